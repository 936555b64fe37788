"""A Llama 4 of 223,795,968 parameters, 138,861,312 active per token, on Cosmopedia.

    python prepare/cosmopedia.py --limit=4500000        # 2.8 billion tokens of its 39 million documents
    torchrun --nproc_per_node=1 train.py config/llama4_tiny.py

The tokenizer has 32,000 tokens, as the model's vocabulary expects: one trained on the documents, or Llama 2's with
--tokenizer tokenizer.model.
"""
dataset = "cosmopedia"
model = "llama4-tiny"  # 12 layers, dim 768, 12/4 heads, 8 experts top-2 in every 2nd layer, chunks of 512
out_dir = "out/llama4_tiny"
block_size = 1024  # two chunks, so that NoPE layers have something to carry across
batch_size = 16
gradient_accumulation_steps = 16  # 262,144 tokens a step
max_iters = 10000  # 2.6 billion tokens
optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 500
eval_interval = 500
eval_tokens = 2097152  # a set that takes seconds
router_aux = 0.01  # Switch Transformer's weight
