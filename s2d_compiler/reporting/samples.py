"""Samples for a report: data, or tensors, with labels or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2d_compiler.data import Data, Preprocessing, batches, require_fit
from s2d_compiler.data.loading import require_classes
from s2d_compiler.data.sources import Arrays
from s2d_compiler.errors import DataError

if TYPE_CHECKING:
    from s2d_compiler.dynamic import StagedNetwork

__all__ = ["Samples", "samples_of"]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the network is shown.

    Attributes:
        name: Where they come from.
        count: How many.
        classes: Names of the classes; None where unknown.
        labelled: Whether the right classes are known.
        preprocessing: What is done to each; None: nothing.
        source: The data, or one tensor ``(N, ...)`` per input and the labels ``(N,)``.
        batch_size: How many at a time.
        input_shape: Of one input, where there is only one.
    """

    name: str
    count: int
    classes: tuple[str, ...] | None
    labelled: bool
    preprocessing: Preprocessing | None
    source: Data | tuple[tuple[Tensor, ...], Tensor]
    batch_size: int
    input_shape: tuple[int, ...] | None

    def batches(self, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """Inputs as the network takes them, and labels; zeros where these are not known."""
        if isinstance(self.source, Data):
            how = self.preprocessing or Preprocessing()
            yield from batches(self.source, how, self.batch_size, device, self.input_shape)
            return
        inputs, labels = self.source
        for start in range(0, self.count, self.batch_size):
            part = [value[start : start + self.batch_size] for value in inputs]
            if self.preprocessing is not None:
                part = [self.preprocessing(part[0], self.name)]
            given = tuple(value.to(device) for value in part)
            some = labels[start : start + self.batch_size].to(device)
            yield given[0] if len(given) == 1 else given, some

    def check(self, labels: Tensor, count: int) -> None:
        """Refuse labels that a network of so many classes does not know."""
        data = self.source
        if not isinstance(data, Data):
            data = Arrays(self.name, data[0][0], data[1])
        require_classes(data, labels, count)

    def image(self, index: int) -> Tensor | None:
        """One image ``(C, H, W)`` before preprocessing; None where a sample is none."""
        if isinstance(self.source, Data):
            return self.source.image(index)
        inputs, _ = self.source
        if len(inputs) != 1 or inputs[0].ndim != 4 or inputs[0].is_complex():
            return None
        return inputs[0][index]


def samples_of(
    network: StagedNetwork, data: Any, preprocessing: Preprocessing | None, batch_size: int
) -> Samples:
    """Samples from what somebody handed in.

    Args:
        network: What they are for.
        data: What ``open_data`` returns, or a pair ``(inputs, labels)``: a tensor or an array
            ``(N, ...)``, or a tuple of them where the network takes several inputs, and ``(N,)``
            classes from 0, or None.
        preprocessing: None: what is stored with the network. Tensors are taken as the network
            takes them where nothing is stored.
        batch_size: How many at a time.

    Raises:
        DataError: They are something else, or do not fit the network.
    """
    how = preprocessing or network.settings.preprocessing
    if isinstance(data, Data):
        shape = require_fit(data, how or Preprocessing(), network.parts.input_shapes)
        known = data.label(0) >= 0  # -1: opened without labels
        return Samples(data.name, len(data), data.classes, known, how, data, batch_size, shape)
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError(
            f"data: a {type(data).__name__} is neither what open_data returns nor a pair (inputs, "
            "labels); give one of these"
        )
    given, labels = data
    inputs = tuple(map(_tensor, given if isinstance(given, tuple | list) else (given,)))
    counts = {len(value) for value in inputs if value.ndim}
    marks = None if labels is None else _tensor(labels)
    if marks is not None:
        counts.add(_count_of(marks))
    if len(counts) != 1 or not min(counts):
        raise DataError(
            f"data: {', '.join(map(str, sorted(counts)))} samples in inputs and labels, and each "
            "must have as many, at least 1; hand in as many of the one as of the other"
        )
    count = counts.pop()
    is_image = len(inputs) == 1 and inputs[0].ndim == 4
    return Samples(
        "tensors", count, None, labels is not None, how if is_image else None,
        (inputs, torch.zeros(count, dtype=torch.long) if marks is None else marks.long()),
        batch_size, None,
    )  # fmt: skip


def _count_of(labels: Tensor) -> int:
    is_number = not labels.is_floating_point() and not labels.is_complex()
    if labels.ndim != 1 or not is_number or bool((labels < 0).any()):
        raise DataError(
            f"data: labels of shape {tuple(labels.shape)} and type {labels.dtype}, the least "
            f"{labels.min() if labels.numel() and is_number else 'none'}, and labels are class "
            "numbers from 0 of shape (N,), or None; give these"
        )
    return len(labels)


def _tensor(value: Any) -> Tensor:
    import numpy

    if isinstance(value, Sequence | numpy.ndarray):
        value = numpy.ascontiguousarray(value)
        if value.dtype.kind in "iufb":
            return torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise DataError(
            f"data: a {type(value).__name__} among the inputs and labels, which are tensors or "
            "arrays of numbers; convert it"
        )
    return value
