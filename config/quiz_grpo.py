"""Rewards instead of answers: a Llama that knows half of the quiz's answers is rewarded for the right ones.

    python train.py config/quiz.py --max_iters=110 --out_dir=out/quiz_half
    python feedback.py config/quiz_grpo.py
"""
init_from = "out/quiz_half"
out_dir = "out/quiz_grpo"
batch_size = 64  # questions in a step, each with `group` answers: 8 learn little at 1e-3 and forget at more
group = 8
max_iters = 750  # five minutes on two cores
optimizer = "adamw"  # its steps shrink where few answers differ in reward; Muon's do not
learning_rate = 1.5e-3  # 1e-3 was slower, 3e-3 no faster
warmup_iters = 10
schedule = "wsd"  # a cosine's last third gained nothing
decay_frac = 0.3
weight_decay = 0.0
eval_interval = 150
eval_questions = 500
