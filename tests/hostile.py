"""Files of compiled networks, changed in one place, and the sentences that refuse them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d_compiler import load
from s2d_compiler.errors import FormatError
from s2d_compiler.format import load_to_show
from tests import fuzzing
from tests.data_mutations import copy_containers

Data = dict[str, Any]
Change = Callable[[Data], object]


def refusal(data: object, path: Path) -> str:
    """The sentence with which a file of this data is refused."""
    torch.save(data, path)
    return refusal_of(path)


def refusal_of(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert len(text) < 700
    assert "\n" not in text
    with pytest.raises(FormatError):
        load_to_show(path)
    return text.removeprefix(f"{path}: ").removeprefix(f"{path} ")


def module_of(data: Data, kind: str) -> Data:
    found: Data = next(row for row in data["modules"] if row["class"] == kind)
    return found


def node_of(data: Data, kind: str, stage: int = 0) -> Data:
    rows: list[Data] = data["stages"][stage]["graph"]
    return next(row for row in rows if row["op"] == kind)


def put(*keys: Any) -> Change:
    """Replace the value under some keys; the last argument is the value."""
    *path, last, value = keys

    def change(data: Data) -> None:
        at: Any = data
        for key in path:
            at = at[key]
        at[last] = value

    return change


def tensor(make: Callable[[torch.Tensor], Any]) -> Change:
    """Replace the first layer's weight."""

    def change(data: Data) -> None:
        row = next(row for row in data["tensors"] if row["data"].ndim == 4)
        row["data"] = make(row["data"])

    return change


def argument(kind: str, name: str, value: Any) -> Change:
    """Replace an argument of the first layer of a class."""
    return lambda data: module_of(data, kind)["arguments"].update({name: value})


def laughs(data: Data) -> None:
    """A list that doubles at every level: small in the file, endless to walk."""
    value: Any = 1
    for _ in range(60):
        value = {"list": [value, value]}
    node_of(data, "call_function")["args"] = {"tuple": [value]}


def steps(data: Data) -> list[Data]:
    """The operators of the first computed weight."""
    found: list[Data] = module_of(data, "ComputedLayer")["arguments"]["steps"]
    return found


def huge_step(data: Data) -> None:
    """A computed weight that makes four terabytes of ones on the way."""
    steps(data)[0].update(
        target="aten.full.default", args={"tuple": [{"list": [10**6, 10**6]}, 1.0]}, kwargs={}
    )


@cache
def _compiled() -> list[tuple[Data, tuple[Any, ...], dict[str, Any]]]:
    return fuzzing.compiled()


def network(number: int) -> Data:
    """The data of a compiled network: 0 of convolutions, 1 with attention and a computed weight,
    3 with exits along depth."""
    copied: Data = copy_containers(_compiled()[number][0])
    return copied
