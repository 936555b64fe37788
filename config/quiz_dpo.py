"""Preferences instead of answers: pairs of a right answer to a question of the quiz and a wrong one.

    python train.py config/quiz.py --max_iters=110 --out_dir=out/quiz_half
    python feedback.py config/quiz_dpo.py
"""
objective = "dpo"
init_from = "out/quiz_half"
out_dir = "out/quiz_dpo"
batch_size = 16  # pairs
max_iters = 300
optimizer = "adamw"
learning_rate = 3e-4
warmup_iters = 10
weight_decay = 0.0
eval_interval = 100
eval_questions = 500
