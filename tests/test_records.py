"""tests/records.py: commands that the scripts accept, a figure at their end, and README's table."""
import json
import shutil

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
