"""Tensors of terms as arguments of operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from s2d_compiler.verification.terms import Terms


@dataclass(frozen=True)
class Value:
    """A tensor of terms.

    Attributes:
        terms: Terms, of the tensor's shape.
        known: The numbers themselves, where they depend on constants alone.
    """

    terms: Terms
    known: torch.Tensor | None = None


def result_of_zeros(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A result on numbers, for operators that do not run on shapes; on complex ones, if they take
    no others."""

    def zeros(v: Any, complex_: bool) -> Any:
        if not isinstance(v, torch.Tensor):
            return v
        return torch.zeros(v.shape, dtype=torch.complex64 if complex_ and v.is_floating_point()
                           else v.dtype)  # fmt: skip

    try:
        return target(*(zeros(a, False) for a in args), **kwargs)
    except RuntimeError:
        return target(*(zeros(a, True) for a in args), **kwargs)


def leaves(items: Any) -> list[Any]:
    """All that stands in arguments, tensors of terms whole."""
    return tree_leaves(list(items), is_leaf=is_value)


def is_value(item: Any) -> bool:
    """Whether something is a tensor of terms."""
    return isinstance(item, Value)


def opname(target: Any) -> str:
    """An operator's name without its namespace and overload."""
    name = str(target._opname)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_known(target: Any) -> bool:
    """Whether an operator is one of torch's own, whose name says what it does."""
    return str(target.namespace) == "aten"


def is_transposed(given: Mapping[str, Any]) -> bool:
    """Whether a convolution with these arguments is a transposed one."""
    return bool(given.get("transposed")) or "output_padding" in given


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names in the operator's schema, defaults filled in."""
    found: dict[str, Any] = {}
    for k, argument in enumerate(target._schema.arguments):
        if k < len(args):
            found[argument.name] = args[k]
        elif argument.name in kwargs:
            found[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def unbind(target: Any, given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments for a call."""
    args, kwargs = [], {}
    for argument in target._schema.arguments:
        if argument.name not in given:
            continue
        if argument.kwarg_only:
            kwargs[argument.name] = given[argument.name]
        else:
            args.append(given[argument.name])
    return args, kwargs
