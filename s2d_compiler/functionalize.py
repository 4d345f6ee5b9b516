"""Rewrite an exported graph so that no operator writes into its operands.

Export keeps in-place operators. Constants that depend on no input are computed here with
their real aliasing; every other in-place operator becomes its functional form, and views
that shared memory with what it wrote are made again from the new value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from s2d_compiler.errors import CaptureError
from s2d_compiler.program import is_scalar, place, tensor_value

aten = torch.ops.aten

#: Identities in evaluation mode whose schema does not say that they alias.
_IDENTITY = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
#: Schemas that say "alias" although a copy is made when layout or type differ.
_MAYBE_COPY = {
    aten.contiguous.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.type_as.default,
}


def written_argument(node: fx.Node) -> fx.Node | None:
    """The operand that an in-place operator writes to, None for pure operators."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    for argument, value in zip(target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value if isinstance(value, fx.Node) else None
    return None


def aliased_argument(node: fx.Node) -> fx.Node | None:
    """The operand whose memory the result of a view shares, None for copies."""
    target = node.target
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    first = node.args[0]
    if target is operator.getitem:
        return aliased_argument(first) and first
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target in _IDENTITY:
        return None if node.args[-1] is True else first
    if target in _MAYBE_COPY:
        return first if _shares_memory(node) else None
    info = target._schema.arguments[0].alias_info
    returns = target._schema.returns
    if info is None or info.is_write or not returns or returns[0].alias_info is None:
        return None
    return first


def _fake_result(node: fx.Node, target: torch._ops.OpOverload) -> Any:
    """What ``target`` makes of the shapes and types of a node's operands."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with torch.no_grad():
        return target(*args, **kwargs)


def _shares_memory(node: fx.Node) -> bool:
    """Whether the result of a view or copy shares the memory of its first operand."""
    assert isinstance(node.target, torch._ops.OpOverload)
    assert isinstance(node.args[0], fx.Node)
    source, result = tensor_value(node.args[0]), _fake_result(node, node.target)
    assert source is not None
    return bool(source.untyped_storage()._cdata == result.untyped_storage()._cdata)


def functional_target(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.relu.default`` for ``aten.relu_.default``; None when there is no such form."""
    name = target._opname
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    if packet is None:
        return None
    wanted = _signature(target)
    found = (getattr(packet, overload) for overload in packet.overloads())
    return next((each for each in found if _signature(each) == wanted), None)


def _signature(target: torch._ops.OpOverload) -> tuple[str, list[tuple[str, str]]]:
    """Types of an operator's arguments, and all names but the first; overload names say less."""
    first, *rest = target._schema.arguments
    return str(first.type), [(argument.name, str(argument.type)) for argument in rest]


@dataclass
class Functionalizer:
    """Copies a graph node by node into one without writes.

    Args:
        source: The exported graph.
        constants: Real tensors of placeholders that are constants (lifted tensors).
        add_constant: Registers a computed constant, returns its attribute name.
    """

    source: fx.Graph
    constants: Mapping[str, torch.Tensor]
    add_constant: Callable[[torch.Tensor], str]
    target: fx.Graph = field(default_factory=fx.Graph)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.current: dict[fx.Node, Any] = {}
        self.real: dict[fx.Node, Any] = {}
        self.base: dict[fx.Node, fx.Node] = {}
        self.order = {node: i for i, node in enumerate(self.source.nodes)}
        self.emitted_constants: dict[tuple[int, int], tuple[fx.Node, Any]] = {}

    def run(self) -> fx.Graph:
        for node in self.source.nodes:
            if node.op == "placeholder" and node.name in self.constants:
                self.real[node] = self.constants[node.name].clone()
            elif node.op == "call_function" and self._is_constant(node):
                self._fold(node)
            elif written_argument(node) is not None:
                self._write(node)
            else:
                if (origin := aliased_argument(node)) is not None:
                    self.base[node] = origin
                self.current[node] = self._copy(node)
        return self.target

    # -- constants -----------------------------------------------------------------------

    def _is_constant(self, node: fx.Node) -> bool:
        if any(operand not in self.real for operand in node.all_input_nodes):
            return False
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if torch.Tag.nondeterministic_seeded in target.tags or target.namespace != "aten":
                return False
            return tensor_value(node) is not None or isinstance(node.meta.get("val"), list | tuple)
        return target is operator.getitem

    def _fold(self, node: fx.Node) -> None:
        arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.real[n])
        with torch.no_grad():
            self.real[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]

    def _constant(self, node: fx.Node, before: fx.Node) -> fx.Node:
        value = self.real[node]
        key = (id(value), value._version)
        if key not in self.emitted_constants:
            created = self.target.get_attr(self.add_constant(value.clone()))
            created.meta = dict(before.meta) | {"val": node.meta["val"]}
            # The value is kept alive so that no other one takes over its id.
            self.emitted_constants[key] = created, value
        return self.emitted_constants[key][0]

    # -- everything else -------------------------------------------------------------------

    def _copy(self, node: fx.Node) -> fx.Node:
        return self.target.node_copy(node, lambda n: self._lookup(n, node))

    def _lookup(self, operand: fx.Node, reader: fx.Node) -> Any:
        return self._constant(operand, reader) if operand in self.real else self.current[operand]

    def _call(self, target: Any, args: tuple[Any, ...], like: fx.Node, val: Any) -> fx.Node:
        created = self.target.call_function(target, args)
        created.meta = dict(like.meta) | {"val": val}
        return created

    def _write(self, node: fx.Node) -> None:
        written = written_argument(node)
        assert written is not None
        self._unfold(written, node)
        if written.op == "placeholder" and not written.users.keys() <= {node}:
            self.notes.append(f"{place(node)} writes into {written.name}; the write is not kept")
        value = self._functional(node, written)
        self.base[node] = written
        chain = self._write_back(node, written, value)
        self._refresh_views(node, chain)
        self.current[node] = value

    def _unfold(self, written: fx.Node, reader: fx.Node) -> None:
        """A constant that is overwritten with data stops being one, with all its views."""
        if written not in self.real:
            return
        storage = self.real[written].untyped_storage().data_ptr()
        for node, value in list(self.real.items()):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == storage:
                self.current[node] = self._constant(node, reader)
                if (origin := aliased_argument(node)) is not None:
                    self.base[node] = origin
        for node in list(self.current):
            self.real.pop(node, None)

    def _functional(self, node: fx.Node, written: fx.Node) -> fx.Node:
        """What an in-place operator leaves in its operand."""
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        before = tensor_value(written)
        assert before is not None
        args: Any = fx.map_arg(node.args, lambda n: self._lookup(n, node))
        kwargs: Any = fx.map_arg(dict(node.kwargs), lambda n: self._lookup(n, node))
        val = node.meta["val"]
        if target is aten.copy_.default or target is aten.fill_.Tensor:
            return self._expanded(node, args[1], args[0], before)
        if target is aten.zero_.default:
            return self._call(aten.zeros_like.default, (args[0],), node, val)
        if target is aten.fill_.Scalar:
            return self._call(aten.full_like.default, args[:2], node, val)
        functional = functional_target(target)
        if functional is None:
            raise CaptureError(
                f"{place(node)} writes into its operand and has no form that does not. "
                "Compute its result with other operators in the model's source, such as "
                "torch.where."
            )
        created = self.target.call_function(functional, tuple(args), kwargs)
        created.meta = dict(node.meta) | {"val": _fake_result(node, functional)}
        return self._cast(created, before.dtype, node)

    def _expanded(
        self, node: fx.Node, copied: fx.Node, into: fx.Node, before: torch.Tensor
    ) -> fx.Node:
        """A value as it is after it was copied into a tensor."""
        copied = self._cast(copied, before.dtype, node)
        source = tensor_value(copied)
        assert source is not None
        if source.dim() == before.dim() and all(map(_is_same, source.shape, before.shape)):
            return copied
        return self._call(aten.expand_as.default, (copied, into), node, node.meta["val"])

    def _cast(self, value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        """A value in the type of the memory that it is written to."""
        current = tensor_value(value)
        assert current is not None
        if current.dtype == dtype:
            return value
        return self._call(aten.to.dtype, (value, dtype), like, current.to(dtype))

    def _write_back(self, node: fx.Node, written: fx.Node, value: Any) -> set[fx.Node]:
        """Give every base of a written view its new value; return the nodes updated."""
        child: fx.Node = written
        self.current[child] = value
        updated = {child}
        while child in self.base:
            origin = self.base[child]
            if not self._is_read_after(node, origin, updated):
                break
            if child.target is operator.getitem:
                value = self._scatter_piece(node, child, origin, value)
                origin = self.base[origin]
            else:
                value = self._scatter(node, child, origin, value)
            self.current[origin] = value
            updated.add(origin)
            child = origin
        return updated

    def _family(self, node: fx.Node) -> set[fx.Node]:
        def root(n: fx.Node) -> fx.Node:
            while n in self.base:
                n = self.base[n]
            return n

        top = root(node)
        return {n for n in [*self.base, top] if root(n) is top}

    def _is_read_after(self, node: fx.Node, origin: fx.Node, updated: set[fx.Node]) -> bool:
        """Whether anything that shares memory with ``origin`` is read after ``node``."""
        moment = self.order[node]
        return any(
            self.order[user] > moment
            for member in self._family(origin) - updated
            if member is not node
            for user in member.users
        )

    def _scatter(self, node: fx.Node, child: fx.Node, origin: fx.Node, value: Any) -> Any:
        """The value of ``origin`` after its view ``child`` became ``value``."""
        target = child.target
        current = self.current[origin]
        val = tensor_value(origin)
        if written_argument(child) is not None or target in _SAME:
            return value
        rest: Any = fx.map_arg(child.args[1:], lambda n: self._lookup(n, node))
        if target in (aten.slice.Tensor, aten.narrow.default):
            return self._scatter_slice(node, child, origin, value)
        if target is aten.select.int:
            return self._call(aten.select_scatter.default, (current, value, *rest), node, val)
        if target is aten.diagonal.default:
            return self._call(aten.diagonal_scatter.default, (current, value, *rest), node, val)
        if target in _SELF_INVERSE:
            return self._call(target, (value, *rest), node, val)
        if target in (aten.movedim.int, aten.movedim.intlist):
            return self._call(target, (value, rest[1], rest[0]), node, val)
        if target is aten.permute.default:
            rank = len(rest[0])
            order = [d % rank for d in rest[0]]
            inverse = [order.index(d) for d in range(rank)]
            return self._call(aten.permute.default, (value, inverse), node, val)
        if target in _RESHAPING:
            return self._reshaped(node, origin, value)
        raise CaptureError(
            f"{place(node)} writes in place through {place(child)}, and the memory behind it is "
            "read again; this compiler cannot follow such a write. Write to a copy instead."
        )

    def _scatter_slice(self, node: fx.Node, child: fx.Node, origin: fx.Node, value: Any) -> Any:
        rest: Any = fx.map_arg(child.args[1:], lambda n: self._lookup(n, node))
        if child.target is aten.narrow.default:
            rest = (rest[0], rest[1], rest[1] + rest[2])
        piece, whole = tensor_value(child), tensor_value(origin)
        assert piece is not None
        assert whole is not None
        if all(map(_is_same, piece.shape, whole.shape)):
            return value
        args = (self.current[origin], value, *rest)
        return self._call(aten.slice_scatter.default, args, node, whole)

    def _reshaped(self, node: fx.Node, origin: fx.Node, value: Any) -> Any:
        whole = tensor_value(origin)
        assert whole is not None
        sizes = [size if isinstance(size, int) else -1 for size in whole.shape]
        if sizes.count(-1) > 1:
            args = (value, self.current[origin])
            return self._call(aten.reshape_as.default, args, node, whole)
        return self._call(aten.reshape.default, (value, sizes), node, whole)

    def _scatter_piece(self, node: fx.Node, child: fx.Node, pieces: fx.Node, value: Any) -> Any:
        """The value of what was split after one of its pieces became ``value``."""
        whole = self.base[pieces]
        taken = _piece(pieces, child.args[1])
        if taken is None:
            raise CaptureError(
                f"{place(node)} writes in place into a piece of {place(pieces)}, and the whole is "
                "read again; this compiler cannot follow such a write. Write to a copy instead."
            )
        target = aten.select_scatter.default if len(taken) == 2 else aten.slice_scatter.default
        return self._call(target, (self.current[whole], value, *taken), node, tensor_value(whole))

    def _refresh_views(self, node: fx.Node, updated: set[fx.Node]) -> None:
        """Make views of what was written again, where they or views of them are read later."""
        moment = self.order[node]
        family = sorted(self._family(node) - updated - {node}, key=self.order.__getitem__)
        needed: set[fx.Node] = set()
        for member in reversed(family):
            if member in needed or any(self.order[user] > moment for user in member.users):
                needed.add(member)
                if member in self.base:
                    needed.add(self.base[member])
        for member in family:
            if member not in self.base or member not in self.current or member not in needed:
                continue
            if written_argument(member) is not None:
                self.current[member] = self.current[self.base[member]]
            else:
                self.current[member] = self._copy(member)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def _piece(pieces: fx.Node, index: Any) -> tuple[int, ...] | None:
    """Where a piece of ``chunk`` or ``split`` lies: dimension, start and stop; of ``unbind``:
    dimension and index. None where that depends on the batch."""
    is_unbind = pieces.target is aten.unbind.int
    names = ("self", "dim") if is_unbind else ("self", "size", "dim")
    arguments = dict(zip(names, pieces.args, strict=False)) | dict(pieces.kwargs)
    dimension = arguments.get("dim", 0)
    values = pieces.meta["val"]
    if not isinstance(dimension, int):
        return None
    index %= len(values)
    if is_unbind:
        return dimension % (values[0].dim() + 1), index
    dimension %= values[0].dim()
    sizes = [v.shape[dimension] for v in values[: index + 1]]
    if any(not isinstance(size, int) for size in sizes):
        return None
    return dimension, sum(sizes[:-1]), sum(sizes)


#: Views that are their operand: what is written to them is written to it, as it is.
_SAME = (
    _IDENTITY
    | (_MAYBE_COPY - {aten.reshape.default, aten.flatten.using_ints})
    | {
        aten.alias.default,
        aten.detach.default,
    }
)
#: Views that undo themselves.
_SELF_INVERSE = {
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
}
_RESHAPING = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
}
_SPLITTING = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def functionalize(
    source: fx.Graph,
    constants: Mapping[str, torch.Tensor],
    add_constant: Callable[[torch.Tensor], str],
) -> tuple[fx.Graph, list[str]]:
    """Copy ``source`` into a graph without writes; see the module's docstring.

    Returns:
        The new graph and sentences about writes that were not kept.

    Raises:
        CaptureError: A write cannot be followed.
    """
    work = Functionalizer(source, constants, add_constant)
    return work.run(), work.notes


def pieces_to_slices(graph: fx.Graph) -> None:
    """Replace ``chunk``/``split``/``unbind`` and their ``getitem`` by slices and selects."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SPLITTING:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if any(user.target is not operator.getitem for user in node.users):
            continue
        places = {user: _piece(node, user.args[1]) for user in node.users}
        if None in places.values():
            continue
        for user, taken in places.items():
            assert taken is not None
            target = aten.select.int if len(taken) == 2 else aten.slice.Tensor
            with graph.inserting_before(user):
                piece = graph.call_function(target, (source, *taken))
            piece.meta = dict(node.meta) | {"val": user.meta["val"]}
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
        graph.erase_node(node)


def is_size_only(node: fx.Node) -> bool:
    """Whether a node computes sizes only."""
    return is_scalar(node)
