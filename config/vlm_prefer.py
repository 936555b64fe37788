"""Stage 3: direct preference optimization on pairs of answers about a picture, against invented details.

    python prepare/llava.py --input rlaif_v.jsonl --images IMAGES --out data/rlaif && python vlm.py config/vlm_prefer.py
"""
dataset = "rlaif"
out_dir = "out/vlm_prefer"
init_from = "out/vlm_instruct"
stage = "prefer"
beta = 0.1
block_size = 1024
batch_size = 4  # pairs
gradient_accumulation_steps = 8
max_iters = 2600  # RLAIF-V's 83,000 pairs once
optimizer = "adamw"
learning_rate = 1e-6  # small: the reference is to stay near
warmup_iters = 50
weight_decay = 0.0
eval_interval = 200
eval_tokens = 20000
keep = 1  # each checkpoint has the whole Llama
