"""The masked form: the static program evaluated with dead weights masked.

It defines what a staged network means. The program is run once per stage at full size: in
the run of stage i, positions of earlier stages keep the values of their own runs, positions
of later stages are zero, weights read only what stage i reads. Nothing here uses the passes
or the rules' way of building stages; only the analysis is shared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.labels import VERSIONED, Labels
from s2d_compiler.computed import ComputedLayer
from s2d_compiler.layout import channel_dimensions, layout, take
from s2d_compiler.provenance import Slice
from s2d_compiler.rules.layers import is_cut_between, is_layer
from s2d_compiler.thin_expression import slice_expression


def masked_outputs(assignment: StageAssignment, inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Flat outputs of every thin stage in the masked form.

    Args:
        assignment: Owners and reads; its program's weights are used as they are.
        inputs: The network's inputs.

    Returns:
        Per stage, the flat outputs of the original, stages after it being dead.
    """
    runs: list[dict[fx.Node, Any]] = []
    with torch.no_grad():
        for stage in range(1, assignment.thin_stages + 1):
            runs.append(_Run(assignment, stage, runs[-1] if runs else None).run(inputs))
    leaves = assignment.program.output_leaves
    return [tuple(run[n] if isinstance(n, fx.Node) else n for n in leaves) for run in runs]


class _Run:
    """One evaluation of the whole program, as one stage sees it."""

    def __init__(self, assignment: StageAssignment, stage: int, before: dict[fx.Node, Any] | None):
        self.assignment = assignment
        self.program = assignment.program
        self.channels = assignment.channels
        self.stage = stage
        self.before = before
        self.values: dict[fx.Node, Any] = {}

    def run(self, inputs: tuple[Any, ...]) -> dict[fx.Node, Any]:
        given = iter(inputs)
        for node in self.program.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                self.values[node] = next(given)
            elif node.op == "get_attr":
                self.values[node] = self.program.attribute(node)
            else:
                self.values[node] = self._merge(node, self._evaluate(node))
        return self.values

    def _owners(self, node: fx.Node) -> Labels:
        return self.assignment.owner_labels[node.name]

    def _merge(self, node: fx.Node, value: Any) -> Any:
        """Earlier stages keep their own values, later ones are dead."""
        if not isinstance(value, torch.Tensor) or node.name not in self.assignment.owner_labels:
            return value
        owner = torch.from_numpy(np.ascontiguousarray(self._owners(node)))
        if owner.dim() != value.dim():
            return value
        if self.before is not None and ((owner >= 1) & (owner < self.stage)).any():
            value = torch.where((owner >= 1) & (owner < self.stage), self.before[node], value)
        if (owner > self.stage).any():
            value = torch.where(owner > self.stage, torch.zeros((), dtype=value.dtype), value)
        return value

    def _evaluate(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(dict(node.kwargs), self.values.__getitem__)
        if node.name in self.channels.coupled:
            return self._coupled(node, args, kwargs)
        if node.op == "call_module":
            module = self.program.module(node)
            if is_layer(node) and node.name in self.channels.layer_of:
                return self._layer(node, module, args[0])
            return module(*args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    # -- layers --------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, module: nn.Module, source: Any) -> Any:
        mask = self._column_mask(node, module)
        if isinstance(module, ComputedLayer):
            return self._computed(node, module, mask, source)
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        groups = int(getattr(module, "groups", 1))
        if getattr(module, "transposed", False):
            shape = (-1, *[1] * (weight.dim() - 1))
            masked = weight * mask.reshape(-1).to(weight.dtype).reshape(shape)
        else:
            per_row = mask.repeat_interleave(weight.shape[0] // groups, dim=0)
            masked = weight * per_row.to(weight.dtype).reshape(
                *per_row.shape, *[1] * (weight.dim() - 2)
            )
        parameters = dict(module.named_parameters()) | {"weight": masked}
        return torch.func.functional_call(module, parameters, (source,))

    def _computed(
        self, node: fx.Node, module: ComputedLayer, mask: torch.Tensor, source: Any
    ) -> torch.Tensor:
        """A layer whose weight is computed from the alive slice, the rest of it zero."""
        layer = self.channels.layers[self.channels.layer_of[node.name]]
        rows, columns = np.arange(module.out_channels), torch.nonzero(mask.any(0)).flatten()
        if node.name not in self.channels.predictions:
            rows = np.flatnonzero(self.assignment.owner_of(layer.rows) == self.stage)
        whole, whole_bias = module.weight_and_bias()
        weight = torch.zeros_like(whole)
        bias = None if whole_bias is None else torch.zeros_like(whole_bias)
        if rows.size:
            thin = slice_expression(module, rows.tolist(), columns.tolist())
            tensors = {
                key: Slice(key, index).take(module.tensors()[key])
                for key, index in thin.index.items()
            }
            known = thin.expression.values(tensors | thin.constants)
            at = torch.from_numpy(rows)
            weight[at[:, None], columns] = known[thin.expression.weight]
            if bias is not None and thin.expression.bias is not None:
                bias[at] = known[thin.expression.bias]
        return module.apply_with(source, weight, bias)

    def _column_mask(self, node: fx.Node, module: nn.Module) -> torch.Tensor:
        """(groups, inputs per group): which weights the stage's rows read."""
        layer = self.channels.layer_of[node.name]
        columns = self.channels.layers[layer].columns[0]
        groups = int(getattr(module, "groups", 1))
        if node.name in self.channels.predictions:
            alive = self.assignment.owner_of(columns) <= self.stage
        elif groups > 1 and is_cut_between(module):
            alive = np.ones(len(columns), dtype=bool)
        else:
            alive = self.assignment.columns_alive(layer, self.stage, reuse=True)
        by_group = alive.reshape(groups, -1)
        if groups > 1 and not is_cut_between(module):
            by_group = np.broadcast_to(by_group.any(axis=0), by_group.shape)
        return torch.from_numpy(np.ascontiguousarray(by_group))

    # -- coupled operators ---------------------------------------------------------------------

    def _coupled(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Evaluate on the stage's own channels, with their own count."""
        source_node = node.args[0]
        assert isinstance(source_node, fx.Node)
        owners = self._owners(source_node)
        own = np.flatnonzero(owners.reshape(-1) == self.stage)
        versioned = bool((self._owners(node) == VERSIONED).any())
        if not own.size and (self.before is not None or not versioned):
            return self.before[node] if self.before is not None else torch.zeros_like(args[0])
        if not own.size:
            return self._apply(node, args[0], args[1:], kwargs, None)
        where = layout(owners.shape, own)
        part = take(args[0], where)
        result = self._apply(node, part, args[1:], kwargs, own)
        if versioned:
            return result
        full = torch.zeros_like(args[0])
        dimension = channel_dimensions(owners.shape)[0]
        return full.index_copy(dimension, torch.from_numpy(own), result)

    def _apply(
        self, node: fx.Node, part: torch.Tensor, rest: Any, kwargs: Any, own: Any
    ) -> torch.Tensor:
        if node.op != "call_module":
            return node.target(part, *rest, **kwargs)  # type: ignore[operator, no-any-return]
        module = self.program.module(node)
        if isinstance(module, nn.modules.conv._ConvNd):  # along channels
            return module(part)  # type: ignore[no-any-return]
        index = torch.from_numpy(own)
        weight = None if module.weight is None else module.weight[index]
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(part, [len(own)], weight, module.eps)
        bias = None if module.bias is None else module.bias[index]
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(part, module.num_groups, weight, bias, module.eps)
        assert isinstance(module, nn.LayerNorm)
        return functional.layer_norm(part, (len(own),), weight, bias, module.eps)


def static_outputs(assignment: StageAssignment, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flat outputs of the static program."""
    with torch.no_grad():
        result = assignment.program.graph_module(*inputs)
    return tuple(result)
