"""Reading plain data that somebody else wrote: its kinds, its depth, its numbers, place by place.

A refusal names the place (``stages[0].graph[3].name``), the value found and the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from s2d_compiler.errors import FormatError

#: The largest number in a file: what 64 bits hold.
LARGEST = 2**63 - 1
#: Levels of lists and dicts in one another. A network's arguments and outputs take a dozen.
_DEEPEST = 100
_SCALARS = (str, int, float, bool, type(None))
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def damaged(place: str, problem: str) -> NoReturn:
    """Refuse."""
    at = f"{place}: " if place else ""
    raise FormatError(f"{at}{problem}; the file is damaged, compile the model again.")


def shown(value: Any) -> str:
    """A value in a message: short, on one line, without what a terminal would obey."""
    if isinstance(value, str | int | float | bool | type(None)):
        text = ascii(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- all of it -----------------------------------------------------------------------------------


def require_plain(data: Any) -> None:
    """Require nested dicts, lists and tuples of text, numbers and tensors, each container once.

    Nothing but these exact classes, so that reading them calls no method of a file's choosing;
    no container in itself or in two places, so that they can be walked in time.

    Raises:
        FormatError: naming the first place that holds something else.
    """
    seen: set[int] = set()
    stack: list[tuple[Any, Any, int]] = [(data, None, 0)]
    while stack:
        value, where, depth = stack.pop()
        kind = type(value)
        if kind is str:
            if _CONTROL.search(value):
                damaged(_path(where), f"{shown(value)} has characters that no name has")
        elif kind is int:
            if not -LARGEST <= value <= LARGEST:
                damaged(_path(where), "a number is larger than 64 bits hold")
        elif kind in (dict, list, tuple):
            if not value:
                continue
            if id(value) in seen:
                damaged(_path(where), f"this {kind.__name__} lies in itself, or in two places")
            if depth >= _DEEPEST:
                damaged(_path(where), f"more than {_DEEPEST} lists or dicts lie in one another")
            seen.add(id(value))
            stack.extend(_inside(value, where, depth + 1))
        elif kind is not torch.Tensor and kind not in _SCALARS:
            damaged(
                _path(where),
                f"this is a {kind.__module__}.{kind.__qualname__}, and a dyn.pt holds dicts, lists "
                "and tuples of text, numbers and tensors",
            )


def _inside(value: Any, where: Any, depth: int) -> Iterator[tuple[Any, Any, int]]:
    if type(value) is not dict:
        for position, item in enumerate(value):
            yield item, (where, position), depth
        return
    for key, item in value.items():
        if type(key) not in _SCALARS:
            damaged(_path(where), f"a key is a {type(key).__name__}, neither text nor a number")
        yield key, (where, "a key"), depth
        yield item, (where, key), depth


def _path(where: Any) -> str:
    parts: list[str] = []
    while where is not None:
        where, key = where
        plain = isinstance(key, str) and key.isidentifier() and key.isascii()
        parts.append(f".{key[:40]}" if plain else f"[{shown(key)}]")
    return "".join(reversed(parts)).removeprefix(".")


# -- one place after the other -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fields:
    """One object of a file: its values by key, each of the kind that is asked for.

    Args:
        data: What stands there.
        place: Where, for messages.

    Raises:
        FormatError: It is no dict; and every method, if a value is missing or of another kind.
    """

    data: Any
    place: str

    def __post_init__(self) -> None:
        if type(self.data) is not dict:
            damaged(self.place, f"{shown(self.data)} stands where a dict belongs")

    def at(self, key: Any) -> str:
        """Where the value of a key stands."""
        return f"{self.place}.{key}" if self.place else str(key)

    def value(self, key: str) -> Any:
        """Anything."""
        if key not in self.data:
            damaged(self.place, f"{key!r} is missing")
        return self.data[key]

    def text(self, key: str) -> str:
        """A string."""
        return as_text(self.value(key), self.at(key))

    def number(self, key: str, least: int = 0, most: int = LARGEST) -> int:
        """A whole number in a range."""
        return as_number(self.value(key), self.at(key), least, most)

    def flag(self, key: str) -> bool:
        """True or False."""
        value = self.value(key)
        if type(value) is not bool:
            damaged(self.at(key), f"{shown(value)} is neither True nor False")
        return value

    def items(self, key: str) -> list[Any]:
        """A list."""
        return as_list(self.value(key), self.at(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(as_text(value, self.at(key)) for value in self.items(key))

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers from 0."""
        return tuple(as_number(value, self.at(key)) for value in self.items(key))

    def rows(self, key: str) -> list[Fields]:
        """A list of objects."""
        items = self.items(key)
        return [Fields(item, f"{self.at(key)}[{number}]") for number, item in enumerate(items)]

    def inner(self, key: str) -> Fields:
        """An object."""
        return Fields(self.value(key), self.at(key))

    def named(self, key: str) -> dict[str, Any]:
        """An object whose keys are text."""
        found: dict[str, Any] = self.inner(key).data
        for name in found:
            as_text(name, self.at(key))
        return found


def fields_of(data: Any, place: str) -> Fields:
    """An object as ``Fields``, if it is not yet."""
    return data if isinstance(data, Fields) else Fields(data, place)


def as_text(value: Any, place: str) -> str:
    """A string."""
    if type(value) is not str:
        damaged(place, f"{shown(value)} stands where text belongs")
    return value


def as_list(value: Any, place: str) -> list[Any]:
    """A list."""
    if type(value) is not list:
        damaged(place, f"{shown(value)} stands where a list belongs")
    return value


def as_number(value: Any, place: str, least: int = 0, most: int = LARGEST) -> int:
    """A whole number in a range."""
    if type(value) is not int:
        damaged(place, f"{shown(value)} is no whole number")
    if not least <= value <= most:
        bound = f"below {least}" if value < least else f"above {most}"
        damaged(place, f"{shown(value)} is {bound}")
    return value
