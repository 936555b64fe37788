"""The quick start's Llama learns to copy what a tale tells once: the first half minute of the quiz.

    python prepare/tales.py && python train.py config/tales.py
    python prepare/quiz.py --names=False --excerpts=1 --conversations=8000 --out=data/quiz_begin
    python train.py config/quiz_begin.py
"""
dataset = "quiz_begin"
init_from = "out/tales"
context = 448  # the tales' is 120; as config/quiz.py, which goes on from here
block_size = 448
batch_size = 5  # sequences of conversations, about 2,200 tokens
max_iters = 150
head_copy = 0.2  # without it no word that a tale tells once is copied after these steps
learning_rate = 1e-2  # as high as in pretraining: copying what a tale tells once is new to it
warmup_iters = 30
schedule = "wsd"
decay_frac = 0.0  # config/quiz.py goes on from here
weight_decay = 0.0  # towards zero would be away from what it knows
eval_interval = 150
eval_tokens = 20000
sample_tokens = 16
