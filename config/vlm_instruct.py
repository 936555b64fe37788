"""Stage 2: projector and Llama learn to follow instructions about pictures. LLaVA's 150,000 conversations, once.

    python prepare/llava.py --input llava_instruct_150k.json --images coco/train2017
    python vlm.py config/vlm_instruct.py
"""
dataset = "llava"
out_dir = "out/vlm_instruct"
init_from = "out/vlm_align"
stage = "instruct"
block_size = 1024  # a picture and several turns
batch_size = 8
gradient_accumulation_steps = 16  # LLaVA's 128 conversations a step
max_iters = 1200
optimizer = "adamw"
learning_rate = 2e-5  # LLaVA's
warmup_iters = 36  # LLaVA's 3 %
weight_decay = 0.0
eval_interval = 200
eval_tokens = 50000
keep = 1  # each checkpoint has the whole Llama
