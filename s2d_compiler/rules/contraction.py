"""Products of tensors: matmul, einsum, attention.

Every one is written with subscripts, one letter per dimension, as ``einsum`` does. Equal
letters of two operands are one dimension; letters that the result lacks are summed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from s2d_compiler.analysis.labels import Labels, has_atoms
from s2d_compiler.layout import Layout, box_positions, channel_dimensions, layout
from s2d_compiler.program import is_scalar, shape_of, tensor_value
from s2d_compiler.raising import schema_arguments
from s2d_compiler.rules.base import NoRule, OperatorRule, register
from s2d_compiler.rules.channelwise import tie_along
from s2d_compiler.rules.elementwise import combine
from s2d_compiler.rules.products import product_macs

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder

Subscripts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """One operand of a product: its shape, its labels and a name for each dimension."""

    shape: tuple[int, ...]
    labels: Labels
    names: Subscripts

    def carries(self, name: str) -> bool:
        """Whether channels lie along the dimension of that name."""
        return name in self.names and self.labels.shape[self.names.index(name)] > 1


def contract(
    context: ChannelContext, terms: Sequence[Term], result: Subscripts, sizes: tuple[int, ...]
) -> Labels:
    """Labels of a product; see docs/semantics.md, "Matrix products".

    Args:
        context: Told of the ties.
        terms: The operands.
        result: Name of every dimension of the result; other names are summed over.
        sizes: Shape of the result.

    Raises:
        NoRule: The product sums over all channels of an operand without a weight, or would
            tie every channel to every other.
    """
    terms = [_summed(context, k, terms, result) for k in range(len(terms))]
    collapsed = _outer(terms, result)
    operands = []
    for term in terms:
        labels = term.labels
        along = {d for d, n in enumerate(term.names) if n in collapsed}
        tie_along(context, labels, along)
        for d in along:
            labels = labels.max(axis=d, keepdims=True)
        shared = {n for n in term.names if any(t.carries(n) for t in terms if t is not term)}
        operands.append(_in_result(term, labels, result, sizes, shared))
    found = combine(context, sizes, operands)
    for d, name in enumerate(result):
        if name in collapsed and found.shape[d] > 1:
            tie_along(context, found, {d})
            found = found.max(axis=d, keepdims=True)
    return found


def _summed(context: ChannelContext, k: int, terms: Sequence[Term], result: Subscripts) -> Term:
    """A term after what is summed over is tied."""
    term, labels = terms[k], terms[k].labels
    along = {d for d, n in enumerate(term.names) if n not in result and labels.shape[d] > 1}
    if not along:
        return term
    others = any(has_atoms(other.labels) for j, other in enumerate(terms) if j != k)
    if has_atoms(labels) and set(channel_dimensions(labels.shape)) <= along and not others:
        raise NoRule("it sums over all channels with a factor that is no weight")
    tie_along(context, labels, along)
    for d in along:
        labels = labels.max(axis=d, keepdims=True)
    return Term(term.shape, labels, term.names)


def _outer(terms: Sequence[Term], result: Subscripts) -> set[str]:
    """Names of the result along which operands of their own channels meet all to all."""
    own: list[set[str]] = []
    for k, term in enumerate(terms):
        elsewhere = {n for j, other in enumerate(terms) if j != k for n in other.names}
        carried = {n for n in result if term.carries(n) and has_atoms(term.labels)}
        own.append(carried - elsewhere)
    if sum(bool(names) for names in own) < 2:
        return set()
    shared = set(result) - set().union(*own)
    if not any(term.carries(n) for term in terms for n in shared):
        raise NoRule("it would tie every channel to every other")
    return set().union(*own)


def _in_result(
    term: Term, labels: Labels, result: Subscripts, sizes: tuple[int, ...], shared: set[str]
) -> tuple[tuple[int, ...], Labels]:
    """A term's shape and labels in the dimensions of the result; where it has no such
    dimension it counts as expanded. Where the other carries channels along a dimension of
    both and the term does not (keys that all heads share), it counts as of size 1, written
    so or not."""
    kept = [d for d, n in enumerate(term.names) if n in result]
    order = sorted(kept, key=lambda d: result.index(term.names[d]))
    dropped = [d for d in range(labels.ndim) if d not in kept]
    moved = labels.transpose([*order, *dropped]).reshape([labels.shape[d] for d in order])
    shape, frame, at = list(sizes), [1] * len(result), 0
    for position, name in enumerate(result):
        if name in term.names:
            shape[position] = (
                1 if name in shared and not term.carries(name) else term.shape[order[at]]
            )
            frame[position] = moved.shape[at]
            at += 1
    return tuple(shape), moved.reshape(frame)


class Product(OperatorRule):
    """``matmul``, ``bmm``, ``einsum``: ties along what is summed over.

    What remains is combined as in an elementwise operator: with atoms along a shared
    dimension (heads) these are tied; one atom against several is a gate.
    """

    family: ClassVar[str] = "matrix product"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        operands, names, result = subscripts(node)
        terms = [
            Term(shape_of(n), context.labels_of(n), s) for n, s in zip(operands, names, strict=True)
        ]
        return contract(context, terms, result, shape_of(node))

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        operands, names, result = subscripts(node)
        if not where.is_box:
            return whole(builder, node, where, stage)
        layouts, parts = read_operands(builder, operands, names, chosen_of(result, where), stage)
        given = (node.args[0], parts) if isinstance(node.args[0], str) else tuple(parts)
        created = builder.emit(node, given, {}, stage)
        part, full = (_index_sizes(operands, names, held) for held in (layouts, None))
        return with_macs_share(created, math.prod(part.values()), math.prod(full.values()))

    def macs(self, node: fx.Node) -> int:
        return product_macs(node)


def chosen_of(result: Subscripts, where: Layout) -> dict[str, tuple[int, ...]]:
    """Positions that a box asks for, by dimension name."""
    assert where.lists is not None
    return {result[d]: c for d, c in zip(where.dimensions, where.lists, strict=True)}


def operand_layout(
    frame: tuple[int, ...],
    shape: tuple[int, ...],
    names: Subscripts,
    chosen: dict[str, tuple[int, ...]],
) -> Layout:
    """Positions of an operand from which some positions of the result are made."""
    sizes = [
        size if name in chosen and size > 1 else carried
        for name, size, carried in zip(names, shape, frame, strict=True)
    ]
    lists = tuple(
        chosen.get(names[d], tuple(range(sizes[d]))) for d in channel_dimensions(tuple(sizes))
    )
    return layout(tuple(sizes), box_positions(tuple(sizes), lists))


def read_operands(
    builder: StageBuilder,
    operands: list[fx.Node],
    names: list[Subscripts],
    chosen: dict[str, tuple[int, ...]],
    stage: int,
) -> tuple[list[Layout], list[fx.Node]]:
    """What a stage reads of every operand for some positions of the result."""
    layouts = [
        operand_layout(builder.labels(n).shape, shape_of(n), s, chosen)
        for n, s in zip(operands, names, strict=True)
    ]
    parts = [builder.read(n, held, stage) for n, held in zip(operands, layouts, strict=True)]
    return layouts, parts


def _index_sizes(
    operands: list[fx.Node], names: list[Subscripts], layouts: list[Layout] | None
) -> dict[str, int]:
    """Size of every dimension of a product, of the whole or of what these layouts hold."""
    sizes: dict[str, int] = {}
    for k, (operand, subscript) in enumerate(zip(operands, names, strict=True)):
        shape = shape_of(operand)
        held = layouts[k].shape(shape) if layouts is not None else shape
        for name, size in zip(subscript, held, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return sizes


def with_macs_share(created: fx.Node, part: int, full: int) -> fx.Node:
    """Say what share of the whole operator's products a node computes, for the cost."""
    if part != full:
        created.meta["share"] = (part, full)
    return created


def whole(builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
    """The operator at full size, later stages' channels zero, and the wanted positions of it."""

    def operand(n: fx.Node) -> fx.Node:
        return builder.scalar(n, stage) if is_scalar(n) else builder.full(n, stage)

    args = fx.map_arg(node.args, operand)
    result = builder.emit(node, args, fx.map_arg(dict(node.kwargs), operand), stage)
    return builder.cut(result, node, where, stage)


# -- subscripts ------------------------------------------------------------------------------------


def subscripts(node: fx.Node) -> tuple[list[fx.Node], list[Subscripts], Subscripts]:
    """Operands of a product, the names of their dimensions and those of the result."""
    if getattr(node.target, "_opname", "") == "einsum":
        return _einsum(node)
    operands = list(node.args[:2])
    if len(node.args) != 2 or any(
        not isinstance(n, fx.Node) or tensor_value(n) is None for n in operands
    ):
        raise NoRule("its operands are not two tensors")
    first, second = (n for n in operands if isinstance(n, fx.Node))
    a, b = len(shape_of(first)), len(shape_of(second))
    outer = [f"batch {k}" for k in range(max(a, b) - 2, 0, -1)]

    def batch(rank: int) -> list[str]:
        return outer[len(outer) - max(0, rank - 2) :] if rank > 2 else []

    left = [*batch(a), *(["row"] if a > 1 else []), "sum"]
    right = [*batch(b), "sum", *(["column"] if b > 1 else [])]
    result = [*outer, *(["row"] if a > 1 else []), *(["column"] if b > 1 else [])]
    return [first, second], [tuple(left), tuple(right)], tuple(result)


def _einsum(node: fx.Node) -> tuple[list[fx.Node], list[Subscripts], Subscripts]:
    equation, given = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(given, list | tuple)
    operands = [n for n in given if isinstance(n, fx.Node)]
    left, arrow, right = equation.replace(" ", "").partition("->")
    spelled = left.split(",")
    if len(spelled) != len(operands) or len(operands) != len(given):
        raise NoRule("its equation cannot be followed")
    names = [_letters(s, len(shape_of(n))) for s, n in zip(spelled, operands, strict=True)]
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        once = sorted({c for c in letters if letters.count(c) == 1})
        right = ("..." if "..." in left else "") + "".join(once)
    result = _letters(right, len(shape_of(node)))
    if any(len(set(s)) != len(s) for s in [*names, result]):
        raise NoRule("it takes a diagonal")
    return operands, names, result


def _letters(spelled: str, rank: int) -> Subscripts:
    """One name per dimension; those under an ellipsis count from the right."""
    before, dots, after = spelled.partition("...")
    hidden = rank - len(before) - len(after)
    return (
        (*before, *(f"...{hidden - k}" for k in range(hidden)), *after) if dots else tuple(spelled)
    )


# -- attention -------------------------------------------------------------------------------------


class Attention(OperatorRule):
    """Scaled dot-product attention: cut by heads.

    All of a head's queries, keys and values are one atom. With one head, queries and keys
    belong to stage 1 and the values are cut.
    """

    family: ClassVar[str] = "attention"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        operands = self._operands(node)
        names, scores, result = _attention_names(operands, len(shape_of(node)))
        terms = [
            Term(shape_of(n), context.labels_of(n), s) for n, s in zip(operands, names, strict=True)
        ]
        query, key, value, *mask = terms
        sizes = (*shape_of(node)[:-2], query.shape[-2], key.shape[-2])
        weights = contract(context, [query, key], scores, sizes)
        given = [(sizes, weights), *((term.shape, term.labels) for term in mask)]
        weights = combine(context, sizes, given)
        if weights.shape[-1] > 1 or weights.shape[-2] > 1:
            raise NoRule("channels lie along the tokens")
        return contract(context, [Term(sizes, weights, scores), value], result, shape_of(node))

    @staticmethod
    def _operands(node: fx.Node) -> list[fx.Node]:
        arguments = schema_arguments(node)
        if arguments.get("enable_gqa"):
            raise NoRule("its queries share keys by groups of heads")
        given = [arguments[n] for n in ("query", "key", "value")]
        mask = arguments.get("attn_mask")
        return [*given, mask] if mask is not None else given

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        operands = self._operands(node)
        names, _, result = _attention_names(operands, len(shape_of(node)))
        if not where.is_box:
            return whole(builder, node, where, stage)
        layouts, parts = read_operands(builder, operands, names, chosen_of(result, where), stage)
        arguments = schema_arguments(node) | dict(
            zip(("query", "key", "value", "attn_mask"), parts, strict=False)
        )
        target: Any = node.target
        keywords = ("scale", "enable_gqa")
        positional = [arguments[a.name] for a in target._schema.arguments if a.name not in keywords]
        scale = {"scale": arguments["scale"]} if arguments.get("scale") is not None else {}
        created = builder.emit(node, tuple(positional), scale, stage)
        part, full = [_index_sizes(operands, names, where) for where in (layouts, None)]
        return with_macs_share(created, _attention_size(part), _attention_size(full))

    def macs(self, node: fx.Node) -> int:
        return product_macs(node)


def _attention_names(
    operands: list[fx.Node], rank: int
) -> tuple[list[Subscripts], Subscripts, Subscripts]:
    """Names of the operands' dimensions, of the attention weights' and of the result's."""
    outer = [f"batch {k}" for k in range(rank - 2, 0, -1)]
    scores = (*outer, "query", "key")
    spelled = [("query", "width"), ("key", "width"), ("key", "value")]
    names = [
        (*outer[len(outer) - len(shape_of(n)) + 2 :], *last)
        for n, last in zip(operands, spelled, strict=False)
    ]
    names += [scores[len(scores) - len(shape_of(n)) :] for n in operands[3:]]
    return names, scores, (*outer, "query", "value")


def _attention_size(sizes: dict[str, int]) -> int:
    outer = math.prod(n for name, n in sizes.items() if name.startswith("batch"))
    return outer * sizes["query"] * sizes["key"] * (sizes["width"] + sizes["value"])


register(Product(), [f"aten.{name}" for name in ("matmul", "mm", "bmm", "mv", "einsum")])
register(Attention(), ["aten.scaled_dot_product_attention"])
