"""tests/memory.py: the calculated memory of training, against torch's own tracker."""
from dataclasses import replace

import memory
import pytest
import torch

import optim
import train
from model import PRESETS, Llama, LlamaConfig

MEMORY = {  # shape, settings; each has another part of the sum that matters
    "weights": (dict(dim=512, ffn_dim=1536), dict(batch_size=1, block_size=16)),
    "logits": (dict(vocab_size=8192, n_layer=1), {}),
    "layers": (dict(n_layer=6), {}),
    "ffn": (dict(ffn_dim=1536), {}),
    "heads": (dict(n_head=16, n_kv_head=16, head_dim=32), {}),
    "checkpointing": (dict(n_layer=5), dict(checkpointing=True)),
    "moe": (dict(arch="llama4", nope_every=2, chunk=64, qk_norm=True, n_experts=4, top_k=2, expert_dim=192), {}),
    "muon": (dict(dim=256, ffn_dim=768), dict(batch_size=1, block_size=16, optimizer="muon")),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_memory_estimate_is_what_training_takes(name):
    """Within 15 % of the bytes that torch's own tracker counts over two steps."""
    from torch.distributed._tools.mem_tracker import MemTracker
    shape, more = MEMORY[name]
    cfg = train.TrainConfig(**dict(batch_size=2, block_size=256, optimizer="adamw") | more)
    tracker, device = MemTracker(), torch.device("cpu")
    with tracker:
        common = dict(vocab_size=512, n_layer=4, n_head=4, n_kv_head=2, dim=128, ffn_dim=384, context=256)
        model = Llama(LlamaConfig(**common | shape)).train()
        model.model.checkpointing = cfg.checkpointing
        optimizers = optim.make_optimizers(model, cfg, device, torch.float32)
        tracker.track_external(model, *optimizers)
        x = torch.randint(0, 512, (cfg.batch_size, cfg.block_size))
        for _ in range(2):
            model(x, x)[1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            tracker.reset_mod_stats()
    taken = tracker.get_tracker_snapshot("peak")[device]["Total"]
    assert memory.memory_estimate(model, cfg, torch.float32, 1) == pytest.approx(taken, rel=0.15)


def test_the_memory_of_shards():
    """On the meta device, for the README's table: halving the share halves what is shared and nothing else."""
    with torch.device("meta"):
        model = Llama(replace(PRESETS["llama-3.1-8b"], n_layer=2))
    cfg = train.TrainConfig(shard=True, checkpointing=True, optimizer="adamw", batch_size=1, block_size=8192)
    on = {n: memory.memory_estimate(model, replace(cfg, gradient_accumulation_steps=n), torch.bfloat16, n)
          for n in (8, 16, 32)}
    assert on[8] - on[16] == pytest.approx(12 * model.counts()[0] / 16) == pytest.approx(2 * (on[16] - on[32]))
