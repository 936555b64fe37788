"""A Llama that sees, from scratch on a laptop: small ViT, projector and small Llama learn the built-in shapes together.

    python prepare/shapes.py && python vlm.py config/vlm_shapes.py
    python vlm.py config/vlm_shapes.py --eval
"""
dataset = "shapes"
out_dir = "out/vlm_shapes"
stage = "together"
encoder = "vit_tiny"  # 64 x 64 pixels, three convolutions to 8 x 8 patches, 3 layers of width 128
pixel_shuffle = True  # 64 patches -> 16 image tokens: rows of 32 tokens, half the work
model = "stories15m"  # Llama 2, made smaller below: captions have some sixty words
vocab_size = 512
n_layer = 3
n_head = 4
dim = 128
ffn_dim = 352
block_size = 128  # a picture and three questions
batch_size = 32
max_iters = 3000
learning_rate = 3e-3
warmup_iters = 50
eval_interval = 500
eval_tokens = 8000
sample_images = 64  # enough to see the exact matches grow
sample_tokens = 40
