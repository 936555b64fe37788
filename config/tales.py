"""The quick start: a small Llama learns the built-in tales on a laptop's processor, close to their exact floor.

    python prepare/tales.py && python train.py config/tales.py
"""
dataset = "tales"
model = "stories15m"  # Llama 2, made smaller below: the tales have 1,536 tokens and simple plots
n_layer = 4
n_head = 4
dim = 128
ffn_dim = 384
tie_embeddings = False  # a token's own direction stands out from the start: names are copied much sooner
block_size = 120  # the longest tale
whole_docs = True  # what begins inside a tale cannot reach the floor
batch_size = 16  # 1,500 tokens a step: with 8 the names in a tale are copied much later
max_iters = 850
head_copy = 0.05  # without it, most seeds do not learn in time to name again an animal told of once
learning_rate = 7e-3  # with Muon; 5e-3 ended 0.6 % higher, 1e-2 1.6 %; half the size ended higher too
warmup_iters = 30
eval_interval = 170
log_interval = 10
sample_tokens = 120
