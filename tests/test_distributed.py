"""Several processes that share a model: first weights, gradients, Muon, checkpoints, faults; on gloo, without GPUs."""
import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_train import DENSE, SPARSE, log_of, same, settings, words  # noqa: F401

import adapter
import checkpoint
import common
import optim
import runs
import shard
import train
from conftest import PATIENCE, ROOT
from model import PRESETS, Head, Llama, LlamaConfig, draw_normal, put
from prepare import tokenizer
from shard import Place

CPU, F32 = torch.device("cpu"), torch.float32
SHAPES = {name: LlamaConfig(**dict(vocab_size=50, context=32) | shape) for name, shape in {
    "tied": DENSE | dict(tie_embeddings=True), "untied": DENSE,
    "moe": SPARSE,  # 4 experts: whole ones on 2 and 4 processes
    "few": SPARSE | dict(n_experts=2)}.items()}  # on 3 processes one has none, on 4 each has rows of both
LAYOUTS = [(2, 1), (4, 1), (4, 2)]  # processes, replicas

FORK = """
import os, sys
import torch.distributed.checkpoint, torch.distributed.fsdp
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_distributed  # what it imports of others is imported once; the project's modules again by each process
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if file.startswith({root!r}) and "site-packages" not in file:
        del sys.modules[name]
codes = []
for n, port, call in {groups!r}:
    children = []
    for rank in range(n):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            import test_distributed, common, config
            config.run(getattr(test_distributed, call[0]), *call[1:])
            common.cleanup()
            os._exit(0)
        children.append(child)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print("codes", codes)
"""


def processes(*groups):
    """For each (n, name, arguments ...) of groups call the function `name` of this file in n processes, a group at a
    time. Returns (exit codes of each group, stdout, stderr)."""
    with_ports = []
    for n, *call in groups:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            with_ports.append((n, s.getsockname()[1], call))
    done = subprocess.run([sys.executable, "-c", FORK.format(root=str(ROOT), groups=with_ports)], cwd=ROOT, text=True,
                          capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    out, _, codes = done.stdout.rpartition("codes ")
    return json.loads(codes), out, done.stderr


def all_well(*groups):
    codes, out, err = processes(*groups)
    assert not any(map(any, codes)), (codes, err[-3000:])
    return out


@pytest.mark.parametrize("suggested, agreed", [
    (["bfloat16"] * 3, "bfloat16"), (["float16"] * 3, "float16"), (["float32"] * 3, "float32"),
    (["float16", "bfloat16", "bfloat16"], "float16"), (["float32", "bfloat16", "bfloat16"], "float32"),
    (["float16", "float32", "float16"], "float32"), (["float16", "float32", "bfloat16"], "float32")], ids=str)
def test_all_processes_take_one_dtype(monkeypatch, suggested, agreed):
    """Gradients in float16 are scaled, others not: their mean would be neither."""
    sums = [suggested.count(name) for name in ("float16", "bfloat16")]
    monkeypatch.setattr(common, "WORLD", 3)
    for name in suggested:
        def all_reduce_sum(*own, name=name):
            assert own == (name == "float16", name == "bfloat16")
            return sums
        monkeypatch.setattr(common, "all_reduce_sum", all_reduce_sum)
        monkeypatch.setattr(common, "pick_dtype", lambda *_, name=name: (getattr(torch, name), "fast"))
        dtype, why = common.agreed_dtype("auto", CPU)
        assert dtype == getattr(torch, agreed) and (why == "fast") == (len(set(suggested)) == 1)


def meet(*counts):
    """In 10 seconds at most, as two machines whose torchruns have counted other restarts."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = counts[common.RANK]
    common.PATIENCE = timedelta(seconds=10)
    common.init_distributed(CPU)
    assert common.gather(common.RANK) == [*range(common.WORLD)]


def test_machines_that_have_counted_other_restarts_meet():
    all_well((2, "meet", "1", "0"), (3, "meet", "0", "0", "2"))


def two_starts(port):
    """The second on the store of the first, as after a restart: what that left there misleads nobody."""
    said = []
    for _ in range(2):
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        said.append(common.word_of_start(store))
    common.init_distributed(CPU)
    assert common.gather(said) == [said] * common.WORLD and len(set(said)) == 2


def test_a_second_start_agrees_on_another_word():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    all_well((3, "two_starts", store.port))


def normed(out):
    """Batch norms of copies see other data; each ends with the first one's statistics."""
    common.init_distributed(CPU)
    model = torch.nn.BatchNorm1d(3)
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(common.RANK)))
    shard.share_buffers(model)
    means = common.gather(model.running_mean.tolist())
    assert means == [means[0]] * common.WORLD and any(means[0])


def barred(out):
    """One process cannot make its directory, and all say so at once."""
    common.init_distributed(CPU)
    whole, common.PATIENCE = checkpoint.tempfile.TemporaryDirectory, timedelta(seconds=20)
    if common.RANK == 1:
        def refused(*_, **__):
            raise OSError(30, "Read-only file system")
        checkpoint.tempfile.TemporaryDirectory = refused
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    t = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    try:
        checkpoint.write(Path(out), None, {"a": t})
    except OSError as e:
        assert "Read-only" in str(e)
    else:
        raise AssertionError("it was written")
    checkpoint.tempfile.TemporaryDirectory = whole


def test_copies_agree_and_refusals_reach_all(tmp_path):
    all_well((3, "normed", ""), (2, "barred", str(tmp_path / "new")))


# -- the same numbers --------------------------------------------------------------------------------------------------

@torch.enable_grad()
def one_step(out, replicas=1):
    """First weights, gradients and the weights after a step of each optimizer, of every shape, into files."""
    common.init_distributed(CPU)
    for name, c in SHAPES.items():
        Head.WHOLE, Head.ROWS = 0 if common.WORLD > 1 and c.arch == "llama" else 2**28, 5  # there the loss by parts
        cfg = train.TrainConfig(shard=True, replicas=replicas, muon_momentum=0.5)
        llama = Place(cfg, CPU, F32).new(c, 3).train()
        first = {n: checkpoint.whole(p).clone() for n, p in llama.named_parameters()}
        rows = torch.randint(50, (12, 17), generator=torch.Generator().manual_seed(1))
        rows = rows.view(common.WORLD, -1, 17)[common.RANK]
        llama(rows[:, :-1], rows[:, 1:])[1].backward()
        gradients = {n: checkpoint.whole(p.grad).clone() for n, p in llama.named_parameters()}
        for n, p in llama.named_parameters():  # the same for all: a first step divides gradients by their own size
            put(p.grad, draw_normal(p.shape, 1.0, 5, n, CPU))
        for optimizer in optim.make_optimizers(llama, cfg, CPU, F32):
            optimizer.step()
        after = {n: checkpoint.whole(p) for n, p in llama.named_parameters()}
        if common.RANK == 0:
            torch.save((first, gradients, after), f"{out}_{name}")


def test_weights_gradients_and_muon_are_those_of_one_process(tmp_path):
    """The first weights bit for bit; gradients within 1e-6; 2, 3, 4 processes, 2 replicas of halves; a head of its
    own or not, with the loss by parts; experts that are shared out whole, by rows, or not to all."""
    one_step(tmp_path / "1x1")
    layouts = [(3, 1), *LAYOUTS]
    all_well(*((n, "one_step", str(tmp_path / f"{n}x{replicas}"), replicas) for n, replicas in layouts))
    for name in SHAPES:
        first, gradients, after = torch.load(tmp_path / f"1x1_{name}")
        for n, replicas in layouts:
            first2, gradients2, after2 = torch.load(tmp_path / f"{n}x{replicas}_{name}")
            assert same(first, first2), (name, n, replicas)
            for key in gradients:
                assert torch.allclose(gradients[key], gradients2[key], rtol=0, atol=1e-6), (name, n, replicas, key)
                assert torch.allclose(after[key], after2[key], rtol=0, atol=1e-5), (name, n, replicas, key)


def adapted(folder, out, dtype):
    """An adapter and its base, or a new adapter: each process reads its part of the base alone."""
    common.init_distributed(CPU)
    rank, dtype = 3, getattr(torch, dtype)
    cfg = train.TrainConfig(shard=True, init_from=folder, lora_rank=rank, lora_alpha=8)
    llama, _ = train.load_llama(cfg, {}, folder, Place(cfg, CPU, dtype))
    assert common.WORLD == 1 or all(hasattr(p, "placements") for p in llama.parameters())
    tensors = {n: (checkpoint.whole(p), p.requires_grad) for n, p in llama.named_parameters()}
    idx = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    with common.autocast_to(dtype, CPU):
        loss = llama.train()(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    gradients = {n: checkpoint.whole(p.grad) for n, p in llama.named_parameters() if p.grad is not None}
    if common.RANK == 0:
        torch.save((tensors, gradients), out)


@torch.enable_grad()
def test_adapters_are_those_of_one_process_and_read_in_parts(tmp_path):
    base, adapter_folder = tmp_path / "base", tmp_path / "adapter"
    Llama(LlamaConfig(vocab_size=50, context=32, **SPARSE | dict(n_experts=3))).save_pretrained(base)
    tokenizer.byte().save(base)
    llama = Llama.from_pretrained(base)
    adapter.begin(llama, 3, 8, base, seed=5)
    for n, p in llama.named_parameters():
        if "lora_" in n:
            p.data.normal_(generator=torch.Generator().manual_seed(len(n)))
    adapter.save(llama, adapter_folder)
    calls = [(kind, dtype, folder) for dtype in ("float32", "bfloat16")
             for kind, folder in (("new", str(base)), ("read", str(adapter_folder)))]
    for kind, dtype, folder in calls:
        adapted(folder, tmp_path / f"{kind}_{dtype}_1", dtype)
    all_well(*((2, "adapted", folder, str(tmp_path / f"{kind}_{dtype}_2"), dtype) for kind, dtype, folder in calls))
    for kind, dtype, _ in calls:
        (one, gradients), (two, gradients2) = (torch.load(tmp_path / f"{kind}_{dtype}_{n}") for n in (1, 2))
        assert same(one, two) and gradients.keys() == gradients2.keys() and len(gradients) > 10
        for key in gradients:  # both processes have the same rows here
            assert torch.allclose(gradients[key], gradients2[key], atol=1e-6 if dtype == "float32" else 1e-4), key


def test_replicas_must_divide_the_processes():
    codes, _, err = processes((2, "one_step", "unused", 3))
    assert codes == [[2, 2]] and "replicas=3 must divide the 2 processes" in err


# -- checkpoints -------------------------------------------------------------------------------------------------------

def go_on(words, out, replicas, shape, **more):  # noqa: F811
    """train.main with a shared model, and what it printed before."""
    train.main(settings(words, out, shard=True, replicas=replicas, optimizer="muon", eval_interval=2, keep=9,
                        gradient_accumulation_steps=4, batch_size=1, **more), shape)
    if dist.is_initialized():
        dist.barrier()


def read_back(folder, out, replicas):
    """Load a checkpoint, weights and states, into parts; write the whole of them."""
    common.init_distributed(CPU)
    cfg = train.TrainConfig(shard=True, replicas=replicas)
    place, folder = Place(cfg, CPU, F32), Path(folder)
    llama = Llama.from_pretrained(folder, F32, CPU, prepare=place.mesh and place.split)
    made = optim.make_states(llama, optim.make_optimizers(llama, cfg, CPU, F32),
                             checkpoint.tensor_names(folder / "optimizer"))
    checkpoint.load_tensors(made, folder / "optimizer")
    tensors = {n: checkpoint.whole(t) for n, t in [*llama.named_parameters(), *made.items()]}
    if common.RANK == 0:
        torch.save(tensors, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe", "tied"])
def test_saved_by_any_number_resumed_by_any_other(words, tmp_path, name):  # noqa: F811
    """What is loaded has the bits that were saved, and later losses are one process's within 1e-6; the files are those
    of a Hugging Face checkpoint, one or more for each process, and JSON."""
    shape = SPARSE | dict(n_experts=3) if name == "moe" else DENSE
    layouts, alone, kept = [(1, 1), *LAYOUTS], tmp_path / "1x1", {}
    go_on(words, alone, 1, shape, max_iters=4)
    runs_of = {layout: tmp_path / f"{layout[0]}x{layout[1]}" for layout in layouts}
    for layout in LAYOUTS:  # each goes on from what one process saved
        (runs_of[layout] / "checkpoints").mkdir(parents=True)
        (runs_of[layout] / "checkpoints/step_00000002").symlink_to(alone / "checkpoints/step_00000002")
    resume = dict(init_from="resume", max_iters=4)
    calls = [(n, "resumed", str(words), str(runs_of[n, r]), r, kept, resume) for n, r in LAYOUTS]
    four = runs_of[4, 2] / "checkpoints/step_00000004"  # and what replicas saved is read by all
    calls += [(n, "read_back", str(four), str(tmp_path / f"read_{n}x{r}"), r) for n, r in LAYOUTS]
    all_well(*calls)
    read_back(four, tmp_path / "read_1x1", 1)
    assert len(list(four.glob("model-*.safetensors"))) >= 4 and not list(four.glob("**/*.pt"))
    expected = log_of(alone)
    for layout in LAYOUTS:
        log = [r for r in expected if r["step"] > 2]
        for a, b in zip(log, log_of(runs_of[layout]), strict=True):
            for key in a.keys() & {"train_loss", "val_loss"}:
                assert a[key] == pytest.approx(b[key], abs=1e-6), (layout, a, b)
    reads = [torch.load(tmp_path / f"read_{n}x{r}") for n, r in layouts]
    assert all(same(reads[0], other) for other in reads[1:])
    weights = {}
    for file in four.glob("model-*.safetensors"):
        weights |= load_file(file)
    assert weights.keys() <= reads[0].keys() and same(weights, {k: reads[0][k] for k in weights})
    go_on(words, runs_of[4, 1], 1, kept, init_from="resume", max_iters=6)  # one process goes on from four
    assert (runs_of[4, 1] / "model.safetensors").exists()
    assert not list(runs_of[4, 1].glob("model-*")), "of the earlier checkpoint"


def resumed(words, out, replicas, shape, more):  # noqa: F811
    go_on(words, out, replicas, shape, **more)


# -- faults ------------------------------------------------------------------------------------------------------------

def fault(words, out, kind):  # noqa: F811
    """A run of which something goes wrong with the last process after step 2."""
    save, step, last = runs.save_checkpoint, runs.Log.write, common.RANK == common.WORLD - 1

    def fails(out, write, state, *rest):
        def write_most(directory):
            write(directory)
            if not last:
                raise OSError("no room for the tokenizer")
        if state["step"] == 4 and kind == "full" and last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        elsewhere = state["step"] == 4 and kind == "elsewhere" and last
        between = state["step"] == 4 and kind == "between"
        save(out.with_name("elsewhere") if elsewhere else out, write_most if between else write, state, *rest)

    def ends(self, entry):
        if entry["step"] == 3 and last:
            os._exit(9) if kind == "dies" else time.sleep(15)
        step(self, entry)
    if kind in ("dies", "hangs"):
        runs.Log.write = ends
    else:
        runs.save_checkpoint = fails
    if kind in ("hangs", "between"):
        common.PATIENCE = common.timedelta(seconds=10)
    go_on(words, out, 1, DENSE, max_iters=6)


def contents(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind, codes, line", [
    ("full", [2, 2], "cannot save to {out}: .*; the checkpoint step_00000002 is intact"),
    ("elsewhere", [2, 2], "cannot save to {out}: process 1 writes to another disk.*step_00000002 is intact"),
    ("between", [2, 2], "cannot save to {out}: no room for the tokenizer; the checkpoint step_00000002 is intact"),
    ("dies", [2, 9], "another process has ended"),
    pytest.param("hangs", [2, None], "has not answered for 0:00:10", marks=pytest.mark.slow)])
def test_a_fault_of_one_process_ends_all_with_a_line(words, tmp_path, kind, codes, line):  # noqa: F811
    """A disk that is full, or is not the same for all, a file that one process cannot write, a process that dies, one
    that does not answer: the checkpoint before stays whole."""
    out = tmp_path / "run"
    (found,), said, err = processes((2, "fault", str(words), str(out), kind))
    assert [c for c, want in zip(found, codes) if want is not None] == [c for c in codes if c is not None], err
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert errors and all(re.search(line.format(out=out), text) for text in errors), err
    assert len(errors) == (1 if "cannot save" in line else len(errors)) and "Traceback" not in err
    assert runs.latest(out).name == "step_00000002"
    assert [p.name for p in (out / "checkpoints").iterdir() if p.name != ".writing"] == ["step_00000002"]
    go_on(words, out, 1, {}, init_from="resume", max_iters=4)
    assert runs.read_state(runs.latest(out))["step"] == 4


# -- compiled ----------------------------------------------------------------------------------------------------------

def graphs(out):
    """Losses with blocks compiled before they are split, without a break, and without; the number of graphs."""
    common.init_distributed(CPU)
    counts, compiler = [], torch.nn.Module.compile

    def count(graph, inputs):
        counts.append(1)
        return graph.forward
    torch.nn.Module.compile = lambda self: compiler(self, fullgraph=True, backend=count)
    found = {}
    for name in "tied", "moe":
        c = replace(SHAPES[name], n_layer=4)
        for compiled in False, True:
            torch._dynamo.reset()
            place = Place(train.TrainConfig(shard=True), CPU, torch.bfloat16)
            place.compile = compiled
            llama = place.new(c, 3).train()
            llama.model.checkpointing = True
            rows = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(1))
            with torch.autocast("cpu", torch.bfloat16):
                loss = llama(rows[:, :-1], rows[:, 1:])[1]
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1e9).full_tensor()
            found[f"{name}_{compiled}"] = [loss.item(), norm.item(), len(counts)]
            counts.clear()
    if common.RANK == 0:
        Path(out).write_text(json.dumps(found))


def test_blocks_are_compiled_before_they_are_split(tmp_path):
    """fullgraph raises at a graph break. One graph serves all dense blocks, two Scout's (with RoPE and without)."""
    all_well((2, "graphs", str(tmp_path / "found")))
    found = json.loads((tmp_path / "found").read_text())
    for name, count in ("tied", 1), ("moe", 2):
        eager, compiled = found[f"{name}_False"], found[f"{name}_True"]
        assert eager[2] == 0 and compiled[2] == count, found
        assert compiled[:2] == pytest.approx(eager[:2], rel=1e-2)


# -- real sizes, without memory ----------------------------------------------------------------------------------------

def placements():
    """Print, for real models on many processes of which none is real: name, processes, replicas, parameters, the most
    and the fewest that a process has, seconds; and in the end GiB of memory."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    for preset, (world, replicas) in itertools.product(("llama-3.1-70b", "llama-4-scout"), ((64, 1), (512, 8))):
        start, parts = time.process_time(), []
        for rank in 0, world - 1:
            shard.WORLD = world
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            with torch.device("meta"):
                llama = Llama(PRESETS[preset])
            Place(train.TrainConfig(shard=True, replicas=replicas), CPU, torch.bfloat16).split(llama)
            optim.make_optimizers(llama, train.TrainConfig(), CPU, torch.bfloat16)
            parts.append(sum(p.to_local().numel() for p in llama.parameters()))
            dist.destroy_process_group()
        print(json.dumps([preset, world, replicas, llama.counts()[0], *parts, (time.process_time() - start) / 2]))
    print(common.peak_memory(CPU) / 2**30)


@pytest.mark.slow
def test_real_sizes_are_placed_within_a_gibibyte():
    """The first process and the last have their share and little more; the models take no memory, and seconds of a
    processor."""
    done = subprocess.run([sys.executable, "-c", "import test_distributed; test_distributed.placements()"], cwd=ROOT,
                          text=True, capture_output=True, env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"})
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, memory = done.stdout.splitlines()
    for preset, world, replicas, total, first, last, seconds in map(json.loads, lines):
        print(f"{preset} on {world}, {replicas} replicas: {first:,} to {last:,} of {total:,} in {seconds:.1f} s")
        assert 0.9 * total * replicas / world < last <= first < 1.02 * total * replicas / world
        assert seconds < 10
    print(f"{float(memory):.2f} GiB of memory with Python and torch")
    assert len(lines) == 4 and float(memory) < 1


# -- torchrun starts all again -----------------------------------------------------------------------------------------

def agent(out, said, dataset, *options):
    """torchrun with a run that shares a model and saves every other step."""
    keys = dict(dataset=dataset, out_dir=out, batch_size=1, gradient_accumulation_steps=2, block_size=32,
                max_iters=10**6, eval_interval=2, eval_tokens=64, log_interval=1, sample_tokens=0, shard=True,
                device="cpu", dtype="float32", **DENSE)
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py",
               *(f"--{k}={v}" for k, v in keys.items())]
    return subprocess.Popen(command, cwd=ROOT, stdout=open(said, "w"), stderr=subprocess.STDOUT)


def wait_for(what, *agents):
    """Wait until what() is true, while these agents live."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end and all(a.poll() is None for a in agents)
        time.sleep(0.05)


def saved_step(out):
    found = runs.latest(out)
    return int(found.name.removeprefix("step_")) if found else 0


def end(*agents):
    """Kill torchruns and their processes, as a node without power does."""
    for a in agents:
        if a.poll() is None:
            for pid in [a.pid, *children_of(a.pid)]:
                os.kill(pid, signal.SIGKILL)
            a.wait()


def children_of(pid):
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def need_every_step_once(out):
    """The log has each step once, up to the newest checkpoint at least, and that opens."""
    steps = [r["step"] for r in runs.read_log(out / "log.jsonl") if "train_loss" in r]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) >= saved_step(out)
    Llama.from_pretrained(runs.latest(out))
    assert checkpoint.tensor_names(runs.latest(out) / "optimizer")


@pytest.mark.slow
def test_a_node_is_killed_and_the_other_goes_on(words, tmp_path):  # noqa: F811
    """--nnodes=1:2: two agents, one killed with its process; the other goes on alone, with all passes of a step."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out, common_words = tmp_path / "run", (
        "--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7",
        "--rdzv_conf=last_call_timeout=5", "--max_restarts=5")
    agents = []
    try:
        for name in "first", "second":  # the first one keeps what all agree on
            agents.append(agent(out, tmp_path / name, words, *common_words))
            time.sleep(3)
        wait_for(lambda: saved_step(out) >= 2, *agents)
        assert "x 2 processes" in (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
        end(agents[1])
        reached = saved_step(out)
        wait_for(lambda: saved_step(out) >= reached + 4, agents[0])
        said = (tmp_path / "first").read_text()
        assert "restart    a process had died; going on from" in said and "x 2 passes x 1 process" in said
    finally:
        end(*agents)
    need_every_step_once(out)


@pytest.mark.slow
def test_kills_of_any_process_lose_nothing_but_steps_since_the_last_save(words, tmp_path):  # noqa: F811
    """$KILLS (20) of a random process at a random moment."""
    out, rng, kills = tmp_path / "run", random.Random(0), int(os.environ.get("KILLS", "20"))
    run = agent(out, tmp_path / "said", words, "--standalone", "--nproc_per_node=2", f"--max_restarts={kills + 1}")
    try:
        for _ in range(kills):
            reached = saved_step(out)
            wait_for(lambda: saved_step(out) > reached, run)
            time.sleep(rng.uniform(0, 1))
            assert saved_step(out) >= reached
            os.kill(rng.choice(children_of(run.pid)), signal.SIGKILL)
        reached = saved_step(out)
        wait_for(lambda: saved_step(out) > reached, run)
    finally:
        end(run)
    need_every_step_once(out)
