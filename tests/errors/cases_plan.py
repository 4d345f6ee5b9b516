"""Plans: in Python, as data, as JSON text, as a file, and against a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d_compiler import Plan, Setting, inspect_model, transform
from s2d_compiler.errors import PlanError
from tests.errors.case import Case

GOOD: dict[str, Any] = {
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
}


def said(trigger: Callable[[Path], object], place: str, value: str, rule: str, remedy: str) -> Case:
    return Case(trigger, PlanError, place, value, rule, remedy)


def data(place: str, value: str, rule: str, remedy: str, /, **changes: Any) -> Case:
    """A plan that is wrong in what ``changes`` says."""
    wrong = copy.deepcopy(GOOD) | changes
    return said(lambda folder: Plan.from_dict(wrong, "spec.json"), place, value, rule, remedy)


def split(value: Any) -> dict[str, Any]:
    return {"split": value, "concat": "all"}


def concat(value: Any) -> dict[str, Any]:
    return {"split": [4, 6], "concat": value}


def text(content: str, place: str, value: str, rule: str, remedy: str) -> Case:
    """JSON text that is wrong."""
    return said(lambda folder: Plan.from_json(content, "spec.json"), place, value, rule, remedy)


def file(name: str, content: bytes | None, place: str, value: str, rule: str, remedy: str) -> Case:
    """A plan's file that cannot be read."""

    def trigger(folder: Path) -> object:
        if content is not None:
            Path(name).write_bytes(content)
        return Plan.load(name)

    return said(trigger, place, value, rule, remedy)


def against(plan: dict[str, Any], place: str, value: str, rule: str, remedy: str) -> Case:
    """A plan that does not fit its model."""

    def trigger(folder: Path) -> object:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        return transform(model, Plan.from_dict(plan, "spec.json"), (torch.zeros(2, 3, 8, 8),))

    return said(trigger, place, value, rule, remedy)


SHAPE = "write the shape of one input without the batch, e.g. [3, 224, 224]"
SETTING = "give Setting(split=..., concat=...)"

SPACE = inspect_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), input_shape=(3, 8, 8))

CASES = {
    "not whole": data("spec.json: stages", '"3"', "is no whole number", "e.g. 8", stages="3"),
    "no stages": data("spec.json: stages", "0", "is too few", "give 1 or more", stages=0),
    "many groups": data(
        "spec.json: groups", "1025", "is too many", "give 1024 at most", groups=1025
    ),
    "few groups": data(
        "spec.json: groups",
        "2",
        "is fewer than stages (3)",
        "raise groups or lower stages",
        groups=2,
    ),
    "cut point 0": data(
        "spec.json: default.split",
        "0",
        "is below 1",
        "cut points count groups from 1",
        default=split([0, 4]),
    ),
    "cut point at the end": data(
        "spec.json: default.split",
        "8",
        "is not below groups (8)",
        "cut points lie between 1 and 7",
        default=split([4, 8]),
    ),
    "cut points fall": data(
        'spec.json: layers["a"].split',
        "4 follows 6",
        "cut points increase strictly",
        "sort them and drop repeated ones",
        layers={"a": {"split": [6, 4]}},
    ),
    "one cut point": data(
        "spec.json: default.split",
        "[4] has 1 cut point",
        "3 stages need 2",
        "add or drop some, or change stages",
        default=split([4]),
    ),
    "pair of itself": data(
        "spec.json: default.concat",
        "[2, 2]",
        "1 <= earlier < later must hold",
        "swap its stages or drop it",
        default=concat([[2, 2]]),
    ),
    "pair of no stage": data(
        "spec.json: default.concat",
        "[4, 1]",
        "there are 3 stages",
        "drop the pair, or raise stages",
        default=concat([[4, 1]]),
    ),
    "pair of the untouched network": data(
        "spec.json: default.concat",
        "[3, 1]",
        'which with final "original" is the whole network and reads nothing',
        "drop the pair",
        default=concat([[3, 1]]),
        final="original",
    ),
    "split is no list": data(
        "spec.json: default.split",
        "4",
        "is no list of cut points",
        "write one, e.g. [4, 6]",
        default=split(4),
    ),
    "cut point is no number": data(
        "spec.json: resolutions.8x8.split",
        '"4"',
        "is no whole number",
        "cut points count groups, e.g. [4, 6]",
        resolutions={"8x8": {"split": ["4", 6]}},
    ),
    "concat is a word": data(
        "spec.json: default.concat",
        '"some"',
        'is not "all" or "none" or a list of pairs',
        "write one of these",
        default=concat("some"),
    ),
    "concat is a number": data(
        "spec.json: default.concat",
        "5",
        'is neither a list of pairs nor "all" nor "none"',
        "write one of these, e.g. [[2, 1], [3, 1]]",
        default=concat(5),
    ),
    "pair is a triple": data(
        "spec.json: default.concat",
        "[3, 2, 1]",
        "is no pair of stages",
        "write [later, earlier], e.g. [3, 1]",
        default=concat([[3, 2, 1]]),
    ),
    "pair twice": data(
        "spec.json: default.concat",
        "[3, 1]",
        "stands here twice",
        "drop one",
        default=concat([[3, 1], [3, 1]]),
    ),
    "shape is no list": data("spec.json: input_shape", "8", "is no shape", SHAPE, input_shape=8),
    "shape with a zero": data(
        "spec.json: input_shape", "0", "is no positive whole number", SHAPE, input_shape=[3, 0]
    ),
    "shape too large": data(
        "spec.json: input_shape",
        "[65536, 65536]",
        "holds more than 2147483648 numbers",
        SHAPE,
        input_shape=[65536, 65536],
    ),
    "schema is no text": data(
        "spec.json: $schema",
        "5",
        "is no text",
        "name the schema's file or leave the key out",
        **{"$schema": 5},
    ),
    "version is none": data(
        "spec.json: version",
        "0",
        "is no version, which count from 1",
        "write 1 or leave the key out",
        version=0,
    ),
    "newer": data(
        "spec.json: version",
        "2",
        "is newer than this package, which reads plans up to version 1",
        "upgrade s2d-compiler",
        version=2,
    ),
    "order": data(
        "spec.json: order", '"l2"', 'is not "index" or "l1"', "write one of these", order="l2"
    ),
    "resolution": data(
        "spec.json: resolutions",
        '"large"',
        "is no resolution",
        "write height and width as in 32x32, after the depth as in 8x32x32, or a number of ",
        resolutions={"large": {"concat": "all"}},
    ),
    "unknown key": data("spec.json", '"stagse"', "unknown key", 'did you mean "stages"?', stagse=3),
    "unknown key, nothing near": data(
        "spec.json: default",
        '"zzz"',
        "unknown key",
        "known: split, concat",
        default={"zzz": 1},
    ),
    "missing": said(
        lambda folder: Plan.from_dict({"stages": 3, "groups": 8}, "spec.json"),
        "spec.json: default",
        "missing",
        "a plan needs stages, groups, default",
        "add it",
    ),
    "no object": said(
        lambda folder: Plan.from_dict([1], "spec.json"),  # type: ignore[arg-type]
        "spec.json",
        "[1]",
        "is no object with the keys stages, groups, default",
        "write one",
    ),
    "default without split": data(
        "spec.json: default",
        '"split"',
        "is missing",
        "give it, e.g. [4, 6]",
        default={"concat": "all"},
    ),
    "resolutions is a list": data(
        "spec.json: resolutions",
        "[1]",
        "is no object of settings by resolution",
        'write one, e.g. {"32x32": {"concat": "all"}}',
        resolutions=[1],
    ),
    "layers is a list": data(
        "spec.json: layers",
        "[1]",
        "is no object of settings by layer pattern",
        'write one, e.g. {"layer1.*": {"concat": "all"}}',
        layers=[1],
    ),
    "pattern without a name": data(
        "spec.json: layers",
        '""',
        "is no name",
        "names are strings that are not empty",
        layers={"": {"concat": "all"}},
    ),
    "setting that says nothing": data(
        'spec.json: layers["a"]',
        'layers["a"]',
        "says nothing",
        "give split, concat or both, or leave the entry out",
        layers={"a": {}},
    ),
    "untouched network alone": data(
        "spec.json: final",
        '"original"',
        "needs a thin stage before the untouched network",
        'set stages to 2 or more, or final to "cut"',
        stages=1,
        default=split([]),
        final="original",
    ),
    # in Python
    "default is a dict": said(
        lambda folder: Plan(3, 8, {"split": [4, 6]}),  # type: ignore[arg-type]
        "plan: default",
        '{"split": [4, 6]}',
        "is no Setting",
        SETTING,
    ),
    "default without concat": said(
        lambda folder: Plan(3, 8, Setting((4, 6))),
        "plan: default",
        '"concat"',
        "is missing",
        'give it, e.g. "all", "none" or [[3, 1]]',
    ),
    "layers is a number": said(
        lambda folder: Plan(3, 8, Setting((4, 6), "all"), layers=5),  # type: ignore[arg-type]
        "plan: layers",
        "5",
        "is no mapping from names to settings",
        "give a dict",
    ),
    "layer is a tuple": said(
        lambda folder: Plan(
            3,
            8,
            Setting((4, 6), "all"),
            layers={"a": (4, 6)},  # type: ignore[dict-item]
        ),
        "plan: layers.a",
        "[4, 6]",
        "is no Setting",
        SETTING,
    ),
    # text
    "comma": text(
        '{"stages": 3,}',
        "spec.json: line 1, column 1",
        "property name",
        "not JSON",
        "correct the text there",
    ),
    "NaN": text('{"stages": NaN}', "spec.json", "NaN", "is no JSON", "write a number"),
    "repeated": text(
        '{"default": {"split": [4], "split": [5]}}',
        "spec.json: default",
        '"split"',
        "stands here twice",
        "keep one",
    ),
    "nested": text(
        "[" * 100_000,
        "spec.json",
        "nested too deeply",
        "a plan has four levels",
        "check that this is the plan's file",
    ),
    "digits": text(
        json.dumps({"stages": 1}).replace("1", "9" * 5000),
        "spec.json",
        "it has thousands of digits",
        "a number is too large",
        "write a smaller one",
    ),
    "long": text(
        " " * 2**21,
        "spec.json",
        "more than 1048576 characters",
        "a plan is much shorter",
        "check that this is the plan's file",
    ),
    # files
    "no file": file(
        "spec.json", None, "spec.json", "spec.json", "there is no such file", "check the path"
    ),
    "folder": file(".", None, ".", ".", "this is a folder", "name the plan's file"),
    "not UTF-8": file(
        "spec.json",
        b"\xff{}",
        "spec.json",
        "byte 0",
        "not text in UTF-8",
        "a plan is a JSON file",
    ),
    "unreadable": file(
        "a\0b",
        None,
        "a\0b",
        "embedded null",
        "cannot be read",
        "check the path and your rights",
    ),
    # against a model
    "no such resolution": against(
        GOOD | {"resolutions": {"49": {"concat": "none"}}},
        "spec.json: resolutions.49",
        "49",
        "the model has no such resolution",
        "it has 6x6",
    ),
    "no such layer": against(
        GOOD | {"layers": {"conv*": {"concat": "none"}}},
        'spec.json: layers["conv*"]',
        '"conv*"',
        "this pattern matches no layer of the model",
        "its layers are 0",
    ),
    "no such resolution of a space": said(
        lambda folder: SPACE.plan({"49": Setting((4, 6), "all")}),
        "resolutions.49",
        "49",
        "the model has no such resolution",
        "it has 6x6",
    ),
    "setting of a space is a number": said(
        lambda folder: SPACE.plan({"6x6": 5}),  # type: ignore[dict-item]
        "resolutions.6x6",
        "5",
        "is neither a Setting nor (split, concat)",
        "give one of these",
    ),
    "a stage owns nothing": against(
        GOOD | {"groups": 100, "default": split([1, 2])},
        "spec.json: stage 2 of 3",
        "groups 100, default split [1, 2]",
        "owns no channel of any layer",
        "move the cut points apart, or use fewer stages",
    ),
}
