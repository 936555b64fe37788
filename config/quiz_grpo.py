"""Rewards instead of answers: a Llama that knows half of the quiz's answers is rewarded for the right ones.

    python train.py config/quiz.py --max_iters=150 --out_dir=out/quiz_half
    python feedback.py config/quiz_grpo.py
"""
init_from = "out/quiz_half"
out_dir = "out/quiz_grpo"
batch_size = 8  # questions in a step, each with `group` answers
group = 8
max_iters = 300
optimizer = "adamw"  # its steps shrink where few answers differ in reward; Muon's do not
learning_rate = 1e-3  # 300 steps gained 2.6 points; 3e-4 gained nothing
warmup_iters = 10
weight_decay = 0.0
eval_interval = 50
eval_questions = 500
