"""What training takes of each GPU and of each process's host memory, and of one card: the tables of README.

    python tests/memory.py

Simulated: PyTorch's own FSDP with models of the real widths, on fake tensors and 64 fake processes, of which
torch.distributed._tools.FSDPMemTracker counts every byte of a step. It counts two depths, since each further layer
takes as much as the one before it; the shares of weights, gradients and AdamW's states are exact. Nothing is measured
on a GPU here; tests/host_memory.py measures what processes take of a host.
"""
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import adapter
import config
import lora
import optim
import shard
import train
from model import PRESETS, Llama

GPUS = 8, 16, 32, 64, 128, 256, 512
MODELS = {"Llama 3.1 8B": "llama-3.1-8b", "Llama 3.1 70B": "llama-3.1-70b", "Llama 4 Scout": "llama-4-scout"}
SETTINGS = dict(shard=True, checkpointing=True, optimizer="adamw", batch_size=1, block_size=8192)
ONE_CARD = (("Llama 3.2 1B, all weights, AdamW", "llama-3.2-1b", {}),
            ("Llama 3.2 1B, all weights, Muon", "llama-3.2-1b", {"optimizer": "muon"}),
            ("Llama 3.1 8B, an adapter", "llama-3.1-8b", {"lora_rank": 16}))
CPU = torch.device("cpu")


def counted(c, cfg, world, dtype=torch.bfloat16):
    """(the most bytes during forward and backward pass on one of `world` processes, those of its parts of weights and
    gradients) for a model of LlamaConfig c."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    before, shard.WORLD = shard.WORLD, world
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        place = shard.Place(cfg, CPU, dtype)
        with FakeTensorMode():
            with torch.device("meta"):
                llama = Llama(c)
            place.split(llama)
            llama.to_empty(device=CPU).train()
            llama.model.checkpointing = cfg.checkpointing
            x = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
            for _ in range(2):  # in the second step gradients are there from the start, as if they added up
                tracker = FSDPMemTracker(llama)
                with tracker, torch.autocast("cpu", dtype):
                    llama(x, x)[1].backward()
        parts = tracker.get_tracker_snapshot("peak")[CPU]
    finally:
        dist.destroy_process_group()
        shard.WORLD = before
    return parts["Total"], sum(n for kind, n in parts.items() if "SHARDED" in str(kind) and "UN" not in str(kind))


def on_gpu(preset, cfg, worlds):
    """{number of GPUs: bytes on each} for training with AdamW."""
    shape = PRESETS[preset]
    few = max(shape.nope_every, 2)  # layers, in which each kind of layer is there
    rest = []
    for layers in few, 2 * few:
        total, shared = counted(replace(shape, n_layer=layers), cfg, 64)
        rest.append(total - shared)
    own = rest[0] + (rest[1] - rest[0]) * (shape.n_layer - few) / few
    return {world: 16 * parameters(preset) / world + own for world in worlds}


def on_one_card(preset, cfg, dtype=torch.bfloat16):
    """Bytes for training on one card, without other processes: all weights, or with cfg.lora_rank an adapter of frozen
    weights in bfloat16. The states of the optimizers count from the start."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    shape, found = PRESETS[preset], []
    for layers in 2, 4:
        with FakeTensorMode():
            torch.set_default_dtype(dtype if cfg.lora_rank else torch.float32)
            llama = Llama(replace(shape, n_layer=layers)).train()
            torch.set_default_dtype(torch.float32)
            if cfg.lora_rank:
                adapter.begin(llama, cfg.lora_rank, cfg.lora_alpha, preset, cfg.seed)
                lora.float32_stream(llama)
            llama.model.checkpointing = cfg.checkpointing
            x = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
            for _ in range(2):  # as in `counted`
                tracker = MemTracker()
                tracker.track_external(llama)
                none = OrderedDict()
                for p in llama.parameters():
                    if not p.requires_grad:  # of these too it would ask for a gradient
                        tracker._param_to_grad_hook_handles[p] = RemovableHandle(none), RemovableHandle(none)
                with tracker, torch.autocast("cpu", dtype):
                    llama(x, x)[1].backward()
        states = sum(p.numel() * (4 if optim.for_muon(name, p, cfg) else 8)
                     for name, p in llama.named_parameters() if p.requires_grad)
        found.append(tracker.get_tracker_snapshot("peak")[CPU]["Total"] + states)
    return found[0] + (found[1] - found[0]) * (shape.n_layer - 2) / 2


def on_host(preset, world):
    """Bytes of a process's host memory while it saves, beside what Python, torch and CUDA take: the file of weights
    that it holds, which is the most that it ever needs (safetensors 0.8 writes it without a copy)."""
    return min(5e9, 4 * parameters(preset) / world)


def parameters(preset):
    with torch.device("meta"):
        return Llama(PRESETS[preset]).counts()[0]


def main():
    cfg, columns = train.TrainConfig(**SETTINGS), []
    for preset in MODELS.values():
        gpu = on_gpu(preset, cfg, GPUS)
        columns.append({n: f"{gpu[n] / 2**30:.0f} + {on_host(preset, n) / 2**30:.1f}" for n in GPUS})
    print("| GPUs |" + "".join(f" {title} |" for title in MODELS) + "\n|---|" + "---|" * len(MODELS))
    for n in GPUS:
        print(f"| {n} |" + "".join(f" {column[n]} |" for column in columns))
    print("\n| one card | tokens at once | GiB |\n|---|---|---|")
    for title, preset, keys in ONE_CARD:
        for length in 1024, 2048, 4096:
            cfg = train.TrainConfig(init_from=preset, **SETTINGS | dict(shard=False, block_size=length) | keys)
            print(f"| {title} | {length:,} | {on_one_card(preset, cfg) / 2**30:.1f} |")


if __name__ == "__main__":
    config.run(config.names_first, sys.argv[1:], (), "row")  # -h alone
    main()
