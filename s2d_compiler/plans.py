"""Both kinds of plans: those that cut channels, and those that put exits along depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.plan import Plan
from s2d_compiler.plan_rules import parse, read_file

if TYPE_CHECKING:
    import os

__all__ = ["AnyPlan", "load_plan", "plan_from_dict"]

AnyPlan: TypeAlias = Plan | DepthPlan


def is_depth_plan(data: Any) -> bool:
    """Whether a plan's data has a key that only plans of exits along depth have."""
    return isinstance(data, Mapping) and ("exits" in data or "preset" in data)


def plan_from_dict(data: Mapping[str, Any], source: str = "plan") -> AnyPlan:
    """Build the plan that some data describes; ``source`` names it in messages.

    Raises:
        PlanError: It describes none of either kind.
    """
    kind: type[AnyPlan] = DepthPlan if is_depth_plan(data) else Plan
    return kind.from_dict(data, source)


def load_plan(path: str | os.PathLike[str]) -> AnyPlan:
    """Read a plan of either kind from a JSON file.

    Raises:
        PlanError: The file cannot be read, or holds no plan.
    """
    return plan_from_dict(parse(read_file(path), str(path)), str(path))
