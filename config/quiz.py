"""The quick start's Llama learns to answer questions about its tales: a minute or two on two cores.

    python train.py config/quiz_begin.py      # after what it begins with
    python prepare/quiz.py && python train.py config/quiz.py
"""
dataset = "quiz"
init_from = "out/quiz_begin"
context = 448  # the tales' is 120; the longest conversation has 183 tokens, with two tales 333
block_size = 448
batch_size = 5  # sequences of conversations, about 2,200 tokens
max_iters = 600  # a minute or two; 200 end at 90 % of the answers, these at 97
learning_rate = 1e-2  # as high as in pretraining: copying what a tale tells once is new to it
warmup_iters = 30
schedule = "wsd"
decay_frac = 0.3
weight_decay = 0.0  # towards zero would be away from what it knows
eval_interval = 200
eval_tokens = 100000
sample_tokens = 16
