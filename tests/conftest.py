"""What every test shares: one thread, the project on the path, what is optional, torchvision beside torch for CPUs."""
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in every child too: no result depends on the number of cores

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
REAL_DATA = Path(os.environ.get("EVERYLLAMA_DATA", ROOT.parent / "shared" / "data"))  # no part of the project
PATIENCE = 600  # seconds for a child process: what hangs ends; no test measures by it

try:
    import torchvision  # noqa: F401  transformers imports it where it is installed
except RuntimeError:  # its compiled operators need the CUDA build of torch; declaring them lets its Python parts import
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
except ImportError:
    pass


# -- what is optional --------------------------------------------------------------------------------------------

def real_data(path=""):
    """The path of a file or folder of the real data; the test is skipped where it is missing."""
    found = REAL_DATA / path
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data in {REAL_DATA}; set EVERYLLAMA_DATA")
    if not found.exists():
        pytest.skip(f"no {path} in EVERYLLAMA_DATA ({REAL_DATA})")
    return found


def need_transformers_5_24():
    """Skip a test whose oracle read such files otherwise before, or could not; the code follows the newer reading."""
    import transformers
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("the oracle is transformers 5.24 or newer, which wants Python 3.11")


@pytest.fixture
def data():
    """The folder of real data."""
    return real_data()


def pytest_terminal_summary(terminalreporter):
    """One line for each thing that is missing: how many tests it would take, and the reason that they gave."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} test{'s' * (count > 1)} skipped: {reason}")


# -- the project in a folder of its own --------------------------------------------------------------------------

@pytest.fixture
def project(tmp_path):
    """command(*words) -> (stdout, stderr) of Python, in a copy of the project that may write its data/ and out/."""
    for part in "config", "prepare":
        shutil.copytree(ROOT / part, tmp_path / part)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)

    def command(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                              timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-2000:]
        gloo = re.compile(r"\[Gloo\]|connected peer ranks")  # what torch 2.10 prints, two processes at once
        lines = [line for line in done.stdout.splitlines(keepends=True) if not gloo.search(line) and line.strip()]
        return "".join(lines), done.stderr
    return command
