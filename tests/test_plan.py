"""Plans: their meaning, their JSON, and every way in which one can be wrong."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_compiler.errors import PlanError
from s2d_compiler.plan import Plan, Setting

FULL = {
    "version": 1,
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "resolutions": {
        "32x32": {"split": [3, 5], "concat": [[3, 1], [3, 2]]},
        "49": {"split": [1, 7]},
    },
    "layers": {"layer1.*": {"concat": "none"}, "layer1.0.*": {"split": [2, 3]}},
    "order": "l1",
    "input_shape": [3, 32, 32],
    "final": "cut",
}


def plan_with(**changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(FULL) | changes
    return {key: value for key, value in data.items() if value is not ...}


# Round trips


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    stages = draw(st.integers(1, 5))
    groups = draw(st.integers(stages, 16))
    final = draw(st.sampled_from(["cut", "original"])) if stages > 1 else "cut"
    last = stages if final == "cut" else stages - 1
    pairs = [(j, i) for j in range(2, last + 1) for i in range(1, j)]
    splits = st.lists(
        st.integers(1, max(groups - 1, 1)), min_size=stages - 1, max_size=stages - 1, unique=True
    ).map(lambda points: tuple(sorted(points)))
    concats = st.sampled_from(["all", "none"]) | (
        st.lists(st.sampled_from(pairs), unique=True).map(tuple) if pairs else st.just(())
    )
    either = st.builds(Setting, splits, concats)
    partly = st.builds(Setting, splits) | st.builds(Setting, st.none(), concats) | either
    return Plan(
        stages,
        groups,
        draw(either),
        draw(st.dictionaries(st.sampled_from(["32x32", "16x16", "8x9", "49", "1x1"]), partly)),
        draw(st.dictionaries(st.text(min_size=1, max_size=8), partly, max_size=3)),
        draw(st.sampled_from(["index", "l1"])),
        draw(st.none() | st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple)),
        final,
    )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_round_trips(plan: Plan) -> None:
    for again in (
        Plan.from_dict(plan.to_dict()),
        Plan.from_json(plan.to_json()),
        Plan.from_dict(json.loads(json.dumps(plan.to_dict()))),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
    ):
        assert again == plan
        assert hash(again) == hash(plan)
        assert list(again.layers) == list(plan.layers)
        assert str(again) == str(plan)


def test_full_plan_from_json() -> None:
    plan = Plan.from_dict(FULL)
    assert plan.default == Setting((4, 6), "all")
    assert plan.resolutions == {
        "32x32": Setting((3, 5), ((3, 1), (3, 2))),
        "49": Setting((1, 7)),
    }
    assert (plan.order, plan.input_shape, plan.final) == ("l1", (3, 32, 32), "cut")
    assert plan.to_dict() == FULL


def test_defaults() -> None:
    plan = Plan(1, 8, Setting((), "none"))
    assert (plan.order, plan.input_shape, plan.final) == ("index", None, "cut")
    assert plan == Plan.from_json(
        '{"stages": 1, "groups": 8, "default": {"split": [], "concat": "none"}}'
    )


def test_lists_and_numpy_numbers_are_taken() -> None:
    loose = Plan(
        np.int64(3),
        np.int32(8),
        Setting([np.int64(4), 6], [[3, 1], [2, 1]]),  # type: ignore[arg-type]
        input_shape=[3, np.int64(8)],  # type: ignore[arg-type]
    )
    strict = Plan(3, 8, Setting((4, 6), ((2, 1), (3, 1))), input_shape=(3, 8))
    assert loose == strict
    assert loose.to_json() == strict.to_json()


def test_order_counts_for_layers_and_not_for_resolutions_or_pairs() -> None:
    one, two = Setting(None, "all"), Setting(None, "none")
    default = Setting((4,), "none")
    by_layer = Plan(2, 8, default, layers={"a": one, "b": two})
    assert by_layer != Plan(2, 8, default, layers={"b": two, "a": one})
    by_resolution = Plan(2, 8, default, {"8x8": one, "16x16": two})
    assert by_resolution == Plan(2, 8, default, {"16x16": two, "8x8": one})
    assert list(by_resolution.resolutions) == ["16x16", "8x8"]
    assert Setting(None, ((3, 1), (2, 1))) == Setting(None, ((2, 1), (3, 1)))


def test_a_plan_cannot_be_changed() -> None:
    plan = Plan.from_dict(FULL)
    with pytest.raises(FrozenInstanceError):
        plan.stages = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.resolutions["32x32"] = Setting((1, 2))  # type: ignore[index]
    assert replace(plan, order="index").order == "index"
    with pytest.raises(PlanError):
        replace(plan, stages=4)


def test_source_is_not_compared() -> None:
    assert Plan.from_dict(FULL, "a.json") == Plan.from_dict(FULL, "b.json")
    assert hash(Plan.from_dict(FULL, "a.json")) == hash(Plan.from_dict(FULL, "b.json"))


def test_text() -> None:
    assert str(Plan.from_dict(FULL)).splitlines() == [
        "3 stages, 8 groups, order l1, final cut, input 3x32x32",
        "  default     split [4, 6], concat all",
        "  32x32       split [3, 5], concat [[3, 1], [3, 2]]",
        "  49          split [1, 7]",
        "  layer1.*    concat none",
        "  layer1.0.*  split [2, 3]",
    ]


def test_json_has_a_line_for_each_setting() -> None:
    assert (
        '    "32x32": {"split": [3, 5], "concat": [[3, 1], [3, 2]]},\n'
        in Plan.from_dict(FULL).to_json()
    )


def test_save_and_load(tmp_path: Path) -> None:
    plan = Plan.from_dict(FULL)
    plan.save(tmp_path / "spec.json")
    assert Plan.load(tmp_path / "spec.json") == plan
    assert Plan.load(tmp_path / "spec.json").source == str(tmp_path / "spec.json")


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(FULL), encoding="utf-8-sig")
    assert Plan.load(tmp_path / "spec.json") == Plan.from_dict(FULL)


@pytest.mark.parametrize(("stages", "groups"), [(1, 1), (1, 8), (3, 8), (8, 8), (5, 16)])
def test_uniform_is_even(stages: int, groups: int) -> None:
    split = Plan.uniform(stages, groups).default.split
    assert split is not None
    widths = np.diff([0, *split, groups])
    assert widths.min() >= 1
    assert widths.max() - widths.min() <= 1
    assert Plan.uniform(3, 8, [4, 6], "all").default == Setting((4, 6), "all")


# Meaning


def test_split_precedence() -> None:
    plan = Plan.from_dict(FULL)
    assert plan.split_for("8x8", ["conv"]) == (4, 6)
    assert plan.split_for("32x32", ["conv"]) == (3, 5)
    assert plan.split_for("32x32", ["layer1.1.conv"]) == (3, 5), "its pattern says only concat"
    assert plan.split_for("32x32", ["conv", "layer1.0.conv"]) == (2, 3), "any writer will do"
    assert plan.split_for("32x32", iter(["layer1.0.conv"])) == (2, 3)
    assert plan.split_for("32x32", []) == (3, 5)


def test_a_later_pattern_wins() -> None:
    settings = {"a.*": Setting((1,)), "*.b": Setting((2,))}
    assert Plan(2, 8, Setting((4,), "none"), layers=settings).split_for("1", ["a.b"]) == (2,)
    backwards = dict(reversed(settings.items()))
    assert Plan(2, 8, Setting((4,), "none"), layers=backwards).split_for("1", ["a.b"]) == (1,)


def test_patterns_mind_case() -> None:
    plan = Plan(2, 8, Setting((4,), "none"), layers={"Conv": Setting((2,))})
    assert plan.split_for("1", ["conv"]) == (4,)


def test_reads() -> None:
    plan = Plan.from_dict(FULL)
    every = {(2, 1), (3, 1), (3, 2)}
    assert plan.reads("8x8", "conv") == every
    assert plan.reads("32x32", "conv") == {(3, 1), (3, 2)}
    assert plan.reads("49", "conv") == every, "its resolution says only split"
    assert plan.reads("32x32", "layer1.0.conv") == frozenset()


def test_the_untouched_network_reads_nothing() -> None:
    plan = Plan(3, 8, Setting((4, 6), "all"), final="original")
    assert plan.reads("8x8", "conv") == {(2, 1)}


def test_pairs_are_not_transitive() -> None:
    assert Plan(3, 8, Setting((4, 6), ((3, 1),))).reads("8x8", "conv") == {(3, 1)}


# Against a model


def test_check_against_accepts() -> None:
    Plan.from_dict(FULL).check_against(["32x32", "49"], ["conv", "layer1.0.conv"])


def test_unknown_resolution_lists_those_that_exist() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(FULL, "spec.json").check_against(["32x32", "16x16"], ["layer1.0.conv"])
    assert str(caught.value) == (
        "spec.json: resolutions.49: the model has no such resolution; it has 32x32, 16x16"
    )


def test_pattern_without_a_layer() -> None:
    plan = Plan.from_dict(plan_with(layers={"layer1.0.cnv1": {"concat": "all"}}), "spec.json")
    with pytest.raises(PlanError) as caught:
        plan.check_against(["32x32", "49"], ["stem", "layer1.0.conv1", "layer1.0.conv2"])
    assert str(caught.value) == (
        'spec.json: layers["layer1.0.cnv1"]: this pattern matches no layer of the model; '
        "near it are layer1.0.conv1, layer1.0.conv2"
    )
    with pytest.raises(PlanError, match="it has no layers to cut"):
        plan.check_against(["32x32", "49"], [])


# Refusals

WRONG = {
    "not an object": ([1], "plan: [1] is no object with the keys stages, groups, default"),
    "null": (None, "plan: null is no object"),
    "unknown key": (plan_with(stagse=3), 'unknown key "stagse"; did you mean "stages"?'),
    "unknown key, nothing near": (plan_with(zzz=3), 'unknown key "zzz"; known: stages, groups'),
    "unknown key in default": (
        plan_with(default={"splt": [4, 6], "concat": "all"}),
        'plan: default: unknown key "splt"; did you mean "split"?',
    ),
    "unknown key in layer": (
        plan_with(layers={"a.*": {"splits": [4, 6]}}),
        'plan: layers["a.*"]: unknown key "splits"; did you mean "split"?',
    ),
    "stages missing": (
        plan_with(stages=...),
        "plan: stages: missing, and a plan needs stages, groups",
    ),
    "groups missing": (plan_with(groups=...), "plan: groups: missing"),
    "default missing": (plan_with(default=...), "plan: default: missing"),
    "split missing": (plan_with(default={"concat": "all"}), 'plan: default: "split" is missing'),
    "concat missing": (plan_with(default={"split": [4, 6]}), 'plan: default: "concat" is missing'),
    "default no object": (plan_with(default=[4, 6]), "plan: default: [4, 6] is no object"),
    "stages a string": (plan_with(stages="3"), 'plan: stages: "3" is no whole number'),
    "stages a float": (plan_with(stages=3.0), "plan: stages: 3.0 is no whole number"),
    "stages a bool": (plan_with(stages=True), "plan: stages: true is no whole number"),
    "no stages": (plan_with(stages=0), "plan: stages: 0 is too few, a network has one at least"),
    "groups a bool": (plan_with(groups=True), "plan: groups: true is no whole number"),
    "groups few": (plan_with(groups=2), "plan: groups: 2 is fewer than stages (3)"),
    "groups many": (
        plan_with(groups=10**9),
        "plan: groups: 1000000000 is too many; give 1024 at most",
    ),
    "split no list": (
        plan_with(default={"split": 4, "concat": "all"}),
        "plan: default.split: 4 is no list of cut points; write one, e.g. [4, 6]",
    ),
    "split a string": (
        plan_with(default={"split": "46", "concat": "all"}),
        'plan: default.split: "46" is no list',
    ),
    "split null": (
        plan_with(default={"split": None, "concat": "all"}),
        "plan: default.split: null is no list",
    ),
    "cut point a float": (
        plan_with(resolutions={"32x32": {"split": [4, 6.5]}}),
        "plan: resolutions.32x32.split: 6.5 is no whole number",
    ),
    "cut point a bool": (
        plan_with(resolutions={"32x32": {"split": [True, 6]}}),
        "plan: resolutions.32x32.split: true is no whole number",
    ),
    "cut point zero": (
        plan_with(resolutions={"32x32": {"split": [0, 6]}}),
        "plan: resolutions.32x32.split: 0 is below 1",
    ),
    "cut point beyond": (
        plan_with(default={"split": [4, 9], "concat": "all"}),
        "plan: default.split: 9 is not below groups (8); cut points lie between 1 and 7",
    ),
    "cut point at the end": (
        plan_with(default={"split": [4, 8], "concat": "all"}),
        "plan: default.split: 8 is not below groups (8)",
    ),
    "cut points equal": (
        plan_with(layers={"a.*": {"split": [4, 4]}}),
        'plan: layers["a.*"].split: 4 follows 4, but cut points increase strictly',
    ),
    "cut points falling": (
        plan_with(layers={"a.*": {"split": [5, 4]}}),
        'plan: layers["a.*"].split: 4 follows 5',
    ),
    "cut points few": (
        plan_with(default={"split": [4], "concat": "all"}),
        "plan: default.split: [4] has 1 cut point, but 3 stages need 2",
    ),
    "cut points many": (
        plan_with(default={"split": [2, 4, 6], "concat": "all"}),
        "plan: default.split: [2, 4, 6] has 3 cut points, but 3 stages need 2",
    ),
    "concat word": (
        plan_with(default={"split": [4, 6], "concat": "some"}),
        'plan: default.concat: "some" is not "all" or "none" or a list of pairs',
    ),
    "concat number": (
        plan_with(default={"split": [4, 6], "concat": 1}),
        'plan: default.concat: 1 is neither a list of pairs nor "all" nor "none"',
    ),
    "flat pair": (
        plan_with(default={"split": [4, 6], "concat": [3, 1]}),
        "plan: default.concat: 3 is no pair of stages; write [later, earlier], e.g. [3, 1]",
    ),
    "triple": (
        plan_with(default={"split": [4, 6], "concat": [[3, 2, 1]]}),
        "plan: default.concat: [3, 2, 1] is no pair of stages",
    ),
    "pair of a bool": (
        plan_with(default={"split": [4, 6], "concat": [[3, True]]}),
        "plan: default.concat: [3, true] is no pair of stages",
    ),
    "pair backwards": (
        plan_with(resolutions={"8x8": {"concat": [[1, 3]]}}),
        "plan: resolutions.8x8.concat: [1, 3] is no pair [later, earlier]: 1 <= earlier < later",
    ),
    "pair of one stage": (
        plan_with(resolutions={"8x8": {"concat": [[2, 2]]}}),
        "plan: resolutions.8x8.concat: [2, 2] is no pair",
    ),
    "pair from zero": (
        plan_with(resolutions={"8x8": {"concat": [[1, 0]]}}),
        "plan: resolutions.8x8.concat: [1, 0] is no pair",
    ),
    "pair beyond": (
        plan_with(resolutions={"8x8": {"concat": [[4, 1]]}}),
        "plan: resolutions.8x8.concat: [4, 1] names stage 4, but there are 3 stages",
    ),
    "pair twice": (
        plan_with(resolutions={"8x8": {"concat": [[3, 1], [2, 1], [3, 1]]}}),
        "plan: resolutions.8x8.concat: [3, 1] stands here twice; drop one",
    ),
    "order": (plan_with(order="l2"), 'plan: order: "l2" is not "index" or "l1"'),
    "order null": (plan_with(order=None), 'plan: order: null is not "index" or "l1"'),
    "order a list": (plan_with(order=["l1"]), 'plan: order: ["l1"] is not "index" or "l1"'),
    "final": (plan_with(final="whole"), 'plan: final: "whole" is not "cut" or "original"'),
    "final alone": (
        plan_with(
            stages=1,
            default={"split": [], "concat": "all"},
            resolutions={},
            layers={},
            final="original",
        ),
        'plan: final: "original" needs a thin stage before the untouched network',
    ),
    "final reads": (
        plan_with(final="original"),
        'plan: resolutions.32x32.concat: [3, 1] names stage 3, which with final "original" is the '
        "whole network and reads nothing; drop the pair",
    ),
    "shape a number": (plan_with(input_shape=32), "plan: input_shape: 32 is no shape"),
    "shape null": (plan_with(input_shape=None), "plan: input_shape: null is no shape"),
    "shape empty": (plan_with(input_shape=[]), "plan: input_shape: [] is no shape"),
    "shape zero": (plan_with(input_shape=[3, 0, 32]), "plan: input_shape: 0 is no positive whole"),
    "shape a bool": (plan_with(input_shape=[True, 8]), "plan: input_shape: true is no positive"),
    "shape huge": (plan_with(input_shape=[10**6] * 10**4), "plan: input_shape: [1000000, 1000000"),
    "resolution word": (
        plan_with(resolutions={"large": {"split": [4, 6]}}),
        'plan: resolutions: "large" is no resolution; write height and width as in 32x32',
    ),
    "resolution zero": (plan_with(resolutions={"0x8": {"split": [4, 6]}}), '"0x8" is no resolut'),
    "resolution other digits": (plan_with(resolutions={"٣": {"split": [4, 6]}}), "no resolution"),
    "resolution line end": (plan_with(resolutions={"8x8\n": {}}), '"8x8\\n" is no resolution'),
    "resolution long": (plan_with(resolutions={"9" * 5000: {}}), "is no resolution"),
    "resolution a number": (plan_with(resolutions={49: {}}), "49 is no resolution"),
    "resolutions a list": (plan_with(resolutions=[]), "plan: resolutions: [] is no object of"),
    "resolution null": (plan_with(resolutions={"49": None}), "plan: resolutions.49: null is no"),
    "resolution empty": (plan_with(resolutions={"49": {}}), "plan: resolutions.49: says nothing"),
    "layer empty": (plan_with(layers={"a": {}}), 'plan: layers["a"]: says nothing; give split'),
    "layer without name": (
        plan_with(layers={"": {"split": [4, 6]}}),
        'plan: layers: "" is no name',
    ),
    "layers a string": (plan_with(layers="a"), 'plan: layers: "a" is no object of settings'),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(data)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_refusals_in_python_name_the_place() -> None:
    with pytest.raises(PlanError, match=r"^plan: default\.split: 9 is not below groups"):
        Plan(3, 8, Setting((4, 9), "all"))
    with pytest.raises(PlanError, match="is no Setting; give Setting"):
        Plan(3, 8, {"split": [4, 6], "concat": "all"})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="is no mapping"):
        Plan(3, 8, Setting((4, 6), "all"), 5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no Setting"):
        Plan(3, 8, Setting((4, 6), "all"), layers={"a": (4, 6)})  # type: ignore[dict-item]
    with pytest.raises(PlanError, match=r'^split: "x" is no whole'):
        Setting(("x",))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="a value of type int is too many"):
        Plan(3, 10**5000, Setting((4, 6), "all"))


TEXTS = {
    "comma": ('{"stages": 3,\n  "groups": 8,,}', "plan: line 2, column 15: not JSON"),
    "empty": ("", "plan: line 1, column 1: not JSON"),
    "more": ("{} {}", "plan: line 1, column 4: not JSON: Extra data"),
    "repeated": ('{"stages": 3, "stages": 3}', 'plan: the key "stages" stands here twice'),
    "repeated inside": (
        '{"stages": 3, "default": {"split": [4], "split": [5]}}',
        'plan: default: the key "split" stands here twice; keep one',
    ),
    "NaN": ('{"stages": NaN}', "plan: NaN is no JSON; write a number"),
    "infinity": ('{"stages": -Infinity}', "plan: -Infinity is no JSON"),
    "float overflow": (
        '{"stages": 1e400, "groups": 8, "default": {"split": [4], "concat": "all"}}',
        "plan: stages: Infinity is no whole number",
    ),
    "digits": ('{"stages": ' + "9" * 5000 + "}", "plan: a number is too large"),
    "large": (
        '{"stages": 3, "groups": ' + "9" * 4000 + ', "default": {"split": [4], "concat": "all"}}',
        "is too many; give 1024 at most",
    ),
    "deep list": ("[" * 100_000, "nested too deeply"),
    "deep object": ('{"a":' * 100_000, "nested too deeply"),
    "deep and closed": ("[" * 900 + "]" * 900, "no object with the keys"),
    "long": (" " * 2**21, "more than 1048576 characters"),
    "surrogate": ('{"\\ud800": 1}', 'unknown key "\\ud800"'),
}


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_text(case: str) -> None:
    text, message = TEXTS[case]
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert message in str(caught.value)
    assert str(caught.value).encode()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"spec\.json: there is no such file"):
        Plan.load(tmp_path / "spec.json")
    with pytest.raises(PlanError, match=r"this is a folder"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="embedded null"):
        Plan.load("a\0b")
    (tmp_path / "spec.json").write_bytes(b'{"stages": \xff}')
    with pytest.raises(PlanError, match=r"not text in UTF-8 \(byte 11\)"):
        Plan.load(tmp_path / "spec.json")
    with pytest.raises(PlanError, match="more than 1048576 characters"):
        Plan.load("/dev/zero")


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(plan_with(resolutions={"32x32": {"split": [4, 9]}})))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}: resolutions.32x32.split: 9 is not below groups")


def test_values_of_several_lines_are_shown_on_one() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict({**FULL, "stages": np.zeros((2, 2))})
    assert "\n" not in str(caught.value)
    assert "array([[0., 0.], [0., 0.]])" in str(caught.value)
