"""Where each sample of a batch lies in the features and outputs of a network.

Mostly in dimension 0; in dimension 1 of sequence-first tokens; together with windows or heads in
one dimension where these are merged into the batch; nowhere in what is computed from no input.
Graphs do not say it, so it is found by running the stages three times on tiny batches. Two samples
and three differ in the size of one dimension. Another second sample must leave the numbers of the
first alone: where it does not, samples depend on each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: Features by stage and position, and the flat outputs of each stage.
Values = tuple[dict[tuple[int, int], Any], list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class SampleAxis:
    """How a tensor holds the samples of a batch.

    Attributes:
        dimension: The dimension, or None where it holds no samples: it is the same for any batch.
        factor: Positions per sample in it.
        is_outer: Whether a sample's positions lie together.
    """

    dimension: int | None
    factor: int = 1
    is_outer: bool = True

    def take(self, value: Tensor, rows: Tensor) -> Tensor:
        """The given samples only, in the tensor's own memory format."""
        if self.dimension is None:
            return value
        if self.factor == 1:
            return _select(value, self.dimension, rows)
        apart, place = self._apart(value)
        return _select(apart, place, rows).flatten(self.dimension, self.dimension + 1)

    def empty(self, value: Tensor, samples: int) -> Tensor:
        """Room for so many samples of the shape of a value."""
        assert self.dimension is not None
        shape = list(value.shape)
        shape[self.dimension] = samples * self.factor
        return value.new_empty(shape)

    def put(self, room: Tensor, rows: Tensor, value: Tensor) -> None:
        """Write samples to their rows."""
        assert self.dimension is not None
        if self.factor == 1:
            room.index_copy_(self.dimension, rows, value)
            return
        apart, place = self._apart(room)
        apart.index_copy_(place, rows, self._apart(value)[0])

    def _apart(self, value: Tensor) -> tuple[Tensor, int]:
        """A view with samples in a dimension of their own, and which that is."""
        assert self.dimension is not None
        samples = value.shape[self.dimension] // self.factor
        sizes = (samples, self.factor) if self.is_outer else (self.factor, samples)
        shape = (*value.shape[: self.dimension], *sizes, *value.shape[self.dimension + 1 :])
        return value.reshape(shape), self.dimension + (not self.is_outer)


def _select(value: Tensor, dimension: int, rows: Tensor) -> Tensor:
    if (
        value.ndim == 4
        and dimension == 0
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=torch.channels_last)
    ):
        return value.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return value.index_select(dimension, rows)


#: How a network takes one batch size and no other: dimension 0.
WHOLE = SampleAxis(0)


@dataclass(frozen=True, slots=True)
class SampleAxes:
    """Where samples lie in everything that stages hand on and give out.

    Attributes:
        features: By stage and position.
        outputs: Per stage, per flat output; None for what is no tensor.
    """

    features: dict[tuple[int, int], SampleAxis]
    outputs: tuple[tuple[SampleAxis | None, ...], ...]


@torch.no_grad()
def find_sample_axes(
    run: Callable[[tuple[Tensor, ...]], Values], inputs: Sequence[Tensor]
) -> SampleAxes | None:
    """Find where samples lie.

    Args:
        run: Runs all stages on flat inputs.
        inputs: Inputs like those that will come, (N, ...) each; they give types, devices, and
            for integers the values.

    Returns:
        None where samples depend on each other, or the network does not run on two samples.
    """
    first, second, third = (_like(inputs, seed) for seed in range(3))
    try:
        pair, other, triple = (
            run(tuple(torch.cat(parts) for parts in zip(*samples, strict=True)))
            for samples in ((first, second), (first, third), (first, second, third))
        )
    except Exception as error:
        log.warning("samples run one by one: a batch of two or three fails: %s", error)
        return None
    try:
        features = {
            key: _axis(value, other[0][key], triple[0][key]) for key, value in pair[0].items()
        }
        outputs = tuple(
            tuple(
                _axis(*values) if isinstance(values[0], Tensor) else None
                for values in zip(*rows, strict=True)
            )
            for rows in zip(pair[1], other[1], triple[1], strict=True)
        )
    except _DependentError as error:
        log.warning("samples run one by one: %s", error)
        return None
    return SampleAxes(features, outputs)


class _DependentError(Exception):
    """A sample changes the numbers of another one, or lies nowhere."""


def _like(inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """One sample of each input, other numbers for every seed."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for value in inputs:
        shape = (1, *value.shape[1:])
        if value.is_floating_point() or value.is_complex():
            sample = torch.randn(shape, generator=generator, dtype=torch.float32)
        elif value.dtype == torch.bool:
            sample = torch.rand(shape, generator=generator) < 0.5
        elif value.numel():
            known = value.detach().flatten().cpu()
            sample = known[torch.randint(len(known), shape, generator=generator)]
        else:
            sample = torch.zeros(shape)
        sample = sample.to(device=value.device, dtype=value.dtype)
        if value.ndim == 4 and not value.is_contiguous():
            sample = sample.contiguous(memory_format=torch.channels_last)
        found.append(sample)
    return found


def _axis(pair: Tensor, other: Tensor, triple: Tensor) -> SampleAxis:
    """How a value holds samples, from those of two batches of two and one of three."""
    sizes = [
        (d, two, three)
        for d, (two, three) in enumerate(zip(pair.shape, triple.shape, strict=True))
        if two != three
    ]
    if not sizes:
        if not _equal(pair, other):
            raise _DependentError("a value without a batch dimension depends on them")
        return SampleAxis(None)
    (dimension, two, three), *more = sizes
    if more or two % 2 or three != two // 2 * 3:
        raise _DependentError(
            f"sizes {tuple(pair.shape)} of two samples become {tuple(triple.shape)} of three"
        )
    factor = two // 2
    row = torch.zeros(1, dtype=torch.long, device=pair.device)
    layouts = [SampleAxis(dimension, factor)]
    if factor > 1:
        layouts.append(SampleAxis(dimension, factor, is_outer=False))
    fitting = [a for a in layouts if _equal(a.take(pair, row), a.take(other, row))]
    if len(fitting) == 1 or (fitting and factor == 1):
        return fitting[0]
    raise _DependentError(
        "their outputs depend on each other"
        if not fitting
        else "where they lie in merged positions does not show"
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding: kernels may add in another order."""
    if not one.is_floating_point():
        return torch.equal(one, two)
    size = float(one.double().abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
    tolerance = size * 100 * torch.finfo(one.dtype).eps
    return torch.allclose(one.double(), two.double(), rtol=0, atol=tolerance, equal_nan=True)
