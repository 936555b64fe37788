"""tests/records.py and bench.py: commands that the scripts accept, a figure at their end, and README's table."""
import dataclasses
import json
import shutil

import bench
import pytest
import records

import config
import train
import vlm
from conftest import ROOT


@pytest.mark.parametrize("name", records.RECORDS)
def test_commands_are_accepted_and_follow_each_other(name):
    kind = {"train.py": train.TrainConfig, "vlm.py": vlm.VlmConfig}
    *stages, score = [config.load(kind[script], words, "model.py:LlamaConfig")[0]
                      for script, *words in records.commands(name, ["--max_iters=3"])]
    scores = [getattr(s, "eval", s.eval_only) for s in (*stages, score)]
    assert scores == [False] * len(stages) + [True] and all(s.max_iters == 3 for s in stages)
    for before, after in zip(stages, (*stages[1:], score)):
        assert after.init_from == f"{before.out_dir}/best" and after.dataset == before.dataset


def test_readme_says_what_was_measured():
    """The table in README is that of records.json: neither is changed by hand."""
    kept = json.loads(records.KEPT.read_text())
    assert kept and kept.keys() <= records.RECORDS.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(records.MARKS[0]) == 1
    assert records.table(kept) == readme.partition(records.MARKS[0])[2].partition(records.MARKS[1])[0]


def test_readme_says_what_the_bench_found():
    kept, readme = json.loads(bench.KEPT.read_text()), (ROOT / "README.md").read_text(encoding="utf-8")
    assert bench.readme(kept) == readme.partition(bench.MARKS[0])[2].partition(bench.MARKS[1])[0]
    for rows in kept.values():
        assert rows.keys() <= {"machine", *bench.ROWS}
        assert all(pair["ratio"] == pair["theirs"] / pair["ours"] for name in bench.ROWS for pair in rows.get(name, ()))


def test_mean_and_deviation():
    assert records.spread([1.0, 2.0, 3.0]) == "2.0000 ± 1.0000"
    assert records.spread([0.25]) == "0.2500"


@pytest.mark.slow
def test_a_record_ends_in_its_figure(project, tmp_path):
    (tmp_path / "tests").mkdir()
    for file in "records.py", "bench.py":
        shutil.copy(ROOT / "tests" / file, tmp_path / "tests")
    project("prepare/tales.py", "--stories=500", "--val_stories=50")
    printed, _ = project("tests/records.py", "tales", "--max_iters=2", "--batch_size=2", "--sample_tokens=0",
                         "--device=cpu")
    figure = float(printed.splitlines()[-1].split("[")[1].split("]")[0])
    assert 2 < figure < 4  # two steps from knowing nothing: nearly log2(1536) bits a token


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """made(name, **settings): a run directory as tales leave it, whose score is 0.23 plus its seed in millionths."""
    monkeypatch.setattr(records, "run", lambda words: f"loss {words[2].split('seed')[1].split('/')[0]} bits/byte")

    def made(seed, step=850, **settings):
        words = ["config/tales.py", f"--seed={seed}"]
        given, shape = config.load("train.py:TrainConfig", words, "model.py:LlamaConfig")
        out = tmp_path / f"seed0.{seed}"
        out.mkdir()
        (out / "run.json").write_text(json.dumps({
            "settings": dataclasses.asdict(train.TrainConfig(**given | settings)), "model": shape, "gpu": None,
            "git_commit": "0123456789abcdef-dirty", "torch": "2.13.0+cpu", "started": "2026-11-27T10:11:12Z"}))
        (out / "log.jsonl").write_text("".join(json.dumps({"step": n, "seconds": n / 5}) + "\n" for n in (0, step)))
        return str(out)
    return made


def test_a_record_of_runs_that_are_there(finished):
    made = records.from_runs("tales", [finished(2301, dtype="bfloat16"), finished(2303)])
    assert made["figures"] == {"bits/byte": [0.2301, 0.2303]} and made["minutes"] == 2.8
    assert made["commit"] == "0123456-dirty" and made["date"] == "2026-11-27 10:11" and made["torch"] == "2.13.0"
    assert records.table({"tales": {"here": made}}).count("| 0.2302 ± 0.0001 bits/byte | 2 |") == 1


@pytest.mark.parametrize("changes, words", [
    ({"weight_decay": 0.2}, "has another weight_decay"), ({"max_iters": 900}, "has another max_iters"),
    ({"step": 170}, "not finished")])
def test_a_run_of_something_else_is_no_record(finished, changes, words):
    with pytest.raises(config.Mistake, match=words):
        records.from_runs("tales", [finished(2301, **changes)])
    with pytest.raises(config.Mistake, match="is no run"):
        records.from_runs("tales", ["tests"])
    with pytest.raises(config.Mistake, match="2 stages"):
        records.from_runs("flickr8k", ["tests"])
