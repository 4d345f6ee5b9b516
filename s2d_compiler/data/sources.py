"""What data are: images with labels, in a fixed order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2d_compiler.errors import DataError

__all__ = ["Arrays", "Data", "Selected", "as_image", "as_label"]


class Data(ABC):
    """Labelled images, in a fixed order.

    Args:
        name: Where they come from, for messages.
        classes: The names of the classes in the order of the labels; None where unknown.
    """

    def __init__(self, name: str, classes: Sequence[str] | None = None) -> None:
        self.name = name
        self.classes = None if classes is None else tuple(classes)

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """All labels, ``(N,)`` of int64, counted from 0."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """One image ``(C, H, W)``, of bytes or floating-point numbers.

        Raises:
            DataError: It cannot be read; the message names it.
        """

    def label(self, index: int) -> int:
        """One label."""
        return int(self.labels[index])

    def item(self, index: int) -> tuple[Tensor, int]:
        """One image and its label."""
        return self.image(index), self.label(index)

    def images(self, indices: Sequence[int]) -> Tensor | None:
        """Several images ``(N, C, H, W)`` at once, if that is faster than one by one; or None."""
        return None

    def place(self, index: int) -> str:
        """What messages call an image."""
        return f"{self.name}: image {index}"

    #: Whether images may be read by several threads at once.
    concurrent = False

    def limited(self, count: int | None) -> Data:
        """At most so many of them, evenly spaced, so that data sorted by class keep all classes."""
        total = len(self)
        if count is None or count >= total:
            return self
        chosen = [index * total // count for index in range(count)]
        return Selected(self, chosen, f"{self.name} ({count} of {total})")


class Arrays(Data):
    """Images that all lie in memory.

    Args:
        name: Where they come from.
        images: ``(N, C, H, W)``.
        labels: ``(N,)`` of int64.
        classes: Names of the classes.
    """

    def __init__(
        self, name: str, images: Tensor, labels: Tensor, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(name, classes)
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def image(self, index: int) -> Tensor:
        return self._images[index]

    def images(self, indices: Sequence[int]) -> Tensor | None:
        return self._images[torch.as_tensor(indices, dtype=torch.long)]


class Selected(Data):
    """Some of the images of other data.

    Args:
        data: The others.
        indices: Which of them, in which order.
        name: What messages and records call them.
    """

    def __init__(self, data: Data, indices: Sequence[int], name: str) -> None:
        super().__init__(name, data.classes)
        self.data = data
        self.indices = indices
        self.concurrent = data.concurrent

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        return self.data.labels[torch.tensor(self.indices, dtype=torch.long)]

    def image(self, index: int) -> Tensor:
        return self.data.image(self.indices[index])

    def label(self, index: int) -> int:
        return self.data.label(self.indices[index])

    def item(self, index: int) -> tuple[Tensor, int]:
        return self.data.item(self.indices[index])

    def images(self, indices: Sequence[int]) -> Tensor | None:
        return self.data.images([self.indices[index] for index in indices])

    def place(self, index: int) -> str:
        return self.data.place(self.indices[index])


def as_image(value: Any, place: str) -> Tensor:
    """A tensor, an array or a Pillow image as a tensor ``(C, H, W)``.

    Raises:
        DataError: It is none.
    """
    import numpy
    from PIL import Image

    if isinstance(value, Image.Image):
        if value.mode not in ("L", "RGB"):
            value = value.convert("RGB")
        pixels = torch.from_numpy(numpy.array(value))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "uf":
        value = torch.from_numpy(numpy.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise DataError(
            f"{place} is a {type(value).__name__}, neither a tensor nor a Pillow image; have the "
            "data set return one of these"
        )
    if value.dim() not in (2, 3) or not value.numel():
        raise DataError(
            f"{place} has the shape {tuple(value.shape)}, and an image is (C, H, W); have the data "
            "set return images without the batch"
        )
    if value.dtype != torch.uint8 and not value.is_floating_point():
        raise DataError(
            f"{place} holds {value.dtype} numbers, and images are bytes (torch.uint8) or "
            "floating-point numbers; convert them"
        )
    return value[None] if value.dim() == 2 else value


def as_label(value: Any, place: str) -> int:
    """A whole number, as Python, numpy or torch has them.

    Raises:
        DataError: It is none.
    """
    import numpy

    if isinstance(value, numpy.generic | numpy.ndarray | Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    if type(value) is not int or not 0 <= value < 2**31:
        raise DataError(
            f"{place} has the label {str(value)[:60]!r}, and a label is a class number from 0; "
            "have the data set return such numbers"
        )
    return value
