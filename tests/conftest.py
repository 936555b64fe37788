"""What every test shares: the repository on the path, the optional data, and torchvision beside a CPU-only torch."""
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
