"""tests/memory.py: the memory of training that torch's own tracker counts on fake tensors and processes."""
from dataclasses import replace

import memory
import pytest
import torch

import train
from model import PRESETS, LlamaConfig

SMALL = LlamaConfig(vocab_size=2048, n_layer=2, n_head=4, n_kv_head=2, dim=128, ffn_dim=384, context=256)


def test_twice_as_many_processes_halve_what_is_shared_and_nothing_else():
    """The parts of weights and gradients are 8 bytes a parameter, and what a process needs for itself stays."""
    cfg = train.TrainConfig(shard=True, batch_size=1, block_size=256)
    (on_4, parts_4), (on_8, parts_8) = (memory.counted(SMALL, cfg, world, torch.float32) for world in (4, 8))
    total = 2 * 2048 * 128 + 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384 + 2 * 128) + 128
    assert parts_4 == pytest.approx(8 * total / 4, rel=0.01) and parts_8 == pytest.approx(8 * total / 8, rel=0.01)
    assert on_4 - parts_4 == pytest.approx(on_8 - parts_8, rel=0.02)


def test_each_further_layer_takes_as_much_as_the_one_before():
    """Which the table of README is extrapolated by."""
    cfg = train.TrainConfig(shard=True, checkpointing=True, batch_size=1, block_size=256)
    rest = []
    for layers in 2, 4, 8:
        total, parts = memory.counted(replace(SMALL, n_layer=layers), cfg, 4, torch.float32)
        rest.append(total - parts)
    assert rest[2] - rest[1] == pytest.approx(2 * (rest[1] - rest[0]), rel=0.02)
    assert rest[1] - rest[0] == pytest.approx(2 * 4 * 256 * 128, rel=0.1)  # of two layers, their inputs are kept


def test_logits_are_the_largest_part_of_a_long_vocabulary():
    """Three copies of the logits and of the gradients: 12 bytes for each token and word, and little else."""
    cfg = train.TrainConfig(shard=True, checkpointing=True, batch_size=1, block_size=256)
    small, large = (memory.counted(replace(SMALL, vocab_size=v), cfg, 4, torch.float32) for v in (8192, 16384))
    own = [total - parts for total, parts in (small, large)]
    assert own[1] - own[0] == pytest.approx(8192 * (256 * 12 + 128 * 4), rel=0.15)


def test_a_real_width_has_its_share():
    assert memory.parameters("llama-3.1-70b") == 70553706496 and PRESETS["llama-3.1-70b"].n_layer == 80
    assert memory.on_host("llama-3.1-70b", 512) < memory.on_host("llama-3.1-70b", 8) == 5e9


def test_one_card_holds_sixteen_bytes_a_weight_that_learns_and_two_of_one_that_is_frozen(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)
    settings = dict(init_from="small", checkpointing=True, batch_size=1, block_size=64)
    count, full, adapted = memory.parameters("small"), *(
        memory.on_one_card("small", train.TrainConfig(**settings | more)) for more in ({}, {"lora_rank": 2}))
    assert 16 * count < full < 19 * count + 64 * 2048 * 14  # autocast's copies of some weights; logits
    assert 2 * count < adapted < 3 * count + 64 * 2048 * 14
