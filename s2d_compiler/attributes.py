"""Modules and tensors under dotted names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


def read(root: nn.Module, target: str) -> Any:
    """What stands under a dotted name.

    Raises:
        AttributeError: Nothing does.
    """
    value: Any = root
    for part in target.split("."):
        held = _held(value, part)
        value = getattr(value, part) if held is None else held
    return value


def find(root: nn.Module, target: str) -> Any:
    """What stands under a dotted name, None for nothing."""
    value: Any = root
    for part in target.split("."):
        held = _held(value, part)
        value = getattr(value, part, None) if held is None else held
        if value is None:
            return None
    return value


def _held(value: Any, name: str) -> Any:
    """What a module holds under a name. Its own attribute access fails once before it looks in
    these tables, and graphs ask for thousands of names."""
    if not isinstance(value, nn.Module):
        return None
    found: Any = value._modules.get(name)
    if found is None:
        found = value._parameters.get(name)
    return value._buffers.get(name) if found is None else found


def with_or_without_bias(module: nn.Module, has_bias: bool) -> nn.Module:
    """A norm as it is, or without the bias (an option that not every release's norms have)."""
    if not has_bias:
        module.register_parameter("bias", None)
    return module


def is_container(value: Any) -> bool:
    """Whether something is a plain module that only holds others."""
    return isinstance(value, nn.Module) and type(value) is nn.Module


def is_taken(root: nn.Module, target: str) -> bool:
    """Whether a dotted name holds something else than a container."""
    found = find(root, target)
    return found is not None and not is_container(found)


def put(root: nn.Module, target: str, value: Any, *, saved: bool = True) -> None:
    """Put a module, parameter or buffer under a dotted name, making containers on the way.

    Args:
        root: Where the name starts.
        target: The name.
        value: A module, or a tensor.
        saved: Whether a buffer belongs to the state dict.
    """
    *containers, last = target.split(".")
    module = root
    for part in containers:
        if module._modules.get(part) is None:
            module.add_module(part, nn.Module())
        module = read(module, part)
    if isinstance(value, nn.Module):
        module.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_buffer(last, value, persistent=saved)


def is_saved(root: nn.Module, target: str) -> bool:
    """Whether a tensor under a dotted name belongs to the state dict."""
    container, _, last = target.rpartition(".")
    holder = read(root, container) if container else root
    return last not in holder._non_persistent_buffers_set


def empty_graph_module(class_name: str) -> fx.GraphModule:
    """A graph module that holds nothing yet, for ``put`` and a graph."""
    return fx.GraphModule(nn.Module(), fx.Graph(), class_name=class_name)


def graph_module(root: nn.Module, graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A graph module over what ``root`` holds.

    ``fx.GraphModule`` copies attributes and forgets which buffers are not saved.
    """
    result = fx.GraphModule(root, graph, class_name=class_name)
    for path, module in root.named_modules():
        if is_container(module) and (not path or find(result, path) is not None):
            held = read(result, path) if path else result
            held._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return result


def empty_like(tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """A tensor of other sizes on the meta device, a parameter if the given one is."""
    shape = torch.empty(sizes, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shape, requires_grad=tensor.requires_grad)
    return shape
