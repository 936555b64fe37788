"""Fine-tuning: a model that is there learns the conversations that prepare/chat.py has prepared.

    python prepare/chat.py --input my.jsonl --init_from out/smollm2
    python train.py config/finetune.py --init_from=out/smollm2
    python train.py config/finetune.py --init_from=out/smollm2 --lora_rank=16 --learning_rate=5e-4
"""
dataset = "chat"
init_from = "out/smollm2"
out_dir = "out/finetune"
block_size = 1024  # most conversations; prepare/chat.py prints a larger one where its data need it
batch_size = 4  # a processor's memory holds that of a small model
gradient_accumulation_steps = 2  # 8 sequences of conversations; from 32 on, larger batches learn less from each
epochs = 2  # a third time teaches the words rather than the way
optimizer = "adamw"  # what the model was most likely trained with; Muon would begin with matrices it does not fit
learning_rate = 5e-5  # a tenth to a hundredth of pretraining's; with LoRA ten times that
warmup_iters = 10  # AdamW's second moment begins anew
weight_decay = 0.0  # towards zero would be away from what it knows
eval_interval = 50
eval_tokens = 20000
sample_tokens = 60
