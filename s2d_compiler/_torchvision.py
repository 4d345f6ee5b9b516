"""Makes ``import torchvision`` work beside a torch that its compiled operators do not fit.

torchvision's wheel carries an extension, ``_C``, with operators such as non-maximum suppression.
Beside a CPU-only torch the extension of the usual wheel does not load, because it wants torch's
CUDA libraries. torchvision means to live without it, yet its import fails: it registers shape
rules for ``torchvision::nms`` and ``torchvision::qnms``, and torch refuses rules for operators
that do not exist.

Importing this module puts a finder in front of Python's import system that acts once, when
torchvision is first looked for. It tries the extension exactly as torchvision would. Where it
loads, that is all: torchvision finds it loaded. Where it does not, the operators are declared,
without any implementation, so that the import goes through; calling one still ends in
torchvision's own message. Who never imports torchvision pays nothing, and if torchvision was
imported before this module there is nothing left to do.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

__all__ = ["prepare"]

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""The operators that torchvision names while it is imported, whether they exist or not."""

_libraries: list[torch.library.Library] = []
"""Declarations last as long as their library object."""


def prepare(folder: str) -> None:
    """Declare the operators that torchvision's import needs and its extension does not bring.

    Args:
        folder: where the torchvision package lies.
    """
    if _loads_extension(folder):
        return
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in missing:
        library.define(_SCHEMAS[name])  # type: ignore[no-untyped-call]
    _libraries.append(library)


def _loads_extension(folder: str) -> bool:
    """Load torchvision's extension as torchvision does; doing it twice changes nothing."""
    spec = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
    except (ImportError, OSError):
        return False
    return True


class _TorchvisionFinder:
    """Prepares torchvision when it is first looked for, then steps aside for good."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            prepare(folder)
        return spec


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _TorchvisionFinder())
