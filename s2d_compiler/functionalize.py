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
    aten.contiguous.default: lambda a, _: a.is_contiguous(),
    aten.reshape.default: lambda a, _: a.is_contiguous(),
    aten.flatten.using_ints: lambda a, _: a.is_contiguous(),
    aten.to.dtype: lambda a, out: a.dtype == out.dtype,
    aten.to.device: lambda a, out: a.dtype == out.dtype and a.device == out.device,
    aten.to.dtype_layout: lambda a, out: a.dtype == out.dtype and a.device == out.device,
    aten.type_as.default: lambda a, out: a.dtype == out.dtype,
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
        return first
    if target in _MAYBE_COPY:
        source, result = tensor_value(first), tensor_value(node)
        assert source is not None and result is not None
        return first if _MAYBE_COPY[target](source, result) else None
    info = target._schema.arguments[0].alias_info
    returns = target._schema.returns
    if info is None or info.is_write or not returns or returns[0].alias_info is None:
        return None
    return first


def functional_target(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.relu.default`` for ``aten.relu_.default``; None when there is no such form."""
    name = target._opname
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    if packet is None:
        return None
    overload = target._overloadname or "default"
    return getattr(packet, overload) if overload in packet.overloads() else None


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
        self.emitted_constants: dict[tuple[int, int], fx.Node] = {}

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
            self.emitted_constants[key] = created
        return self.emitted_constants[key]

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

    def _functional(self, node: fx.Node, written: fx.Node) -> Any:
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        before = tensor_value(written)
        assert before is not None
        args = fx.map_arg(node.args, lambda n: self._lookup(n, node))
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: self._lookup(n, node))
        val = node.meta["val"]
        if target is aten.copy_.default:
            copied = args[1]
            source = node.args[1]
            source_value = tensor_value(source) if isinstance(source, fx.Node) else None
            if source_value is not None and source_value.dtype != before.dtype:
                copied = self._call(aten.to.dtype, (copied, before.dtype), node, source_value.to(before.dtype))
            return self._call(aten.expand_as.default, (copied, args[0]), node, val)
        if target is aten.zero_.default:
            return self._call(aten.zeros_like.default, (args[0],), node, val)
        if target._opname == "fill_":
            if target._overloadname == "Scalar":
                return self._call(aten.full_like.default, args[:2], node, val)
            return self._call(aten.expand_as.default, (args[1], args[0]), node, val)
        functional = functional_target(target)
        if functional is None:
            raise CaptureError(
                f"{place(node)} writes into its operand and has no form that does not. "
                "Use the operator without the trailing underscore in the model's source."
            )
        created = self.target.call_function(functional, tuple(args), kwargs)
        created.meta = dict(node.meta)
        return created

    def _write_back(self, node: fx.Node, written: fx.Node, value: Any) -> set[fx.Node]:
        """Give every base of a written view its new value; return the nodes updated."""
        child: fx.Node = written
        self.current[child] = value
        updated = {child}
        while child in self.base:
            origin = self.base[child]
            if not self._is_read_after(node, origin, updated):
                break
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
        if written_argument(child) is not None or target in _IDENTITY or target in _MAYBE_COPY and (
            target not in (aten.reshape.default, aten.flatten.using_ints)
        ):
            return value
        rest = fx.map_arg(child.args[1:], lambda n: self._lookup(n, node))
        if target is aten.slice.Tensor:
            return self._call(aten.slice_scatter.default, (current, value, *rest), node, val)
        if target is aten.select.int:
            return self._call(aten.select_scatter.default, (current, value, *rest), node, val)
        if target is aten.transpose.int:
            return self._call(aten.transpose.int, (value, *rest), node, val)
        if target is aten.permute.default:
            inverse = [0] * len(rest[0])
            for i, d in enumerate(rest[0]):
                inverse[d] = i
            return self._call(aten.permute.default, (value, inverse), node, val)
        if target in _RESHAPING:
            return self._call(aten.view_as.default, (value, current), node, val)
        if target is operator.getitem and origin.target in _SPLITTING:
            return self._scatter_piece(node, child, origin, value)
        if target in (aten.alias.default, aten.detach.default):
            return value
        raise CaptureError(
            f"{place(node)} writes in place through {place(child)}, and the memory behind it is "
            "read again; this compiler cannot follow such a write. Write to a copy instead."
        )

    def _scatter_piece(self, node: fx.Node, child: fx.Node, pieces: fx.Node, value: Any) -> Any:
        raise CaptureError(
            f"{place(node)} writes in place into a piece of {place(pieces)}, and the whole is read "
            "again; this compiler cannot follow such a write. Write to a copy instead."
        )

    def _refresh_views(self, node: fx.Node, updated: set[fx.Node]) -> None:
        """Make views of what was written again, where they are read later."""
        moment = self.order[node]
        for member in sorted(self._family(node) - updated - {node}, key=self.order.__getitem__):
            if member not in self.base or member not in self.current:
                continue
            if not any(self.order[user] > moment for user in member.users):
                continue
            if written_argument(member) is not None:
                self.current[member] = self.current[self.base[member]]
            else:
                self.current[member] = self._copy(member)


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
        arguments = dict(zip(("self", "size", "dim"), node.args, strict=False)) | dict(node.kwargs)
        if node.target is aten.unbind.int:
            dimension = arguments.get("size", arguments.get("dim", 0))
        else:
            dimension = arguments.get("dim", 0)
        if not isinstance(dimension, int) or any(u.target is not operator.getitem for u in node.users):
            continue
        values = node.meta["val"]
        rank = source.meta["val"].dim()
        dimension %= rank
        sizes = [v.shape[dimension] for v in values] if node.target is not aten.unbind.int else []
        if any(not isinstance(size, int) for size in sizes):
            continue
        for user in list(node.users):
            index = int(user.args[1]) % len(values)
            with graph.inserting_before(user):
                if node.target is aten.unbind.int:
                    piece = graph.call_function(aten.select.int, (source, dimension, index))
                else:
                    start = sum(sizes[:index])
                    stop = start + sizes[index]
                    piece = graph.call_function(aten.slice.Tensor, (source, dimension, start, stop))
            piece.meta = dict(node.meta) | {"val": values[index]}
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
        graph.erase_node(node)


def is_size_only(node: fx.Node) -> bool:
    """Whether a node computes sizes only."""
    return is_scalar(node)
