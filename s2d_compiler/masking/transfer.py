"""Weights between the masked and the staged form, by provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from s2d_compiler.attributes import read
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import UsageError
from s2d_compiler.provenance import Slice

#: Whose tensors: of all stages, or of the untouched network at the end.
ALL, ORIGINAL = -1, -2


@dataclass(frozen=True)
class Weights:
    """The tensors of a masked form.

    Attributes:
        tensors: By owner (a stage from 1 whose head it is, ``ALL``, ``ORIGINAL``) and key in the
            original's state dict.
        last: Index of the stage that is the untouched network, None for none.
        names: Their names in the masked form.
    """

    tensors: Mapping[tuple[int, str], torch.Tensor]
    last: int | None
    names: Mapping[tuple[int, str], str]

    def find(self, key: str, source: str) -> torch.Tensor | None:
        """The tensor that a stage's tensor is a slice of, None for none.

        Args:
            key: The stage's tensor in the staged network's state dict.
            source: What it is a slice of in the original.
        """
        _, number, name = key.split(".", 2)
        if int(number) == self.last:
            return self.tensors.get((ORIGINAL, source))
        head = (int(number) + 1, source)
        if head in self.tensors and self._is_of_module(self.names[head], name):
            return self.tensors[head]
        return self.tensors.get((ALL, source), self.tensors.get(head))

    @staticmethod
    def _is_of_module(mine: str, name: str) -> bool:
        """Whether two names lie in one module: its own tensors, or the same used by itself."""
        return mine.rpartition(".")[0].split(".", 2)[2:] == [name.rpartition(".")[0]]


def _pairs(weights: Weights, dyn: DynamicModel) -> list[tuple[str, Slice, torch.Tensor]]:
    """Every tensor of a staged network that comes from the original, and what it is a slice of."""
    found = []
    for key, where in dyn.provenance.items():
        whole, part = weights.find(key, where.source), read(dyn, key)
        if whole is None:
            raise UsageError(
                f"{key} of the staged network is a slice of {where.source!r}, which the masked "
                "form does not have; make the masked form from the model that the network was "
                "compiled from."
            )
        fits = len(where.index) == whole.dim() and all(
            index is None or max(index, default=0) < size
            for index, size in zip(where.index, whole.shape, strict=True)
        )
        if not fits or where.shape(whole) != tuple(part.shape):
            raise UsageError(
                f"{key} of the staged network has the shape {tuple(part.shape)}, which is no such "
                f"slice of {where.source!r} of shape {tuple(whole.shape)} in the masked form; make "
                "the masked form from the model that the network was compiled from."
            )
        found.append((key, where, whole))
    return found


def write_to(weights: Weights, dyn: DynamicModel, *, in_place: bool = True) -> None:
    """Write a masked form's weights into a staged network.

    Args:
        weights: The masked form's.
        dyn: The staged network.
        in_place: Whether the network keeps its types and devices; else it takes over the masked
            form's.

    Raises:
        UsageError: It was made from another model.
    """
    with torch.no_grad():
        for key, where, whole in _pairs(weights, dyn):
            part = where.take(whole.detach())
            held = read(dyn, key)
            if in_place:
                held.copy_(part)
                continue
            held.data = part
            if isinstance(held, nn.Parameter):
                held.requires_grad_(whole.requires_grad)


def take_from(weights: Weights, dyn: DynamicModel) -> None:
    """The reverse of ``write_to``; what no stage holds stays as it was.

    Raises:
        UsageError: It was made from another model, or holds different numbers in the place of one
            of the masked form's. Nothing is changed then.
    """
    pairs = _pairs(weights, dyn)
    taken = {id(whole): whole.detach().clone() for _, _, whole in pairs}
    with torch.no_grad():
        for key, where, whole in pairs:
            copied = taken[id(whole)]
            copied[_grid(where, copied)] = read(dyn, key).detach().to(copied.device, copied.dtype)
        for key, where, whole in pairs:
            part = read(dyn, key).detach().to(whole.device, whole.dtype)
            found = where.take(taken[id(whole)])
            apart = whole.is_floating_point() and not _is_same(found, part)
            if apart:
                raise UsageError(
                    f"{key} of the staged network is a slice of {where.source!r} that another "
                    "tensor holds as well, and they are no longer the same, while the masked form "
                    "has one tensor for both; train this network in its staged form."
                )
        for _, _, whole in pairs:
            whole.copy_(taken[id(whole)])


def freeze_as(weights: Weights, dyn: DynamicModel) -> None:
    """Let the masked form's parameters take gradients where a staged network's do.

    Raises:
        UsageError: Slices of one parameter differ in that, or the network is of another model.
    """
    takes: dict[int, bool] = {}
    for key, where, whole in _pairs(weights, dyn):
        part = read(dyn, key)
        if not isinstance(part, nn.Parameter):
            continue
        if takes.setdefault(id(whole), part.requires_grad) != part.requires_grad:
            raise UsageError(
                f"{key} of the staged network has requires_grad={part.requires_grad}, and another "
                f"slice of {where.source!r} differs, while the masked form has one tensor for "
                "both; train this network in its staged form."
            )
        whole.requires_grad_(part.requires_grad)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _grid(where: Slice, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An index of a slice's elements."""
    sizes = zip(where.index, whole.shape, strict=True)
    index = [
        np.arange(size) if chosen is None else np.asarray(chosen, dtype=np.int64)
        for chosen, size in sizes
    ]
    return tuple(torch.from_numpy(i).to(whole.device) for i in np.ix_(*index))
