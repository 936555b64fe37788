"""The quick start: a small Llama learns the built-in tales on a laptop's processor, close to their exact floor.

    python prepare/tales.py && python train.py config/tales.py
"""
dataset = "tales"
model = "stories15m"  # Llama 2, made smaller below: the tales have 1,024 tokens and simple plots
n_layer = 4
n_head = 4
dim = 192
ffn_dim = 512
block_size = 256  # two to three tales
batch_size = 16  # 4,096 tokens a step: many small steps beat few large ones on a short run
max_iters = 600
learning_rate = 6e-3
warmup_iters = 30
eval_interval = 200
