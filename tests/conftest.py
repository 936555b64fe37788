"""What every test shares: the repository on the path, the optional data, and torchvision beside a CPU-only torch."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared" / "data"  # real data that is not part of the project

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


@pytest.fixture
def data():
    """The folder of optional real data; the test is skipped where there is none."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    return DATA


@pytest.fixture
def project(tmp_path):
    """command(*words) -> (stdout, stderr) of Python, in a copy of the project that may write its data/ and out/."""
    for part in "common.py", "train.py", "model.py", "config", "prepare":
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)

    def command(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr
    return command
