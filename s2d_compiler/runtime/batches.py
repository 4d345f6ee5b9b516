"""A batch on its way through the stages: what is left of it, and what has been computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler.runtime.sample_axes import WHOLE, SampleAxes, SampleAxis


@dataclass(frozen=True, slots=True)
class Wiring:
    """What each stage takes, and which features are read afterwards.

    Attributes:
        inputs: Per stage, ``("input", k)`` or ``("feature", stage, position)``.
        kept: Per stage, the features that later stages read.
    """

    inputs: tuple[tuple[tuple[Any, ...], ...], ...]
    kept: tuple[frozenset[tuple[int, int]], ...]


class Batch(ABC):
    """Samples that go from stage to stage together.

    Attributes:
        is_whole: Whether stages run for samples that have left, too.
    """

    is_whole = False

    @abstractmethod
    def run(self, number: int) -> Sequence[Any]:
        """Run a stage for the samples that are left; its flat outputs for these."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these of the samples that are left, in ascending order."""

    @abstractmethod
    def axis(self, stage: int, position: int) -> SampleAxis | None:
        """How a flat output of a stage holds the samples; None for no tensor."""


class TogetherBatch(Batch):
    """All samples in one tensor; those that leave are taken out of features and inputs."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        wiring: Wiring,
        axes: SampleAxes | None,
        inputs: Sequence[Tensor],
    ):
        self.stages = stages
        self.wiring = wiring
        self.axes = axes
        self.inputs = list(inputs)
        self.features: dict[tuple[int, int], Any] = {}

    def run(self, number: int) -> Sequence[Any]:
        inputs, features = self.inputs, self.features
        arguments = [
            inputs[where[1]] if where[0] == "input" else features[where[1], where[2]]
            for where in self.wiring.inputs[number]
        ]
        leaves, handed = self.stages[number](*arguments)
        del arguments
        for position, value in enumerate(handed):
            features[number, position] = value
        kept = self.wiring.kept[number]
        for key in [k for k in features if k not in kept]:
            del features[key]
        return leaves  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        assert self.axes is not None
        self.inputs = [WHOLE.take(value, rows) for value in self.inputs]
        for key, value in self.features.items():
            self.features[key] = self.axes.features[key].take(value, rows)

    def axis(self, stage: int, position: int) -> SampleAxis | None:
        return WHOLE if self.axes is None else self.axes.outputs[stage][position]


class WholeBatch(TogetherBatch):
    """One batch size only: stages run for all samples as long as one is left."""

    is_whole = True

    def __init__(self, stages: Sequence[nn.Module], wiring: Wiring, inputs: Sequence[Tensor]):
        super().__init__(stages, wiring, None, inputs)
        self.rows: Tensor | None = None
        self.samples = len(inputs[0]) if inputs else 1

    def run(self, number: int) -> Sequence[Any]:
        leaves = super().run(number)
        if self.rows is None:
            return leaves
        return [self._taken(leaf) for leaf in leaves]

    def keep(self, rows: Tensor) -> None:
        self.rows = rows if self.rows is None else self.rows[rows]

    def _taken(self, leaf: Any) -> Any:
        assert self.rows is not None
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == self.samples:
            return leaf.index_select(0, self.rows)
        return leaf


class SingleSamples(Batch):
    """Samples one by one, for networks in which they depend on each other.

    Args:
        axes: Per stage and flat output, where they are put together.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        wiring: Wiring,
        axes: Sequence[Sequence[SampleAxis]],
        inputs: Sequence[Tensor],
    ):
        self.axes = axes
        self.samples = [
            TogetherBatch(stages, wiring, None, [value[row : row + 1] for value in inputs])
            for row in range(len(inputs[0]))
        ]

    def run(self, number: int) -> Sequence[Any]:
        found = [sample.run(number) for sample in self.samples]
        return [
            torch.cat(leaves, axis.dimension or 0)
            if isinstance(leaves[0], Tensor) and leaves[0].ndim
            else leaves[0]
            for axis, leaves in zip(self.axes[number], zip(*found, strict=True), strict=True)
        ]

    def keep(self, rows: Tensor) -> None:
        self.samples = [self.samples[row] for row in rows.tolist()]

    def axis(self, stage: int, position: int) -> SampleAxis | None:
        return self.axes[stage][position]
