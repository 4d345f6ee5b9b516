"""Random calls of operators, as the rows of a ``dyn.pt``."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch

from s2d_compiler.errors import FormatError
from s2d_compiler.operator_names import operator_from_name
from tests.data_mutations import OPERATORS

_SMALL = [0, 1, 2, 3, 4, 8, -1, -2]
_LARGE = [100, 2**15, 10**9, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**31), -(2**63 - 1)]
_LITERALS: dict[str, list[Any]] = {
    "float": [0.0, 1.0, -1.0, 0.5, 1e30, 1e-30, float("nan"), float("inf")],
    "number": [0, 1, -1, 2, 0.5, float("nan"), 1e30, 2**62, True],
    "bool": [True, False],
    "str": ["", "none", "mean", "sum", "constant", "reflect", "i,j->ij", "nuc", "fro", "linear"],
    "ScalarType": [{"dtype": name} for name in ("float32", "int64", "float16", "bool", "int8")],
    "Layout": [{"layout": "strided"}],
    "Device": [{"device": "cpu"}],
    "MemoryFormat": [{"memory_format": "contiguous_format"}, {"memory_format": "channels_last"}],
}


@cache
def permitted() -> tuple[Any, ...]:
    """The operators that a file may name without permission."""
    found = []
    for name in OPERATORS:
        try:
            found.append(operator_from_name(name, ""))
        except FormatError:
            continue
    return tuple(found)


def random_call(names: list[str], pick: random.Random) -> dict[str, Any]:
    """Target and arguments of a node that takes values of these names."""
    target = pick.choice(permitted())
    sane = pick.random() < 0.7
    arguments = []
    for argument in target._schema.arguments:
        if argument.kwarg_only:
            break
        if argument.has_default_value() and pick.random() < (0.7 if sane else 0.3):
            break  # those behind it have defaults too
        arguments.append(_value(argument.real_type, names, pick, sane))
    name = f"{target.namespace}.{target._opname}.{target._overloadname}"
    return {"target": name, "args": {"tuple": arguments}, "kwargs": {}}


def _value(kind: Any, names: list[str], pick: random.Random, sane: bool) -> Any:
    text = str(kind)
    if text.startswith("Optional"):
        return None if pick.random() < 0.5 else _value(kind.getElementType(), names, pick, sane)
    if text.startswith("List"):
        items = range(pick.choice([0, 1, 2, 2, 3, 4]))
        return {"list": [_value(kind.getElementType(), names, pick, sane) for _ in items]}
    if text == "Tensor":
        return {"node": pick.choice(names)}
    if text in ("int", "SymInt"):
        return pick.choice(_SMALL if sane else _SMALL + _LARGE)
    return pick.choice(_LITERALS.get(text, [None]))


def odd_operands(pick: random.Random) -> list[torch.Tensor]:
    """Tensors to compute with: of the usual shapes, without elements, of other kinds of numbers."""
    shapes = [(2, 3, 8, 8), (2, 8), (3,), (), (0,), (2, 0, 3), (2, 3, 4), (8, 3, 3, 3), (5, 5)]
    kinds = [torch.float32] * 4 + [torch.int64, torch.bool, torch.float16, torch.complex64]
    found = [(torch.randn(pick.choice(shapes)) * 3).to(pick.choice(kinds)) for _ in range(4)]
    if pick.random() < 0.2:
        found[0] = torch.full((5, 5), float("nan"))
    return found
