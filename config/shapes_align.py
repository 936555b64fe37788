"""Second of four stages on a laptop: a new small encoder and a projector learn to show captions to a frozen Llama.

    python prepare/shapes.py --stage=align && python vlm.py config/shapes_align.py
"""
dataset = "shapes_align"
out_dir = "out/shapes_align"
init_from = "out/shapes_text"
stage = "see"  # align, with an encoder that has nothing to say yet
encoder = "vit_tiny"
block_size = 64  # a picture and two captions
batch_size = 32
max_iters = 3000  # after 2,000, 98 % of the captions are right, after these nearly all
learning_rate = 3e-3  # with Muon
warmup_iters = 50
eval_interval = 1000
eval_tokens = 8000
sample_images = 64  # enough to see the exact matches grow
sample_tokens = 40
