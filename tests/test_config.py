"""Settings: what is accepted, what is refused and how, and that every default says its reason."""
import ast
import json
import math
import ntpath
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import config
import runs
from conftest import ROOT, real_data
from model import PRESETS, Llama


@dataclass
class Settings:
    """For these tests."""
    dataset: str = "tales"  # a name
    batch_size: int = 4  # a size
    learning_rate: float = 1e-3  # (0, 1] a rate
    optimizer: str = "muon"  # {muon, adamw} the first is faster
    compile: bool = False  # a flag
    out_dir: str | None = None  # maybe
    # -- files
    input: tuple[str, ...] = ()  # what to read
    max_iters: int = 7  # [1, inf) steps
    lora_rank: int = 0  # [0, inf) a rank

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


@pytest.mark.parametrize("argv, name, value", [
    (["--batch_size=8"], "batch_size", 8),
    (["--batch_size", "8"], "batch_size", 8),
    (["--batch-size=1e3"], "batch_size", 1000),
    (["--batch_size=32_768"], "batch_size", 32768),
    (["--learning_rate=0.5"], "learning_rate", 0.5),
    (["--compile"], "compile", True),
    (["--compile", "False"], "compile", False),
    (["--compile=no", "--batch_size=2"], "compile", False),
    (["--out_dir=x=y"], "out_dir", "x=y"),
    (["--out_dir=none"], "out_dir", None),
    (["--dataset", "--batch_size=2"], None, "needs a value"),
    (["--input", "a", "b", "--batch_size=2"], "input", ("a", "b")),
    (["--input=a"], "input", ("a",)),
    (["--input=a", "--batch_size=2", "--input", "b", "c"], "input", ("a", "b", "c")),
    (["--batch_size=2", "--batch_size=3"], "batch_size", 3),
    (["--dataset", "--x y"], None, "--dataset needs a value (str); if '--x y' is one: --dataset='--x y'"),
    (["--dataset=~/a"], "dataset", "/home of one/a"),
    (["--input", "~/a", "b~/c", "~"], "input", ("/home of one/a", "b~/c", "~")),
    (["--input=()"], "input", ()),
    (["--input", "()"], "input", ()),
    (["a" * 300 + ".py"], None, "no config file aaaa"),
    (["--batch_size=2.5"], None, "batch_size takes int, not '2.5'"),
    (["--batch_size=1e400"], None, "batch_size takes int"),
    (["--batch_size=0"], None, "batch_size must be at least 1"),
    (["--compile=perhaps"], None, "compile takes bool"),
    (["--bach_size=2"], None, "did you mean 'batch_size'"),
    (["--lr=1"], None, "did you mean 'learning_rate'"),
    (["--steps=1"], None, "did you mean 'max_iters'"),
    (["--lora=1"], None, "did you mean 'lora_rank'"),
    (["--optimizer=adamw"], "optimizer", "adamw"),
    (["--optimizer=sgd"], None, "optimizer must be one of muon, adamw, not 'sgd'"),
    (["--learning_rate=nan"], None, "learning_rate must lie in (0, 1], not nan"),
    (["--batch_size=[8]"], None, "batch_size takes int, not '[8]'"),
    (["--learning_rate=0"], None, "learning_rate must lie in (0, 1], not 0.0"),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["tales"], None, "did you mean config/tales.py"),
    (["config/tales"], None, "did you mean config/tales.py"),
    (["tale"], None, "did you mean config/tales.py"),
    (["xyz"], None, "-h shows what is"),
    (["--batch_size=2", "c.py"], None, "c.py comes too late: config files stand before --keys"),
    (["--zzzzzz=2"], None, "-h lists them all"),
    (["batch_size=2"], None, "neither a config file"),
    (["nowhere.py"], None, "no config file nowhere.py; there are config/"),
])
def test_command_line(argv, name, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home of one")
    if name is None:
        with pytest.raises(config.Mistake) as e:
            config.load(Settings, argv)
        assert value in str(e.value) and "\n" not in str(e.value)
    else:
        assert getattr(config.load(Settings, argv), name) == value


@pytest.mark.parametrize("text, expect", [
    ("batch_size = 8\nlearning_rate = 1\n_private = 3\nimport math\n", {"batch_size": 8, "learning_rate": 1.0}),
    ("from math import sqrt\nfrom functools import partial\nhalf = partial(sqrt)\nbatch_size = half(64)\n",
     {"batch_size": 8}),
    ("def half(x):\n    return x // 2\nbatch_size = half(16)\n", {"batch_size": 8}),
    ("from math import e as learning_rate\n", "learning_rate must lie in .0, 1., not 2.7"),
    ("from __future__ import annotations\nfrom math import pi\nfrom os import environ\nlearning_rate = pi / 10\n",
     {"learning_rate": math.pi / 10}),
    ("batch_size = 1e3\n", {"batch_size": 1000}),
    ("batch_size = 1.5\n", "batch_size takes int, not 1.5"),
    ("learning_rate = 2.0\n", "learning_rate must lie in"),
    ("learning_rate = float('nan')\n", "learning_rate must lie in"),
    ("batch_size = 64 // 8\n", {"batch_size": 8}),
    ("import numpy as np\nbatch_size = np.int64(8)\nlearning_rate = np.float64(0.5)\n",
     {"batch_size": 8, "learning_rate": 0.5}),
    ("import numpy as np\nlearning_rate = np.float32(2)\n", "learning_rate must lie in"),
    ("import numpy as np\nbatch_size = np.array([1, 2])\n", "batch_size takes int"),
    ("batch_size = True\n", "batch_size takes int, not True"),
    ("batch_size = 'eight'\n", "batch_size takes int"),
    ("a = 1\nbatch_size = = 8\n", "line 2: invalid syntax"),
    ("a_helper = 1\n", "unknown key 'a_helper'; -h lists them all .a name of your own begins with _.$"),
    ("batch = 2\nbatch_size = batch\n", "unknown key 'batch'; did you mean 'batch_size'. .a name of your own begins"),
    ("x = 1 / 0\n", "line 1: ZeroDivisionError"),
    ("bach_size = 8\n", "did you mean 'batch_size'"),
])
def test_file(tmp_path, text, expect):
    path = tmp_path / "c[1 (copy.py"
    path.write_text(text)
    if isinstance(expect, str):
        with pytest.raises(config.Mistake, match=expect.replace("'", ".")) as e:
            config.load(Settings, [str(path)])
        assert str(path) in str(e.value)
    else:
        cfg = config.load(Settings, [str(path)])
        assert {k: getattr(cfg, k) for k in expect} == expect


def test_a_hub_name_takes_no_settings_of_the_folder_here(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"batch_size": 3}, "model": {}}))
    (tmp_path / "best").mkdir()
    monkeypatch.chdir(tmp_path)
    assert config.of_run("owner/model", "train.py:TrainConfig") == ({}, {})
    assert config.of_run("best", "train.py:TrainConfig")[0] == {"batch_size": 3}


def test_help_has_groups_limits_and_presets(capsys):
    with pytest.raises(SystemExit):
        config.load(Settings, ["-h"], also="model.py:LlamaConfig")
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    own, files = lines.index("settings:"), lines.index("files:")
    assert own < lines.index("--optimizer='muon' {muon, adamw} the first is faster") < files
    assert files < lines.index("--max_iters=7 [1, inf) steps") < lines.index("Llama 4:")
    assert lines.index("Llama 4:") < lines.index([line for line in lines if line.startswith("--top_k=1 ")][0])
    with pytest.raises(SystemExit):
        config.load("train.py:TrainConfig", ["-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f" {name}" in said for name in PRESETS)


def test_what_a_config_file_of_the_project_names_is_found_from_any_folder(tmp_path, monkeypatch):
    """A run that lies here, as such files once made, goes on; the paths in files of one's own begin here."""
    project = tmp_path / "project"
    monkeypatch.setattr(config, "ROOT", project)
    (project / "config").mkdir(parents=True)
    for path in project / "config/a.py", tmp_path / "mine.py":
        path.write_text("out_dir = 'out/a'\ndataset = 'outer/a'\n")
    for folder, seen in (project, "out/a"), (project / "config", "../out/a"), (tmp_path, "project/out/a"):
        monkeypatch.chdir(folder)
        cfg = config.load(Settings, [os.path.relpath(project / "config/a.py")])
        assert (cfg.out_dir, cfg.dataset) == (os.path.normpath(seen), "outer/a")
    assert config.load(Settings, ["mine.py"]).out_dir == "out/a"
    (tmp_path / "out/a").mkdir(parents=True)
    assert config.load(Settings, ["project/config/a.py"]).out_dir == "out/a"


SCRIPTS = [path for folder in ("", "prepare") for path in sorted((ROOT / folder).glob("*.py"))
           if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_begins_with_the_words_of_the_script(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "-h"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # `config.run` sets it
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[0] == ast.get_docstring(ast.parse(path.read_bytes())).splitlines()[0]


def test_command_line_beats_file_beats_default(tmp_path):
    (tmp_path / "c.py").write_text("batch_size = 8\ndataset = 'b'\ninput = 'a', 'b'\n")
    cfg = config.load(Settings, [str(tmp_path / "c.py"), "--batch_size=16", "--input=c", "--input=d"])
    assert (cfg.batch_size, cfg.dataset, cfg.input, cfg.learning_rate) == (16, "b", ("c", "d"), 1e-3)


def test_what_was_given_is_in_the_order_in_which_it_was_said(tmp_path):
    (tmp_path / "c.py").write_text("batch_size = 8\ndataset = 'b'\nn_layer = 3\n")
    words = [str(tmp_path / "c.py"), "--batch_size=16", "--max-iters", "5", "--n_head=2"]
    given, shape = config.load("train.py:TrainConfig", words, "model.py:LlamaConfig")
    assert list(given.items()) == [("dataset", "b"), ("batch_size", 16), ("max_iters", 5)]  # what was said last is last
    assert list(shape.items()) == [("n_layer", 3), ("n_head", 2)]


@pytest.mark.parametrize("word, meant", [("lr", "learning_rate"), ("lora", "lora_rank"), ("steps", "max_iters"),
                                         ("bs", "batch_size"), ("layers", "n_layer"), ("gpus", None)])
def test_training_knows_what_was_meant(word, meant):
    with pytest.raises(config.Mistake, match=f"did you mean '{meant}'" if meant else "-h lists them all"):
        config.load("train.py:TrainConfig", [f"--{word}=1"], "model.py:LlamaConfig")


def test_keys_of_another_class():
    cfg, other = config.load(Settings, ["--n_layer=3", "--batch_size=2", "--rope_scaling", "8", "1", "4", "8192"],
                             also="model.py:LlamaConfig")
    with_commas = config.load(Settings, ["--rope_scaling=8,1,4,8192"], also="model.py:LlamaConfig")
    assert with_commas[1] == {"rope_scaling": (8.0, 1.0, 4.0, 8192.0)}
    twice = config.load(Settings, ["--rope_scaling=2,1", "--rope_scaling=8,1,4,8192"], also="model.py:LlamaConfig")
    assert twice == with_commas  # numbers belong together
    assert cfg.batch_size == 2 and other == {"n_layer": 3, "rope_scaling": (8.0, 1.0, 4.0, 8192.0)}


@pytest.mark.parametrize("name", ["train.py:TrainConfig", "sample.py:SampleConfig", "model.py:LlamaConfig",
                                  "serve.py:ServeConfig", "vlm.py:VlmConfig"])
def test_every_default_says_its_reason(name):
    keys = config.keys_of(name)
    assert len(keys) > 10
    assert not [k.name for k in keys.values() if len(k.why) <= 3]


SETTINGS = ["train.py:TrainConfig", "sample.py:SampleConfig", "serve.py:ServeConfig", "vlm.py:VlmConfig"] + [
    f"prepare/{path.name}:Settings" for path in sorted((ROOT / "prepare").glob("*.py"))
    if "class Settings" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_knows_its_range(name):
    """-1, nan, inf, 2**64 and their like are refused in one line that names the key, or lie within what it declares."""
    numbers = {k: key for k, key in config.keys_of(name).items() if key.type.split(" ")[0] in ("int", "float")}
    for key, declared in numbers.items():
        assert declared.limits, f"{name} {key} declares no interval"
        low, high = map(float, declared.limits[1:-1].split(", "))
        for value in ("-1", "0", "nan", "inf", "-inf", "18446744073709551616", str(2**63), "1e400", "-1e-300", "1e19"):
            try:
                taken = config._from_args([f"--{key}={value}"], numbers)[key]
            except config.Mistake as e:
                assert key in str(e) and "\n" not in str(e)
            else:
                assert low <= taken <= high and math.isfinite(taken) and abs(taken) < 2**63


def test_a_default_lies_within_its_range():
    for name in SETTINGS:
        for key in config.keys_of(name).values():
            key.check(key.default, name)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_config_file_loads(path):
    """With the keys of the script that its first command names."""
    script = re.search(rf"(\w+)\.py config/{path.name}", path.read_text(encoding="utf-8"))[1]
    known = config.keys_of(f"{script}.py:{script.capitalize()}Config")
    assert len(config._from_file(path, known | config.keys_of("model.py:LlamaConfig"))) > 3


@pytest.mark.parametrize("name, script", [("vlm_shapes", "vlm"), ("quiz_grpo", "feedback")])
def test_a_file_for_another_script_says_so(name, script):
    with pytest.raises(config.Mistake, match=f"{name}.py is for {script}.py"):
        config.load("train.py:TrainConfig", [str(ROOT / f"config/{name}.py")], "model.py:LlamaConfig")


@pytest.mark.slow
@pytest.mark.parametrize("name, script, sizes", [
    ("mini_llama", "fineweb_edu", "109,529,856 parameters (llama, 12 layers, dim 768)"),
    ("llama4_tiny", "cosmopedia", "223,795,968 parameters, 138,861,312 active per token (llama4, 12 layers, dim 768)")])
def test_config_runs_as_it_is_on_a_processor(name, script, sizes, project, tmp_path):
    """A few steps on the sample: only the size of a step is overridden, to what a test can wait for."""
    project(f"prepare/{script}.py", "--input", real_data("text/fineweb_sample.jsonl.gz"), "--limit=600")
    project("prepare/hellaswag.py", "--input", real_data("text/hellaswag_val.jsonl.gz"))
    out, _ = project("train.py", f"config/{name}.py", "--max_iters=3", "--gradient_accumulation_steps=1",
                     "--batch_size=1", "--block_size=256", "--eval_tokens=512", "--hellaswag_items=4",
                     "--log_interval=1", "--device=cpu")
    assert f"model      {sizes}\n" in out and "vocabulary 32,000\n" in out
    log = runs.read_log(tmp_path / "out" / name / "log.jsonl")
    losses = [r["train_loss"] for r in log if "train_loss" in r]
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(32000), abs=1)
    assert ("hellaswag_acc" in log[-1]) == (name == "mini_llama")
    assert Llama.from_pretrained(tmp_path / "out" / name).config.vocab_size == 32000


@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_a_reader_that_leaves_ends_the_program_quietly(unbuffered):
    """`train.py -h | head -1` once ended in a traceback."""
    with subprocess.Popen([sys.executable, *unbuffered, "train.py", "-h"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141 and not said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("end, code, said", [
    (">/dev/full", 2, "error: [Errno 28] No space left on device\n"), (">&-", 0, "seen\n"), ("2>&-", 0, "")])
def test_output_that_cannot_be_written_is_no_traceback(end, code, said):
    call = 'import sys, config; config.run(lambda: (print(1), print("seen", file=sys.stderr, flush=True)))'
    done = subprocess.run(f"{sys.executable} -c '{call}' {end}", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.removeprefix("seen\n" if code else "")) == (code, said)


def test_a_closed_stdin_is_an_empty_one():
    call = "import config; config.run(lambda: print(input()))"
    said = [subprocess.run(f"{sys.executable} -c '{call}' {end}", shell=True, cwd=ROOT, capture_output=True, text=True
                           ).stderr.splitlines()[-1] for end in ("<&-", "</dev/null")]
    assert said == ["EOFError: EOF when reading a line"] * 2


def test_what_the_machine_refuses_is_one_line(tmp_path):
    call = f"import config; config.run(open, {str(tmp_path)!r}, 'w')"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno ") and done.stderr.count("\n") == 1


def test_a_path_on_another_drive_is_shown_as_it_is(monkeypatch):
    assert config.as_seen(ROOT / "config") == os.path.relpath(ROOT / "config")
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)
    assert config.as_seen("Z:\\out") == "Z:\\out"


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_does_not_import_torch(script):
    """-h lists every key, and answers without loading torch (which alone takes more than a second)."""
    code = (f"import sys, runpy; sys.argv = ['{script}', '-h']\ntry: runpy.run_path('{script}', run_name='__main__')\n"
            "except SystemExit as e: assert not e.code\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    print(f"{script} -h took {time.perf_counter() - start:.2f} s")
    assert done.returncode == 0, done.stderr
    assert "--seed=1337" in done.stdout and "same seed" in done.stdout or "nanoGPT's" in done.stdout


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "train.py", "--lerning_rate=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: command line: unknown key 'lerning_rate'; did you mean 'learning_rate'?\n"
