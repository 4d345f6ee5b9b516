"""Comparing the masked form with the staged form, in evaluation and in training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from s2d_compiler import DynamicModel, MaskedModel, masked

LARGEST = 1e-9
"""Of the spread of an output over the inputs."""
VACUOUS = 1e-6
"""A spread below this share of an output's size tells nothing."""


@dataclass
class Compared:
    """Largest error of any output, and how many outputs told something."""

    error: float
    telling: int


def tensors(output: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]


def compared(ours: Any, theirs: Any) -> Compared:
    """Outputs of all stages, each measured by its spread over the inputs."""
    error, telling = 0.0, 0
    mine, others = tensors(ours), tensors(theirs)
    assert len(mine) == len(others)
    for a, b in zip(mine, others, strict=True):
        assert a.shape == b.shape
        if not b.is_floating_point():
            assert torch.equal(a, b)
            continue
        spread = float((b - b.mean(0)).abs().max()) if b.dim() else 0.0
        size = float(b.abs().max()) if b.numel() else 0.0
        if spread > VACUOUS * size:
            telling += 1
        else:  # zeros, or the same for all inputs
            spread = max(size, 1e-300)
        error = max(error, float((a - b).abs().max()) / spread if b.numel() else 0.0)
    return Compared(error, telling)


def equal(net: MaskedModel, dyn: DynamicModel, inputs: tuple[Any, ...], **kwargs: Any) -> Compared:
    """Compare the outputs of both forms in evaluation mode."""
    net.eval()
    dyn.eval()
    with torch.no_grad():
        result = compared(net(*inputs, **kwargs), dyn(*inputs, **kwargs))
    assert result.error <= LARGEST, f"the forms differ by {result.error:.1e} of the spread"
    return result


def loss_of(outputs: Any) -> Tensor:
    """A loss to which every number of every output matters, none like another."""
    total = torch.zeros((), dtype=torch.float64)
    for k, output in enumerate(tensors(outputs)):
        if output.is_floating_point() and output.numel():
            weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype)
            flat = output.reshape(-1)
            total = total + (k + 1) * (weights * flat + (flat * weights).square() / 2).mean()
    return total


def one_step(model: nn.Module, inputs: tuple[Any, ...], **keywords: Any) -> None:
    """A step of gradient descent in training mode, without dropout."""
    model.train()
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of(model(*inputs, **keywords)).backward()
    optimizer.step()


def trained_alike(net: MaskedModel, inputs: tuple[Any, ...], **keywords: Any) -> None:
    """Require that one step of either form gives the same weights and statistics."""
    dyn = net.extract()
    start = copy.deepcopy(dyn.state_dict())
    one_step(dyn, inputs, **keywords)
    one_step(net, inputs, **keywords)
    mine = net.extract().state_dict()
    moved = 0.0
    for key, value in dyn.state_dict().items():
        if key not in dyn.provenance:
            continue
        change = float((value - start[key]).abs().max()) if value.numel() else 0.0
        moved = max(moved, change)
        error = float((mine[key] - value).abs().max()) if value.numel() else 0.0
        scale = max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        assert error <= LARGEST * scale, (
            f"{key} differs by {error:.1e} after a step of {change:.1e}"
        )
    assert moved > 0


def both_ways(model: nn.Module, spec: dict[str, Any], x: Tensor) -> tuple[Compared, MaskedModel]:
    """Everything that must hold of one network and plan."""
    net = masked(model, spec, (x,))
    return equal(net, net.extract(), (x,)), net
