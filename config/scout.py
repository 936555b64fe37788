"""A 128M Llama 4 in the manner of Scout on TinyStories: 127,785,472 parameters, 48,159,232 active per token.

    python prepare/tinystories.py && torchrun --nproc_per_node=1 train.py config/scout.py
"""
dataset = "tinystories"
model = "scout-128m"  # 6 layers, dim 512, 8/2 heads, 16 experts top-1 + shared, NoPE every 4th layer, chunks of 128
out_dir = "out/scout"
block_size = 256  # most stories are shorter
batch_size = 64
max_iters = 25000
optimizer = "adamw"  # the recipe this run is compared with
learning_rate = 2.5e-4
min_lr = 2.5e-5
warmup_iters = 500
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
eval_interval = 500
eval_tokens = 65536  # enough for two decimals; --eval_only scores all of them
router_noise = 1.0  # noisy top-k: as large as the logits' own spread at the start, so that every expert is tried
router_aux = 0.01  # Switch Transformer's weight
checkpointing = False  # True where memory is short: a third more work
