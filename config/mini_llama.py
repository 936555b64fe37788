"""GPT-2's size as a Llama on FineWeb-Edu: 109,529,856 parameters, 10 billion tokens.

    python prepare/fineweb_edu.py && python prepare/hellaswag.py
    torchrun --nproc_per_node=8 train.py config/mini_llama.py

The tokenizer has 32,000 tokens, as the model's vocabulary expects: one trained on the pages, or Llama 2's with
--tokenizer tokenizer.model.
"""
dataset = "fineweb_edu"
model = "mini-llama"
out_dir = "out/mini_llama"
block_size = 1024  # GPT-2's
batch_size = 32
gradient_accumulation_steps = 16  # 524,288 tokens a step, GPT-3's 0.5M for this size; a multiple of the processes
max_iters = 19073  # 10 billion tokens
optimizer = "adamw"  # GPT-3's recipe from here on
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 715  # GPT-3's 375 million tokens
weight_decay = 0.1
eval_interval = 1000  # evaluations also save; a signal saves at once
eval_tokens = 10485760  # a tenth of the validation shard
hellaswag = True  # whose curve GPT-2 and GPT-3 of this size can be compared with
sample_tokens = 60
