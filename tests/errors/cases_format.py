"""dyn.pt: files, versions, values place by place, and the modules in it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from s2d_compiler import format as dyn_format
from s2d_compiler import load
from s2d_compiler.format import from_data
from tests.errors.stored import (
    AGAIN,
    FOLDER,
    Data,
    attention,
    computed,
    drop,
    of,
    put,
    said,
    stored,
)


def twice(data: Data) -> None:
    data["made_by"]["a"] = data["made_by"]["b"] = [1]


def deep(data: Data) -> None:
    inner: list[Any] = []
    for _ in range(200):
        inner = [inner]
    data["made_by"]["a"] = inner


def float_gradient(data: Data) -> None:
    row = next(row for row in data["tensors"] if not row["data"].is_floating_point())
    row["parameter"] = row["requires_grad"] = True


def in_place_of(content: bytes) -> Callable[[Path], object]:
    def trigger(folder: Path) -> object:
        Path("dyn.pt").write_bytes(content)
        return load("dyn.pt")

    return trigger


def pipe(folder: Path) -> object:
    os.mkfifo("dyn.pt")
    return load("dyn.pt")


def model(folder: Path) -> object:
    torch.save(nn.Linear(2, 2), "dyn.pt")
    return load("dyn.pt")


def state_dict(folder: Path) -> object:
    torch.save(nn.Linear(2, 2).state_dict(), "dyn.pt")
    return load("dyn.pt")


def other_data(folder: Path) -> object:
    torch.save({"weight": torch.zeros(2)}, "dyn.pt")
    return load("dyn.pt")


def cut_off(folder: Path) -> object:
    whole = (FOLDER / "dyn-v1-attention.pt").read_bytes()
    return in_place_of(whole[: len(whole) // 2])(folder)


def flipped(folder: Path) -> object:
    whole = bytearray((FOLDER / "dyn-v1-attention.pt").read_bytes())
    whole[len(whole) // 3] ^= 1
    return in_place_of(bytes(whole))(folder)


def defect(folder: Path) -> object:
    with mock.patch.object(dyn_format, "decode_network", side_effect=KeyError("no rule")):
        return from_data(copy.deepcopy(stored("attention")), "dyn.pt")


def empty_step(data: Data) -> None:
    """The weight norm of nothing."""
    held = data["modules"][2]["tensors"]
    for name, shape in (("original1", (0, 4, 3, 3)), ("original0", (0, 1, 1, 1))):
        row = data["tensors"][held[name]["tensor"]]
        row["data"] = torch.zeros(shape, dtype=torch.float64)


CASES = {
    # in Python
    "operators are text": said(
        lambda folder: load("dyn.pt", operators="mylib::myop"),
        "operators",
        "'mylib::myop'",
        "is no list of operators",
        'write namespace::operator, such as ["mylib::myop"]',
    ),
    "types are names": said(
        lambda folder: load("dyn.pt", types=["Own"]),  # type: ignore[list-item]
        "types",
        "'Own'",
        "is no class",
        "hand in the class itself",
    ),
    "no device": said(
        lambda folder: from_data(copy.deepcopy(stored("attention")), "dyn.pt", None, "abacus"),
        "map_location",
        "'abacus'",
        "is no device of this machine",
        'leave it at "cpu"',
    ),
    # files
    "pipe": said(pipe, "dyn.pt", "dyn.pt", "is a device or a pipe", "name a plain file"),
    "folder": said(
        lambda folder: load(folder),
        "{folder}",
        "{folder}",
        "is a directory",
        "name the dyn.pt file inside it",
    ),
    "no file": said(
        lambda folder: load("dyn.pt"),
        "dyn.pt",
        "dyn.pt",
        "no such file",
        "compile one with s2d-compile MODEL --splits PLAN -o dyn.pt",
    ),
    "a model": said(
        model,
        "dyn.pt",
        "torch.nn.modules.linear.Linear",
        "is not a dyn.pt, or is damaged",
        "s2d-compile dyn.pt --splits PLAN -o OUTPUT",
    ),
    "a state dict": said(
        state_dict,
        "dyn.pt",
        "its pickle has the instruction BUILD",
        "which no data needs",
        "it may be a model, which s2d-compile dyn.pt --splits PLAN -o OUTPUT turns into one",
    ),
    "other data": said(
        other_data, "dyn.pt", "dyn.pt", "is not a dyn.pt", "which s2d-compile turns into one"
    ),
    "cut off": said(
        cut_off,
        "dyn.pt",
        "it is incomplete, its end is missing",
        "is not a dyn.pt, or is damaged",
        "copy it again",
    ),
    "a flipped bit": said(
        flipped,
        "dyn.pt",
        "the checksum of ",
        "does not match",
        "copy it again",
    ),
    # versions
    "version of text": attention(
        put("version", "1"),
        "its format has version",
        "'1'",
        "which is none (versions count from 1)",
        "compile the model again",
    ),
    "newer": attention(
        put("version", 3),
        "its format has version 3",
        "3",
        "this package reads versions up to 2",
        "upgrade s2d-compiler",
    ),
    "a defect": said(
        defect,
        "dyn.pt: ",
        "KeyError: 'no rule'",
        "what it holds is no network",
        AGAIN,
    ),
    # all of it
    "control characters": attention(
        put("made_by", "a", "\x1b[31m"), "made_by.a", "'\\x1b[31m'", "has characters that no name"
    ),
    "huge number": attention(
        put("made_by", "a", 2**70), "made_by.a", "a number", "is larger than 64 bits hold"
    ),
    "twice": attention(twice, "made_by.", "this list", "lies in itself, or in two places"),
    "deep": attention(
        deep, "made_by.a", "lists or dicts lie in one another", "more than 100 lists or dicts"
    ),
    "a set": attention(
        put("made_by", "a", {1}),
        "made_by.a",
        "this is a builtins.set",
        "a dyn.pt holds dicts, lists and tuples of text, numbers and tensors",
    ),
    "a tuple as key": attention(
        put("made_by", (1,), 1), "made_by", "a key is a tuple", "neither text nor a number"
    ),
    # fields
    "no dict": attention(put("cost", 5), "cost", "5", "stands where a dict belongs"),
    "no plan": attention(drop("plan"), "'plan'", "'plan'", "is missing"),
    "no flag": attention(
        put("tensors", 0, "parameter", 1), "tensors[0].parameter", "1", "is neither True nor False"
    ),
    "no text": attention(
        put("modules", 0, "class", 5), "modules[0].class", "5", "stands where text belongs"
    ),
    "no list": attention(put("tensors", {}), "tensors", "a dict", "stands where a list belongs"),
    "no number": attention(
        put("cost", "original_macs", "many"), "cost.original_macs", "'many'", "is no whole number"
    ),
    "too small": attention(put("batch", 0), "batch", "0", "is below 1"),
    "wrong sum": attention(
        put("cost", "stages", 0, "cumulative_macs", 5),
        "cost.stages[0].cumulative_macs",
        "5",
        "is not the sum 524",
    ),
    "cost of a layer": attention(
        put("cost", "stages", 0, "layers", [5]),
        "cost.stages[0].layers",
        "5",
        "is not name, operator, MACs and parameters",
    ),
    "share": attention(
        put("report", "cut_share", 2), "report.cut_share", "2", "is no share from 0 to 1"
    ),
    "stage one": attention(
        put("report", "stage_one", [5]),
        "report.stage_one",
        "5",
        "is not a kind of layer and its MACs",
    ),
    # the whole network
    "fewer stages": attention(
        lambda data: data["stages"].pop(),
        "stages",
        "2 stages with 3 interfaces and 3 costs",
        "but the plan has 3",
    ),
    "no call": attention(
        put("input_spec", {"children": [None], "kind": "tuple", "context": None}),
        "input_spec",
        "the structure of its inputs",
        "is not that of a call",
    ),
    "no shape": attention(put("input_shapes", [5]), "input_shapes", "5", "is no shape"),
    "a tensor in part": attention(
        put("tensors", 0, "data", torch.zeros(8)[:4]),
        "tensors[0].data",
        "it is no tensor",
        "of numbers that all lie in the file, each once",
    ),
    "gradient of integers": attention(
        float_gradient, "tensors[", "torch.int64", "numbers have no gradient"
    ),
    "owners": attention(
        put("owners", torch.zeros(3)), "owners", "a Tensor", "is no list of numbers (torch.int16)"
    ),
    "a slice": attention(
        put("provenance", "slices", "stages.0.position", [5]),
        "provenance.slices.stages.0.position",
        "a list",
        "is no source and positions",
    ),
    "a slice of another shape": attention(
        put("provenance", "slices", "stages.0.position", ["position", [None]]),
        "provenance.slices.stages.0.position",
        "the slice",
        "is not of the shape (1, 4, 4) that the tensor has",
    ),
    # modules
    "tensors of a module": attention(
        drop("modules", 0, "tensors", "bias"),
        "modules[0].tensors",
        "a Conv2d",
        "has bias, weight",
    ),
    "shape of a weight": attention(
        put("modules", 0, "tensors", "bias", "tensor", 0),
        "modules[0].tensors.bias",
        "it is (4, 2, 2, 2)",
        "not (4,)",
    ),
    "a weight that is none": attention(
        put("tensors", 0, "parameter", False),
        "modules[0].tensors.weight",
        "it is",
        "no parameter",
    ),
    "class of a module": attention(
        put("modules", 0, "class", "Sequential"),
        "modules[0].class",
        "'Sequential'",
        "is not a module that a dyn.pt may hold, which are AlphaDropout, ",
    ),
    "arguments of a module": attention(
        drop("modules", 0, "arguments", "stride"),
        "modules[0].arguments",
        "Conv2d",
        "has not the arguments bias, dilation",
    ),
    "argument of a module": attention(
        put("modules", 0, "arguments", "stride", 1),
        "modules[0].arguments.stride",
        "1",
        "is not 2 whole numbers from 1",
    ),
    "arguments together": attention(
        put("modules", 0, "arguments", "groups", 3),
        "modules[0]",
        "must be divisible by groups",
        "a Conv2d cannot be made with its arguments",
    ),
    # layers with computed weights
    "computed norm": of(
        "original",
        computed(
            "layer",
            {"class": "PReLU", "arguments": {"num_parameters": 1}},
        ),
        "modules[2].arguments",
        "a PReLU",
        "has no computed weight",
    ),
    "computed name": of(
        "original",
        lambda data: data["modules"][2]["tensors"].update(
            {"forward": data["modules"][2]["tensors"].popitem()[1]}
        ),
        "modules[2].arguments",
        "'forward'",
        "which is no name or is taken",
    ),
    "computed step": of(
        "original",
        computed("steps", 0, "args", {"list": []}),
        "modules[2].arguments.steps[0]",
        "the step 'value0'",
        "has no arguments, or its name is taken",
    ),
    "computed from nothing": of(
        "original",
        computed("weight", "absent"),
        "modules[2].arguments",
        "its weight or bias",
        "is none of its values",
    ),
    "computed without bias": of(
        "original",
        computed("bias", None),
        "modules[2].arguments",
        "it has a bias",
        "that is not computed, or none where one is",
    ),
    "computed in vain": of(
        "original",
        computed("steps", 0, "target", "aten.conv2d.default"),
        "modules[2].arguments",
        "Given groups=1",
        "its weight cannot be computed",
    ),
    "computed from no elements": of(
        "original",
        empty_step,
        "modules[2].arguments",
        "'original1'",
        "whose norm is taken, has no elements",
    ),
    "computed otherwise": of(
        "original",
        lambda data: computed("weight", data["modules"][2]["arguments"]["bias"])(data),
        "modules[2].arguments",
        "its weight and bias are",
        "not [(4, 4, 3, 3), (4,)]",
    ),
}
