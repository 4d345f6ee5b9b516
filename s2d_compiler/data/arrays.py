"""CIFAR as torchvision reads it, and ``.npz`` files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from s2d_compiler.data.sources import Arrays
from s2d_compiler.errors import DataError, first_line
from s2d_compiler.memory import explained, let_through

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["open_cifar", "open_npz"]


def open_cifar(kind: str, root: str, split: str | None) -> Arrays:
    """CIFAR-10 or CIFAR-100 as torchvision reads it: files whose checksums are the official ones.

    Args:
        kind: ``"cifar10"`` or ``"cifar100"``.
        root: The folder that holds ``cifar-10-batches-py`` (``cifar-100-python``), or that folder.
        split: ``"train"`` or ``"test"``, which None means.

    Raises:
        DataError: They are not there, or are others.
    """
    from torchvision import datasets

    known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    place = f"{kind}:{root}"
    if split not in (None, "train", "test"):
        raise DataError(f"{place}: there is no split {split!r}; it has the splits train and test")
    folder = Path(root)
    if folder.name == known.base_folder:
        folder = folder.parent
    files = [name for name, _ in (*known.train_list, *known.test_list)]
    try:
        found = known(folder, train=split == "train", download=False)
    except Exception as error:
        let_through(error)
        where = folder / known.base_folder
        missing = [name for name in files if not (where / name).is_file()]
        what = "have another content than the official ones (checksums differ)"
        if missing:
            what = f"are not all in {where} ({missing[0]} is missing)"
        raise DataError(
            f"{place}: the files {files[0]} to {files[-1]} {what}; unpack "
            f"{Path(known.url).name} so that they lie there (nothing is downloaded)"
        ) from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    name = f"{place} {split or 'test'}"
    return Arrays(name, images, torch.tensor(found.targets), found.classes)


def open_npz(path: str, split: str | None, *, labels: bool = True) -> Arrays:
    """A file of ``numpy.savez``.

    It holds ``images``, ``(N, H, W, C)``, ``(N, C, H, W)`` or ``(N, H, W)`` of bytes or
    floating-point numbers, ``labels``, ``(N,)`` of whole numbers from 0, and may hold ``classes``,
    their names. With a split, the arrays are called ``train_images``, ``train_labels`` and so on.
    Without ``labels`` there need be none, and each is -1.

    Raises:
        DataError: It is no such file, or damaged; nothing pickled is read.
    """
    prefix = "" if split is None else f"{split}_"
    with explained(f"reading {path}", "check that the file is the one you mean"):
        names = [f"{prefix}images", f"{prefix}labels"]
        arrays = _read(path, names if labels else names[:1])
    images = _images(arrays[f"{prefix}images"], f"{path}: {prefix}images")
    found = torch.full((len(images),), -1)
    if labels:
        found = _labels(arrays[f"{prefix}labels"], f"{path}: {prefix}labels")
    if len(images) != len(found):
        raise DataError(
            f"{path}: {len(images)} images and {len(found)} labels, and each image has one; store "
            "as many of the one as of the other"
        )
    classes = arrays.get("classes")
    class_names = None
    if classes is not None and classes.ndim == 1 and classes.dtype.kind == "U":
        class_names = [str(name) for name in classes]
    return Arrays(path if split is None else f"{path} {split}", images, found, class_names)


def _read(path: str, required: list[str]) -> dict[str, NDArray[Any]]:
    try:
        if not zipfile.is_zipfile(path):
            Path(path).open("rb").close()  # there, and readable
            raise DataError(
                f"{path}: this is no .npz archive; write it with numpy.savez(path, images=..., "
                "labels=...)"
            )
        with Path(path).open("rb") as opened, numpy.load(opened, allow_pickle=False) as file:
            for name in required:
                if name not in file.files:
                    there = ", ".join(sorted(file.files)[:8]) or "nothing"
                    alone = ", or train by a teacher alone (s2d train --no-labels)"
                    raise DataError(
                        f"{path}: it holds {there}, and {name} is missing; store it under that name"
                        f"{alone if name.endswith('labels') else ''}"
                    )
            names = [*required, *(["classes"] if "classes" in file.files else [])]
            found = {name: file[name] for name in names}
        for name, value in found.items():
            if not isinstance(value, numpy.ndarray):  # numpy hands on members of other kinds
                raise DataError(
                    f"{path}: {name} is no array of numpy's; write the file with numpy.savez"
                )
        return found
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"{path}: the file cannot be read ({error.strerror}); check the path and your rights"
        ) from error
    except DataError:
        raise
    except Exception as error:
        let_through(error)
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}: refused: an array in it is pickled, and reading that runs code; store "
                "arrays of numbers"
            ) from error
        raise DataError(
            f"{path}: numpy cannot read it ({type(error).__name__}: {first_line(error)[:160]}), "
            "the file is damaged; copy or write it again"
        ) from error


def _images(array: NDArray[Any], place: str) -> torch.Tensor:
    if array.dtype != numpy.uint8 and array.dtype.kind != "f":
        raise DataError(
            f"{place}: {array.dtype} numbers, and images are bytes (uint8) or floating-point "
            "numbers; convert them with astype"
        )
    if array.ndim not in (3, 4) or not all(array.shape[1:]):
        raise DataError(
            f"{place}: the shape is {array.shape}, and it must be (N, H, W, C), (N, C, H, W) or "
            "(N, H, W); store them so"
        )
    if not array.dtype.isnative or array.dtype.itemsize > 8:
        array = array.astype(numpy.float64 if array.dtype.itemsize > 4 else numpy.float32)
    images = torch.from_numpy(numpy.ascontiguousarray(array))
    if images.dim() == 3:
        return images[:, None]
    last, first = images.shape[3] in (1, 3), images.shape[1] in (1, 3)
    if last and first:
        raise DataError(
            f"{place}: the shape is {array.shape}, and both its second and its last number could "
            "be that of the channels; store images larger than 3 pixels a side"
        )
    return images.permute(0, 3, 1, 2) if last else images


def _labels(array: NDArray[Any], place: str) -> torch.Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{place}: {array.dtype} numbers of shape {array.shape}, and labels are whole numbers "
            "of shape (N,); store one class number per image"
        )
    wrong = numpy.flatnonzero((array < 0) | (array >= 2**31))
    if len(wrong):
        raise DataError(
            f"{place}[{wrong[0]}]: {array[wrong[0]]} is no class; number the classes from 0"
        )
    return torch.from_numpy(array.astype(numpy.int64))
