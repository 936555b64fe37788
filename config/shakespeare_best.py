"""Tiny Shakespeare as well as eight minutes on two cores allow; the mark is nanoGPT's 1.4697, three minutes of an A100.

    python prepare/shakespeare.py && python train.py config/shakespeare_best.py
"""
dataset = "shakespeare"
out_dir = "out/shakespeare_best"
model = "stories15m"
n_layer = 6
n_head = 6
dim = 192
ffn_dim = 512
tie_embeddings = False  # a character's own direction stands out from the start
block_size = 256  # what came before helps: nanoGPT's
batch_size = 8  # 2,048 characters a step: many small steps beat few large ones on a short run
dropout = 0.0  # under two epochs: none
max_iters = 860
learning_rate = 1e-2  # with Muon
muon_momentum = 0.9  # for a short run; 0.95 ends 0.016 higher
warmup_iters = 30
eval_interval = 430
sample_tokens = 200  # characters
