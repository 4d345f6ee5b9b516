"""Which stage owns each atom, and which stages each layer reads: a plan applied to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from s2d_compiler.analysis.channels import ChannelAnalysis, Family, cut_resolutions
from s2d_compiler.analysis.labels import NOBODY, VERSIONED, ZERO, Labels
from s2d_compiler.computed import weight_of
from s2d_compiler.errors import PlanError
from s2d_compiler.plan import Plan
from s2d_compiler.program import Program
from s2d_compiler.threads import one_thread

Owners = npt.NDArray[np.int64]

#: Owner codes of positions without an owner (stages count from 1).
OWNER_NOBODY = 0


@dataclass(frozen=True)
class StageAssignment:
    """The input of every pass.

    Attributes:
        program: The static program.
        channels: Its channel analysis.
        plan: The plan.
        owners: Stage of every atom, from 1.
        reads: Layer name -> pairs (later, earlier) that the plan lets it read.
    """

    program: Program
    channels: ChannelAnalysis
    plan: Plan
    owners: Owners
    reads: Mapping[str, frozenset[tuple[int, int]]]

    @property
    def stages(self) -> int:
        return self.plan.stages

    @property
    def thin_stages(self) -> int:
        """Stages cut out of the network; with ``final: original`` the last is not one."""
        return self.plan.stages - (self.plan.final == "original")

    @cached_property
    def owner_labels(self) -> dict[str, Labels]:
        """Node name -> owner of every position: a stage, ``NOBODY``, ``VERSIONED`` or ``ZERO``."""
        return {name: self.owner_of(labels) for name, labels in self.channels.labels.items()}

    def owner_of(self, labels: Labels) -> Labels:
        """Owners of an array of atoms and marks (marks stay)."""
        if not len(self.owners):
            return labels
        return np.where(labels >= 0, self.owners[np.maximum(labels, 0)], labels)

    def columns_alive(self, layer: str, stage: int, *, reuse: bool) -> npt.NDArray[np.bool_]:
        """Input channels of a dense layer that ``stage`` reads.

        The rule stands in docs/semantics.md, "Alive weights".
        """
        channels = self.channels.layers[layer]
        owner = np.full(len(channels.columns[0]), NOBODY, dtype=np.int64)
        for columns in channels.columns:
            mine = self.owner_of(columns)
            owner = np.where(owner == NOBODY, np.where(mine == ZERO, NOBODY, mine), owner)
        alive: npt.NDArray[np.bool_] = (owner == stage) | (owner == NOBODY) | (owner == VERSIONED)
        if reuse:
            for later, earlier in self.reads[layer]:
                if later == stage:
                    alive |= owner == earlier
        if not alive.any():
            present = owner[(owner >= 1) & (owner < stage)]
            if present.size:
                alive = owner == present.max()
        return alive


RowWeights = Callable[[str], npt.NDArray[np.float64]]


def assign(
    program: Program,
    channels: ChannelAnalysis,
    plan: Plan,
    row_weights_of: RowWeights | None = None,
) -> StageAssignment:
    """Apply a plan.

    Args:
        program: The captured model.
        channels: Its channels.
        plan: The plan.
        row_weights_of: What order "l1" goes by, of a layer by name; the program's own weights
            (``row_weights``) where there is none.

    Raises:
        PlanError: The plan names a resolution or layer that the model does not have, or
            leaves a stage with nothing.
    """
    plan.check_against(cut_resolutions(channels), cut_layers(channels))
    owners = np.zeros(channels.atom_count, dtype=np.int64)
    weights = row_weights_of or cache(partial(row_weights, program))
    for family in channels.families:
        split = plan.split_for(family.resolution, family.writers)
        order = family.atoms if plan.order == "index" else _by_weight(channels, family, weights)
        owners[list(order)] = family_owners(len(order), split, plan.groups)
        owners[list(family.atoms[: family.pinned])] = 1
    _require_every_stage(owners, plan, channels)
    reads = {name: plan.reads(layer.resolution, name) for name, layer in channels.layers.items()}
    return StageAssignment(program, channels, plan, owners, reads)


def family_owners(count: int, split: tuple[int, ...], groups: int) -> Owners:
    """Owners of a family's atoms in order: stages up to i own the first max(1, n·p_i // G)."""
    bounds = [max(1, count * point // groups) for point in split]
    owners = np.full(count, len(split) + 1, dtype=np.int64)
    for stage, bound in reversed(list(enumerate(bounds, start=1))):
        owners[:bound] = stage
    return owners


def cut_layers(channels: ChannelAnalysis) -> tuple[str, ...]:
    """Layers that a plan's ``layers`` patterns may name."""
    return tuple(
        name
        for name, layer in channels.layers.items()
        if not set(layer.layer.nodes) <= channels.predictions
    )


def _by_weight(channels: ChannelAnalysis, family: Family, weights: RowWeights) -> tuple[int, ...]:
    """Atoms by the sum of absolute weights over all writers' rows, largest first."""
    atoms = np.asarray(family.atoms, dtype=np.int64)
    place = np.full(channels.atom_count, -1, dtype=np.int64)
    place[atoms] = np.arange(len(atoms))
    total = np.zeros(len(atoms))
    for writer in family.writers:
        at = place[channels.layers[writer].rows]
        np.add.at(total, at[at >= 0], weights(writer)[at >= 0])
    order = np.argsort(-total[family.pinned :], kind="stable") + family.pinned
    return (*family.atoms[: family.pinned], *atoms[order].tolist())


#: Weights that are held in double precision at once.
_AT_ONCE = 1 << 18


def row_weights(program: Program, layer: str) -> npt.NDArray[np.float64]:
    """Sum of absolute weights of every output channel of a layer.

    The same for any number of threads: another order of additions might order channels otherwise.
    """
    module: Any = program.graph_module.get_submodule(layer)
    with one_thread():  # a computed weight
        weight = weight_of(module).detach()
    if not getattr(module, "transposed", False):
        rows = weight.flatten(1)
        step = max(1, _AT_ONCE // max(1, rows.shape[1]))
        return np.concatenate([_row_sums(part) for part in torch.split(rows, step)])
    groups = int(module.groups)
    by_group = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return _row_sums(by_group.flatten(0, 1).flatten(1))


def _row_sums(rows: torch.Tensor) -> npt.NDArray[np.float64]:
    """Sums of absolute numbers (R, N) over N, by numpy, which adds in one order."""
    numbers = rows.abs().double().cpu().contiguous().numpy()
    sums: npt.NDArray[np.float64] = numbers.sum(axis=1)
    return sums


def _require_every_stage(owners: Owners, plan: Plan, channels: ChannelAnalysis) -> None:
    thin = plan.stages - (plan.final == "original")
    empty = [
        stage for stage in range(1, thin + 1) if plan.stages > 1 and not (owners == stage).any()
    ]
    if not empty:
        return
    remedy = "move the cut points apart, or use fewer stages"
    if not len(owners):
        remedy = "the model has no layer whose channels can be cut; use one stage"
    if uncut := (*channels.unknown, *channels.refused):
        names = ", ".join(sorted({f"{use.operator} ({use.reason})" for use in uncut}))
        remedy += f". Operators that could not be followed: {names}"
    raise PlanError(
        f"{plan.source}: stage {empty[0]} of {plan.stages} owns no channel of any layer "
        f"(groups {plan.groups}, default split {list(plan.default.split or ())}); {remedy}."
    )
