"""A folder of images, a folder in it for each class."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import torch
from torch import Tensor

from s2d_compiler.data.sources import Data, as_image
from s2d_compiler.errors import DataError, first_line
from s2d_compiler.memory import let_through

__all__ = ["ImageFiles", "open_folder"]

logger = logging.getLogger(__name__)


class ImageFiles(Data):
    """Images in files, read when they are asked for.

    Args:
        name: The folder.
        files: Path and label of each.
        classes: Names of the classes.
    """

    concurrent = True

    def __init__(self, name: str, files: list[tuple[str, int]], classes: list[str]) -> None:
        super().__init__(name, classes)
        self.files = files
        self._labels = torch.tensor([label for _, label in files])

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def image(self, index: int) -> Tensor:
        from PIL import Image

        path, _ = self.files[index]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                raise OSError("no regular file")
            with Image.open(path) as image:
                return as_image(image.convert("RGB"), path)
        except Exception as error:
            let_through(error)
            raise DataError(
                f"{path}: this image cannot be read ({type(error).__name__}: "
                f"{first_line(error)[:160]}); copy it again, or remove it"
            ) from error

    def place(self, index: int) -> str:
        return self.files[index][0]


def open_folder(root: str, split: str | None) -> ImageFiles:
    """A folder as torchvision's ``ImageFolder`` reads it: classes by the names of their folders.

    Args:
        root: The folder.
        split: The folder in it that holds the classes; None: ``root`` itself.

    Raises:
        DataError: There is no such folder, or none with images.
    """
    from torchvision import datasets

    folder = Path(root) if split is None else Path(root, split)
    if not folder.is_dir():
        there = "it is a file" if folder.exists() else "it does not exist"
        raise DataError(
            f"{folder}: a folder with one folder of images for each class belongs here, and {there}"
            "; check the path"
        )
    try:
        found = datasets.ImageFolder(str(folder))
    except OSError as error:
        raise DataError(
            f"{folder}: {first_line(error)[:200]}; put the images of each class in a folder of its "
            "own there, as ImageFolder of torchvision reads them"
        ) from error
    others = sum(1 for name in found.classes for path in (folder / name).rglob("*")
                 if path.is_file()) - len(found.samples)  # fmt: skip
    if others > 0:
        logger.warning("%s: %d files are no images by their names and left out", folder, others)
    return ImageFiles(str(folder), found.samples, found.classes)
