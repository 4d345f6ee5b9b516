"""Layers whose weight is masked when it is applied."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.computed import ComputedLayer
from s2d_compiler.masking.masks import LayerMask
from s2d_compiler.provenance import Slice
from s2d_compiler.thin_expression import slice_expression


class MaskedLayer(nn.Module):
    """A convolution or linear layer that is called with a mask for its weight.

    Args:
        layer: The layer, whose settings and tensors it takes over.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.description = f"{type(layer).__name__}({layer.extra_repr()})"
        self.options = _options(layer)
        self.function = _function(layer)
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer._parameters["bias"])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if mask is None else self.weight * mask
        result: torch.Tensor = getattr(functional, self.function)(
            x, weight, self.bias, **self.options
        )
        return result

    def extra_repr(self) -> str:
        return self.description


def _function(layer: nn.Module) -> str:
    name = type(layer).__name__
    if isinstance(layer, nn.Linear):
        return "linear"
    return name.replace("ConvTranspose", "conv_transpose").replace("Conv", "conv")


def _options(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {}
    names = ["stride", "padding", "dilation", "groups"]
    if layer.transposed:
        names.append("output_padding")
    return {name: getattr(layer, name) for name in names}


class MaskedComputedLayer(nn.Module):
    """A layer whose weight is computed: every stage's rows from its alive slice alone.

    A plan says which elements of every tensor a stage keeps, so that here a plan changes index
    lists of other lengths, and ``torch.compile`` compiles again.

    Args:
        layer: The layer, whose tensors it takes over.
        mask: What is read at the layer's first call site.
    """

    def __init__(self, layer: ComputedLayer, mask: LayerMask):
        super().__init__()
        self.layer = [layer]  # not a submodule: its tensors are this module's
        self.mask = mask
        self.parts: list[tuple[Any, ...]] = []
        for key, tensor in layer.tensors().items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(key, tensor)
            else:
                saved = key not in layer._non_persistent_buffers_set
                self.register_buffer(key, tensor, persistent=saved)

    def follow(self, assignment: StageAssignment) -> None:
        """Take over a plan."""
        layer, mask = self.layer[0], self.mask
        seen = np.asarray(mask.seen(assignment).any(axis=1))
        every = np.arange(mask.outputs)
        device = next(iter(self.tensors().values())).device
        self.parts = []
        if mask.stage is None:
            owner = assignment.owner_of(assignment.channels.layers[mask.layer].rows)
            rows_of = [every[owner == k + 1] for k in range(len(seen))]
        else:
            rows_of = [every]
        for rows, columns in zip(rows_of, map(np.flatnonzero, seen), strict=True):
            if rows.size:
                thin = slice_expression(layer, rows.tolist(), columns.tolist())
                index = {key: Slice(key, kept) for key, kept in thin.index.items()}
                constants = {k: v.to(device) for k, v in thin.constants.items()}
                places = (torch.from_numpy(rows)[:, None].to(device),
                          torch.from_numpy(columns)[None].to(device))  # fmt: skip
                self.parts.append((thin.expression, index, constants, places))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        held = [*self._parameters.items(), *self._buffers.items()]
        return {key: tensor for key, tensor in held if tensor is not None}

    def weight_and_bias(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias, dead elements being zero."""
        tensors, layer = self.tensors(), self.layer[0]
        weight = bias = None
        for expression, index, constants, (rows, columns) in self.parts:
            mine = {key: where.take(tensors[key]) for key, where in index.items()}
            here = next(iter(mine.values())).device
            rows, columns = rows.to(here), columns.to(here)
            known = expression.values(mine | {k: v.to(here) for k, v in constants.items()})
            part = known[expression.weight]
            if weight is None:
                shape = (self.mask.outputs, layer.in_channels // layer.groups, *part.shape[2:])
                weight = part.new_zeros(shape)
            weight = weight.index_put((rows, columns), part)
            if expression.bias is not None:
                if bias is None:
                    bias = known[expression.bias].new_zeros(self.mask.outputs)
                bias = bias.index_put((rows[:, 0],), known[expression.bias])
        assert weight is not None
        return weight, bias

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = self.weight_and_bias()
        if mask is not None:
            weight = weight * mask
        return self.layer[0].apply_with(x, weight, bias)

    def extra_repr(self) -> str:
        return self.layer[0].extra_repr()
