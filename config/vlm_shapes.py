"""A Llama that sees, from scratch on a laptop: small ViT, projector and small Llama learn the built-in shapes together.

    python prepare/shapes.py && python vlm.py config/vlm_shapes.py
    python vlm.py config/vlm_shapes.py --eval
"""
dataset = "shapes"
out_dir = "out/vlm_shapes"
stage = "together"
encoder = "vit_tiny"  # 48 x 48 pixels, four convolutions to 3 x 3 patches, one layer of width 128
model = "stories15m"  # Llama 2, made smaller below: captions have some sixty words
vocab_size = 512
n_layer = 4  # finding an object by its color, then telling another attribute, takes layers
n_head = 4
dim = 128
ffn_dim = 256
tie_embeddings = False  # a word's own direction stands out from the start
block_size = 160  # a picture, its caption and eight questions
batch_size = 16  # pictures, with all that is said about them
max_iters = 2800  # left of, above are learned last, from step 2,000 on
learning_rate = 3e-3  # with Muon; half and three times as much learn later
warmup_iters = 50
eval_interval = 1000
eval_tokens = 8000
sample_images = 64  # enough to see the exact matches grow
sample_tokens = 40
