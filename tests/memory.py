"""What training takes of each GPU's memory, by calculation: the table of README.

    python tests/memory.py

The calculation is held against torch's own tracker in tests/test_memory.py.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import optim  # noqa: E402
import train  # noqa: E402
from model import PRESETS, Llama  # noqa: E402

GPUS = 8, 16, 32, 64, 128, 256, 512
MODELS = {"Llama 3.1 8B": "llama-3.1-8b", "Llama 3.1 70B": "llama-3.1-70b", "Llama 4 Scout": "llama-4-scout"}
SETTINGS = dict(shard=True, checkpointing=True, optimizer="adamw", batch_size=1, block_size=8192)


def memory_estimate(model, cfg, dtype, world):
    """Bytes that training takes on each of `world` processes; the model may be on the meta device.

    4 bytes a parameter for weights, gradients and each state of the optimizer (AdamW 2, Muon 1), divided by `world`
    where they are sharded; and the larger of what is there as the backward pass begins (all activations, three copies
    of the logits) and as it ends or the optimizer works. The bytes of each layer were counted with torch's MemTracker.
    """
    m, size = model.config, dtype.itemsize
    share, tokens = world if cfg.shard else 1, cfg.batch_size * cfg.block_size
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = [p for n, p in learn.items() if optim.for_muon(n, p, cfg)]
    weights, gradients = 4 * model.counts()[0], 4 * sum(p.numel() for p in learn.values())
    states = 2 * gradients - 4 * sum(p.numel() for p in hidden)
    first = last = weights / 4 * size * (size < 4)  # beside activations, at both ends of the backward pass
    if cfg.shard and world > 1:
        # The embedding and the head; the embedding and a block, the next, its gradients in two types.
        largest = max(sum(p.numel() for p in block.parameters()) for block in model.model.layers)
        first, last = (4 + size) * m.vocab_size * m.dim, 4 * m.vocab_size * m.dim + (3 * size + 4) * largest
    muon = 0
    for p in hidden:
        of_this_shape = sum(q.numel() for q in hidden if q.shape == p.shape)
        muon = max(muon, 16 * max(min(optim.Muon.BATCH, of_this_shape), p.numel()))
    attention = (22 if size == 4 else 28) * m.dim + (3 * m.n_head + 2 * m.n_kv_head) * m.head_dim * size
    layers = []
    for i in range(m.n_layer):
        experts = size * (4 * m.expert_dim * (1 + m.top_k) + (2 + 3 * m.top_k) * m.dim)
        layers.append(attention + (experts if m.is_moe(i) else size * 4 * m.ffn_dim))
    kept = 12 * m.vocab_size + (4 * m.dim * m.n_layer if cfg.checkpointing else sum(layers))
    held = cfg.gradient_accumulation_steps > world or world > share  # gradients are there during the forward pass
    backward_begins = first + tokens * kept + gradients / share * held
    backward_ends = gradients / share + max(last + tokens * max(layers), muon)
    return (weights + states) / share + max(backward_begins, backward_ends)


def main():
    print("| GPUs |" + "".join(f" {n} |" for n in GPUS) + "\n|---|" + "---|" * len(GPUS))
    for title, preset in MODELS.items():
        with torch.device("meta"):
            model = Llama(PRESETS[preset])
        cells = []
        for n in GPUS:
            cfg = train.TrainConfig(**SETTINGS, gradient_accumulation_steps=n)
            cells.append(f" {memory_estimate(model, cfg, torch.bfloat16, n) / 2**30:.0f} |")
        print(f"| {title} |" + "".join(cells))


if __name__ == "__main__":
    main()
