"""The quick start's Llama learns to answer questions about its tales: some minutes on two cores.

    python prepare/tales.py && python train.py config/tales.py
    python prepare/quiz.py && python train.py config/quiz.py
"""
dataset = "quiz"
init_from = "out/tales"
context = 384  # the tales' is 120; the longest conversation has 318 tokens
block_size = 384
batch_size = 5  # sequences of conversations, about 1,900 tokens, as in config/tales.py
max_iters = 2200
learning_rate = 1e-2  # as high as in pretraining: copying what a tale tells once is new to it
warmup_iters = 30
schedule = "wsd"
decay_frac = 0.3
weight_decay = 0.0  # towards zero would be away from what it knows
eval_interval = 550
eval_tokens = 100000
sample_tokens = 16
