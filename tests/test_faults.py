"""Whatever is wrong, the answer is one line: bad settings, damaged files, full disks, full memory."""
import contextlib
import copy
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter
import config
import feedback
import model
import checkpoint
import runs
import train
import vlm
from conftest import PATIENCE, ROOT
from prepare import shards, tokenizer

SMALL = dict(n_layer=1, n_head=2, n_kv_head=1, dim=16, head_dim=8, ffn_dim=16)
RUN = dict(batch_size=2, block_size=16, max_iters=2, eval_interval=1, eval_tokens=64, sample_tokens=0,
           device="cpu", dtype="float32")


def data_set(folder, tok, text="abcd" * 500, last=None):
    """A data set of this text; the last id of each shard may be another one, of which its sha256 knows."""
    writer = shards.Writer(folder, tok)
    writer.add("train", tok.encode(text), len(text))
    writer.add("val", tok.encode(text[:400]), 400)
    meta = writer.finish()
    for split in meta["splits"].values() if last else ():
        path = folder / split["shards"][0]["file"]
        ids = np.fromfile(path, "<u2")
        ids[-1] = last
        ids.tofile(path)
        split["shards"][0]["sha256"] = shards._contents(path, ids.dtype)[0]
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def edited(path, change):
    """Rewrite a JSON file after change(its content)."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good data set and run, and a copy of either for each way to be damaged."""
    d = tmp_path_factory.mktemp("faults")
    data_set(d / "data", tokenizer.char("abcd"))
    train.main(train.TrainConfig(dataset=str(d / "data"), out_dir=str(d / "run"), **RUN), SMALL)
    data_set(d / "bytes", tokenizer.byte())
    data_set(d / "beyond", tokenizer.char("abcd"), last=9)
    data_set(d / "empty", tokenizer.char("abcd"), text="")
    (d / "no_meta").mkdir()
    for name in "truncated", "altered", "gone", "retold", "meta_cut":
        shutil.copytree(d / "data", d / name)
        (d / name / ".verified.json").unlink()
    shard = (d / "data/train_000.bin").read_bytes()
    (d / "truncated/train_000.bin").write_bytes(shard[:-2])
    (d / "altered/train_000.bin").write_bytes(bytes([shard[0] ^ 1]) + shard[1:])
    (d / "gone/train_000.bin").unlink()
    tokenizer.char("abce").save(d / "retold")
    (d / "meta_cut/meta.json").write_text((d / "data/meta.json").read_text()[:-9])
    for name in ("cut", "header", "pickle", "bin", "shape", "renamed", "no_json", "other",
                 "no_tok", "tok_cut", "tok_bytes", "state_cut"):
        shutil.copytree(d / "run", d / name)
        weights, state = d / name / "model.safetensors", d / name / "checkpoints/step_00000002/train_state.json"
        for path in weights, d / name / "config.json", d / name / "tokenizer.json", state:  # they are links
            path.write_bytes((path.read_bytes(), path.unlink())[0])
        if name == "cut":
            weights.write_bytes(weights.read_bytes()[:-7])
        elif name == "header":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])  # a header of 2**64 - 1 bytes
        elif name == "pickle":
            weights.write_bytes(pickle.dumps({"a": 1}))
        elif name == "bin":
            weights.rename(d / name / "pytorch_model.bin")
        elif name == "shape":
            edited(d / name / "config.json", lambda c: c.update(intermediate_size=24))
        elif name == "renamed":
            tensors = load_file(d / "run/model.safetensors")
            save_file({n.replace("q_proj", "query"): t for n, t in tensors.items()}, weights)
        elif name == "no_json":
            (d / name / "config.json").write_text("{")
        elif name == "other":
            edited(d / name / "config.json", lambda c: c.update(model_type="gpt2"))
        elif name == "no_tok":
            (d / name / "tokenizer.json").unlink()
        elif name == "tok_cut":
            (d / name / "tokenizer.json").write_text((d / "run/tokenizer.json").read_text()[:-9])
        elif name == "tok_bytes":
            tokenizer.byte().save(d / name)
        elif name == "state_cut":
            state.write_bytes(state.read_bytes()[:-9])
    (d / "file").write_text("")
    for name, text in (("syntax", "batch_size = 4\nblock_size = = 8\n"), ("unknown", "batchsize = 4\n"),
                       ("type", "batch_size = 'b'\n"), ("error", "\nbatch_size = 1 / 0\n")):
        (d / f"{name}.py").write_text(text)
    return d


TRAIN = [  # arguments, and what the line says
    (["--learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    (["--batch_size=many"], "batch_size takes int, not 'many'"),
    (["--batch_size"], "--batch_size needs a value"),
    (["batch_size=4"], "neither a config file"),
    (["--block_size=0"], "block_size must lie in [1, inf), not 0"),
    (["--learning_rate=nan"], "learning_rate must lie in [0, 1000], not nan"),
    (["--optimizer=sgd"], "optimizer must be one of muon, adamw"),
    (["--n_head=4", "--n_kv_head=3", "--dim=32"], "n_head=4 is not divisible by n_kv_head=3"),
    (["--dim=15"], "is not divisible by n_head=2"),
    (["--model=llama-9"], "no preset 'llama-9'"),
    (["--context=8"], "block_size=16 is beyond the model's context=8"),
    (["--init_from={d}/run", "--block_size=32"], "block_size=32 is beyond the model's context=16"),
    (["--block_size=5000"], "too few for block_size"),
    (["--doc_mask"], "need documents that begin with BOS"),
    (["--gradient_accumulation_steps=0"], "gradient_accumulation_steps must lie in [1, inf), not 0"),
    (["--device=tpu7"], "cannot be used here"),
    (["--vocab_size=2"], "the data set has ids up to 3, the model only vocab_size=2"),
    (["--dataset={d}/nowhere"], "run `python prepare/"),
    (["--dataset={d}/no_meta"], "run `python prepare/"),
    (["--dataset={d}/empty"], "has no val tokens"),
    (["--dataset={d}/meta_cut"], "meta.json is damaged"),
    (["--dataset={d}/retold"], "another tokenizer than the tokenizer.json in it"),
    (["--dataset={d}/bytes", "--init_from={d}/run"], "was made with another tokenizer"),
    (["--dataset={d}/beyond"], "has ids up to 9, beyond the vocabulary of 4"),
    (["--dataset={d}/truncated"], "train_000.bin is truncated or altered: it has 3998 bytes instead of 4000"),
    (["--dataset={d}/altered"], "train_000.bin is altered: its sha256"),
    (["--dataset={d}/gone"], "train_000.bin is missing"),
    (["--init_from=resume"], "nothing to resume"),
    (["--init_from={d}/nowhere"], "no directory"),
    (["--init_from={d}/run", "--dim=32"], "the checkpoint has dim=16, not 32; leave the key out"),
    (["--init_from={d}/cut"], "model.safetensors is not a readable safetensors file"),
    (["--init_from={d}/header"], "model.safetensors is not a readable safetensors file"),
    (["--init_from={d}/pickle"], "model.safetensors is not a readable safetensors file"),
    (["--init_from={d}/bin"], "pickled weights are not read"),
    (["--init_from={d}/shape"], "3 tensors are of the wrong shape"),
    (["--init_from={d}/renamed"], "1 tensors are missing: model.layers.0.self_attn.q_proj.weight"),
    (["--init_from={d}/no_json"], "config.json is not JSON"),
    (["--init_from={d}/other"], "model_type 'gpt2' is not supported"),
    (["--init_from={d}/no_tok"], "there is no tokenizer"),
    (["--init_from=resume", "--out_dir={d}/state_cut", "--max_iters=4"], "train_state.json cannot be read"),
    (["--init_from=resume", "--out_dir={d}/run", "--optimizer=adamw", "--max_iters=4"],
     "was made by another optimizer"),
    (["--out_dir=/proc/nothing"], "cannot write the run directory"),
    (["--out_dir={d}/file"], "cannot write the run directory"),
    (["--out_dir={d}/file/below"], "cannot write the run directory"),
]
FILES = [
    (["{d}/syntax.py"], "syntax.py, line 2: invalid syntax"),
    (["{d}/unknown.py"], "unknown.py: unknown key 'batchsize'; did you mean 'batch_size'?"),
    (["{d}/type.py"], "type.py: batch_size takes int, not 'b'"),
    (["{d}/error.py"], "error.py, line 2: ZeroDivisionError"),
    (["{d}/nowhere.py"], "no config file"),
]
SAMPLE = [
    (["--temprature=1"], "unknown key 'temprature'; did you mean 'temperature'?"),
    (["--temperature=warm"], "temperature takes float, not 'warm'"),
    (["--top_p=2"], "top_p must lie in [0, 1], not 2.0"),
    (["--start", ""], "the prompt is empty"),
    (["--start", "ab", "--chat"], "--chat asks for what you say: leave --start out"),
    (["--system", "Be kind."], "--system is for --chat"),
    (["--start", "abcd" * 5], "the prompt has 20 tokens, and the model's context holds 16: shorten it by at least 5"),
    (["--start", "ab", "abcd" * 5], "the prompt has 20 tokens"),
    (["--start", "xyz"], "the character 'x' is not among"),
    (["--start", "FILE:{d}/nowhere.txt"], "cannot read the prompt FILE:"),
    (["--start", "FILE:{d}/file"], "the prompt is empty"),
    (["--chat"], "no chat template"),
    (["--device=tpu7"], "cannot be used here"),
    (["--init_from={d}/nowhere"], "no directory"),
    (["--init_from={d}/no_meta"], "no config.json"),
    (["--init_from={d}/cut"], "model.safetensors is not a readable safetensors file"),
    (["--init_from={d}/header"], "model.safetensors is not a readable safetensors file"),
    (["--init_from={d}/pickle"], "model.safetensors is not a readable safetensors file"),
    (["--init_from={d}/bin"], "pickled weights are not read"),
    (["--init_from={d}/shape"], "3 tensors are of the wrong shape"),
    (["--init_from={d}/renamed"], "1 tensors are missing"),
    (["--init_from={d}/no_json"], "config.json is not JSON"),
    (["--init_from={d}/other"], "model_type 'gpt2' is not supported"),
    (["--init_from={d}/no_tok"], "there is no tokenizer"),
    (["--init_from={d}/tok_cut"], "tokenizer"),
    (["--init_from={d}/tok_bytes"], "they do not belong together"),
]
TABLE = [("train.py", [], args, line) for args, line in TRAIN]
TABLE += [("train.py", files, [], line) for files, line in FILES]
TABLE += [("sample.py", [], args, line) for args, line in SAMPLE]


def command(d, script, files, args):
    """The command line of a case: good settings, then what is wrong."""
    good = dict(init_from=d / "run", device="cpu", dtype="float32")
    if script == "train.py":
        good = dict(dataset=d / "data", out_dir=d / "out", **RUN)
    good |= SMALL if script == "train.py" and not any("init_from" in a for a in args) else {}
    return [*(f.format(d=d) for f in files), *(f"--{k}={v}" for k, v in good.items()), *(a.format(d=d) for a in args)]


def files_in(d):
    """What a folder holds: {path: (size, time of change)}, but for the note that spares hashing shards again."""
    found = [p for p in d.rglob("*") if p.is_dir() or p.name != ".verified.json"]
    return {p: None if p.is_dir() else (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def check(line, code, out, err):
    """One line on stderr that says `line`, nothing on stdout but facts about the run, exit code 2."""
    assert code == 2, (code, out, err)
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert line in err and "Traceback" not in out
    assert len(err) < 600, err


def run_script(monkeypatch, capsys, script, args):
    """(exit code, stdout, stderr) of a script run from first line to last, as this interpreter's main module."""
    monkeypatch.setattr(sys, "argv", [script, *args])
    capsys.readouterr()
    code = 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("script, files, args, line", TABLE,
                         ids=[f"{s[:-3]} {' '.join(f + a)}"[:60] for s, f, a, _ in TABLE])
def test_bad_input_is_one_line(place, monkeypatch, capsys, script, files, args, line):
    before = files_in(place)
    check(line, *run_script(monkeypatch, capsys, script, command(place, script, files, args)))
    assert files_in(place) == before


@pytest.mark.parametrize("script, files, args, line", [TABLE[0], TABLE[len(TRAIN)], TABLE[-1]],
                         ids=["key", "file", "sample"])
def test_bad_input_in_a_process_of_its_own(place, script, files, args, line):
    before = files_in(place)
    done = subprocess.run([sys.executable, script, *command(place, script, files, args)], cwd=ROOT,
                          capture_output=True, text=True)
    check(line, done.returncode, done.stdout, done.stderr)
    assert files_in(place) == before


@contextlib.contextmanager
def largest_file(size):
    """No file can grow beyond so many bytes: how a disk that is full looks to each write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_for_a_run_directory(place, monkeypatch, capsys):
    before = files_in(place)
    with largest_file(100):
        found = run_script(monkeypatch, capsys, "train.py", command(place, "train.py", [], []))
    check("cannot write the run directory: ", *found)
    assert files_in(place) == before


def test_a_disk_that_is_full_is_an_os_error(tmp_path):
    """Of safetensors too, for whoever merges or saves outside of a run."""
    llama = model.Llama(model.LlamaConfig(vocab_size=4, context=4, **SMALL))
    with largest_file(3000), pytest.raises(OSError, match="File too large"):
        llama.save_pretrained(tmp_path / "whole")
    llama.save_pretrained(tmp_path / "base")
    adapter.begin(llama, 4, 8, tmp_path / "base", seed=0)
    with largest_file(3000), pytest.raises(OSError, match="File too large"):
        adapter.save(llama, tmp_path / "adapter")


def test_files_are_synced_while_they_can_be_written(tmp_path, monkeypatch):
    """Windows syncs no others."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.write(file, b"")))  # an error where it only reads
    model.Llama(model.LlamaConfig(vocab_size=4, context=4, **SMALL)).save_pretrained(tmp_path)
    with config.atomic_write(tmp_path / "a.txt") as path:
        path.write_text("a")
    assert len(synced) == 3


@pytest.mark.parametrize("steps, room, line", [
    (4, 5000, "the checkpoint step_00000002 is intact"), (4, 8300, "the checkpoint step_00000002 is intact"),
    (200, 20000, "whose checkpoints are as they were")], ids=["weights", "state", "log"])
def test_a_disk_that_fills_up_leaves_the_checkpoint(place, tmp_path, monkeypatch, capsys, steps, room, line):
    """One line, and every file of the last checkpoint as it was; with room again the run goes on from there."""
    def contents():
        return {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in ("log.jsonl", "run.json")}
    out = tmp_path / "run"
    again = command(place, "train.py", [], [f"--out_dir={out}", "--init_from=resume", f"--max_iters={steps}",
                                            f"--eval_interval={steps}", "--log_interval=1"])
    shutil.copytree(place / "run", out)
    before = contents()
    with largest_file(room):
        check(line, *run_script(monkeypatch, capsys, "train.py", again))
    assert contents() == before
    code, said, _ = run_script(monkeypatch, capsys, "train.py", again)
    assert code == 0 and "resumed after step" in said
    assert runs.read_state(runs.latest(out))["step"] == steps
    assert [r["step"] for r in runs.read_log(out / "log.jsonl") if "train_loss" in r] == [*range(1, steps + 1)]


@pytest.mark.parametrize("where", ["forward", "allocate"])
def test_out_of_memory_names_what_helps(place, monkeypatch, capsys, where):
    """The memory that was reached and the flags that take less; nothing is written, and an earlier run stays."""
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n"
                                     "GPU 0 has a total capacity of 1 GiB")
    monkeypatch.setattr(model.Llama, where, full)
    before = files_in(place)
    args = command(place, "train.py", [], [f"--out_dir={place / 'run'}", "--batch_size=8"])
    found = run_script(monkeypatch, capsys, "train.py", args)
    check("GiB; try --batch_size=4 --gradient_accumulation_steps=2, --checkpointing, a shorter --block_size, "
          "--dtype=bfloat16, --shard on more GPUs, or a smaller model", *found)
    assert re.search(r"out of memory on cpu at \d+\.\d GiB", found[2])
    assert files_in(place) == before


@pytest.mark.parametrize("cfg, ways", [
    (train.TrainConfig(batch_size=1), "--checkpointing, a shorter --block_size, --shard on more GPUs"),
    (vlm.VlmConfig(batch_size=1), "--checkpointing, a shorter --block_size"),
    (feedback.FeedbackConfig(batch_size=1), "--checkpointing")], ids=["train", "vlm", "feedback"])
def test_out_of_memory_names_no_flag_that_a_script_refuses(cfg, ways):
    with pytest.raises(config.Mistake, match=f"; try {ways}, or a smaller model$"):
        with train.memory_advice(cfg, torch.device("cpu"), torch.bfloat16):
            raise torch.OutOfMemoryError("CUDA out of memory")


STRANGE = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**400, 1e308, -1e-300, math.nan, math.inf,
           "", "7", "llama4_text", "x" * 10000, [], [7], [[]] * 3, {}, {"a": {"b": []}}]


def mutated(data, rng, packed=False):
    """data (bytes) with a bit turned, cut, grown, or (JSON; packed: behind its length) with some value replaced."""
    start = 8 if packed else 0
    end = start + int.from_bytes(data[:8], "little") if packed else len(data)
    if rng.random() < 0.6:
        tree = json.loads(data[start:end])
        spots = []

        def walk(node, spots=spots):
            for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
                spots.append((node, key))
                if isinstance(value, (dict, list)):
                    walk(value)
        walk(tree)
        for _ in range(rng.choice((1, 1, 2))):
            node, key = rng.choice(spots)
            what = rng.random()
            if what < 0.2:
                node.pop(key, None) if isinstance(node, dict) else node.clear()
            elif what < 0.3 and isinstance(node, dict) and key in node:
                node[str(key) + "_"] = node.pop(key)
            elif isinstance(node, dict) or key < len(node):
                node[key] = copy.deepcopy(rng.choice(STRANGE))
        header = json.dumps(tree).encode()
        return (len(header).to_bytes(8, "little") if packed else b"") + header + data[end:]
    at, what = rng.randrange(end if packed and rng.random() < 0.8 else len(data)), rng.random()
    if what < 0.6:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    return data[:at] if what < 0.8 else data[:at] + rng.randbytes(rng.choice((1, 8, 1000))) + data[at:]


def tensors_of(data):
    """{name: (dtype, shape, bytes)} of a safetensors file, read by its definition."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return {n: (t["dtype"], t["shape"], data[end:][slice(*t["data_offsets"])])
            for n, t in header.items() if n != "__metadata__"}


def load_run(d):
    """Llama.from_pretrained(d), which must be what the files say: each number of config.json, each weight's bits."""
    found = model.Llama.from_pretrained(d)
    said, kept = json.loads((d / "config.json").read_bytes()), checkpoint.config_to_hf(found.config)
    lists = {"interleave_moe_layer_step", "no_rope_layer_interval"}  # overruled by config.json's lists of each layer
    table = checkpoint.LLAMA4_KEYS if found.config.arch == "llama4" else checkpoint.LLAMA_KEYS
    for key in {key for key, _ in table.values()} & said.keys() - lists:
        if key == "attn_scale" and not (found.config.nope_every and said.get("attn_temperature_tuning", True)):
            continue  # tunes NoPE layers only
        if said[key]:
            same = said[key] == kept[key] and type(said[key]) in (type(kept[key]), int)
            assert same, (key, said[key], kept[key])
    state = found.state_dict()
    for name, (dtype, shape, data) in tensors_of((d / "model.safetensors").read_bytes()).items():
        if not name.endswith("inv_freq"):
            assert list(state[name].shape) == shape, name
            assert state[name].numpy().tobytes() == data, name


def load_data(d):
    """Both splits, whose ids must be those that were written."""
    for split in "train", "val":
        found = shards.Split(d, split)
        assert found[:].tobytes() == (d / f"{split}_000.bin").read_bytes() and found[:].max() < found.vocab_size


def load_tokenizer(d):
    """A tokenizer, which must either work as before or show that it is another one."""
    found = tokenizer.load(d)
    kind = json.loads((d / "meta.json").read_text())["tokenizer"]["kind"]
    good = next(t for t in (tokenizer.char("abcd"), tokenizer.byte()) if t.kind == kind)
    assert found.fingerprint != good.fingerprint or found.encode("abcd") == good.encode("abcd")


def fuzz(place, seed, count):
    """Load `count` mutations of each kind of file; prints what was refused and what was not, by kind."""
    place, rng, refused = Path(place), random.Random(seed), (ValueError, FileNotFoundError, config.Mistake)
    kinds = [("config.json", "run", load_run), ("config.json", "sparse", load_run),
             ("model.safetensors", "run", load_run),
             ("meta.json", "data", load_data), ("tokenizer.json", "data", load_tokenizer),
             ("tokenizer.json", "bytes", load_tokenizer)]
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))  # what allocates more than 1 GiB fails
    for name, source, load in kinds:
        shutil.copytree(place / source, place / "fuzzed", dirs_exist_ok=True)
        good, clean = (place / source / name).read_bytes(), 0
        (place / "fuzzed" / name).unlink()
        for i in range(count):
            bad = mutated(good, rng, packed=name == "model.safetensors")
            (place / "fuzzed" / name).write_bytes(bad)
            signal.alarm(20)  # ends this process if it hangs
            try:
                load(place / "fuzzed")
            except refused:
                clean += 1
            except BaseException as e:
                raise AssertionError(f"{name} of {source}, mutation {i} of seed {seed}: {bad[:3000]}") from e
        print(f"{name}: {clean} of {count} refused", flush=True)
        assert clean > count / 4
        shutil.rmtree(place / "fuzzed")


@pytest.mark.parametrize("count", [110, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_that_cannot_be_trusted(place, count):
    """Damaged files never crash the interpreter, hang, take more than 1 GiB, or load as anything but what they say."""
    cfg = train.TrainConfig(dataset=str(place / "data"), out_dir=str(place / "sparse"), **RUN)
    if not (place / "sparse").exists():
        train.main(cfg, SMALL | dict(arch="llama4", n_experts=2, nope_every=2, chunk=8, n_layer=2, qk_norm=True,
                                     attn_scale=0.1))
    code = f"import test_faults; test_faults.fuzz({str(place)!r}, {count}, {count})"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=PATIENCE,
                          env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"})
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-4000:])
    print(done.stdout)
