"""The files of ``tests/formats``, with one thing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from s2d_compiler.errors import FormatError
from s2d_compiler.format import from_data
from tests.errors.case import Case

FOLDER = Path(__file__).parent.parent / "formats"


AGAIN = "the file is damaged, compile the model again"


Data = dict[str, Any]


@cache
def stored(name: str) -> Data:
    data: Data = torch.load(FOLDER / f"dyn-v1-{name}.pt", weights_only=True)
    return data


def said(trigger: Callable[[Path], object], *parts: str) -> Case:
    return Case(trigger, FormatError, *parts)


def of(name: str, edit: Callable[[Data], object], *parts: str, **given: Any) -> Case:
    """A file of ``tests/formats`` with one thing changed; without a remedy it is damaged."""

    def trigger(folder: Path) -> object:
        data = copy.deepcopy(stored(name))
        edit(data)
        return from_data(data, "dyn.pt", **given)

    place, value, rule, remedy = (*parts, AGAIN)[:4]
    return said(trigger, f"dyn.pt: {place}", value, rule, remedy)


def attention(edit: Callable[[Data], object], *parts: str, **given: Any) -> Case:
    return of("attention", edit, *parts, **given)


def put(*path: Any) -> Callable[[Data], None]:
    """Put the last item where the others lead."""
    *keys, last, value = path

    def edit(data: Data) -> None:
        holder: Any = data
        for key in keys:
            holder = holder[key]
        holder[last] = value

    return edit


def drop(*path: Any) -> Callable[[Data], None]:
    *keys, last = path

    def edit(data: Data) -> None:
        holder: Any = data
        for key in keys:
            holder = holder[key]
        del holder[last]

    return edit


def node(number: int, *path: Any) -> Callable[[Data], None]:
    """Change a node of stage 1."""
    return put("stages", 0, "graph", number, *path)


def argument(value: Any, number: int = 23) -> Callable[[Data], None]:
    return node(number, "args", {"tuple": [value]})


def target(name: str) -> Callable[[Data], None]:
    return node(23, "target", name)


NODE = {"node": "stages_0_last_norm"}


def calls(name: str, *arguments: Any) -> Callable[[Data], None]:
    """Node 23 calls an operator."""

    def encoded(value: Any) -> Any:
        if isinstance(value, list):
            return {"list": [encoded(v) for v in value]}
        return copy.copy(value)

    def edit(data: Data) -> None:
        target(name)(data)
        node(23, "args", {"tuple": [encoded(value) for value in arguments]})(data)

    return edit


def computed(*path: Any) -> Callable[[Data], None]:
    """Change the layer with a computed weight."""
    return put("modules", 2, "arguments", *path)
