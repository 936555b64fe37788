"""tests/ladder.py: rungs that differ in nothing but what they add."""
import subprocess
import sys
from dataclasses import replace

import ladder
import pytest
import torch

import config
from conftest import ROOT
from model import PRESETS, Llama


@pytest.mark.parametrize("changes", [dict(n_layer=4, n_head=4, dim=128, ffn_dim=384, vocab_size=1536),
                                     dict(n_layer=8, n_head=8, dim=512, ffn_dim=1408)])
def test_rungs_have_equal_active_parameters(changes):
    base = replace(PRESETS["stories15m"], n_kv_head=0, head_dim=0, **changes)
    found = ladder.rungs(base, 120)
    assert list(found)[0] == "Llama 2" and len(found) == 5
    with torch.device("meta"):
        counts = [Llama(replace(base, **keys)).counts() for keys in found.values()]
    assert all(active == pytest.approx(counts[0][1], rel=0.02) for _, active in counts)
    assert counts[-1][0] > 2 * counts[0][0] - base.vocab_size * base.dim  # the experts that rest
    names = list(found)
    for a, b in zip(names, names[1:]):
        kept = {k: v for k, v in found[a].items() if k not in ("ffn_dim", "n_kv_head")}
        assert found[b].items() >= kept.items()
    with pytest.raises(config.Mistake, match="dense Llama"):
        ladder.rungs(PRESETS["scout-128m"], 120)


@pytest.mark.slow
def test_ladder_runs_and_does_not_repeat_itself(project, tmp_path):
    project("prepare/tales.py", "--stories=500", "--val_stories=50")
    words = [sys.executable, ROOT / "tests/ladder.py", "config/tales.py", f"--dataset={tmp_path / 'data/tales'}",
             f"--out_dir={tmp_path / 'out'}", "--max_iters=4", "--eval_interval=2", "--dim=64", "--ffn_dim=96",
             "--batch_size=2", "--eval_tokens=500", "--device=cpu", "--sample_tokens=0"]
    first, second = (subprocess.run(words, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr[-2000:] + second.stderr[-2000:]
    rows = [line for line in first.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == ["Llama 2", "+ GQA", "+ QK norm", "+ iRoPE, chunks", "+ MoE"]
    assert len({row.split("|")[4] for row in rows}) == 5 and "==" not in second.stdout
    assert (tmp_path / "out/ladder_tales/ladder.png").read_bytes().startswith(b"\x89PNG")
