"""Thin modules: slices of layers as shapes first, filled with weights at the end.

Passes work on modules of the meta device and say in ``graph_module.meta["slices"]`` what
each of their tensors is a slice of; ``fill`` copies the numbers once everything is decided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from s2d_compiler.attributes import empty_like, find, is_taken, put, read
from s2d_compiler.computed import ComputedLayer, weight_shape
from s2d_compiler.program import Program
from s2d_compiler.provenance import Slice, normalised
from s2d_compiler.thin_expression import slice_expression

Positions = npt.NDArray[np.int64]
Slices = dict[str, tuple[torch.Tensor, Slice]]


def _tuple(positions: Positions) -> tuple[int, ...]:
    return tuple(positions.tolist())


def _slice(
    program: Program, path: str, key: str, tensor: torch.Tensor, index: tuple[Any, ...]
) -> Slice:
    name = f"{path}.{key}"
    return Slice(program.sources.get(name, name), normalised(index, tuple(tensor.shape)))


def thin_layer_module(
    program: Program, node: fx.Node, rows: Positions, columns: Positions | None, groups: int
) -> tuple[str, Slices, nn.Module]:
    """Rows and columns of a convolution or linear layer.

    Args:
        rows: Output channels.
        columns: Input channels within a group; None for all.
        groups: Groups of the thin layer.
    """
    module = program.module(node)
    path = str(node.target)
    if isinstance(module, ComputedLayer):
        return _thin_computed(program, path, module, rows, columns, groups)
    weight: torch.Tensor = module.weight
    taken = _tuple(rows)
    chosen = None if columns is None else _tuple(columns)
    rest = (None,) * (weight.dim() - 2)
    if getattr(module, "transposed", False):
        index = _transposed_index(module, rows, columns, groups)
    else:
        index = (taken, chosen, *rest)
    slices = {"weight": (weight, _slice(program, path, "weight", weight, index))}
    if module.bias is not None:
        bias: torch.Tensor = module.bias
        slices["bias"] = (bias, _slice(program, path, "bias", bias, (taken,)))
    per_group = weight.shape[1] if columns is None else len(columns)
    if getattr(module, "transposed", False):
        per_group = len(index[0] or range(weight.shape[0])) // groups
    return path, slices, _resized_layer(module, per_group * groups, len(rows), groups)


def _thin_computed(
    program: Program,
    path: str,
    module: ComputedLayer,
    rows: Positions,
    columns: Positions | None,
    groups: int,
) -> tuple[str, Slices, nn.Module]:
    """Rows and columns of a layer with a computed weight, as ``thin_layer_module``."""
    inside = range(weight_shape(module)[1]) if columns is None else columns.tolist()
    thin = slice_expression(module, rows.tolist(), inside)
    tensors, slices = module.tensors(), {}
    shapes: dict[str, torch.Tensor] = {}
    for key, index in thin.index.items():
        slices[key] = (tensors[key], _slice(program, path, key, tensors[key], index))
        shapes[key] = empty_like(tensors[key], tuple(len(chosen) for chosen in index))
    unsaved = frozenset({*module._non_persistent_buffers_set, *thin.constants})
    config = _resized_layer(module.layer(), len(inside) * groups, len(rows), groups)
    build = ComputedLayer(config, thin.expression, shapes | thin.constants, unsaved)
    return path, slices, build


def _transposed_index(
    module: nn.Module, rows: Positions, columns: Positions | None, groups: int
) -> tuple[Any, ...]:
    """Index of a transposed convolution's weight (in_channels, out_channels / groups, ...)."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    whole = int(module.groups)  # type: ignore[arg-type]
    per_in, per_out = weight.shape[0] // whole, weight.shape[1]
    rest = (None,) * (weight.dim() - 2)
    if whole == 1:
        return (None if columns is None else _tuple(columns), _tuple(rows), *rest)
    chosen = np.unique(rows // per_out)
    inside = np.arange(per_in) if columns is None else columns
    inputs = (chosen[:, None] * per_in + inside[None, :]).reshape(-1)
    return (_tuple(inputs), _tuple(np.unique(rows % per_out)), *rest)


def _resized_layer(module: nn.Module, inputs: int, outputs: int, groups: int) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _with(module, in_features=inputs, out_features=outputs)
    return _with(module, in_channels=inputs, out_channels=outputs, groups=groups)


def _with(module: nn.Module, **settings: Any) -> nn.Module:
    """A module of the same tensors and other settings, for ``place_slices`` to give its own;
    building one anew would initialise weights only to drop them."""
    changed = type(module).__new__(type(module))
    changed.__dict__ = {**module.__dict__, **settings}
    return changed


def head_module(
    program: Program, node: fx.Node, columns: Positions, groups: int
) -> tuple[str, Slices, nn.Module]:
    """All rows and some columns of a prediction layer."""
    module = program.module(node)
    rows = np.arange(module.out_features if isinstance(module, nn.Linear) else module.out_channels)
    return thin_layer_module(program, node, rows, columns, groups)


def thin_per_channel_module(
    program: Program, node: fx.Node, positions: Positions, groups: int | None
) -> tuple[str, Slices, nn.Module]:
    """Some channels of a norm or another module whose tensors have one entry per channel."""
    module = program.module(node)
    path = str(node.target)
    slices: Slices = {}
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        per_channel = tensor.dim() == 1 and tensor.shape[0] > 1
        index = (_tuple(positions),) if per_channel else (None,) * tensor.dim()
        slices[key] = (tensor, _slice(program, path, key, tensor, index))
    return path, slices, _resized_norm(module, len(positions), groups)


def _resized_norm(module: nn.Module, channels: int, groups: int | None) -> nn.Module:
    if isinstance(module, nn.PReLU):
        return _with(module, num_parameters=1 if module.num_parameters == 1 else channels)
    if isinstance(module, nn.GroupNorm):
        assert groups is not None
        return _with(module, num_groups=groups, num_channels=channels)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _with(module, normalized_shape=(channels,))
    return _with(module, num_features=channels)


# -- placing and filling ---------------------------------------------------------------------------


def place_slices(
    graph_module: fx.GraphModule,
    name: str,
    slices: Mapping[str, tuple[torch.Tensor, Slice]],
    *,
    like: nn.Module | None = None,
    persistent: bool = True,
) -> str:
    """Put a module (or, under the key ``""``, a tensor) of slices into a staged graph.

    Returns:
        The attribute name: ``name``, or with a suffix where that one holds something else.
    """
    table: dict[str, Slice] = graph_module.meta["slices"]
    entries = {f"{name}.{k}" if k else name: s for k, (_, s) in slices.items()}
    candidate, count = name, 1
    while is_taken(graph_module, candidate):
        if all(table.get(k) == s for k, s in entries.items()) and _same_kind(
            graph_module, candidate, like
        ):
            return candidate
        count += 1
        candidate = f"{name}_{count}"
        entries = {f"{candidate}.{k}" if k else candidate: s for k, (_, s) in slices.items()}
    if like is not None:
        sizes = {k: where.shape(tensor) for k, (tensor, where) in slices.items()}
        put(graph_module, candidate, meta_copy(like, sizes))
    else:
        tensor, where = slices[""]
        shape = empty_like(tensor, where.shape(tensor))
        put(graph_module, candidate, shape, saved=persistent)
    table.update(entries)
    return candidate


def remove_modules(graph_module: fx.GraphModule, names: Collection[str]) -> None:
    """Take modules of slices out of a staged graph."""
    for name in names:
        graph_module.delete_submodule(name)
    table: dict[str, Slice] = graph_module.meta["slices"]
    for key in [k for k in table if any(path in names for path in _parents(k))]:
        del table[key]


def _parents(key: str) -> Iterator[str]:
    """Paths of the modules that a name lies in, innermost first."""
    while key := key.rpartition(".")[0]:
        yield key


def _same_kind(root: nn.Module, name: str, like: nn.Module | None) -> bool:
    if like is None:
        return True
    found = read(root, name)
    if isinstance(found, ComputedLayer) and isinstance(like, ComputedLayer):
        return found.computes_like(like)
    return type(found) is type(like) and found.extra_repr() == like.extra_repr()


def meta_copy(module: nn.Module, sizes: Mapping[str, tuple[int, ...]] | None = None) -> nn.Module:
    """A copy of a module on the meta device.

    Args:
        module: The module.
        sizes: Shapes of tensors that have another one in the copy.
    """
    sizes = sizes or {}
    copied = type(module).__new__(type(module))
    copied.__dict__ = {  # hooks and other tables are its own
        k: v.copy() if isinstance(v, dict | set) else v for k, v in module.__dict__.items()
    }
    copied._parameters = {
        k: None if p is None else empty_like(p, sizes.get(k, tuple(p.shape)))  # type: ignore[misc]
        for k, p in module._parameters.items()
    }
    kept = module.constants() if isinstance(module, ComputedLayer) else ()
    copied._buffers = {
        k: b if b is None or k in kept else empty_like(b, sizes.get(k, tuple(b.shape)))
        for k, b in module._buffers.items()
    }
    copied._modules = {}
    return copied


def fill(root: nn.Module, slices: Mapping[str, Slice], program: Program) -> None:
    """Copy the slices' numbers from the original into the modules of a staged graph.

    One tensor of the graph stays one however many stages read it, and equal slices within one
    stage share one parameter (call sites of one module).
    """
    tensors = originals(program)
    made: dict[tuple[str, Slice], nn.Parameter] = {}
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the old one, for its id
    path: str | None = None
    module: Any = None
    for name, where in slices.items():
        container, _, last = name.rpartition(".")
        if container != path:  # tensors of one module follow each other
            path, module = container, find(root, container) if container else root
        if module is None:
            continue
        old = module._parameters.get(last, module._buffers.get(last))
        if old is None:
            continue
        original = tensors[where.source]
        stage = name.split(".")[1] if name.startswith("stages.") else ""
        if id(old) not in replaced:
            if last not in module._parameters:
                new: torch.Tensor = where.take(original.detach())
            elif (known := made.get((stage, where))) is not None:
                new = known
            else:
                data = where.take(original.detach())
                new = nn.Parameter(data, requires_grad=original.requires_grad)
                made[stage, where] = new
            replaced[id(old)] = (old, new)
        (module._parameters if last in module._parameters else module._buffers)[last] = replaced[
            id(old)
        ][1]


def originals(program: Program) -> dict[str, torch.Tensor]:
    """Original tensors by state-dict key (by attribute name for constants)."""
    result: dict[str, torch.Tensor] = {}
    root = program.graph_module
    for name, tensor in [
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    ]:
        result[program.sources.get(name, name)] = tensor
    return result
