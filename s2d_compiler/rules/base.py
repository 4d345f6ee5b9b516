"""The contract of an operator rule, and the one table that holds them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.analysis.labels import Labels
    from s2d_compiler.layout import Layout
    from s2d_compiler.staging import StageBuilder


class NoRule(Exception):
    """Raised by a rule that does not cover one use of its operator; the text says why."""


class OperatorRule(ABC):
    """What one family of operators does to channels, and what it costs.

    A rule is stateless. To support an operator, write one and ``register`` it under the
    operator's name (``"aten.relu"``) or, for operators that are raised to modules, under the
    class name (``"Conv2d"``).
    """

    #: Name of the family, as reports print it.
    family: ClassVar[str]
    #: Whether the operator mixes channels without weights and runs once per stage.
    is_coupled: ClassVar[bool] = False
    #: Whether every element of the result depends on one element of each operand, so that a
    #: slice of the result can be computed from slices of the operands.
    moves_or_maps: ClassVar[bool] = False

    @abstractmethod
    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        """Labels of the result; ties between operands are told to the context.

        Raises:
            NoRule: This use is not covered; the node is then versioned.
        """

    @abstractmethod
    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Emit the operator for some positions of its result, as ``stage`` computes them.

        Args:
            builder: Reads operands and emits nodes.
            node: The node of the static program.
            where: The positions of the result, and the layout in which to return them.
            stage: The stage that computes (from 1; 0 for what is nobody's).
        """

    def macs(self, node: fx.Node) -> int:
        """MACs per sample of the whole operator (layers are counted from their weights)."""
        return 0


_TABLE: dict[str, OperatorRule] = {}


def register(rule: OperatorRule, names: Iterable[str]) -> OperatorRule:
    """Enter a rule into the table.

    Raises:
        ValueError: A name is taken.
    """
    entries = list(names)
    for name in entries:
        if name in _TABLE:
            raise ValueError(f"{name} already has the rule {_TABLE[name].family!r}")
    _TABLE.update(dict.fromkeys(entries, rule))
    return rule


def table() -> dict[str, OperatorRule]:
    """The table, operator or class name -> rule (a copy)."""
    return dict(_TABLE)


def rule_key(node: fx.Node) -> str:
    """The name under which a node's rule is looked up."""
    if node.op == "call_module":
        return str(node.meta.get("kind", ""))
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return str(getattr(target, "__name__", target))


def find_rule(node: fx.Node) -> OperatorRule | None:
    """The rule of a node, None for an operator that is not known.

    An operator without an entry whose own registration in torch carries the ``pointwise``
    tag is elementwise: that is torch's statement, not a guess.
    """
    if (found := _TABLE.get(rule_key(node))) is not None:
        return found
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _TABLE["<pointwise>"]
    return None
