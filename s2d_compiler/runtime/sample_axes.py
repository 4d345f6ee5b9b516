"""Where each sample of a batch lies in the features and outputs of a network.

Mostly in dimension 0; in dimension 1 of sequence-first tokens; together with windows or heads in
one dimension where these are merged into the batch; nowhere in what is computed from no input.
Graphs do not say it, so it is found by running the stages on tiny batches, of random samples and of
some of those that have come. Two samples and three differ in the size of one dimension. Another
second sample, the two in the other order, and a third one must leave a sample's numbers alone:
where they do not, samples depend on each other, on their place, or on how many they are.
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


#: Samples in dimension 0.
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


@dataclass(frozen=True, slots=True)
class _Probe:
    """What the stages give for four small batches.

    Attributes:
        pair: First and second sample.
        other: The first and another second one.
        swapped: The second and the first.
        triple: First, second, and the other one.
    """

    pair: Any
    other: Any
    swapped: Any
    triple: Any

    def map(self, pick: Callable[[Any], Any]) -> _Probe:
        """The same part of each."""
        return _Probe(pick(self.pair), pick(self.other), pick(self.swapped), pick(self.triple))


@torch.no_grad()
def find_sample_axes(
    run: Callable[[tuple[Tensor, ...]], Values], inputs: Sequence[Tensor]
) -> SampleAxes | None:
    """Find where samples lie.

    Random samples are as different as can be, and may be none that the network knows what to do
    with; those that came are what it is made for, and may all be alike. So both are asked.

    Args:
        run: Runs all stages on flat inputs.
        inputs: Inputs like those that will come, (N, ...) each, of two samples or more.

    Returns:
        None where samples depend on each other, or the network does not run on two samples.

    Raises:
        UnknownError: These inputs do not show it.
    """
    found: list[SampleAxes] = []
    failure: Exception | None = None
    for samples in ([_like(inputs, seed) for seed in range(3)], _rows(inputs)):
        if all(torch.equal(a, b) for a, b in zip(samples[0], samples[1], strict=True)):
            continue
        try:
            probe = _probed(run, samples)
        except Exception as error:
            failure = error
            continue
        try:
            axes = _axes(probe)
        except _DependentError as error:
            log.warning("samples run one by one: %s", error)
            return None
        if axes is not None:
            found.append(axes)
    if not found and failure is not None:
        log.warning("samples run one by one: a batch of two or three fails: %s", failure)
        return None
    if not found:
        raise UnknownError
    if any(axes != found[0] for axes in found):
        log.warning("samples run one by one: where they lie changes with their numbers")
        return None
    return found[0]


def output_axes(
    run: Callable[[tuple[Tensor, ...]], Values], inputs: Sequence[Tensor]
) -> tuple[tuple[SampleAxis, ...], ...]:
    """Where outputs of samples that run one by one are to be put together, from sizes alone.

    Args:
        run: Runs all stages on flat inputs.
        inputs: (N, ...) each, of two samples or more.

    Returns:
        Per stage, per flat output; dimension 0 where two samples do not run, or tell nothing.
    """
    alone = run(tuple(value[:1] for value in inputs))[1]
    try:
        pair = run(tuple(value[:2] for value in inputs))[1]
    except Exception as error:
        log.debug("two samples fail: %s", error)
        pair = alone
    return tuple(
        tuple(_size_axis(one, two) for one, two in zip(*leaves, strict=True))
        for leaves in zip(alone, pair, strict=True)
    )


def _size_axis(one: Any, two: Any) -> SampleAxis:
    if not isinstance(one, Tensor):
        return WHOLE
    found = [d for d, size in enumerate(one.shape) if two.shape[d] == 2 * size != 0]
    return SampleAxis(found[0], one.shape[found[0]]) if len(found) == 1 else WHOLE


class UnknownError(Exception):
    """What the network gives for some inputs shows nothing: all are alike, or NaN comes out."""


class _DependentError(Exception):
    """A sample changes the numbers of another one, or lies nowhere."""


def _probed(run: Callable[[tuple[Tensor, ...]], Values], samples: list[list[Tensor]]) -> _Probe:
    first, second, third = samples
    return _Probe(
        *(
            run(tuple(torch.cat(parts) for parts in zip(*batch, strict=True)))
            for batch in (
                (first, second), (first, third), (second, first), (first, second, third),
            )
        )
    )  # fmt: skip


def _axes(probe: _Probe) -> SampleAxes | None:
    """Where samples lie in everything; None where something is NaN, which equals nothing."""
    features, leaves = probe.pair

    def feature(key: tuple[int, int]) -> SampleAxis:
        return _axis(probe.map(lambda values: values[0][key]))

    def output(stage: int, place: int) -> SampleAxis | None:
        axis = _axis(probe.map(lambda values: values[1][stage][place]))
        return axis if isinstance(leaves[stage][place], Tensor) else None

    found = SampleAxes(
        {key: feature(key) for key in features},
        tuple(
            tuple(output(stage, place) for place in range(len(row)))
            for stage, row in enumerate(leaves)
        ),
    )
    values = [*features.values(), *(value for row in leaves for value in row)]
    has_nan = any(isinstance(v, Tensor) and bool(v.isnan().any()) for v in values)
    return None if has_nan else found


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
        found.append(_in_format(sample.to(device=value.device, dtype=value.dtype), value))
    return found


def _rows(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Three samples of those that came; of two, the third is the second in another order."""
    found: list[list[Tensor]] = [[], [], []]
    for value in inputs:
        rows = [value[k : k + 1].detach() for k in (0, 1, min(2, len(value) - 1))]
        if len(value) == 2:
            rows[2] = rows[1].flatten().flip(0).reshape(rows[1].shape)
        for place, row in zip(found, rows, strict=True):
            if row.is_floating_point():
                row = row.nan_to_num(0, 0, 0)
            place.append(_in_format(row, value))
    return found


def _in_format(sample: Tensor, value: Tensor) -> Tensor:
    if value.ndim == 4 and not value.is_contiguous():
        return sample.contiguous(memory_format=torch.channels_last)
    return sample


def _axis(probe: _Probe) -> SampleAxis:
    """How a value holds samples."""
    pair, other, swapped, triple = probe.pair, probe.other, probe.swapped, probe.triple
    if not isinstance(pair, Tensor):
        if not pair == other == swapped == triple:
            raise _DependentError("a number depends on them")
        return SampleAxis(None)
    sizes = [
        (d, two, three)
        for d, (two, three) in enumerate(zip(pair.shape, triple.shape, strict=True))
        if two != three
    ]
    if not sizes:
        if not (_equal(pair, other) and _equal(pair, swapped) and _close(pair, triple)):
            raise _DependentError("a value without a batch dimension depends on them")
        return SampleAxis(None)
    (dimension, two, three), *more = sizes
    if more or two % 2 or three != two // 2 * 3:
        raise _DependentError(
            f"sizes {tuple(pair.shape)} of two samples become {tuple(triple.shape)} of three"
        )
    factor = two // 2
    row, both = (torch.arange(n, device=pair.device) for n in (1, 2))
    layouts = [SampleAxis(dimension, factor)]
    if factor > 1:
        layouts.append(SampleAxis(dimension, factor, is_outer=False))
    fitting = [
        a
        for a in layouts
        if _equal(a.take(pair, row), a.take(other, row))
        and _close(pair, a.take(swapped, both.flip(0)))
        and _close(pair, a.take(triple, both))
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise _DependentError(
        "their outputs depend on each other"
        if not fitting
        else "where they lie in merged positions does not show"
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding: the same places of batches of one size, by the same kernels."""
    return _within(one, two, {torch.float64: 1e-13, torch.float32: 1e-5}.get(one.dtype, 0.03))


def _close(one: Tensor, two: Tensor) -> bool:
    """Equal but for what other kernels, or other parts of them, make of it."""
    coarse = 0.02 if one.is_cuda else 1e-4  # on CUDA, some multiply with ten bits
    return _within(one, two, {torch.float64: 1e-9, torch.float32: coarse}.get(one.dtype, 0.1))


def _within(one: Tensor, two: Tensor, share: float) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    if one.is_complex():
        one, two = torch.view_as_real(one), torch.view_as_real(two)
    one, two = one.double(), two.double()
    size = float(one.abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=size * share, equal_nan=True)
