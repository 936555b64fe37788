"""Tiny Shakespeare, one character a token: 65 of them, 1.1 million characters.

    python prepare/shakespeare.py && python train.py config/shakespeare.py
"""
dataset = "shakespeare"
model = "stories15m"
n_layer = 4
n_head = 4
dim = 192
ffn_dim = 512
block_size = 128  # a few lines of verse; longer ones cost more than they teach here
batch_size = 32
max_iters = 1000
learning_rate = 6e-3
warmup_iters = 30
eval_interval = 250
sample_tokens = 200  # characters
