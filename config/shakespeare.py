"""Tiny Shakespeare, one character a token: 65 of them, 1.1 million characters.

    python prepare/shakespeare.py && python train.py config/shakespeare.py
"""
dataset = "shakespeare"
model = "stories15m"
n_layer = 4
n_head = 4
dim = 128
ffn_dim = 384
block_size = 128  # a few lines of verse; longer ones cost more than they teach here
batch_size = 16  # 2,048 characters a step: many small steps beat few large ones on a short run
max_iters = 900
learning_rate = 1e-2  # with Muon; 3e-3 ends 0.05 higher
warmup_iters = 30
eval_interval = 300
sample_tokens = 200  # characters
