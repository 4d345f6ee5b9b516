"""Rewrite operators of a functional graph into fewer kinds, so that rules stay few.

Each rewrite is exact. Operators that have no simpler equal form are left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from s2d_compiler.program import tensor_value

aten = torch.ops.aten

AddConstant = Callable[[torch.Tensor], str]


def canonicalize(graph: fx.Graph, add_constant: AddConstant) -> None:
    """Apply every rewrite of this file.

    - ``stack`` -> ``unsqueeze`` and ``cat``;
    - ``max``/``min`` over a dimension whose index is not used -> ``amax``/``amin``;
    - ``expand_as`` -> ``expand`` (nothing where the shapes are equal), ``reshape_as`` and
      ``view_as`` -> ``reshape``;
    - ``addmm`` and ``baddbmm`` -> a product and a sum;
    - ``slice_scatter``/``select_scatter`` -> ``cat`` and ``index_select`` by a constant;
    - ``zeros`` of a batch -> ``new_zeros``; casts lose a device that changes nothing, ``type_as``
      becomes one.
    """
    _drop_unread(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            with graph.inserting_before(node):
                replacement = rewrite(graph, node, add_constant)
            if replacement is not None and replacement is not node:
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)
    _drop_unread(graph)


def _drop_unread(graph: fx.Graph) -> None:
    """Drop what nothing reads, the assertions that export leaves included."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, val: Any) -> fx.Node:
    created = graph.call_function(target, args)
    created.meta = dict(like.meta) | {"val": val}
    return created


def _value(node: Any) -> torch.Tensor:
    value = tensor_value(node)
    assert value is not None
    return value


def _stack(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
    operands = node.args[0]
    if not isinstance(operands, list | tuple):
        return None
    dimension = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dimension, int)
    dimension %= _value(node).dim()
    wide = [
        _call(graph, aten.unsqueeze.default, (n, dimension), node, _value(n).unsqueeze(dimension))
        for n in operands
    ]
    return _call(graph, aten.cat.default, (wide, dimension), node, node.meta["val"])


def _extreme(target: Any) -> Callable[[fx.Graph, fx.Node, AddConstant], fx.Node | None]:
    def rewrite(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
        if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
            return None
        source, dimension = node.args[0], node.args[1]
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        value = _call(graph, target, (source, [dimension], keep), node, node.meta["val"][0])
        for user in list(node.users):
            user.replace_all_uses_with(value)
            graph.erase_node(user)
        return None

    return rewrite


def _expand_as(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
    source, like = node.args[0], node.args[1]
    mine, other = _value(source), _value(like)
    if mine.dim() > other.dim():
        return None
    offset = other.dim() - mine.dim()
    sizes: list[int] = []
    for d, size in enumerate(other.shape):
        same = d >= offset and (
            mine.shape[d - offset] is size or str(mine.shape[d - offset]) == str(size)
        )
        if same:
            sizes.append(-1)
        elif isinstance(size, int):
            sizes.append(size)
        else:
            return None
    if not offset and all(size == -1 for size in sizes):
        assert isinstance(source, fx.Node)
        return source
    return _call(graph, aten.expand.default, (source, sizes), node, node.meta["val"])


def _reshape_as(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
    source, value = node.args[0], _value(node)
    free = [d for d, size in enumerate(value.shape) if not isinstance(size, int)]
    if len(free) > 1:
        return None
    sizes = [-1 if d in free else size for d, size in enumerate(value.shape)]
    return _call(graph, aten.reshape.default, (source, sizes), node, value)


def products_to_layers(graph: fx.Graph) -> None:
    """``x @ w`` with a parameter matrix is a linear layer whose weight is ``w`` transposed."""
    parameters: dict[fx.Node, bool] = {}  # values of attributes alone: whether of parameters
    for node in list(graph.nodes):
        operands = [parameters.get(n) for n in node.all_input_nodes]
        if node.op == "get_attr":
            parameters[node] = bool(node.meta.get("parameter"))
        elif node.op == "call_function" and operands and None not in operands:
            parameters[node] = any(operands)
        elif node.target in (aten.matmul.default, aten.mm.default):
            with graph.inserting_before(node):
                _product_to_layer(graph, node, parameters)
    _drop_unread(graph)


def _product_to_layer(graph: fx.Graph, node: fx.Node, parameters: dict[fx.Node, bool]) -> None:
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return
    if not parameters.get(second) or _value(second).dim() != 2 or _value(first).dim() < 2:
        return
    if second.target in (aten.t.default, aten.numpy_T.default):
        weight = second.args[0]
    else:
        weight = _call(graph, aten.t.default, (second,), node, _value(second).t())
    layer = _call(graph, aten.linear.default, (first, weight), node, node.meta["val"])
    node.replace_all_uses_with(layer)
    graph.erase_node(node)


def _sum_with_product(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
    """``beta * a + alpha * (b @ c)`` in its parts."""
    base, left, right = node.args[:3]
    product_of = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    product = _call(graph, product_of, (left, right), node, node.meta["val"])
    terms: list[Any] = []
    for value, name in ((base, "beta"), (product, "alpha")):
        factor = node.kwargs.get(name, 1)
        if factor != 1:
            assert isinstance(value, fx.Node)
            value = _call(graph, aten.mul.Tensor, (value, factor), node, value.meta["val"])
        terms.append(value)
    if node.kwargs.get("beta", 1) == 0:
        return terms[1]  # type: ignore[no-any-return]
    return _call(graph, aten.add.Tensor, tuple(terms), node, node.meta["val"])


def _slice_scatter(graph: fx.Graph, node: fx.Node, add_constant: AddConstant) -> fx.Node | None:
    base, source, *rest = node.args
    given: list[Any] = [*rest, *(0, None, None, 1)[len(rest) :]]
    dimension, start, stop, step = given
    size = _value(base).shape[dimension]
    if not isinstance(size, int) or any(isinstance(n, fx.Node) for n in given):
        return None
    taken = range(size)[slice(start, stop, step)]
    return _scattered(
        graph, node, base, source, dimension % _value(base).dim(), list(taken), size, add_constant
    )


def _select_scatter(graph: fx.Graph, node: fx.Node, add_constant: AddConstant) -> fx.Node | None:
    base, source, dimension, index = node.args
    assert isinstance(dimension, int)
    dimension %= _value(base).dim()
    size = _value(base).shape[dimension]
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    wide = _call(
        graph,
        aten.unsqueeze.default,
        (source, dimension),
        node,
        _value(source).unsqueeze(dimension),
    )
    return _scattered(graph, node, base, wide, dimension, [index % size], size, add_constant)


def _scattered(
    graph: fx.Graph,
    node: fx.Node,
    base: Any,
    source: Any,
    dimension: int,
    taken: list[int],
    size: int,
    add_constant: AddConstant,
) -> fx.Node | None:
    """``base`` with the positions ``taken`` along one dimension replaced by ``source``'s."""
    val = node.meta["val"]
    if _value(source).dtype != _value(base).dtype:
        return None
    if taken == list(range(size)):
        return source  # type: ignore[no-any-return]
    if len(taken) == taken[-1] - taken[0] + 1 and taken == sorted(taken):
        parts = [source]
        if taken[0] > 0:
            head = _value(base).narrow(dimension, 0, taken[0])
            parts.insert(
                0, _call(graph, aten.slice.Tensor, (base, dimension, 0, taken[0]), node, head)
            )
        if taken[-1] + 1 < size:
            tail = _value(base).narrow(dimension, taken[-1] + 1, size - taken[-1] - 1)
            parts.append(
                _call(graph, aten.slice.Tensor, (base, dimension, taken[-1] + 1, size), node, tail)
            )
        return _call(graph, aten.cat.default, (parts, dimension), node, val)
    order = list(range(size))
    for position, index in enumerate(taken):
        order[index] = size + position
    both = _value(base).new_empty(
        [size + len(taken) if d == dimension else n for d, n in enumerate(_value(base).shape)]
    )
    joined = _call(graph, aten.cat.default, ([base, source], dimension), node, both)
    index_tensor = torch.tensor(order, device=_value(base).device)
    constant = graph.get_attr(add_constant(index_tensor))
    constant.meta = dict(node.meta) | {"val": _value(base).new_empty((size,), dtype=torch.long)}
    return _call(graph, aten.index_select.default, (joined, dimension, constant), node, val)


def _created_like(target: Any) -> Callable[[fx.Graph, fx.Node, AddConstant], fx.Node | None]:
    """``zeros(n, ...)`` for a batch of n becomes ``x.new_zeros(n, ...)``, which follows x to
    its device."""

    def rewrite(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
        reference = _sized_by(node)
        if reference is None:
            return None
        value = _value(node)
        created = graph.call_function(target, (reference, *node.args))
        if value.dtype != _value(reference).dtype:
            created.kwargs = {"dtype": value.dtype}
        created.meta = dict(node.meta)
        return created

    return rewrite


def _sized_by(node: fx.Node) -> fx.Node | None:
    """The tensor whose size a creation operator uses."""
    for operand in node.all_input_nodes:
        if operand.target is aten.sym_size.int and isinstance(operand.args[0], fx.Node):
            return operand.args[0]
        if tensor_value(operand) is None and (found := _sized_by(operand)) is not None:
            return found
    return None


def _cast(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
    """A cast to the device where its operand is anyway keeps only the change of type."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = _value(source), _value(node)
    if before.device != after.device:
        return None
    if before.dtype == after.dtype:
        return source
    return _call(graph, aten.to.dtype, (source, after.dtype), node, after)


def _type_as(graph: fx.Graph, node: fx.Node, _: AddConstant) -> fx.Node | None:
    """Only the other operand's type is read."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    after = _value(node)
    if _value(source).device != after.device:
        return None
    if _value(source).dtype == after.dtype:
        return source
    return _call(graph, aten.to.dtype, (source, after.dtype), node, after)


_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node, AddConstant], fx.Node | None]] = {
    aten.stack.default: _stack,
    aten.max.dim: _extreme(aten.amax.default),
    aten.min.dim: _extreme(aten.amin.default),
    aten.expand_as.default: _expand_as,
    aten.reshape_as.default: _reshape_as,
    aten.view_as.default: _reshape_as,
    aten.addmm.default: _sum_with_product,
    aten.baddbmm.default: _sum_with_product,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.zeros.default: _created_like(aten.new_zeros.default),
    aten.ones.default: _created_like(aten.new_ones.default),
    aten.full.default: _created_like(aten.new_full.default),
    aten.type_as.default: _type_as,
    aten.to.device: _cast,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
}
