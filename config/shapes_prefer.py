"""Last of four stages on a laptop: of a caption's two kinds, which instruct leaves open, the plain one is preferred.

    python prepare/shapes.py --stage=prefer --images=2500 && python vlm.py config/shapes_prefer.py
"""
dataset = "shapes_prefer"
out_dir = "out/shapes_prefer"
init_from = "out/shapes_instruct"
stage = "prefer"
block_size = 64
batch_size = 16  # pairs
max_iters = 150
optimizer = "adamw"
learning_rate = 1e-5  # 3e-5 moves more pairs, but costs captions
warmup_iters = 20
weight_decay = 0.0
eval_interval = 75
eval_tokens = 8000
sample_images = 64
sample_tokens = 40
