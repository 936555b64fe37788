"""The training loop: data order, exact resume, processes, optimizers, evaluation, the run directory."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import common
import config
import optim
import runs
import train
from conftest import PATIENCE, ROOT
from model import PRESETS, Llama
from prepare import shards, tokenizer
from prepare.windows import Windows, document_positions

CPU = torch.device("cpu")
TIMES = ("seconds", "tokens_per_s", "mfu")  # what may differ between two runs of the same settings
DENSE = dict(n_layer=2, n_head=4, n_kv_head=2, dim=32, head_dim=8, ffn_dim=48)
SPARSE = DENSE | dict(arch="llama4", nope_every=2, chunk=8, qk_norm=True, attn_scale=0.1,
                      n_experts=4, top_k=2, expert_dim=24)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A char-level data set: words drawn at random, with an order that can be learned."""
    rng = np.random.default_rng(0)
    nouns = ["llama", "alpaca", "vicuna", "guanaco"]
    text = " ".join(f"the {nouns[i]} eats {nouns[(i + 1) % 4]} grass." for i in rng.integers(4, size=1500))
    folder = tmp_path_factory.mktemp("data") / "words"
    tok = tokenizer.char(text)
    writer = shards.Writer(folder, tok)
    cut = int(len(text) * 0.9)
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        writer.add(split, tok.encode(part), len(part.encode()))
    writer.finish()
    return folder


def settings(words, out, **more):
    return train.TrainConfig(**dict(dataset=str(words), out_dir=str(out), batch_size=4, block_size=32, max_iters=20,
                                    warmup_iters=4, eval_interval=10, log_interval=1, sample_tokens=0, eval_tokens=512,
                                    device="cpu", dtype="float32") | more)


def log_of(out):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in runs.read_log(out / "log.jsonl")]


def states(out, step):
    folder = out / "checkpoints" / f"step_{step:08d}"
    return Llama.from_pretrained(folder).state_dict(), runs.read_state(folder) | {"optimizers": optimizer_state(folder)}


def optimizer_state(folder):
    """{"parameter.key": tensor} of a checkpoint, however many processes wrote it."""
    if (folder / "optimizer/model.safetensors").exists():
        return load_file(folder / "optimizer/model.safetensors")
    import torch.distributed.checkpoint as dcp
    metadata = dcp.HuggingFaceStorageReader(str(folder / "optimizer")).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    checkpoint.load_tensors(tensors, folder / "optimizer")
    return tensors


def same(a, b):
    """Bit for bit equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [DENSE | dict(dropout=0.1), SPARSE | dict(router_noise=1.0, router_aux=0.01)],
                         ids=["dense", "moe"])
def test_resume_is_exact(words, tmp_path, shape, optimizer):
    """20 steps equal 10 + resume + 10: weights, optimizer, balancing, log, bit for bit."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.main(settings(words, whole, optimizer=optimizer), shape)
    (halves / "checkpoints").mkdir(parents=True)
    (whole / "checkpoints" / "step_00000010").rename(halves / "checkpoints" / "step_00000010")
    (halves / "log.jsonl").write_text((whole / "log.jsonl").read_text()[:-40])  # a later, cut log: its tail is redone
    train.main(settings(words, halves, optimizer=optimizer, init_from="resume"),
               {k: v for k, v in shape.items() if k in train.TRAINING_ONLY})
    (weights, state), (weights2, state2) = states(whole, 20), states(halves, 20)
    assert same(weights, weights2)
    assert same({k: v for k, v in state.items() if k != "seconds"}, {k: v for k, v in state2.items() if k != "seconds"})
    assert log_of(whole) == log_of(halves)
    steps = [r["step"] for r in log_of(halves) if "train_loss" in r]
    assert steps == list(range(1, 21))


def test_a_run_learns_and_leaves_a_checkpoint(words, tmp_path, capsys):
    train.main(settings(words, tmp_path / "run", max_iters=60, learning_rate=1e-2, sample_tokens=20),
               DENSE | {"tie_embeddings": False})
    out, log = tmp_path / "run", log_of(tmp_path / "run")
    vocab = shards.Split(words, "val").vocab_size
    assert abs(log[0]["train_loss"] - math.log(vocab)) < 0.1  # starts from knowing nothing
    val = [r for r in log if "val_loss" in r]
    assert val[-1]["val_loss"] < 0.6 * math.log(vocab)
    assert val[-1]["val_bpb"] == pytest.approx(val[-1]["val_loss"] / math.log(2), rel=1e-3)  # one byte a character
    assert set(runs.read_log(out / "log.jsonl")[0]) == {"step", "tokens", "train_loss", "lr", "grad_norm",
                                                         "tokens_per_s", "mfu", "seconds"}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "train_state.json", "run.json", "loss.png",
                 "best/model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "run.json").read_text())["settings"]["max_iters"] == 60
    assert tokenizer.load(out).fingerprint == tokenizer.load(words).fingerprint
    said = capsys.readouterr().out
    assert "bits/byte" in said and "  | " in said and "left 0:00:0" in said
    assert len(list((out / "checkpoints").iterdir())) == 2  # keep=2


def test_best_keeps_the_lowest_validation_loss(words, tmp_path):
    """Weights that get worse do not reach best/."""
    out = tmp_path / "run"
    train.main(settings(words, out, max_iters=20), DENSE)
    good = (out / "best/model.safetensors").read_bytes()
    assert good == (out / "model.safetensors").read_bytes()
    cfg = settings(words, out, init_from="resume", max_iters=30, learning_rate=3.0, min_lr=3.0, warmup_iters=0,
                   grad_clip=0.0, optimizer="muon")
    train.main(cfg, {})
    assert log_of(out)[-1]["val_loss"] > min(r["val_loss"] for r in log_of(out) if "val_loss" in r)
    assert (out / "best/model.safetensors").read_bytes() == good != (out / "model.safetensors").read_bytes()


def test_best_begins_anew_with_another_validation_set(words, tmp_path, capsys):
    """A loss on other text says nothing about the old one: the first weights measured on it are the best so far."""
    out, other = tmp_path / "run", tmp_path / "other"
    train.main(settings(words, out, max_iters=10), DENSE)
    writer, tok = shards.Writer(other, tokenizer.load(words)), tokenizer.load(words)
    harder = "".join(np.random.default_rng(0).choice(list("the llams"), 4000))
    for split in ("train", "val"):
        writer.add(split, tok.encode(harder), len(harder))
    writer.finish()
    train.main(settings(other, out, init_from="resume", max_iters=20), {})
    first, second = (r["val_loss"] for r in log_of(out) if "val_loss" in r)
    assert second > first and "another validation set" in capsys.readouterr().out
    assert (out / "best/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_an_earlier_run_is_moved_aside(words, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(settings(words, out, max_iters=2), DENSE)
    before = (out / "model.safetensors").read_bytes()
    train.main(settings(words, out, max_iters=2, seed=1), DENSE)
    assert (tmp_path / "run.1/model.safetensors").read_bytes() == before != (out / "model.safetensors").read_bytes()
    assert "is now" in capsys.readouterr().out


def torchrun(n, script, *args, code=0, **more):
    """Run a script in n processes, and return what it said."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                           *more.get("first", ()), str(script), *map(str, args)],
                          cwd=ROOT, env=os.environ | more.get("env", {}),
                          capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


MANY = """
import sys, json
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import common, train
common.dist.init_process_group("gloo")
common.dist.init_process_group = lambda *a, **k: None  # these runs share one
for settings, shape in json.loads({jobs!r}):
    train.main(train.TrainConfig(**settings), shape)
common.cleanup()
"""


def from_step_10(run, new):
    """A run directory whose last checkpoint is step 10 of another run."""
    shutil.copytree(run / "checkpoints/step_00000010", new / "checkpoints/step_00000010")
    return new


def test_two_processes_do_what_one_does(words, tmp_path):
    """One process, two with a copy each, two that share the weights: the same losses within 1e-5 over 20 steps, with
    gradient accumulation and evaluation, dense and MoE; and a checkpoint of each can be continued by the others."""
    shapes = {"dense": DENSE, "moe": SPARSE | dict(n_experts=3, router_aux=0.01)}
    common = dict(batch_size=2, gradient_accumulation_steps=4, sample_tokens=5)
    alone, jobs = {}, {}
    for name, shape in shapes.items():
        kept, more = {k: v for k, v in shape.items() if k in train.TRAINING_ONLY}, {"checkpointing": name == "dense"}
        alone[name] = tmp_path / f"{name}_alone"
        train.main(settings(words, alone[name], **common), shape)
        jobs |= {f"{name}_copies": ({}, shape), f"{name}_shared": ({"shard": True} | more, shape),
                 f"{name}_copies_on": ({"init_from": "resume"}, kept),
                 f"{name}_shared_on": ({"init_from": "resume", "shard": True}, kept)}
        from_step_10(alone[name], tmp_path / f"{name}_copies_on")
        from_step_10(alone[name], tmp_path / f"{name}_shared_on")
        for run in "copies", "shared":  # and 10 + resume + 10 in two processes
            again = tmp_path / f"{name}_{run}_again/checkpoints"
            again.mkdir(parents=True)
            (again / "step_00000010").symlink_to(tmp_path / f"{name}_{run}/checkpoints/step_00000010")  # there by then
            jobs[f"{name}_{run}_again"] = {"init_from": "resume", "shard": run == "shared"}, kept
    (tmp_path / "many.py").write_text(MANY.format(root=str(ROOT), jobs=json.dumps(
        [(asdict(settings(words, tmp_path / run, **common | more)), shape) for run, (more, shape) in jobs.items()])))
    torchrun(2, tmp_path / "many.py")
    for name, shape in shapes.items():
        for run in "copies", "shared":
            new = from_step_10(tmp_path / f"{name}_{run}", tmp_path / f"{name}_{run}_alone")
            train.main(settings(words, new, init_from="resume", **common),
                       {k: v for k, v in shape.items() if k in train.TRAINING_ONLY})
            one, two = (Llama.from_pretrained(path) for path in (alone[name], tmp_path / f"{name}_{run}"))
            assert set(one.state_dict()) == set(two.state_dict())
            weights, state = states(tmp_path / f"{name}_{run}", 20)
            weights2, state2 = states(tmp_path / f"{name}_{run}_again", 20)
            assert same(weights, weights2) and same(state["optimizers"], state2["optimizers"])  # bit for bit
            assert log_of(tmp_path / f"{name}_{run}")[-11:] == log_of(tmp_path / f"{name}_{run}_again")
        for run in "copies", "shared", "copies_on", "shared_on", "copies_alone", "shared_alone":
            other = log_of(tmp_path / f"{name}_{run}")
            expected = [r for r in log_of(alone[name]) if r["step"] >= other[0]["step"]]
            assert len(other) == len(expected) == (22 if run in ("copies", "shared") else 11), run
            for a, b in zip(expected, other):
                assert a.keys() == b.keys()
                for key in a.keys() & {"train_loss", "val_loss", "val_bpb", "grad_norm"}:
                    rel = 1e-5 if key == "grad_norm" else 0
                    assert a[key] == pytest.approx(b[key], abs=1e-5, rel=rel), (name, run, a, b)


def test_a_rank_that_dies_is_started_again(words, tmp_path):
    """torchrun --max_restarts: all processes begin again and go on from the last checkpoint; the log has each step
    once."""
    (tmp_path / "dies.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, config, train
total = train.all_reduce_sum
def dies(*numbers):  # the second process, before the end of step 15, the first time
    if train.RANK == 1 and len(numbers) == 1 and not os.path.exists(died):
        calls.append(1)
        if len(calls) == 15:
            open(died, "x").close()
            os._exit(13)
    return total(*numbers)
calls, train.all_reduce_sum, died = [], dies, {str(tmp_path / "died")!r}
config.run(train.main, *config.load(train.TrainConfig, None, "model.py:LlamaConfig"))
common.cleanup()
""")
    out = tmp_path / "run"
    keys = dict(dataset=words, out_dir=out, batch_size=2, gradient_accumulation_steps=2, block_size=32, max_iters=20,
                eval_interval=5, eval_tokens=128, log_interval=1, sample_tokens=0, device="cpu", dtype="float32",
                **DENSE)
    args = [f"--{k}={v}" for k, v in keys.items()]
    said = torchrun(2, tmp_path / "dies.py", *args, first=["--max_restarts=3"])
    assert f"going on from {out / 'checkpoints'}/step_000000" in said
    assert runs.read_state(runs.latest(out))["step"] == 20
    assert [r["step"] for r in log_of(out) if "train_loss" in r] == [*range(1, 21)]
    assert not (tmp_path / "run.1").exists()


def test_batches_depend_on_seed_and_step_alone(words):
    data = shards.Split(words, "train")
    cfg = settings(words, "unused", batch_size=4, gradient_accumulation_steps=2)
    windows = Windows(data, cfg, None)
    n, per_epoch = 2 * windows.per_epoch // 8 + 1, windows.per_epoch
    drawn = np.stack([windows.draw(8 * s, 8) for s in range(n)])  # (steps, 8, 2)
    assert all((drawn[s] == Windows(data, cfg, None).draw(8 * s, 8)).all() for s in (n - 1, 0, n // 2, 1))
    assert (np.diff(drawn) == 33).all()
    starts = drawn[..., 0].flatten()
    for e in range(2):  # an epoch has no window twice, and windows do not overlap
        epoch = np.sort(starts[e * per_epoch:(e + 1) * per_epoch])
        assert (np.diff(epoch) % 32 == 0).all() and (np.diff(epoch) > 0).all()
    assert (starts[:per_epoch] != starts[per_epoch:2 * per_epoch]).any()
    assert (Windows(data, replace(cfg, seed=1), None).draw(0, 8) != drawn[0]).any()
    x, y, _ = windows.read(drawn[0])
    assert (x[:, 1:] == y[:, :-1]).all() and (y >= 0).all()
    assert data[int(drawn[0, 3, 0]):int(drawn[0, 3, 1])].tolist() == [*x[3].tolist(), int(y[3, -1])]


def test_an_evaluation_of_the_training_split_keeps_the_epochs_order(words):
    windows = Windows(shards.Split(words, "train"), settings(words, "unused"))
    order = windows.epoch(3)
    assert len(windows.in_order()) >= len(order) and windows.epoch(3) is order
    assert (windows.epoch(4) != order).any() and (windows.epoch(3) == order).all()


def test_windows_of_whole_documents(words):
    """Each begins with BOS, none cuts a document that would fit, and every target is there exactly once."""
    rng = np.random.default_rng(0)
    lengths = [1, 5, 3, 40, 2, 9, 8, 25, 33, 34, 100, 7] + rng.integers(1, 30, 200).tolist()
    ids = np.concatenate([[1, *range(2, n + 1)] for n in lengths])
    windows = Windows(ids, settings(words, "unused", block_size=32, whole_docs=True), bos_id=1)
    spans, edges = windows.in_order(), np.flatnonzero(ids == 1)
    targets = [t for start, end in spans for t in range(start + 1, end)]
    inside = [t for t in range(1, len(ids)) if ids[t] != 1]  # BOS is a target only between documents of one window
    assert sorted(set(targets)) == sorted(targets) and set(inside) <= set(targets)
    for start, end in spans:
        assert 1 <= end - start <= 33
        if end - start == 33 and ids[start] != 1:
            continue  # the middle of a long document
        cut = end < len(ids) and ids[end] != 1
        assert not cut or end - start == 33
    starting = [s for s, _ in spans if ids[s] == 1]
    for s in starting:  # a document that fits is never cut
        ends = edges[edges > s]
        assert len(ends) == 0 or ends[0] - s > 33 or any(a <= s and b >= ends[0] for a, b in spans)
    assert sorted(map(tuple, windows.epoch(3).tolist())) == sorted(map(tuple, spans.tolist()))
    assert windows.packing_efficiency == pytest.approx(len(targets) / len(spans) / 32)
    assert windows.targets() == len(targets) < len(ids) - 1


def test_evaluation_counts_each_token_once(words):
    """The whole split, whatever the batch size, equals the loss added up window by window in float64."""
    val = shards.Split(words, "val")
    torch.manual_seed(0)
    model = Llama(train.shape_from(PRESETS["stories15m"], DENSE | dict(vocab_size=val.vocab_size, context=32)))
    nats = 0.0
    for start in range(0, len(val) - 1, 32):
        ids = torch.from_numpy(val[start:start + 33].astype(np.int64))[None]
        p = model(ids[:, :-1])[0].double().log_softmax(-1)
        nats -= p.gather(2, ids[:, 1:, None]).sum().item()
    for batch_size in (1, 7):
        windows = Windows(val, settings(words, "unused", batch_size=batch_size), None)
        loss = train.evaluate(model, train.eval_batches(windows, train.eval_spans(windows, CPU)), CPU, nullcontext())
        assert loss == pytest.approx(nats / (len(val) - 1), rel=1e-6)
    assert model.training


def test_positions_restart_at_documents():
    x = torch.tensor([[5, 1, 7, 8, 1, 1, 9]])
    assert document_positions(x.numpy(), bos_id=1).tolist() == [[0, 0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (5, 24, 64)])
def test_muon_orthogonalizes(shape):
    """Singular values near 1, singular vectors kept; a stack is treated matrix by matrix."""
    torch.manual_seed(0)
    muon = optim.Muon([torch.nn.Parameter(torch.zeros(shape))], 0.1, 0.95, 0.0, torch.float32)
    g = torch.randn(shape).view(-1, *shape[-2:])
    out = muon.orthogonalize(g)
    for a, b in zip(g, out):
        u, s, v = torch.linalg.svd(a, full_matrices=False)
        mapped = u.T @ b @ v.T  # diagonal if the singular vectors are kept
        assert torch.allclose(mapped, torch.diag(mapped.diag()), atol=1e-4)
        assert mapped.diag().min() > 0.6 and mapped.diag().max() < 1.3


def test_muon_step_is_the_formula():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 8, 12))
    muon, before = optim.Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32), p.detach().clone()
    p.grad = torch.randn_like(p)
    muon.step()
    momentum = 0.1 * p.grad
    update = muon.orthogonalize(0.1 * p.grad + 0.9 * momentum)
    assert torch.allclose(p, before * (1 - 0.05) - 0.1 * 0.2 * 12 ** 0.5 * update, atol=1e-6)
    assert 0.15 < (0.2 * 12 ** 0.5 * update).pow(2).mean().sqrt() < 0.25  # the size of an AdamW update


def test_muon_takes_a_convolution_as_one_matrix():
    """Its step is near U V^T of the singular value decomposition of (out, in·h·w), at the same root mean square."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    muon = optim.Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, dtype=torch.float32)
    p.grad = torch.randn_like(p)
    muon.step()
    u, _, v = torch.linalg.svd(p.grad.view(16, 72), full_matrices=False)
    mapped = -(u.T @ p.detach().view(16, 72) @ v.T) / (0.2 * 72 ** 0.5)
    assert torch.allclose(mapped, torch.diag(mapped.diag()), atol=1e-4)
    assert mapped.diag().min() > 0.6 and mapped.diag().max() < 1.3


def test_learning_rate_schedules(words):
    cfg = settings(words, "unused", max_iters=100, warmup_iters=10, learning_rate=1.0, min_lr=0.1)
    rates = [optim.learning_rate(s, cfg) for s in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    flat = [optim.learning_rate(s, replace(cfg, schedule="wsd", decay_frac=0.2)) for s in range(101)]
    assert flat[10:81] == [1.0] * 71 and flat[90] == pytest.approx(0.55) and flat[100] == pytest.approx(0.1)


@pytest.mark.parametrize("warmup, steps, said", [
    (10, 1, True), (0, 1, False), (1, 1, True), (4, 4, True), (3, 4, False)])
def test_a_warmup_that_takes_the_whole_run_is_said(words, capsys, warmup, steps, said):
    cfg = settings(words, "unused", warmup_iters=warmup, max_iters=steps)
    task = SimpleNamespace(cfg=cfg, model=torch.nn.Linear(1, 1), llama=None, device=CPU, dtype=torch.float32,
                           why_dtype="")
    train.print_schedule(task, 100)
    assert (f"warmup     ends after step {warmup}, training after step {steps}:" in capsys.readouterr().out) == said


def test_optimizers_hold_every_parameter_once(words):
    shape = SPARSE | dict(vocab_size=50, moe_every=2, chunk=8, context=32)
    model = Llama(train.shape_from(PRESETS["llama4-tiny"], shape))
    for name in ("muon", "adamw"):
        made = optim.make_optimizers(model, settings(words, "unused", optimizer=name), CPU, torch.float32)
        held = [p for o in made for g in o.param_groups for p in g["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
        decayed = {id(p) for o in made for g in o.param_groups if g["weight_decay"] for p in g["params"]}
        assert all((id(p) in decayed) == (p.dim() > 1) for p in model.parameters())
    muon = optim.make_optimizers(model, settings(words, "unused"), CPU, torch.float32)[1]
    hidden = {id(p) for p in muon.param_groups[0]["params"]}
    assert not any(id(p) in hidden for n, p in model.named_parameters()
                   if "embed" in n or "lm_head" in n or "router" in n or "norm" in n)
    assert all(id(p) in hidden for n, p in model.named_parameters() if "proj" in n)


def test_fine_tuning_starts_from_the_checkpoint(words, tmp_path):
    train.main(settings(words, tmp_path / "a", max_iters=20), DENSE)
    train.main(settings(words, tmp_path / "b", max_iters=1, init_from=str(tmp_path / "a"), eval_tokens=0,
                        learning_rate=0.0), {})
    a, b = (Llama.from_pretrained(tmp_path / n).state_dict() for n in "ab")
    assert same(a, b)


def test_a_step_without_finite_gradient_is_skipped(words, tmp_path, monkeypatch, capsys):
    """One infinite gradient changes no weight; five in a row stop the run and say what to try."""
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(parameters, limit):
        calls.append(1)
        norm = real(parameters, limit)
        return torch.tensor(math.inf) if len(calls) in (3, 7, 8, 9, 10, 11) else norm
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(config.Mistake, match="learning_rate"):
        train.main(settings(words, tmp_path / "run"), DENSE)
    assert len(calls) == 11
    assert "step 3: the gradient is inf; step skipped" in capsys.readouterr().out


def test_eval_only_prints_the_whole_split(words, tmp_path, capsys):
    train.main(settings(words, tmp_path / "a", max_iters=3), DENSE)
    capsys.readouterr()
    train.main(settings(words, tmp_path / "b", init_from=str(tmp_path / "a"), eval_only=True), {})
    line = capsys.readouterr().out.strip().splitlines()[-1]
    val = shards.Split(words, "val")
    model = Llama.from_pretrained(tmp_path / "a")
    windows = Windows(val, settings(words, "unused"))
    batches = train.eval_batches(windows, train.eval_spans(windows, CPU))
    loss = train.evaluate(model, batches, CPU, nullcontext())
    assert f"val loss {loss:.4f}" in line and f"perplexity {math.exp(loss):.3f}" in line
    assert f"{len(val) - 1:,} tokens" in line
    assert not (tmp_path / "b").exists()


def test_eval_only_prints_the_same_for_two_processes(words, tmp_path, project):
    train.main(settings(words, tmp_path / "run", max_iters=3), SPARSE)
    one, two = (project("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                        "train.py", "--eval_only", f"--init_from={tmp_path / 'run'}", f"--dataset={words}",
                        "--block_size=32", "--device=cpu")[0]
                for n in (1, 2))
    assert one == two and "bits/byte" in one


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes(words, tmp_path):
    """SIGKILL at 20 random moments, saving most of the time: every resume starts from a complete checkpoint."""
    out, rng = tmp_path / "run", np.random.default_rng(0)
    keys = dict(dataset=words, out_dir=out, batch_size=4, block_size=32, max_iters=100000, log_interval=1,
                eval_interval=2, eval_tokens=128, sample_tokens=0, device="cpu", dtype="float32")
    args = [f"--{k}={v}" for k, v in keys.items()]
    shape = [f"--{k}={v}" for k, v in DENSE.items()]
    reached = 0
    for _ in range(20):
        resume = ["--init_from=resume"] if runs.latest(out) else shape
        run = subprocess.Popen([sys.executable, "train.py", *args, *resume], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
        for line in run.stdout:
            if "/100000 " in line:
                break
        else:
            pytest.fail(run.stderr.read())
        time.sleep(float(rng.uniform(0, 1.0)))
        run.kill()
        run.communicate()
        if found := runs.latest(out):
            state = runs.read_state(found)
            Llama.from_pretrained(found)
            assert state["step"] >= reached
            reached = state["step"]
    assert reached > 20
    steps = [r["step"] for r in runs.read_log(out / "log.jsonl") if "train_loss" in r]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_memory_stays_flat(words, tmp_path):
    """A soak of $SOAK_MINUTES (30): after a fifth of it, resident memory grows by less than 1 %; no file stays open."""
    seconds, samples = 60 * float(os.environ.get("SOAK_MINUTES", "30")), []
    keys = dict(dataset=words, out_dir=tmp_path / "run", batch_size=4, block_size=32, max_iters=10**7, log_interval=10,
                eval_interval=100, eval_tokens=512, sample_tokens=20, device="cpu", dtype="float32", **SPARSE)
    args = [f"--{k}={v}" for k, v in keys.items()]
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, stdout=said)
        try:
            begin = time.monotonic()
            while (now := time.monotonic() - begin) < seconds and run.poll() is None:
                if now > seconds / 5:
                    pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
                    samples.append((now, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{run.pid}/fd"))))
                time.sleep(0.5)
            assert run.poll() is None, "it ended by itself"
        finally:
            run.kill()
            run.wait()
    at, memory, files = np.array(samples).T
    slope = np.polyfit(at, memory, 1)[0]  # bytes a second
    half = len(files) // 2
    steps = runs.read_log(tmp_path / "run/log.jsonl")[-1]["step"]
    print(f"{seconds:.0f} s, {steps} steps: {memory.mean() / 2**20:.1f} MiB, {slope * 60 / 2**10:+.2f} KiB a minute, "
          f"{files[:half].min():.0f} then {files[half:].min():.0f} files always open")
    assert abs(slope) * (at[-1] - at[0]) < 0.01 * memory.mean()
    assert files[half:].min() <= files[:half].min()  # least of each half: a sample may meet a file being written


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GB200", 2500e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA RTX A1000 Laptop GPU", 0), ("NVIDIA GeForce RTX 4050", 0)])
def test_peak_flops_are_those_of_this_very_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_flops(torch.device("cuda")) == peak * train.WORLD


def test_whole_docs_need_documents(tmp_path):
    tok = tokenizer.byte()
    writer = shards.Writer(tmp_path / "data", tok)
    for split in "train", "val":
        writer.add(split, [65] * 300, 300)
    writer.finish()
    with pytest.raises(config.Mistake, match="whole_docs: no document in .* begins with BOS"):
        train.main(settings(tmp_path / "data", tmp_path / "run", block_size=32, whole_docs=True), {})


def test_what_is_on_a_gpu_is_not_pinned(monkeypatch):
    """Only dense CPU tensors can be pinned: torch refuses others."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pytest.fail("pinned") if t.is_meta else t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *args, **kwargs: t)
    on, off = common.to_device(torch.device("cuda"), torch.zeros(1, device="meta"), torch.ones(1))
    assert on.is_meta and off.item() == 1
