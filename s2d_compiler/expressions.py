"""Find the expressions by which weights follow from parameters, in a captured graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.attributes import read
from s2d_compiler.computed import Expression, Step, Value
from s2d_compiler.program import is_plain_name

#: Operators in an expression above which it is no weight's any more.
_LONGEST = 60


@dataclass(frozen=True)
class Found:
    """An expression and the attributes of the graph module that it reads.

    Attributes:
        expression: Names its tensors by the keys of ``targets``.
        targets: Name -> attribute target.
    """

    expression: Expression
    targets: Mapping[str, str]


def find_expression(
    weight: fx.Node, bias: fx.Node | None, root: nn.Module, sources: Mapping[str, str]
) -> Found | None:
    """The expression of a weight and a bias; None if they depend on more than attributes, or on
    no parameter."""
    nodes = _ancestors([weight] if bias is None else [weight, bias])
    if nodes is None:
        return None
    leaves = [n for n in nodes if n.op == "get_attr"]
    if not any(isinstance(read(root, str(n.target)), nn.Parameter) for n in leaves):
        return None
    names = _names(leaves, sources)
    steps: list[Step] = []
    for node in nodes:
        if node.op == "get_attr":
            continue
        names[node] = f"value{len(steps)}"
        args = fx.map_arg(node.args, lambda n: Value(names[n]))  # type: ignore[arg-type, return-value]
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: Value(names[n]))  # type: ignore[arg-type, return-value]
        steps.append(Step(names[node], node.target, args, kwargs))
    expression = Expression(tuple(steps), names[weight], None if bias is None else names[bias])
    return Found(expression, {names[n]: str(n.target) for n in leaves})


def _ancestors(roots: list[fx.Node]) -> list[fx.Node] | None:
    """Everything that the roots depend on, in order; None if that is not attributes alone."""
    seen: set[fx.Node] = set()
    order: list[fx.Node] = []

    def visit(node: fx.Node) -> bool:
        if node in seen:
            return True
        seen.add(node)
        if len(seen) > _LONGEST:
            return False
        if node.op != "get_attr" and not _is_pure(node):
            return False
        if not all(visit(operand) for operand in node.all_input_nodes):
            return False
        order.append(node)
        return True

    return order if all(visit(root) for root in roots) else None


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(
        node.meta.get("val"), torch.Tensor | tuple | list
    ):
        return False
    target: Any = node.target
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _names(leaves: list[fx.Node], sources: Mapping[str, str]) -> dict[fx.Node, str]:
    """A name for every attribute: the last part of its key in the state dict."""
    names: dict[fx.Node, str] = {}
    by_target: dict[str, str] = {}
    for leaf in leaves:
        target = str(leaf.target)
        if target not in by_target:
            last = sources.get(target, "constant").rpartition(".")[2]
            last = last if is_plain_name(last) and not hasattr(nn.Module, last) else f"{last}_"
            name, count = last, 1
            while name in by_target.values() or not is_plain_name(name):
                count += 1
                name = f"{last}_{count}" if is_plain_name(last) else f"tensor{count}"
            by_target[target] = name
        names[leaf] = by_target[target]
    return names
