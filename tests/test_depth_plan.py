"""Plans of exits along depth: as data, as files, and beside their schema."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_compiler.depth_plan import DEPTH_KEYS, HEADS, DepthPlan
from s2d_compiler.errors import PlanError
from s2d_compiler.plan import Plan
from s2d_compiler.plan_rules import PLAN_VERSION
from s2d_compiler.plan_schema import depth_plan_schema
from s2d_compiler.plans import load_plan, plan_from_dict

SCHEMA = depth_plan_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
VALID: dict[str, Any] = {
    "$schema": "depth-plan.schema.json",
    "version": 1,
    "exits": ["layer1", 0.25, "layer2.1", 0.75],
    "head": ["linear", "branchynet", "branchynet-2", "branchynet-3"],
    "width": 64,
    "preset": "ddi",
    "seed": 3,
    "input_shape": [3, 32, 32],
}

# What the schema's description says -> how the reader says it -> a document that breaks only it.
READER_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "whole numbers are written without a decimal point": (
        r"is no (number of channels|(positive )?whole number|version)",
        VALID | {"seed": 3.0},
    ),
    "paths are not blank": ("an empty path names no module", VALID | {"exits": [" "] * 1}),
    "fractions increase": ("go back", {"exits": [0.5, 0.25]}),
    "there are as many kinds of heads as exits": (
        r"\d+ kinds for \d+ exits",
        VALID | {"head": ["linear"]},
    ),
    "input_shape holds at most 2147483648 numbers": (
        "holds more than 2147483648 numbers",
        VALID | {"input_shape": [2**16, 2**16]},
    ),
}


def refusal(document: Any) -> str | None:
    try:
        DepthPlan.from_json(json.dumps(document))
    except PlanError as error:
        return str(error)
    return None


def places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], list):
            found += places(value[key])
    return found


EDGES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 0.0, 0.5, 1.0, 1.5, 65536, 65537, 2**31 - 1, 2**31, 10**400),
    *("", "linear", "branchynet-4", "ddi", "layer1", [], [0.5], ["layer1"], ["layer1", "layer1"]),
    *([0.5, 0.5], [0.25, 0.5, "a", 0.4], [[0.5]], [True], [3, 0], {}, {"a": 1}),
]


@pytest.mark.parametrize("place", range(len(places(VALID))))
def test_schema_and_reader_agree_on_the_edges(place: int) -> None:
    for edge in [*EDGES, "delete"]:
        document = copy.deepcopy(VALID)
        holder, key = places(document)[place]
        if edge == "delete":
            del holder[key]
        else:
            holder[key] = copy.deepcopy(edge)
        said = refusal(document)
        wrong = [error.message for error in VALIDATOR.iter_errors(document)]
        if said is None:
            assert wrong == [], document
        elif not wrong:
            assert any(re.search(words, said) for words, _ in READER_ONLY.values()), said


@pytest.mark.parametrize("rule", READER_ONLY)
def test_rules_of_the_reader_alone_are_listed(rule: str) -> None:
    words, document = READER_ONLY[rule]
    assert rule in SCHEMA["description"]
    assert VALIDATOR.is_valid(document)
    assert re.search(words, refusal(document) or "")


def test_every_key_is_in_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == set(DEPTH_KEYS)
    assert SCHEMA["$defs"]["head"]["enum"] == list(HEADS)
    assert SCHEMA["properties"]["version"]["enum"] == list(range(1, PLAN_VERSION + 1))
    for rule in SCHEMA["properties"].values():
        assert rule["title"]
        assert rule["description"]


PLANS = st.builds(
    DepthPlan,
    st.lists(st.sampled_from(["layer1", "a.b.c", "x"]), unique=True, min_size=1, max_size=3).map(
        tuple
    ),
    st.sampled_from(list(HEADS)),
    st.none() | st.integers(1, 65536),
    st.sampled_from([None, "ddi"]),
    st.integers(0, 2**31 - 1),
    st.sampled_from([None, (3, 8, 8)]),
)


@settings(max_examples=50)
@given(PLANS)
def test_a_plan_survives_being_written(plan: DepthPlan) -> None:
    text = plan.to_json()
    VALIDATOR.validate(json.loads(text))
    assert DepthPlan.from_json(text) == plan
    assert hash(DepthPlan.from_json(text)) == hash(plan)
    assert str(len(plan.exits)) in str(plan)


def test_fractions_are_kept_to_the_last_digit() -> None:
    fraction = 0.1 + 0.2
    assert DepthPlan.from_json(DepthPlan((fraction,)).to_json()).exits == (fraction,)


def test_a_file_is_read_as_the_plan_that_it_is(tmp_path: Path) -> None:
    depth, cut = tmp_path / "depth.json", tmp_path / "cut.json"
    DepthPlan(("layer1", 0.5), "branchynet").save(depth)
    Plan.uniform(2).save(cut)
    assert load_plan(depth) == DepthPlan.load(depth) == DepthPlan(("layer1", 0.5), "branchynet")
    assert load_plan(cut) == Plan.load(cut) == Plan.uniform(2)
    assert isinstance(plan_from_dict({"preset": "ddi"}), DepthPlan)
    with pytest.raises(PlanError, match=r'depth\.json: unknown key "exits"'):
        Plan.load(depth)


def test_stages_are_the_exits_and_the_rest() -> None:
    plan = DepthPlan(("a", 0.5), ("linear", "branchynet"))
    assert plan.stages == 3
    assert plan.heads == ("linear", "branchynet")
    assert DepthPlan(("a", 0.5)).heads == ("linear", "linear")
