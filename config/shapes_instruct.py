"""Third of four stages on a laptop: encoder, projector and Llama learn to answer questions about the shapes.

    python prepare/shapes.py --stage=instruct && python vlm.py config/shapes_instruct.py
"""
dataset = "shapes_instruct"
out_dir = "out/shapes_instruct"
init_from = "out/shapes_align"
stage = "together"  # the encoder too: until now it has served captions alone
block_size = 160  # a picture, its captions and eight questions
batch_size = 16  # pictures, with all that is said about them
max_iters = 6000  # after 3,000, 95 % of the answers are right, after these nearly all
learning_rate = 3e-3  # with Muon
warmup_iters = 50
eval_interval = 1000
eval_tokens = 8000
sample_images = 64
sample_tokens = 40
