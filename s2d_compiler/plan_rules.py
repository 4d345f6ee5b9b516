"""What a plan must be: the rules of its values, of its parts together, and of its JSON text.

Every rule refuses with a `PlanError` that names the place, the value, the rule and the remedy.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from s2d_compiler.errors import PlanError

if TYPE_CHECKING:
    import os

Split: TypeAlias = tuple[int, ...]
Pair: TypeAlias = tuple[int, int]
Concat: TypeAlias = tuple[Pair, ...] | Literal["all", "none"]

_MAX_GROUPS = 1024
_MAX_INPUT_NUMBERS = 2**31
MAX_CHARACTERS = 2**20
_RESOLUTION = re.compile("[1-9][0-9]{0,8}(x[1-9][0-9]{0,8}){0,2}")
#: The version of plans that this package writes. It reads this one and all before it.
PLAN_VERSION = 1
PLAN_KEYS = (
    "stages", "groups", "default", "resolutions", "layers", "order", "input_shape", "final",
    "version", "$schema",
)  # fmt: skip
SETTING_KEYS = ("split", "concat")
EXAMPLES = {"split": "[4, 6]", "concat": '"all", "none" or [[3, 1]]'}


def fail(place: str, problem: str) -> NoReturn:
    """Refuse."""
    raise PlanError(f"{place}: {problem}") from None


# Rules of the parts together


def check_counts(stages: Any, groups: Any, place: str) -> None:
    """Whole numbers, and a group for every stage."""
    for key, value in (("stages", stages), ("groups", groups)):
        if not is_int(value):
            fail(f"{place}{key}", f"{show(value)} is no whole number; give one, e.g. 8")
    if stages < 1:
        fail(
            f"{place}stages",
            f"{show(stages)} is too few, a network has one at least; give 1 or more",
        )
    if groups > _MAX_GROUPS:
        fail(f"{place}groups", f"{show(groups)} is too many; give {_MAX_GROUPS} at most")
    if groups < stages:
        fail(
            f"{place}groups",
            f"{show(groups)} is fewer than stages ({show(stages)}), and every stage needs a "
            "group of its own; raise groups or lower stages",
        )


def check_split(split: Split, stages: int, groups: int, place: str) -> None:
    """Cut points in range, in order, and as many as the stages need."""
    for point in split:
        if point < 1:
            fail(place, f"{show(point)} is below 1; cut points count groups from 1")
        if point >= groups:
            fail(
                place,
                f"{show(point)} is not below groups ({groups}); cut points lie between 1 "
                f"and {groups - 1}",
            )
    for before, after in itertools.pairwise(split):
        if after <= before:
            fail(
                place,
                f"{after} follows {before}, but cut points increase strictly, or a stage would "
                "own nothing; sort them and drop repeated ones",
            )
    if len(split) != stages - 1:
        fail(
            place,
            f"{show(list(split))} has {_count(len(split), 'cut point')}, but {stages} stages "
            f"need {stages - 1}; add or drop some, or change stages",
        )


def check_pairs(pairs: Iterable[Pair], stages: int, final: str, place: str) -> None:
    """Later stages read earlier ones, and the untouched network reads nothing."""
    for later, earlier in pairs:
        shown = show([later, earlier])
        if not 1 <= earlier < later:
            fail(
                place,
                f"{shown} is no pair [later, earlier]: 1 <= earlier < later must hold; swap its "
                "stages or drop it",
            )
        if later > stages:
            fail(
                place,
                f"{shown} names stage {show(later)}, but there are {stages} stages; drop the pair, "
                "or raise stages",
            )
        if later == stages and final == "original":
            fail(
                place,
                f'{shown} names stage {later}, which with final "original" is the whole network '
                'and reads nothing; drop the pair, or write "all"',
            )


# Rules of single values


def is_int(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_list(value: object) -> bool:
    """Whether a value is a list of sorts; strings are none."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def read_split(value: Any, place: str) -> Split:
    """Cut points as a tuple, whatever numbers they are."""
    if not is_list(value):
        fail(place, f"{show(value)} is no list of cut points; write one, e.g. [4, 6]")
    for point in value:
        if not is_int(point):
            fail(place, f"{show(point)} is no whole number; cut points count groups, e.g. [4, 6]")
    return tuple(map(int, value))


def read_concat(value: Any, place: str) -> Concat:
    """Pairs in ascending order, or "all" or "none"."""
    if isinstance(value, str):
        check_choice(value, ("all", "none"), place, " or a list of pairs, e.g. [[2, 1], [3, 1]]")
        return "all" if value == "all" else "none"
    if not is_list(value):
        fail(
            place,
            f'{show(value)} is neither a list of pairs nor "all" nor "none"; write one of these, '
            "e.g. [[2, 1], [3, 1]]",
        )
    pairs: set[Pair] = set()
    for pair in value:
        if not is_list(pair) or len(pair) != 2 or not all(is_int(stage) for stage in pair):
            fail(place, f"{show(pair)} is no pair of stages; write [later, earlier], e.g. [3, 1]")
        if tuple(pair) in pairs:
            fail(place, f"{show(list(pair))} stands here twice; drop one")
        pairs.add((int(pair[0]), int(pair[1])))
    return tuple(sorted(pairs))


def read_input_shape(value: Any, place: str) -> tuple[int, ...]:
    """The shape of one input, as a tuple."""
    rule = "write the shape of one input without the batch, e.g. [3, 224, 224]"
    if not is_list(value) or not value:
        fail(place, f"{show(value)} is no shape; {rule}")
    numbers = 1
    for size in value:
        if not is_int(size) or size < 1:
            fail(place, f"{show(size)} is no positive whole number; {rule}")
        numbers *= size
        if numbers > _MAX_INPUT_NUMBERS:
            fail(place, f"{show(list(value))} holds more than {_MAX_INPUT_NUMBERS} numbers; {rule}")
    return tuple(map(int, value))


def check_version(data: Any, source: str) -> None:
    """A version that this package knows, or none, which is version 1.

    Before all other rules: what a newer version adds would look like a mistake.
    """
    if not isinstance(data, Mapping):
        return
    if "$schema" in data and not isinstance(data["$schema"], str):
        fail(
            f"{source}: $schema",
            f"{show(data['$schema'])} is no text; name the schema's file or leave the key out",
        )
    version = data.get("version", 1)
    if not is_int(version) or version < 1:
        fail(
            f"{source}: version",
            f"{show(version)} is no version, which count from 1; write {PLAN_VERSION} or leave "
            "the key out",
        )
    if version > PLAN_VERSION:
        fail(
            f"{source}: version",
            f"{show(version)} is newer than this package, which reads plans up to version "
            f"{PLAN_VERSION}; upgrade s2d-compiler",
        )


def check_choice(value: Any, choices: tuple[str, ...], place: str, more: str = "") -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        known = " or ".join(map(as_json, choices))
        fail(place, f"{show(value)} is not {known}{more}; write one of these")


def check_resolution(key: Any, place: str) -> None:
    """A name of the form 32x32, 8x32x32 or 49."""
    if not isinstance(key, str) or not _RESOLUTION.fullmatch(key):
        fail(
            place,
            f"{show(key)} is no resolution; write height and width as in 32x32, after the depth "
            "as in 8x32x32, or a number of positions as in 49",
        )


def positions(resolution: str) -> tuple[int, str]:
    """Sorts resolutions by how many positions they have."""
    return prod(map(int, resolution.split("x"))), resolution


# Files and JSON


def read_file(path: str | os.PathLike[str]) -> str:
    """The text of a plan's file, as far as a plan may be long."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError:
        fail(str(path), "there is no such file; check the path")
    except IsADirectoryError:
        fail(str(path), "this is a folder; name the plan's file")
    except UnicodeDecodeError as error:
        fail(str(path), f"not text in UTF-8 (byte {error.start}); a plan is a JSON file")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(str(path), f"cannot be read ({reason}); check the path and your rights")


def parse(text: str, source: str) -> Any:
    """Read JSON, and refuse what its standard forbids but Python's reader takes."""
    if len(text) > MAX_CHARACTERS:
        fail(
            source,
            f"more than {MAX_CHARACTERS} characters, and a plan is much shorter; check that this "
            "is the plan's file",
        )

    def refuse(constant: str) -> NoReturn:
        fail(source, f"{constant} is no JSON; write a number")

    try:
        data = json.loads(text, object_pairs_hook=_Object, parse_constant=refuse)
        _refuse_repeats(data, source, f"{source}: ")
    except json.JSONDecodeError as error:
        fail(
            f"{source}: line {error.lineno}, column {error.colno}",
            f"not JSON: {error.msg}; correct the text there",
        )
    except RecursionError:
        fail(
            source,
            "lists or objects are nested too deeply, and a plan has four levels; check that this "
            "is the plan's file",
        )
    except ValueError:
        fail(source, "a number is too large: it has thousands of digits; write a smaller one")
    return data


class _Object(dict[str, Any]):
    """A JSON object that remembers a key that it was given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated: str | None = None
        for key, _ in pairs:
            if key in seen:
                self.repeated = key
            seen.add(key)


def _refuse_repeats(value: Any, place: str, prefix: str) -> None:
    if isinstance(value, _Object):
        if value.repeated is not None:
            fail(place, f"the key {show(value.repeated)} stands here twice; keep one")
        for key, item in value.items():
            here = f"{prefix}{key if key.isidentifier() else show(key)}"
            _refuse_repeats(item, here, f"{here}.")
    elif isinstance(value, list):
        for item in value:
            _refuse_repeats(item, place, prefix)


def check_keys(
    data: Any, known: Sequence[str], required: Sequence[str], place: str, prefix: str
) -> None:
    """An object that has all required keys and no unknown ones."""
    if not isinstance(data, Mapping):
        fail(place, f"{show(data)} is no object with the keys {', '.join(known)}; write one")
    for key in data:
        if key not in known:
            matches = difflib.get_close_matches(str(key)[:100], known, n=1)
            remedy = f'did you mean "{matches[0]}"?' if matches else f"known: {', '.join(known)}"
            fail(place, f"unknown key {show(key)}; {remedy}")
    for key in required:
        if key not in data:
            fail(f"{prefix}{key}", f"missing, and a plan needs {', '.join(required)}; add it")


# Text


def as_json(value: Any) -> str:
    """Write a value as JSON on one line."""
    return json.dumps(value)


def show(value: Any) -> str:
    """A value as JSON where it has such a form, on one line that fits a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = " ".join(repr(value).split())
        except Exception:
            text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def nearest(pattern: str, layers: Sequence[str]) -> str:
    """What to say instead of a pattern that matches nothing."""
    if matches := difflib.get_close_matches(pattern[:100], layers, n=3, cutoff=0.4):
        return f"near it are {', '.join(matches)}"
    if layers:
        return f"its layers are {', '.join(layers[:5])}{' ...' if len(layers) > 5 else ''}"
    return "it has no layers to cut"
