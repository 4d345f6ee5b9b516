"""The masked form in terms: what every stage must compute, from the model, the plan and the
owners of its channels.

It is written after docs/semantics.md: in the run of stage i, positions of earlier stages keep the
terms of their own runs, positions of later ones are zero, layers read what the plan lets stage i
read, and operators that mix channels without weights see stage i's own channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.labels import VERSIONED
from s2d_compiler.computed import ComputedLayer
from s2d_compiler.program import is_scalar
from s2d_compiler.provenance import Slice, normalised
from s2d_compiler.rules.layers import GROUPS_TO_CUT_BETWEEN, is_layer
from s2d_compiler.thin_expression import slice_expression
from s2d_compiler.verification.arguments import Value
from s2d_compiler.verification.layers import Held, layer_shape
from s2d_compiler.verification.operators import Operators
from s2d_compiler.verification.static import Environment, StaticRun


class Specification(StaticRun):
    """Runs the masked form stage by stage.

    Args:
        assignment: The model's program, its channels, the plan and the owners.
        operators: What operators do to terms.
        inputs: Terms of the network's inputs.
    """

    def __init__(self, assignment: StageAssignment, operators: Operators, inputs: Sequence[Value]):
        super().__init__(assignment.program, operators, inputs)
        self.assignment = assignment
        self.channels = assignment.channels
        self.stage = 0

    def next_stage(self, *, keep: bool = False) -> Environment:
        """Values in the next stage's run: of exits and of what later stages take over.

        Args:
            keep: Return the values of all nodes.
        """
        self.stage += 1
        found = self.run(lambda node, found: self._merged(node, self._evaluated(node, found)),
                          lambda node: keep or self._is_taken_over(node))  # fmt: skip
        self.before = found
        return found

    def _is_taken_over(self, node: fx.Node) -> bool:
        owners = self.assignment.owner_labels.get(node.name)
        return node.name in self.channels.coupled or (
            owners is not None and bool((owners > 0).any())
        )

    # -- one node ----------------------------------------------------------------------------------

    def _evaluated(self, node: fx.Node, found: Environment) -> Any:
        if node.name in self.channels.coupled:
            return self._coupled(node, found)
        if node.op == "call_module" and is_layer(node) and node.name in self.channels.layer_of:
            x = found[node.args[0]]  # type: ignore[index]
            alive = self._alive(node)
            if isinstance(self.program.module(node), ComputedLayer):
                return self._computed(node, x, alive)
            return self._module(self._held(node, alive), x)
        return self._plain(node, found)

    def _merged(self, node: fx.Node, value: Any) -> Any:
        """Earlier stages keep their own values, later ones are zero."""
        owners = self.assignment.owner_labels.get(node.name)
        if not isinstance(value, Value) or owners is None or is_scalar(node):
            return value
        terms = value.terms
        if owners.ndim != terms.dim() or not (owners >= 1).any():
            return value
        owner = torch.from_numpy(np.ascontiguousarray(owners))
        earlier, later = (owner >= 1) & (owner < self.stage), owner > self.stage
        if earlier.any():
            terms = torch.where(earlier, self.before[node].terms, terms)
        if later.any():
            terms = torch.where(later, torch.zeros((), dtype=torch.int64), terms)
        return Value(terms)

    # -- layers ------------------------------------------------------------------------------------

    def _alive(self, node: fx.Node) -> torch.Tensor:
        """Which input channels the stage's rows read, in the order of the channels."""
        module, layer = self.program.module(node), self.channels.layer_of[node.name]
        columns = self.channels.layers[layer].columns[0]
        alive: Any
        groups = int(getattr(module, "groups", 1))
        between = groups >= GROUPS_TO_CUT_BETWEEN or groups == len(columns)
        if node.name in self.channels.predictions:
            alive = np.asarray(self.assignment.owner_of(columns) <= self.stage)
        elif groups > 1 and between:
            alive = np.ones(len(columns), dtype=bool)
        else:
            alive = self.assignment.columns_alive(layer, self.stage, reuse=True)
        if groups > 1 and not between:
            inside = alive.reshape(groups, -1).any(axis=0)
            alive = np.broadcast_to(inside, (groups, len(inside))).reshape(-1)
        return torch.from_numpy(np.ascontiguousarray(alive))

    def _computed(self, node: fx.Node, x: Value, alive: torch.Tensor) -> Value:
        """A layer whose weight is computed from the alive slice."""
        module: ComputedLayer = self.program.module(node)
        layer = self.channels.layers[self.channels.layer_of[node.name]]
        rows = np.arange(module.out_channels)
        if node.name not in self.channels.predictions:
            rows = np.flatnonzero(self.assignment.owner_of(layer.rows) == self.stage)
        dimension = -1 if module.layer_class == "Linear" else 1
        if not len(rows):
            shape = layer_shape(module.layer(), tuple(x.terms.shape))
            return Value(torch.zeros(shape, dtype=torch.int64))
        per_group_in = module.in_channels // module.groups
        per_group_out = module.out_channels // module.groups
        inside = torch.nonzero(alive.reshape(module.groups, -1).any(0)).flatten().tolist()
        used = sorted({int(r) // per_group_out for r in rows})
        chosen = [g * per_group_in + j for g in used for j in inside]
        part = x.terms.index_select(dimension, torch.tensor(chosen, dtype=torch.int64))
        thin = ThinComputed(module, rows.tolist(), inside, len(used))
        held = Held(thin, self._thin_slices(node, thin))
        terms = self._module(held, Value(part)).terms
        size = list(terms.shape)
        size[dimension] = module.out_channels
        full = torch.zeros(size, dtype=torch.int64)
        return Value(full.index_copy(dimension % full.dim(), torch.from_numpy(rows), terms))

    def _thin_slices(self, node: fx.Node, thin: ThinComputed) -> Mapping[str, Slice]:
        path, module = str(node.target), self.program.module(node)
        tensors = module.tensors()
        return {
            key: Slice(self.program.sources.get(f"{path}.{key}", f"{path}.{key}"),
                       normalised(index, tuple(tensors[key].shape)))
            for key, index in thin.index.items()
            if key not in module._non_persistent_buffers_set  # constants, whose numbers count
        }  # fmt: skip

    # -- coupled operators -------------------------------------------------------------------------

    def _coupled(self, node: fx.Node, found: Environment) -> Any:
        """An operator that mixes channels without weights, on the stage's own channels."""
        source: Any = node.args[0]
        x: Value = found[source]
        owners = self.assignment.owner_labels[source.name]
        own = np.flatnonzero(owners.reshape(-1) == self.stage)
        versioned = bool((self.assignment.owner_labels[node.name] == VERSIONED).any())
        is_first = self.stage == 1
        if not len(own) and not (is_first and versioned):
            return Value(torch.zeros_like(x.terms)) if is_first else self.before[node]
        if not len(own):
            return self._plain(node, found)
        dimension = next(d for d, size in enumerate(owners.shape) if size > 1)
        index = torch.from_numpy(own)
        part = Value(x.terms.index_select(dimension, index))
        if node.op == "call_module":
            result = self._module(self._thin_norm(node, own), part)
        else:
            args = fx.map_arg(node.args[1:], found.__getitem__)
            kwargs = fx.map_arg(dict(node.kwargs), found.__getitem__)
            result = self.operators.apply(node.target, (part, *args), kwargs)
        if versioned:
            return result
        full = torch.zeros_like(x.terms)
        return Value(full.index_copy(dimension, index, result.terms))

    def _thin_norm(self, node: fx.Node, own: Any) -> Held:
        held = self._held(node)
        if isinstance(held.module, nn.modules.conv._ConvNd):  # moves along channels
            return held
        chosen = tuple(int(c) for c in own)
        slices = {k: Slice(s.source, (chosen,) if len(s.index) == 1 else s.index)
                  for k, s in held.slices.items()}  # fmt: skip
        return Held(_resized(held.module, len(own)), slices)


def _resized(module: Any, channels: int) -> Any:
    """A norm's settings for fewer channels."""
    changed = copy.copy(module)
    if hasattr(module, "normalized_shape"):
        changed.normalized_shape = (channels,)
    else:
        changed.num_channels = channels
    return changed


class ThinComputed(ComputedLayer):
    """A layer with a computed weight, cut to some rows and columns; settings and tensors' shapes
    only.

    Args:
        module: The whole layer.
        rows: Its output channels that are kept.
        inside: Its input channels within a group that are kept.
        groups: Groups that are kept.
    """

    def __init__(self, module: ComputedLayer, rows: list[int], inside: list[int], groups: int):
        nn.Module.__init__(self)
        thin = slice_expression(module, rows, inside)
        self.layer_class = module.layer_class
        self.settings = dict(module.settings)
        names = ("in_features", "out_features") if self.layer_class == "Linear" else (
            "in_channels", "out_channels")  # fmt: skip
        self.settings[names[0]] = len(inside) * groups
        self.settings[names[1]] = len(rows)
        if "groups" in self.settings:
            self.settings["groups"] = groups
        self.expression = thin.expression
        self.index = thin.index
        whole = module.tensors()
        self.held = {
            key: torch.empty([len(i) for i in index], device="meta") if whole[key].dim() else
            whole[key] for key, index in thin.index.items()
        }  # fmt: skip
        for key in module._non_persistent_buffers_set & set(thin.index):
            where = Slice(key, normalised(thin.index[key], tuple(whole[key].shape)))
            self.held[key] = where.take(whole[key].detach())
        self.held |= dict(thin.constants)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.held
