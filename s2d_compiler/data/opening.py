"""From what somebody writes on a command line to data."""

from __future__ import annotations

import re
from pathlib import Path

from s2d_compiler.data.arrays import open_cifar, open_npz
from s2d_compiler.data.folders import open_folder
from s2d_compiler.data.functions import open_function
from s2d_compiler.data.sources import Data, Selected
from s2d_compiler.errors import DataError, UsageError

__all__ = ["FORMS", "open_data", "parse_split"]

FORMS = "cifar10:DIR, cifar100:DIR, folder:DIR, FILE.npz or package.module:function"

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.\w+)*")
_SPLIT = re.compile(r"(?P<name>[\w-]*)(\[(?P<range>(-?\d{1,12})?(:(-?\d{1,12})?){1,2})\])?")


def open_data(spec: str, split: str | None = None, *, labels: bool = True) -> Data:
    """Open labelled images; nothing is downloaded.

    Args:
        spec: ``cifar10:DIR`` or ``cifar100:DIR`` (the files of torchvision), ``folder:DIR`` or just
            ``DIR`` (a folder of images for each class), ``FILE.npz`` (arrays ``images`` and
            ``labels``), or ``package.module:function``, a function that returns a map-style data
            set of ``(image, label)``. Naming a function runs it.
        split: Which part, such as ``"train"`` or ``"test"``. CIFAR: ``"test"`` if None. Folder: a
            folder in it. ``.npz``: what the names of the arrays begin with (``train_images``).
            Function: its argument ``split``. A Python slice may follow, as in
            ``"train[45000:]"`` or ``"[::2]"``.
        labels: Whether a ``.npz`` file must have labels; without them each is -1.

    Raises:
        DataError: There are no such data, or they are damaged or empty; the message says where
            they must lie.
        UsageError: The words are none of these forms.
    """
    name, part, text = parse_split(split)
    data = _open(spec, name, labels)
    if part is not None:
        data = Selected(data, range(len(data))[part], f"{data.name}{text}")
    if not len(data):
        raise DataError(f"{data.name}: 0 images, and at least 1 is needed; name other data")
    return data


def parse_split(split: str | None) -> tuple[str | None, slice | None, str]:
    """What ``train[45000:]`` names: the split, the part of it, and how the part is written.

    Raises:
        UsageError: It is neither a name nor a slice.
    """
    match = _SPLIT.fullmatch(split or "")
    if match is None:
        raise UsageError(
            f"the split {split!r} is no name, such as train, with or without a slice; write "
            "train[45000:], for example, or [45000:] alone"
        )
    if not match["range"]:
        return match["name"] or None, None, ""
    bounds = [int(part) if part else None for part in match["range"].split(":")]
    if len(bounds) == 3 and bounds[2] == 0:
        raise UsageError(f"the split {split!r} has a step of 0; write another step, or none")
    return match["name"] or None, slice(*bounds), f"[{match['range']}]"


def _open(spec: str, split: str | None, labels: bool) -> Data:
    kind, _, rest = spec.partition(":")
    if kind in ("cifar10", "cifar100") and rest:
        return open_cifar(kind, rest, split)
    if kind == "folder" and rest:
        return open_folder(rest, split)
    if spec.endswith(".npz"):
        return open_npz(spec, split, labels=labels)
    if Path(spec).is_dir():
        return open_folder(spec, split)
    if _FUNCTION.fullmatch(spec):
        return open_function(spec, split)
    raise UsageError(
        f"the data {spec!r} are neither a folder that exists nor of a form that is known; write "
        f"{FORMS}"
    )
