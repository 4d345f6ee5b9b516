"""Mask buffers: what a plan says, as tensors of shapes that no plan changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.labels import Labels

Bools = npt.NDArray[np.bool_]


class Mask(Protocol):
    """One buffer of a masked network."""

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        """Its numbers under a plan; the shape is the same for every plan."""


@dataclass(frozen=True, eq=False)
class LayerMask:
    """Which weights of a layer are alive at one call site.

    Attributes:
        layer: The layer's name.
        columns: Atom or mark of every input channel at this call site.
        outputs: Number of output channels.
        groups: Groups of the convolution.
        transposed: Whether the weight is (inputs, outputs / groups, ...).
        rank: Dimensions of the weight.
        stage: The stage of a prediction layer, None for any other layer.
    """

    layer: str
    columns: Labels
    outputs: int
    groups: int
    transposed: bool
    rank: int
    stage: int | None = None

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        seen = self.seen(assignment)
        if self.stage is not None:
            rows = np.zeros(self.outputs, dtype=np.int64)
        else:
            rows = assignment.owner_of(assignment.channels.layers[self.layer].rows) - 1
        by_group = rows.reshape(self.groups, -1)
        mask = seen[by_group, np.arange(self.groups)[:, None]]  # groups, outputs, inputs
        if self.transposed:
            mask = mask.transpose(0, 2, 1)
        mask = mask.reshape(-1, mask.shape[-1])
        return mask.reshape(*mask.shape, *[1] * (self.rank - 2))

    def seen(self, assignment: StageAssignment) -> Bools:
        """Per stage (of a head, its own alone) and group, the inputs that are read."""
        if self.stage is not None:
            stages = np.array([self.stage])
            owner = assignment.owner_of(assignment.channels.layers[self.layer].columns[0])
            alive = (owner <= self.stage)[None]
        else:
            stages = np.arange(1, assignment.stages + 1)
            alive = np.stack(
                [assignment.columns_alive(self.layer, int(k), reuse=True) for k in stages]
            )
        inside: Bools = alive.reshape(len(stages), self.groups, -1)
        if self.groups > 1:
            inside = np.asarray(inside.any(axis=1, keepdims=True))
        later = assignment.owner_of(self.columns)[None] > stages[:, None]
        seen: Bools = inside & ~later.reshape(len(stages), self.groups, -1)
        return seen


@dataclass(frozen=True, eq=False)
class Later:
    """Positions that belong to later stages than one.

    Attributes:
        labels: Atoms and marks of a value.
        stage: The stage.
    """

    labels: Labels
    stage: int

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        return np.asarray(assignment.owner_of(self.labels) > self.stage)


@dataclass(frozen=True, eq=False)
class Own:
    """Positions that belong to one stage.

    Attributes:
        labels: Atoms and marks of a value.
        stage: The stage.
    """

    labels: Labels
    stage: int

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        return np.asarray(assignment.owner_of(self.labels) == self.stage)


@dataclass(frozen=True, eq=False)
class Membership:
    """Which stage owns which channel: (stages, channels), 0 or 1.

    Attributes:
        labels: Atom of every channel.
    """

    labels: Labels

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        owner = assignment.owner_of(self.labels.reshape(-1))
        return np.asarray(owner[None] == np.arange(1, assignment.stages + 1)[:, None])


@dataclass(frozen=True, eq=False)
class OwnFirst:
    """An order of channels in which those of one stage come first.

    Attributes:
        labels: Atom of every channel.
        stage: The stage.
        inverse: Whether to give the order that undoes it.
    """

    labels: Labels
    stage: int
    inverse: bool = False

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        own = assignment.owner_of(self.labels.reshape(-1)) == self.stage
        order = np.argsort(~own, kind="stable")
        return np.argsort(order, kind="stable") if self.inverse else order


@dataclass(frozen=True, eq=False)
class NotFirst:
    """Places of ``OwnFirst`` that hold channels of other stages.

    Attributes:
        labels: Atom of every channel.
        stage: The stage.
        rank: Dimensions of the value.
        dimension: The one that holds the channels.
    """

    labels: Labels
    stage: int
    rank: int
    dimension: int

    def array(self, assignment: StageAssignment) -> npt.NDArray[Any]:
        own = np.sort(assignment.owner_of(self.labels.reshape(-1)) == self.stage)[::-1]
        shape = [-1 if d == self.dimension else 1 for d in range(self.rank)]
        return np.asarray(~own).reshape(shape)
