"""First of four stages on a laptop: a small Llama learns the words of the shapes and to read, without a picture.

    python prepare/shapes.py --stage=text --images=8000 && python train.py config/shapes_text.py
"""
dataset = "shapes_text"
out_dir = "out/shapes_text"
model = "stories15m"  # Llama 2, made smaller below, as in config/vlm_shapes.py
n_layer = 4
n_head = 4
dim = 128
ffn_dim = 256
tie_embeddings = False  # a word's own direction stands out from the start
head_copy = 0.05  # as in config/tales.py: a word that attention copies is said sooner
context = 160  # of the stages to come
block_size = 64
batch_size = 32
max_iters = 1000
learning_rate = 5e-3  # with Muon
warmup_iters = 30
eval_interval = 500
sample_tokens = 30
