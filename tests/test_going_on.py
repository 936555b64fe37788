"""A run that goes on, is evaluated or is stopped: run.json holds, keys given now win and are said, nothing is lost."""
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import DENSE, SPARSE, log_of, same, settings, states, torchrun, words  # noqa: F401

import checkpoint
import config
import feedback
import optim
import runs
import train
import vlm
from conftest import PATIENCE, ROOT
from model import Llama, LlamaConfig
from prepare import shards, tokenizer
from prepare.windows import Windows

FLAGS = dict(batch_size=4, block_size=40, max_iters=6, eval_interval=3, log_interval=1, sample_tokens=0, warmup_iters=2,
             learning_rate=2e-3, whole_docs=True, device="cpu", dtype="float32", dropout=0.1, **DENSE)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Documents of very different lengths, as bytes."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("data") / "stories"
    tok = tokenizer.byte()
    writer = shards.Writer(folder, tok)
    for split, count in ("train", 300), ("val", 60):
        for length in rng.integers(1, 39, count):
            text = "".join(rng.choice(list("abcde é"), length))
            writer.add(split, tok.encode(text, bos=True), len(text.encode()))
    writer.finish()
    return folder


def flags(**keys):
    return [f"--{key}={value}" for key, value in keys.items()]


def read_settings(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    return train.read_settings()


@pytest.fixture
def run(stories, tmp_path, monkeypatch):
    """A run of six steps with settings that are not the defaults."""
    out = tmp_path / "run"
    train.main(*read_settings(monkeypatch, *flags(dataset=stories, out_dir=out, **FLAGS)))
    return out


# -- what holds ----------------------------------------------------------------------------------------------------

def test_going_on_keeps_the_settings(run, monkeypatch, capsys):
    before, shape = read_settings(monkeypatch, *flags(out_dir=run, init_from="resume"))
    said = json.loads((run / "run.json").read_text())["settings"]
    for key in said.keys() - {"init_from", "out_dir"}:
        assert getattr(before, key) == said[key], key
    assert before.out_dir == str(run) and shape == {"dropout": 0.1, "router_noise": 0.0, "router_aux": 0.0}
    assert "settings" not in capsys.readouterr().out
    now, shape = read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", batch_size=8, dropout=0.2, dim=32))
    assert (now.batch_size, now.block_size, shape["dropout"], shape["dim"]) == (8, 40, 0.2, 32)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["settings   batch_size=8, where the run had 4", "settings   dropout=0.2, where the run had 0.1"]
    assert read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", epochs=2))[0].epochs == 2
    assert capsys.readouterr().out == ""  # its epochs have become max_iters


@pytest.mark.parametrize("key, had, other", [
    ("head_copy", 0.0, 5.0), ("head_copy", 0.25, 0.5), ("model", "stories15m", "smollm2-135m"), ("lora_rank", 0, 4),
    ("lora_rank", 4, 0)])
def test_what_a_run_began_with_cannot_change(tmp_path, monkeypatch, key, had, other):
    """A command of before may be given again; after that it is said that the key does nothing."""
    settings = {"lora_rank": 0, "model": "stories15m", "head_copy": 0.0, "init_from": "base"} | {key: had}
    (tmp_path / "run.json").write_text(json.dumps({"command": ["train.py"], "settings": settings, "model": {}}))
    begun = flags(out_dir=tmp_path, init_from="resume")
    assert getattr(read_settings(monkeypatch, *begun, f"--{key}={had}")[0], key) == had
    with pytest.raises(config.Mistake, match=rf"began with {key}={had}, .* leave the key out"):
        read_settings(monkeypatch, *begun, f"--{key}={other}")
    assert read_settings(monkeypatch, *begun, f"--{key}={other}", "--eval_only")


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("part", ["", "best", "checkpoints/step_00000006"])
def test_evaluating_a_run_says_what_its_log_says(run, tmp_path, monkeypatch, capsys, part, link):
    """4.2671 bits/byte were once printed where the log had 4.2451: windows of other lengths. A link is what it leads
    to."""
    if link:
        (tmp_path / "link").symlink_to(run / part)
    train.main(*read_settings(monkeypatch, "--eval_only", f"--init_from={tmp_path / 'link' if link else run / part}"))
    log = [entry for entry in log_of(run) if "val_loss" in entry]
    entry = min(log, key=lambda entry: entry["val_loss"]) if part == "best" else log[-1]
    assert f"val loss {entry['val_loss']:.4f}  {entry['val_bpb']:.4f} bits/byte" in capsys.readouterr().out


def test_a_run_that_is_complete_says_so(run, monkeypatch):
    with pytest.raises(config.Mistake, match="has done its 6 steps: to go on, give a larger --max_iters"):
        train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume")))


def test_another_batch_size_goes_on_where_the_data_was(run, stories, monkeypatch):
    """No window twice, none left out, and every token counted."""
    drawn, draw = [], Windows.draw
    monkeypatch.setattr(Windows, "draw", lambda self, *args: drawn.append(args) or draw(self, *args))
    train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", batch_size=2, max_iters=9)))
    assert drawn == [(24, 2), (26, 2), (28, 2)]
    cfg, _ = read_settings(monkeypatch, *flags(out_dir=run, init_from="resume"))
    windows = Windows(shards.Split(stories, "train"), cfg, 256)
    counts = np.diff(windows.epoch(0)[:30]).flatten() - 1  # 4 in each of six steps, 2 in each of three
    ends = np.cumsum(counts)[[3, 7, 11, 15, 19, 23, 25, 27, 29]]
    assert [entry["tokens"] for entry in log_of(run) if "train_loss" in entry] == ends.tolist()


def test_other_training_data_is_said(run, stories, tmp_path, monkeypatch, capsys):
    """The same documents in another order too; a state of before this was kept says nothing."""
    train_ids, val_ids = (shards.Split(stories, split)[:] for split in ("train", "val"))
    second = int((train_ids == 256).nonzero()[0][1])  # where the second document begins
    writer = shards.Writer(tmp_path / "other", tokenizer.byte())
    writer.add("train", [*train_ids[second:], *train_ids[:second]], 1)
    writer.add("val", val_ids, shards.Split(stories, "val").bytes, shards.Split(stories, "val").documents)
    writer.finish()
    for step, data, said in (7, stories, False), (8, tmp_path / "other", True), (9, stories, False):
        if step == 9:
            path = runs.latest(run) / "train_state.json"
            state = json.loads(path.read_text())
            assert state.pop("train_fingerprint")
            path.write_text(json.dumps(state))
        train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", dataset=data, max_iters=step)))
        out = capsys.readouterr().out
        assert ("resume     with other training data than before" in out) == said and "another validation" not in out


def test_settings_of_optimizers_that_are_given_anew_count(run, monkeypatch):
    """An optimizer's saved state holds its old settings too."""
    made, make = [], optim.make_optimizers
    monkeypatch.setattr(optim, "make_optimizers", lambda *args: made.extend(make(*args)) or made)
    train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", max_iters=7, weight_decay=0.3,
                                                  beta1=0.5, muon_momentum=0.8)))
    adamw, muon = made
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in adamw.param_groups} == {(0.5, 0.95)}
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["weight_decay"]) == (0.8, 0.3)
    assert all(len(optimizer.state) for optimizer in made)


def test_another_dtype_goes_on(run, monkeypatch):
    """A run in float32 has no scale of gradients that one in float16 could go on with."""
    train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", max_iters=7, dtype="float16")))
    train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", max_iters=8, dtype="float32")))
    assert runs.read_state(runs.latest(run))["step"] == 8


def test_a_crash_between_checkpoint_and_links_is_mended(run, monkeypatch):
    """The state says that its weights are the best: best/ gets them when the run goes on."""
    path = runs.latest(run)
    state = runs.read_state(path)
    assert state["improved"]
    good = (path / "model.safetensors").read_bytes()
    (run / "best/model.safetensors").unlink()
    (run / "best/model.safetensors").write_bytes(b"of an earlier step")
    cfg, shape = read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", max_iters=7, learning_rate=0.0))
    monkeypatch.setattr(train.Text, "val_loss", lambda *args, **more: 9.0)
    train.main(cfg, shape)
    assert (run / "best/model.safetensors").read_bytes() == good


def test_a_signal_in_the_last_step_is_no_stop(stories, tmp_path, monkeypatch, capsys):
    """It is evaluated and complete; no command to go on is printed."""
    class Signals(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass
    monkeypatch.setattr(train, "stop_signals", lambda: Signals([2]))
    keys = FLAGS | dict(dataset=stories, out_dir=tmp_path / "run", max_iters=1)
    train.main(*read_settings(monkeypatch, *flags(**keys)))
    assert "to go on" not in capsys.readouterr().out
    assert any("val_loss" in entry for entry in log_of(tmp_path / "run"))


def test_evaluating_a_run_that_scored_hellaswag_gives_its_loss(run, monkeypatch):
    facts = json.loads((run / "run.json").read_text())
    facts["settings"]["hellaswag"] = True
    (run / "run.json").write_text(json.dumps(facts))
    assert read_settings(monkeypatch, "--eval_only", f"--init_from={run}")[0].hellaswag is False
    assert read_settings(monkeypatch, *flags(init_from="resume", out_dir=run))[0].hellaswag is True


def test_a_run_is_written_by_one_process(run, monkeypatch):
    """A second one once moved it aside while the first went on writing, and both were lost."""
    settings = json.loads((run / "run.json").read_text())["settings"] | {"max_iters": 9}
    with runs.held(run):
        for init_from in "resume", "scratch":
            with pytest.raises(config.Mistake, match="another process is writing the run"):
                train.main(*read_settings(monkeypatch, *flags(**settings | {"init_from": init_from})))
    train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", max_iters=7)))


def test_of_two_that_start_together_one_writes(tmp_path):
    """Neither finds a run.json when it looks; what locks the first one's must stop the second."""
    out = tmp_path / "run"
    with runs.held(out), runs.held(tmp_path / "another"):  # nothing there is nothing to lock
        pass
    facts, log = {"settings": {"init_from": "scratch"}}, runs.Log(out, 0)
    with runs.start_directory(out, facts, log):
        before = (out / "run.json").stat()
        with pytest.raises(config.Mistake, match="another process is writing the run"):
            runs.start_directory(out, facts, log)
        assert (out / "run.json").stat().st_ino == before.st_ino and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_directory_that_is_a_link_stays_one(tmp_path):
    """To a large disk, say: an earlier run is moved aside there, and the next one is there too."""
    disk, out = tmp_path / "disk/scout", tmp_path / "scout"
    (disk / "checkpoints/step_00000001").mkdir(parents=True)
    (disk / "checkpoints/step_00000001/train_state.json").write_text("{}")
    out.symlink_to(disk)
    with runs.start_directory(out, {"settings": {"init_from": "scratch"}}, runs.Log(out, 0)):
        assert out.is_symlink() and (disk / "run.json").is_file()
    assert sorted(p.name for p in disk.parent.iterdir()) == ["scout", "scout.1"]
    assert runs.latest(disk.parent / "scout.1")


def test_a_copy_of_a_checkpoint_is_the_users(tmp_path):
    state = dict.fromkeys(runs.STATE, 0) | {"best": 1.0}
    for name in "step_00000009_keep", "step_old", "step_00000001":
        (tmp_path / "checkpoints" / name).mkdir(parents=True)

    def write(directory):
        (directory / "weights").write_text("1")
    runs.save_checkpoint(tmp_path, write, state | {"step": 2}, {"a": torch.zeros(1)}, False, keep=1)
    assert runs.latest(tmp_path).name == "step_00000002"
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "step_00000009_keep", "step_old", "step_00000002"}
    assert not list(tmp_path.rglob("rank*"))


def test_a_name_that_no_disk_takes_is_one_line(monkeypatch):
    """As a folder that may not be read, it made Path.is_dir raise before Python 3.14."""
    for key in "init_from", "out_dir":
        cfg = train.TrainConfig(**{key: 300 * "a"})
        with pytest.raises((config.Mistake, FileNotFoundError)):
            runs.check_writable(cfg, train.run_directory(cfg.out_dir, "a"))
            checkpoint.find_checkpoint(cfg.init_from)


def test_a_run_does_not_move_what_it_starts_from(run, stories, monkeypatch):
    for source in run, run / "best":
        with pytest.raises(config.Mistake, match="is where this run starts from: give another --out_dir"):
            args = flags(init_from=source, out_dir=run, dataset=stories, block_size=40)
            train.main(*read_settings(monkeypatch, *args))


@pytest.mark.parametrize("keys, moves", [(dict(init_from="lora"), "base"), (dict(init_from="lora/best"), "base"),
                                         (dict(init_from="other", reference="base/best"), "base"),
                                         (dict(init_from="other", reference="lora"), "base"),
                                         (dict(init_from="other", reference="lora"), "other"),
                                         (dict(init_from="org/name", reference="lora"), "lora")])
def test_a_run_does_not_move_what_it_needs(tmp_path, monkeypatch, keys, moves):
    """The base of an adapter and DPO's reference are needed as much as what it starts from."""
    monkeypatch.chdir(tmp_path)
    for name in "base/best", "lora/best", "other", "free":
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name.split("/")[0] / "run.json").touch()
    for folder in "lora", "lora/best":
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(dict(
            peft_type="LORA", r=1, lora_alpha=1, target_modules=["q_proj"], base_model_name_or_path="base")))
    with pytest.raises(config.Mistake, match=f"^{moves} is where this run starts from: give another --out_dir"):
        runs.check_writable(feedback.FeedbackConfig(**keys), Path(moves))
    runs.check_writable(feedback.FeedbackConfig(**keys), Path("free"))


def test_a_run_takes_no_folder_that_holds_something_else(stories, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(config.Mistake, match="holds something else than a run"):
        train.main(*read_settings(monkeypatch, *flags(**FLAGS | dict(dataset=stories, out_dir=tmp_path))))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_reader_that_leaves_costs_no_step(stories, tmp_path):
    """`train.py | head` once ended the run without a save."""
    out = tmp_path / "run"
    args = flags(**FLAGS | dict(dataset=stories, out_dir=out, max_iters=100000, eval_interval=100000))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, **pipes)
    try:
        for line in run.stdout:
            if line.startswith(b"step      3/"):
                break
        run.stdout.close()
        errors = run.stderr.read()
        run.wait(timeout=PATIENCE)
    finally:
        run.kill()
    assert b"Traceback" not in errors
    assert runs.read_state(runs.latest(out))["step"] >= 3


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of Unix")
def test_a_terminal_that_goes_costs_no_step(stories, tmp_path):
    """`train.py & disown`: once the terminal is closed, print raises OSError."""
    out, (ours, theirs) = tmp_path / "run", os.openpty()
    args = flags(**FLAGS | dict(dataset=stories, out_dir=out, max_iters=40, eval_interval=20))
    run = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    assert run.wait(timeout=PATIENCE) == 0
    assert runs.read_state(runs.latest(out))["step"] == 40


def test_a_context_of_one_token_has_no_sample(stories, tmp_path, monkeypatch):
    keys = FLAGS | dict(dataset=stories, out_dir=tmp_path / "run", block_size=1, sample_tokens=5, whole_docs=False)
    train.main(*read_settings(monkeypatch, *flags(**keys)))
    assert runs.latest(tmp_path / "run").name == "step_00000006"


def test_nothing_to_evaluate_is_one_line(monkeypatch):
    with pytest.raises(config.Mistake, match="--init_from takes a run's directory"):
        read_settings(monkeypatch, "--eval_only")


def test_of_an_older_state_the_weights_open(run, stories, tmp_path, monkeypatch):
    """States were pickles once, which are no longer read: one line says what to do, and that works."""
    path = runs.latest(run)
    (path / "train_state.json").rename(path / "train_state.pt")
    with pytest.raises(config.Mistake, match="train_state.json cannot be .* its weights with --init_from") as e:
        train.main(*read_settings(monkeypatch, *flags(out_dir=run, init_from="resume", max_iters=7)))
    assert "\n" not in str(e.value)
    keys = FLAGS | dict(dataset=stories, out_dir=tmp_path / "new", max_iters=1, learning_rate=0.0)
    train.main(*read_settings(monkeypatch, *flags(init_from=path, **{k: v for k, v in keys.items() if k not in DENSE})))
    assert same(Llama.from_pretrained(path).state_dict(), Llama.from_pretrained(tmp_path / "new").state_dict())


def test_head_copy_changes_the_head_once(stories, tmp_path, monkeypatch, capsys):
    """It is in the weights then: going on and evaluating do not add the embedding again."""
    base, new = tmp_path / "base", tmp_path / "new"
    for out, keys in (base, {"tie_embeddings": False}), (new, {"init_from": base, "head_copy": 0.25}):
        keys = FLAGS | dict(dataset=stories, out_dir=out, max_iters=1, learning_rate=0.0) | keys
        if out == new:
            keys = {key: value for key, value in keys.items() if key not in DENSE}
        train.main(*read_settings(monkeypatch, *flags(**keys)))
    before, after = (Llama.from_pretrained(out).state_dict() for out in (base, new))
    want = before | {"lm_head.weight": before["lm_head.weight"] + 0.25 * before["model.embed_tokens.weight"]}
    assert same(after, want)
    for more in [], ["--head_copy=0.25"]:  # an evaluation changes nothing, and says what it is of
        train.main(*read_settings(monkeypatch, "--eval_only", f"--init_from={base}", *more))
        said = capsys.readouterr().out.splitlines()[-1]
        assert f"val loss {log_of(base)[-1]['val_loss']:.4f}" in said and said.endswith(f", by {base}")
    first = log_of(new)[-1]["val_loss"]
    cfg, shape = read_settings(monkeypatch, "--eval_only", f"--init_from={new}")
    assert train.evaluate_run(cfg, shape) is None and cfg.head_copy == 0
    train.main(*read_settings(monkeypatch, *flags(out_dir=new, init_from="resume", max_iters=2)))
    assert same(Llama.from_pretrained(new).state_dict(), want) and log_of(new)[-1]["val_loss"] == first
    with pytest.raises(config.Mistake, match="head_copy changes the head, which LoRA leaves"):
        read_settings(monkeypatch, *flags(head_copy=0.1, init_from=base, lora_rank=2))


def test_head_copy_of_new_weights(stories, tmp_path, monkeypatch):
    heads = []
    for share in 0.0, 0.25:
        keys = dict(dataset=stories, out_dir=tmp_path / str(share), max_iters=1, learning_rate=0.0, head_copy=share)
        train.main(*read_settings(monkeypatch, *flags(**FLAGS | keys | dict(tie_embeddings=False))))
        heads.append(Llama.from_pretrained(tmp_path / str(share)).state_dict())
    plain, copied = heads
    assert torch.equal(copied["lm_head.weight"], plain["lm_head.weight"] + 0.25 * plain["model.embed_tokens.weight"])
    assert torch.equal(copied["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    with pytest.raises(config.Mistake, match="head_copy: the head is the embedding already"):
        train.main(*read_settings(monkeypatch, *flags(**FLAGS | keys | dict(tie_embeddings=True))))


def test_a_run_json_of_no_use_is_one_line(run, monkeypatch):
    for text in "{", "[]", '{"settings": {"batch_size": "many"}, "model": {}}', '{"settings": {}}':
        (run / "run.json").write_text(text)
        with pytest.raises(config.Mistake, match="run.json") as e:
            read_settings(monkeypatch, *flags(out_dir=run, init_from="resume"))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind, keys", [
    (feedback.FeedbackConfig, {"reference": "there"}), (vlm.VlmConfig, {"vit_weights": "there"})])
def test_paths_in_a_run_json_hold_in_any_folder(tmp_path, monkeypatch, kind, keys):
    """A name of the hub stays one."""
    monkeypatch.chdir(tmp_path)
    key, = keys
    for want in "there", str(tmp_path / "there"):
        assert runs.facts_of_run(kind(**keys), LlamaConfig(), [])["settings"][key] == want
        (tmp_path / "there").mkdir(exist_ok=True)


@pytest.mark.parametrize("dataset", [".", "words/", "a b/../words"])
def test_a_run_has_a_folder_of_its_own(dataset, monkeypatch):
    assert train.run_directory(None, dataset).parent == ROOT / "out"
    assert train.run_directory(None, dataset).name in ("words", os.path.basename(os.getcwd()))


@pytest.mark.parametrize("here", [".", "..", "checkpoints/.."])
def test_a_run_does_not_move_the_folder_that_it_is_started_in(run, stories, monkeypatch, here):
    """The second run in `--out_dir=.` once ended in a traceback after its first step."""
    monkeypatch.chdir(run / "checkpoints" if here == ".." else run)
    with pytest.raises(config.Mistake, match="holds an earlier run, and you are in it"):
        runs.check_writable(train.TrainConfig(out_dir=here), Path(here))
    runs.check_writable(train.TrainConfig(init_from="resume", out_dir=here), Path(here))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a$b_$c", "50$_$", "caf\udce9", "语言"])
def test_a_run_of_any_name_is_drawn(tmp_path, name):
    out = tmp_path / name
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "train_loss": 2, "val_loss": 3}\n')
    runs.Log(out, 1).plot(1.5)
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"


# -- signals, terminals, tools -------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_signal_prints_can_be_pasted(stories, tmp_path, number):
    """Stop a run, then type the command that it prints: it goes on with the next step."""
    out = tmp_path / "a run"
    args = flags(**FLAGS | dict(dataset=stories, out_dir=out, max_iters=100000, eval_interval=100000))
    run = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    try:
        for line in run.stdout:
            if line.startswith("step      3/"):
                break
        run.send_signal(number)
        rest, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0 and errors == ""
    python, *command = shlex.split(rest.strip().splitlines()[-1].partition("to go on: ")[2])
    saved = runs.read_state(runs.latest(out))["step"]
    assert python == "python" and saved >= 3 and runs.read_log(out / "log.jsonl")[-1]["step"] == saved
    done = subprocess.run([sys.executable, *command, f"--max_iters={saved + 2}"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in log_of(out) if "train_loss" in entry] == [*range(1, saved + 3)]


def test_a_terminal_without_a_character_ends_no_run(stories, tmp_path):
    args = flags(**FLAGS | dict(dataset=stories, out_dir=tmp_path / "run", max_iters=2, sample_tokens=60))
    done = subprocess.run([sys.executable, "-c", "import config; config.run(print, 'é €')"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "? ?\n")
    done = subprocess.run([sys.executable, "train.py", *args], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"  | " in done.stdout and not done.stderr


def test_compiling_without_a_compiler_is_one_line_before_training(stories, tmp_path):
    args = flags(**FLAGS | dict(dataset=stories, out_dir=tmp_path / "run", compile=True))
    env = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "train.py", *args], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: torch.compile does not work here") and "--compile=False" in done.stderr
    assert not (tmp_path / "run").exists()


# -- numbers that go wrong -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [DENSE, SPARSE], ids=["dense", "moe"])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(stories, tmp_path, shape):
    """16 sequences with different numbers of targets, in one pass, in sixteen, on two processes: one loss, one norm."""
    logs = {}
    for batch_size, passes in (16, 1), (4, 4), (1, 16):
        out = tmp_path / f"{batch_size}"
        cfg = settings(stories, out, batch_size=batch_size, gradient_accumulation_steps=passes, block_size=40,
                       whole_docs=True, max_iters=3)
        train.main(cfg, shape)
        logs[batch_size] = log_of(out)
    args = flags(**FLAGS | shape | dict(
        dataset=stories, out_dir=tmp_path / "two", batch_size=2, dropout=0.0, max_iters=3,
        gradient_accumulation_steps=8, learning_rate=3e-3, warmup_iters=4, eval_interval=10, eval_tokens=512))
    torchrun(2, ROOT / "train.py", *args)
    logs["two"] = log_of(tmp_path / "two")
    for name, log in logs.items():
        for a, b in zip(logs[16], log, strict=True):
            for key in a.keys() & {"train_loss", "grad_norm", "val_loss", "tokens"}:
                assert a[key] == pytest.approx(b[key], rel=2e-5), (name, key)


def test_one_nan_evaluation_does_not_end_best(words, tmp_path, monkeypatch):  # noqa: F811
    losses = iter([math.nan, 3.0, math.nan, 2.0])
    monkeypatch.setattr(train.Text, "val_loss", lambda self, model, limit: next(losses))
    train.main(settings(words, tmp_path / "run", max_iters=8, eval_interval=2, keep=9), DENSE)
    best = (tmp_path / "run/best/model.safetensors").read_bytes()
    assert best == (tmp_path / "run/checkpoints/step_00000008/model.safetensors").read_bytes()
    assert runs.read_state(runs.latest(tmp_path / "run"))["best"] == 2.0


@pytest.mark.parametrize("overflow", ["lm_head", "q_proj"], ids=["AdamW's", "Muon's"])
def test_in_float16_a_gradient_that_overflows_changes_nothing(words, tmp_path, monkeypatch, overflow):  # noqa: F811
    """Neither optimizer steps where only one's gradients have overflowed; the scale halves, and training goes on."""
    build, backward = train.build_model, []

    def hooked(*args):
        llama = build(*args)
        for name, p in llama.named_parameters():
            if overflow in name:
                p.register_hook(lambda g: backward.append(1) or (g * math.inf if len(backward) == count * 3 else g))
        count = sum(overflow in name for name, _ in llama.named_parameters())
        return llama
    monkeypatch.setattr(train, "build_model", hooked)
    train.main(settings(words, tmp_path / "run", max_iters=4, eval_interval=1, keep=9, dtype="float16"),
               DENSE | {"tie_embeddings": False})
    (second, state2), (third, state3), (fourth, _) = (states(tmp_path / "run", step) for step in (2, 3, 4))
    assert same(second, third) and same(state2["optimizers"], state3["optimizers"])
    assert state3["scaler"]["scale"] == state2["scaler"]["scale"] / 2
    assert not any(torch.equal(third[name], fourth[name]) for name in third if "proj" in name)
    assert all(t.isfinite().all() for t in fourth.values())
    skipped = [entry.get("skipped") for entry in log_of(tmp_path / "run") if "train_loss" in entry]
    assert skipped == [None, None, 1, None]


# -- other machines ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world, launcher", [
    (1, "python"), (4, "torchrun --nproc_per_node=4"),
    (8, "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=node0 --nproc_per_node=4")])
def test_the_command_to_go_on_is_for_all_machines(monkeypatch, world, launcher):
    """Pasted on each, one for a single machine began as many runs in one directory."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(world, 4)))
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setattr(runs, "WORLD", world)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert runs.command_to_resume("out/a") == f"{launcher} train.py --init_from=resume --out_dir=out/a"


def test_processes_that_see_other_checkpoints_do_not_start(words, tmp_path):  # noqa: F811
    """Nodes without a shared disk once went on from different steps, each for itself."""
    train.main(settings(words, tmp_path / "run0"), DENSE)
    (tmp_path / "run1/checkpoints").mkdir(parents=True)
    (tmp_path / "run").mkdir()  # what the command line names; each process takes one of the others
    (tmp_path / "run0/checkpoints/step_00000010").rename(tmp_path / "run1/checkpoints/step_00000010")
    (tmp_path / "apart.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, config, train
cfg, shape = train.read_settings()
cfg.out_dir += os.environ["RANK"]
config.run(train.main, cfg, shape)
""")
    said = torchrun(2, tmp_path / "apart.py", *flags(dataset=words, out_dir=tmp_path / "run", init_from="resume",
                    block_size=32, batch_size=4, gradient_accumulation_steps=2, device="cpu"), code=1)
    assert "1 of 2 processes do not see" in said and "all need the same disk" in said and "Traceback (most" not in \
        said.split("Root Cause")[0].replace("torch/distributed", "")[:200]


def test_going_on_where_a_machine_has_no_run_is_said_before_it_joins(tmp_path, monkeypatch):
    """With the defaults for its settings it once refused them, while the other machines waited."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(config.Mistake, match="nothing to resume in .*absent: all processes need the same disk"):
        train.with_run({"init_from": "resume", "out_dir": str(tmp_path / "absent")}, {})


def test_a_model_of_the_hub_needs_the_data_of_its_tokenizer(words, tmp_path, monkeypatch):  # noqa: F811
    """A directory was always checked; a hub name once trained on other tokens in silence."""
    train.main(settings(words, tmp_path / "run", max_iters=1), DENSE)
    tokenizer.byte().save(tmp_path / "run")
    monkeypatch.setattr(train, "find_checkpoint", lambda name: tmp_path / "run")
    with pytest.raises(config.Mistake, match="was made with another tokenizer .* than org/name"):
        train.main(settings(words, tmp_path / "tuned", init_from="org/name"), {})


# -- a busy machine ------------------------------------------------------------------------------------------------

class Busy:
    """A clock for `IdleThreads`: seconds of a step by (whether threads sleep, whether another program runs)."""
    SECONDS = {(False, False): 1.0, (True, False): 1.35, (False, True): 4.0, (True, True): 1.9}

    def __init__(self, monkeypatch):
        import common
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
        monkeypatch.setattr(common.sys, "platform", "linux")
        self.threads = common.IdleThreads(torch.device("cpu"))

    def steps(self, count, busy):
        """Mean seconds of so many steps."""
        total = 0.0
        for _ in range(count):
            seconds = self.SECONDS[self.threads.second_team is not None, busy]
            self.threads.adapt(seconds)
            total += seconds
        return total / count


def test_threads_sleep_while_the_machine_is_busy(monkeypatch):
    clock = Busy(monkeypatch)
    with clock.threads:
        assert clock.steps(200, busy=False) < 1.01  # one trial
        assert clock.steps(200, busy=True) < 2.1
        clock.steps(600, busy=False)  # notices, however rare its trials have become
        assert clock.steps(200, busy=False) == 1.0
        assert clock.steps(1000, busy=True) < 2.0
    assert clock.threads.second_team is None
    clock = Busy(monkeypatch)
    with clock.threads:
        assert clock.steps(500, busy=True) < 2.1  # from its first step on


def test_how_threads_wait_changes_no_result(words, tmp_path, monkeypatch):  # noqa: F811
    results = []
    for asleep in False, True:
        threads = train.IdleThreads(torch.device("cpu"))
        if asleep:
            threads.switch()
        with threads:
            train.main(settings(words, tmp_path / str(asleep), max_iters=5), DENSE)
        results.append(Llama.from_pretrained(tmp_path / str(asleep)).state_dict())
    assert same(*results)


def test_tensorboard_has_what_the_log_has(words, tmp_path):  # noqa: F811
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    train.main(settings(words, tmp_path / "run", max_iters=4, eval_interval=2, log_interval=1, tensorboard=True), {})
    found = event.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in "train_loss", "val_loss":
        logged = [(r["step"], r[name]) for r in runs.read_log(tmp_path / "run/log.jsonl") if name in r]
        assert [(e.step, e.value) for e in found.Scalars(name)] == [(s, pytest.approx(v)) for s, v in logged]


def test_without_tensorboard_it_is_one_line(words, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(config.Mistake, match="--tensorboard: pip install tensorboard"):
        train.main(settings(words, tmp_path / "run", tensorboard=True), {})
    assert not (tmp_path / "run").exists()
