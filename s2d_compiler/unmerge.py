"""Keep the batch apart from other dimensions that a model merges it with.

Multi-head attention as torch writes it puts the heads into the batch dimension (``view(L, B *
heads, d)``), others do so with patches or groups of channels. Channels cannot be followed
through a dimension whose size depends on the batch, so chains of operators between a merging
view and the view that takes the dimensions apart again are rewritten on the unmerged shape.

Every value of such a chain is built twice at first: as it was, and in *open* form, where each
of its dimensions is a group of dimensions. What is not read in the end is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from s2d_compiler.program import is_scalar, tensor_value

aten = torch.ops.aten

#: A dimension's size: the factor beside the batch, and whether it holds the batch.
Size = tuple[int, bool]


@dataclass(frozen=True)
class Open:
    """A value in open form.

    Attributes:
        node: The open value.
        groups: For each dimension of the value, the sizes of the open dimensions in it.
    """

    node: fx.Node
    groups: tuple[tuple[Size, ...], ...]

    @property
    def flat(self) -> list[Size]:
        return [size for group in self.groups for size in group]

    def starts(self) -> list[int]:
        """Where the open dimensions of each dimension begin."""
        result, at = [], 0
        for group in self.groups:
            result.append(at)
            at += len(group)
        return result

    @property
    def is_merged(self) -> bool:
        return any(len(group) > 1 and any(b for _, b in group) for group in self.groups)


def unmerge_batch(graph: fx.Graph) -> bool:
    """Rewrite chains that merge the batch with other dimensions and take it apart again.

    Returns:
        Whether anything was rewritten.
    """
    return _Unmerger(graph).run()


@dataclass
class _Unmerger:
    graph: fx.Graph
    opened: dict[fx.Node, Open] = field(default_factory=dict)
    changed: bool = False
    batch: Any = None

    def run(self) -> bool:
        self.batch = _batch(self.graph)
        if self.batch is None:
            return False
        before = set(self.graph.nodes)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and tensor_value(node) is not None:
                with self.graph.inserting_before(node):
                    self._visit(node)
        for node in reversed(list(self.graph.nodes)):
            unread = node.op == "call_function" and not node.users
            if unread and (self.changed or node not in before):
                self.graph.erase_node(node)
        return self.changed

    def _visit(self, node: fx.Node) -> None:
        operands = [n for n in node.all_input_nodes if tensor_value(n) is not None]
        name = getattr(node.target, "_opname", "")
        if name in _VIEWS:
            self._view(node)
        elif any(n in self.opened for n in operands) and name in _RULES:
            found = _RULES[name](self, node)
            if found is not None:
                self._record(node, found)

    def _record(self, node: fx.Node, found: Open) -> None:
        """Keep an open value; where nothing is merged it takes the place of the original."""
        if found.is_merged:
            self.opened[node] = found
        else:
            closed = found.node
            if any(len(group) > 1 for group in found.groups):
                closed = self.reshape(closed, _sizes(node) or [], node)
            node.replace_all_uses_with(closed)
            self.changed = True

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        sizes: Sequence[Size],
        **kwargs: Any,
    ) -> fx.Node:
        """An operator on open values whose result has these sizes, and the type of ``like``.

        Operators are not run on symbolic shapes: that may fix the batch size for good.
        """
        created = self.graph.call_function(target, args, kwargs)
        value = tensor_value(like)
        assert value is not None
        shape = [n * self.batch if b else n for n, b in sizes]
        created.meta = {k: v for k, v in like.meta.items() if k != "sample_shape"}
        created.meta["val"] = value.new_empty(shape)
        return created

    # -- views -------------------------------------------------------------------------------------

    def _view(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        target = _sizes(node)
        given = self.opened.get(source)
        held = given.flat if given is not None else _sizes(source)
        if target is None or held is None:
            return
        if given is None and not _merges(held, target):
            return
        groups = _regroup(held, target)
        if groups is None:
            return
        groups = [
            g if any(b for _, b in g) else ((math.prod(n for n, _ in g), False),) for g in groups
        ]
        wanted = [size for group in groups for size in group]
        opened = given.node if given is not None else source
        if wanted != held:
            opened = self.reshape(opened, wanted, node)
        found = Open(opened, tuple(groups))
        if given is not None or found.is_merged:
            self._record(node, found)
        if given is not None and found.is_merged and sum(b for _, b in target) == 1:
            merged = self.reshape(opened, target, node)
            node.replace_all_uses_with(merged)
            self.opened[merged] = found
            self.changed = True

    def reshape(self, source: fx.Node, sizes: Sequence[Size], like: fx.Node) -> fx.Node:
        """A view of pure dimensions."""
        shape = [-1 if b else n for n, b in sizes]
        return self.call(aten.reshape.default, (source, shape), like, sizes)

    # -- operators ---------------------------------------------------------------------------------

    def permuted(self, node: fx.Node, order: list[int]) -> Open:
        """A permutation of dimensions as one of open dimensions."""
        value = self.opened[node.args[0]]  # type: ignore[index]
        starts = value.starts()
        flat = [starts[d] + k for d in order for k in range(len(value.groups[d]))]
        groups = tuple(value.groups[d] for d in order)
        moved = self.call(aten.permute.default, (value.node, flat), node, _flat(groups))
        return Open(moved, groups)

    def aligned(self, operand: fx.Node, groups: Sequence[tuple[Size, ...]]) -> fx.Node | None:
        """An operand in a form that broadcasts against open values of these groups; None where
        its own dimensions are put together in another way."""
        own = self.opened.get(operand)
        shape = _sizes(operand)
        if shape is None:
            return None
        held = own.groups if own is not None else tuple((size,) for size in shape)
        wide: list[Size] = []
        for group, wanted in zip(held, groups[len(groups) - len(shape) :], strict=True):
            if group == wanted or len(wanted) == len(group) == 1:
                wide += group
            elif all(size == (1, False) for size in group):
                wide += [(1, False)] * len(wanted)
            elif own is None and group == (_product_of(wanted),):
                wide += wanted
            else:
                return None
        given = operand if own is None else own.node
        flat = shape if own is None else own.flat
        return given if wide == flat else self.reshape(given, wide, operand)


def _flat(groups: Iterable[tuple[Size, ...]]) -> list[Size]:
    return [size for group in groups for size in group]


def _product_of(group: tuple[Size, ...]) -> Size:
    return math.prod(n for n, _ in group), any(b for _, b in group)


def _batch(graph: fx.Graph) -> Any:
    """The symbolic batch size, None where it is fixed."""
    for node in graph.nodes:
        value = tensor_value(node)
        for size in value.shape if value is not None else ():
            if not isinstance(size, int) and size.node.expr.is_Symbol:
                return size
    return None


def _sizes(node: fx.Node) -> list[Size] | None:
    """A value's dimensions as factors beside the batch; None if one is neither."""
    value = tensor_value(node)
    assert value is not None
    result: list[Size] = []
    for size in value.shape:
        if isinstance(size, int):
            result.append((size, False))
            continue
        expression = size.node.expr
        symbols = list(expression.free_symbols)
        if len(symbols) != 1:
            return None
        factor = expression / symbols[0]
        if not factor.is_Integer:
            return None
        result.append((int(factor), True))
    return result


def _merges(held: list[Size], target: list[Size]) -> bool:
    """Whether a view merges a batch dimension with another."""
    before = max((n for n, b in held if b), default=0)
    return 0 < before < max((n for n, b in target if b), default=0)


def _regroup(held: list[Size], target: list[Size]) -> list[tuple[Size, ...]] | None:
    """Dimensions of a view as groups of (split) dimensions of its operand, which are pure."""
    rest = list(held)
    groups: list[tuple[Size, ...]] = []
    for size, has_batch in target:
        group: list[Size] = []
        wanted, batch = size, has_batch
        while wanted > 1 or batch:
            if not rest:
                return None
            n, b = rest.pop(0)
            if (n, b) == (1, False):
                continue
            if b:
                if not batch or wanted % n:
                    return None
                group.append((n, True))
                batch, wanted = False, wanted // n
            elif wanted % n == 0:
                group.append((n, False))
                wanted //= n
            elif n % wanted == 0:
                group.append((wanted, False))
                rest.insert(0, (n // wanted, False))
                wanted = 1
            else:
                return None
        groups.append(tuple(group) or ((1, False),))
    return groups if all(n == 1 and not b for n, b in rest) else None


# -- rules -----------------------------------------------------------------------------------------


def _transpose(work: _Unmerger, node: fx.Node) -> Open | None:
    rank = len(work.opened[node.args[0]].groups)  # type: ignore[index]
    dims: Any = node.args[1:3]
    first, second = (d % rank for d in dims)
    order = list(range(rank))
    order[first], order[second] = second, first
    return work.permuted(node, order)


def _permute(work: _Unmerger, node: fx.Node) -> Open | None:
    dims = node.args[1]
    assert isinstance(dims, list | tuple)
    return work.permuted(node, [int(d) % len(dims) for d in dims])  # type: ignore[arg-type]


def _last_two(work: _Unmerger, node: fx.Node) -> Open | None:
    rank = len(work.opened[node.args[0]].groups)  # type: ignore[index]
    return work.permuted(node, [*range(rank - 2), rank - 1, rank - 2])


def _moved(work: _Unmerger, node: fx.Node) -> Open | None:
    rank = len(work.opened[node.args[0]].groups)  # type: ignore[index]
    moves: Any = [[d] if isinstance(d, int) else d for d in node.args[1:3]]
    sources, targets = ([d % rank for d in dims] for dims in moves)
    rest = iter([d for d in range(rank) if d not in sources])
    order = [sources[targets.index(d)] if d in targets else next(rest) for d in range(rank)]
    return work.permuted(node, order)


def _same(work: _Unmerger, node: fx.Node) -> Open | None:
    value = work.opened[node.args[0]]  # type: ignore[index]
    kwargs = dict(node.kwargs) if node.target is aten.contiguous.default else {}
    created = work.call(node.target, (value.node, *node.args[1:]), node, value.flat, **kwargs)
    return Open(created, value.groups)


def _elementwise(work: _Unmerger, node: fx.Node) -> Open | None:
    tensors = [n for n in node.all_input_nodes if tensor_value(n) is not None]
    sizes = _sizes(node)
    full = [work.opened[n].groups for n in tensors if n in work.opened]
    if sizes is None or any(is_scalar(n) for n in node.all_input_nodes):
        return None
    full = [groups for groups in full if len(groups) == len(sizes)]
    groups = tuple(
        next((g[d] for g in full if _product_of(g[d]) == size), (size,))
        for d, size in enumerate(sizes)
    )
    given = {n: work.aligned(n, groups) for n in tensors}
    if any(n is None for n in given.values()):
        return None
    args = fx.map_arg(node.args, given.__getitem__)
    kwargs = fx.map_arg(dict(node.kwargs), given.__getitem__)
    return Open(work.call(node.target, args, node, _flat(groups), **kwargs), groups)


def _unsqueeze(work: _Unmerger, node: fx.Node) -> Open | None:
    value = work.opened[node.args[0]]  # type: ignore[index]
    given: Any = node.args[1]
    dimension = given % (len(value.groups) + 1)
    at = [*value.starts(), len(value.flat)][dimension]
    groups = list(value.groups)
    groups.insert(dimension, ((1, False),))
    created = work.call(aten.unsqueeze.default, (value.node, at), node, _flat(groups))
    return Open(created, tuple(groups))


def _pick(work: _Unmerger, node: fx.Node) -> Open | None:
    """slice and select along a dimension that is not merged."""
    value = work.opened[node.args[0]]  # type: ignore[index]
    given: Any = node.args[1] if len(node.args) > 1 else 0
    dimension = given % len(value.groups)
    sizes, groups = _sizes(node), list(value.groups)
    if node.target is aten.slice.Tensor and sizes == _sizes(node.args[0]):  # type: ignore[arg-type]
        return value
    if len(groups[dimension]) != 1 or groups[dimension][0][1] or sizes is None:
        return None
    at = value.starts()[dimension]
    if node.target is aten.select.int:
        del groups[dimension]
    else:
        groups[dimension] = (sizes[dimension],)
    created = work.call(node.target, (value.node, at, *node.args[2:]), node, _flat(groups))
    return Open(created, tuple(groups))


def _pad(work: _Unmerger, node: fx.Node) -> Open | None:
    """Padding of trailing dimensions that are not merged."""
    value = work.opened[node.args[0]]  # type: ignore[index]
    amounts: Any = node.args[1]
    sizes, touched = _sizes(node), len(amounts) // 2
    if sizes is None or any(len(g) != 1 or g[0][1] for g in value.groups[-touched:]):
        return None
    kept = len(sizes) - touched
    groups = (*value.groups[:kept], *((size,) for size in sizes[kept:]))
    args = (value.node, *node.args[1:])
    return Open(work.call(node.target, args, node, _flat(groups), **dict(node.kwargs)), groups)


def _cat(work: _Unmerger, node: fx.Node) -> Open | None:
    """Concatenation along a dimension that is not merged."""
    operands: Any = node.args[0]
    dimension: Any = node.args[1] if len(node.args) > 1 else 0
    sizes = _sizes(node)
    value = next(work.opened[n] for n in operands if n in work.opened)
    if sizes is None or len(value.groups) != len(sizes):
        return None
    dimension %= len(sizes)
    if len(value.groups[dimension]) != 1 or value.groups[dimension][0][1]:
        return None
    parts: list[fx.Node] = []
    for operand in operands:
        held = _sizes(operand)
        if held is None or len(held) != len(sizes):
            return None
        groups = (*value.groups[:dimension], (held[dimension],), *value.groups[dimension + 1 :])
        if operand not in work.opened and held != [_product_of(g) for g in groups]:
            return None
        if (part := work.aligned(operand, groups)) is None:
            return None
        parts.append(part)
    groups = (*value.groups[:dimension], (sizes[dimension],), *value.groups[dimension + 1 :])
    args = (parts, value.starts()[dimension])
    return Open(work.call(node.target, args, node, _flat(groups)), groups)


def _reduce(work: _Unmerger, node: fx.Node) -> Open | None:
    """Reductions along dimensions that are not merged."""
    value, target = work.opened[node.args[0]], node.target  # type: ignore[index]
    assert isinstance(target, torch._ops.OpOverload)
    names = [argument.name for argument in target._schema.arguments]
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    given, rank, starts = arguments.get("dim"), len(value.groups), value.starts()
    reduced = [d % rank for d in (given if isinstance(given, list | tuple) else [])]
    if not reduced or any(len(value.groups[d]) != 1 or value.groups[d][0][1] for d in reduced):
        return None
    groups = tuple(
        ((1, False),) if d in reduced else group
        for d, group in enumerate(value.groups)
        if arguments.get("keepdim", False) or d not in reduced
    )
    arguments |= {names[0]: value.node, "dim": [starts[d] for d in reduced]}
    args = [arguments.pop(name) for name in names[: len(node.args)]]
    return Open(work.call(target, tuple(args), node, _flat(groups), **arguments), groups)


def _expand(work: _Unmerger, node: fx.Node) -> Open | None:
    value = work.opened[node.args[0]]  # type: ignore[index]
    sizes = _sizes(node)
    if sizes is None or len(sizes) != len(value.groups):
        return None
    groups = tuple(
        group if len(group) > 1 or group[0] == size else (size,)
        for group, size in zip(value.groups, sizes, strict=True)
    )
    wanted = [-1 if b or len(g) > 1 else n for g in groups for n, b in g]
    created = work.call(aten.expand.default, (value.node, wanted), node, _flat(groups))
    return Open(created, groups)


def _einsum(work: _Unmerger, node: fx.Node) -> Open | None:
    equation, given = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(given, list | tuple)
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands: list[Any] = list(given)
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        return None
    free = iter([c for c in _LETTERS if c not in equation])
    spelled: dict[str, str] = {}
    sizes: dict[str, tuple[Size, ...]] = {}
    for term, operand in zip(terms, operands, strict=True):
        opened = work.opened.get(operand)
        groups = opened.groups if opened else [(size,) for size in _sizes(operand) or []]
        for letter, group in zip(term, groups, strict=True):
            if letter in sizes and sizes[letter] != group:
                return None
            if letter not in sizes:
                sizes[letter] = group
                spelled[letter] = letter if len(group) == 1 else "".join(next(free) for _ in group)
    written = ["".join(spelled[c] for c in term) for term in (*terms, right)]
    parts = [work.opened[n].node if n in work.opened else n for n in operands]
    args = (",".join(written[:-1]) + "->" + written[-1], parts)
    groups = tuple(sizes[c] for c in right)
    return Open(work.call(node.target, args, node, _flat(groups)), groups)


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _softmax(work: _Unmerger, node: fx.Node) -> Open | None:
    value = work.opened[node.args[0]]  # type: ignore[index]
    dimension = int(node.args[1]) % len(value.groups)  # type: ignore[arg-type]
    if len(value.groups[dimension]) != 1:
        return None
    at = value.starts()[dimension]
    args = (value.node, at, *node.args[2:])
    created = work.call(node.target, args, node, value.flat, **dict(node.kwargs))
    return Open(created, value.groups)


def _product(work: _Unmerger, node: fx.Node) -> Open | None:
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if first in work.opened and len(_sizes(second) or []) == 2:  # a table that all share
        value = work.opened[first]
        if len(value.groups[-1]) != 1:
            return None
        groups = (*value.groups[:-1], ((_sizes(second) or [])[-1],))
        created = work.call(aten.matmul.default, (value.node, second), node, _flat(groups))
        return Open(created, groups)
    if first not in work.opened or second not in work.opened:
        return None
    a, b = work.opened[first], work.opened[second]
    if a.groups[:-2] != b.groups[:-2] or any(len(g) != 1 for g in (*a.groups[-2:], *b.groups[-2:])):
        return None
    groups = (*a.groups[:-1], b.groups[-1])
    created = work.call(aten.matmul.default, (a.node, b.node), node, _flat(groups))
    return Open(created, groups)


def _attention(work: _Unmerger, node: fx.Node) -> Open | None:
    operands = [n for n in node.args[:3] if isinstance(n, fx.Node) and n in work.opened]
    if len(operands) != 3:
        return None
    q, k, v = (work.opened[n] for n in operands)
    apart = all(len(g) == 1 for value in (q, k, v) for g in value.groups[-2:])
    if not apart or not q.groups[:-2] == k.groups[:-2] == v.groups[:-2]:
        return None
    masks = [*node.args[3:4], node.kwargs.get("attn_mask")]
    weights = (*q.groups[:-1], k.groups[-2])
    given = {n: work.aligned(n, weights) for n in masks if isinstance(n, fx.Node)}
    if any(n is None for n in given.values()):
        return None
    rest, kwargs = fx.map_arg((node.args[3:], dict(node.kwargs)), given.__getitem__)
    groups = (*q.groups[:-1], v.groups[-1])
    args = (q.node, k.node, v.node, *rest)
    return Open(work.call(node.target, args, node, _flat(groups), **kwargs), groups)


_VIEWS = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten"])
_RULES: dict[str, Any] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    "mT": _last_two,
    **dict.fromkeys(("movedim", "moveaxis"), _moved),
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("slice", "select"), _pick),
    "einsum": _einsum,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "expand": _expand,
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys("mean sum amax amin var std linalg_vector_norm norm".split(), _reduce),
    **dict.fromkeys(("contiguous", "clone", "alias", "detach"), _same),
    **dict.fromkeys(
        """add sub rsub mul div neg exp log pow sqrt rsqrt square abs relu gelu sigmoid tanh silu
        leaky_relu elu softplus dropout masked_fill where clamp clamp_min clamp_max maximum minimum
        eq ne lt le gt ge logical_and logical_or logical_not""".split(),
        _elementwise,
    ),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("bmm", "matmul"), _product),
    "scaled_dot_product_attention": _attention,
}
