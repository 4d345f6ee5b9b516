"""torchvision is importable after this package, and left alone where it is whole."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_torchvision_is_importable_and_not_imported() -> None:
    assert run(
        "import sys\n"
        "from s2d_compiler import _torchvision\n"
        "before = 'torchvision' in sys.modules\n"
        "import torchvision\n"
        "names = [type(finder).__name__ for finder in sys.meta_path]\n"
        "print(before, torchvision.models.resnet18.__name__, '_TorchvisionFinder' in names)\n"
    ).endswith("resnet18 False")


def test_nothing_is_declared_where_the_extension_loads(tmp_path: Path) -> None:
    library = importlib.util.find_spec("safetensors._safetensors_rust")  # any that loads
    assert library is not None
    assert library.origin is not None
    shutil.copy(library.origin, tmp_path / f"_C{EXTENSION_SUFFIXES[0]}")
    code = (
        "import torch\n"
        "from s2d_compiler._torchvision import prepare\n"
        "prepare({folder!r})\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))\n"
    )
    assert run(code.format(folder=str(tmp_path))) == "False"
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    assert run(code.format(folder=str(tmp_path))) == "True"
