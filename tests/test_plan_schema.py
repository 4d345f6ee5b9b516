"""plan.schema.json: it and the reader take and refuse the same documents.

What a schema cannot say, its description lists. ``READER_ONLY`` has the same list, with how the
reader words each refusal: nothing else may be valid by the schema and refused by the reader.
"""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2d_compiler.errors import PlanError
from s2d_compiler.plan import Plan
from s2d_compiler.plan_rules import PLAN_KEYS, PLAN_VERSION, SETTING_KEYS
from s2d_compiler.plan_schema import DEPTH_PATH, PATH, plan_schema
from tests.plans import plans

ROOT = Path(__file__).parent.parent
SCHEMA = plan_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

VALID = {
    "$schema": "plan.schema.json",
    "version": 1,
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "resolutions": {
        "32x32": {"split": [3, 5], "concat": [[3, 1], [3, 2]]},
        "49": {"split": [1, 7]},
    },
    "layers": {"layer1.*": {"concat": "none"}, "*": {"split": [2, 3]}},
    "order": "l1",
    "input_shape": [3, 32, 32],
    "final": "cut",
}

# What the schema's description says -> how the reader says it -> a document that breaks only it.
READER_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "numbers are written without a decimal point": (
        r"\d+\.0\b.* is no (positive )?(whole number|pair of stages|version)",
        VALID | {"stages": 3.0},
    ),
    "groups is at least stages": ("is fewer than stages", VALID | {"groups": 2}),
    "a split has stages - 1 cut points": (
        r"has \d+ cut points?, but \d+ stages need",
        VALID | {"default": {"split": [4], "concat": "all"}},
    ),
    "which increase": (
        "cut points increase strictly",
        VALID | {"default": {"split": [6, 4], "concat": "all"}},
    ),
    "and lie below groups": (
        "is not below groups",
        VALID | {"default": {"split": [4, 8], "concat": "all"}},
    ),
    "earlier is less than later": (
        "1 <= earlier < later must hold",
        VALID | {"default": {"split": [4, 6], "concat": [[3, 3]]}},
    ),
    "later is at most stages": (
        r"names stage \d+, but there are \d+ stages",
        VALID | {"default": {"split": [4, 6], "concat": [[4, 1]]}},
    ),
    'with final "original" less than stages': (
        'which with final "original" is the whole network',
        VALID | {"final": "original"},
    ),
    "input_shape holds at most 2147483648 numbers": (
        "holds more than 2147483648 numbers",
        VALID | {"input_shape": [2**16, 2**16]},
    ),
}


def refusal(document: Any) -> str | None:
    """What the reader says to a document; None if it takes it."""
    try:
        Plan.from_json(json.dumps(document))
    except PlanError as error:
        return str(error)
    return None


def compare(document: Any) -> None:
    said = refusal(document)
    wrong = [error.message for error in VALIDATOR.iter_errors(document)]
    if said is None:
        assert wrong == []
    elif not wrong:
        assert any(re.search(words, said) for words, _ in READER_ONLY.values()), said


# Random documents: plans, and plans in which a few things were changed

NUMBERS = (
    st.integers(-2, 10)
    | st.sampled_from([1023, 1024, 1025, 2**31, 2**31 + 1, 10**400])
    | st.sampled_from([1.0, 2.0, 3.0, 2.5, -1.0, 1e300])
)
WORDS = st.sampled_from(
    [
        *(*PLAN_KEYS, *SETTING_KEYS, "all", "none", "index", "l1", "cut", "original", ""),
        *("8x8", "49", "8x8\n", "0x8", "٣", "08", "1234567890", "4x4x4", "4x4x4x4", "layer1.*"),
    ]
)
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


@st.composite
def documents(draw: st.DrawFn) -> Any:
    document = copy.deepcopy(draw(st.just(VALID) | plans(["8x8", "4x4"])))
    for _ in range(draw(st.integers(0, 2))):
        if not (found := places(document)):
            break
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "delete", "add", "move"])):
            case "replace":
                holder[key] = draw(JUNK)
            case "delete":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(WORDS)] = draw(JUNK)
            case "add":
                holder.append(draw(JUNK))
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from(found)))[0]
    return document


@settings(max_examples=200)
@given(documents())
@example(VALID)
@example([])
@example(VALID | {"resolutions": {"8x8\n": {"split": [4, 6]}}})
@example(VALID | {"stages": True})
@example(VALID | {"version": 2})
@example(VALID | {"$schema": 5})
@example({"stages": 1, "groups": 8, "default": {"split": [], "concat": "all"}, "final": "original"})
def test_schema_and_reader_agree(document: Any) -> None:
    compare(document)


EDGES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 1.0, 1023, 1024, 1025, 2**31, 2**31 + 1),
    *("", "all", "index", "cut", "original", "more", "8x8"),
    *([], [1], [1, 1], [4, 6], [0, 4], [3, 2, 1], [[2, 1]], [[2, 1], [2, 1]], [[2, 1, 1]]),
    *([[3, 0]], [[1, 1]], [[1025, 1]], [[3]], [3, 32, 0]),
    *({}, {"": {"split": [4, 6]}}, {"8x8": {}}, {"more": {"split": [4, 6]}}),
]


@pytest.mark.parametrize("place", range(len(places(VALID))))
def test_schema_and_reader_agree_on_the_edges(place: int) -> None:
    """One value of a plan replaced by each edge of each rule, or left out."""
    for edge in EDGES:
        document = copy.deepcopy(VALID)
        holder, key = places(document)[place]
        holder[key] = edge
        compare(document)
    document = copy.deepcopy(VALID)
    holder, key = places(document)[place]
    del holder[key]
    compare(document)


@settings(max_examples=50)
@given(plans(["8x8", "4x4"]))
def test_what_is_written_is_valid(data: dict[str, Any]) -> None:
    VALIDATOR.validate(json.loads(Plan.from_dict(data).to_json()))


@pytest.mark.parametrize("rule", READER_ONLY)
def test_rules_of_the_reader_alone_are_listed(rule: str) -> None:
    words, document = READER_ONLY[rule]
    assert rule in SCHEMA["description"]
    assert VALIDATOR.is_valid(document)
    assert re.search(words, refusal(document) or "")


@pytest.mark.parametrize("holder", [SCHEMA, SCHEMA["$defs"]["setting"]])
def test_every_key_is_explained_with_an_example(holder: dict[str, Any]) -> None:
    """Editors show titles and descriptions, and offer examples, defaults and enumerations."""
    assert set(holder["properties"]) == set(PLAN_KEYS if holder is SCHEMA else SETTING_KEYS)
    for key, rule in holder["properties"].items():
        described = SCHEMA["$defs"].get(rule.get("$ref", "").rpartition("/")[2], {}) | rule
        assert described["title"], key
        assert described["description"], key
        assert "examples" in described or "default" in described, key
        for shown in described.get("examples", []):
            assert VALIDATOR.evolve(schema=SCHEMA | {"required": []}).is_valid({key: shown}) or (
                holder is not SCHEMA
            )


def test_the_schema_is_one_and_of_the_version_that_is_written() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["version"]["enum"] == list(range(1, PLAN_VERSION + 1))


def test_its_place_is_printed_for_editors(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(PATH.with_name("plan_schema.py")), run_name="__main__")
    assert list(map(Path, capsys.readouterr().out.splitlines())) == [PATH, DEPTH_PATH]


def test_plans_of_this_repository_are_valid() -> None:
    for path in (ROOT / "examples").glob("*.json"):
        VALIDATOR.validate(json.loads(path.read_text()))
    block = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    VALIDATOR.validate(json.loads(block[1]))
