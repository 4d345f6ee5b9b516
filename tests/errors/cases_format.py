"""dyn.pt: what a file holds, place by place, and what cannot be written to one."""

from __future__ import annotations

import copy
import os
from collections import defaultdict, namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import nn

from s2d_compiler import format as dyn_format
from s2d_compiler import load
from s2d_compiler.errors import FormatError
from s2d_compiler.format import from_data
from s2d_compiler.graph_codec import encode
from s2d_compiler.module_codec import encode_module
from s2d_compiler.operator_names import operator_to_name
from s2d_compiler.structure import encode_structure
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


def computed(*path: Any) -> Callable[[Data], None]:
    """Change the layer with a computed weight."""
    return put("modules", 2, "arguments", *path)


def spec(row: Any) -> Callable[[Data], None]:
    return put("output_spec", {"children": [None, None], **row})


def swap_placeholder(data: Data) -> None:
    data["stages"][0]["graph"][1]["target"] = "image"


def twice(data: Data) -> None:
    data["made_by"]["a"] = data["made_by"]["b"] = [1]


def deep(data: Data) -> None:
    inner: list[Any] = []
    for _ in range(200):
        inner = [inner]
    data["made_by"]["a"] = inner


def held_apart(data: Data) -> None:
    data["stages"][0]["modules"]["patches.inner"] = 1


def no_output_feature(data: Data) -> None:
    output = data["stages"][0]["graph"][-1]["args"]["tuple"][0]["tuple"]
    output[1]["tuple"][0] = 5


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


def stand_in(folder: Path) -> object:
    """A network that was only looked at is run."""
    data = copy.deepcopy(stored("attention"))
    data["stages"][0]["graph"][23]["target"] = "mylib.soft.default"
    dyn = from_data(data, "dyn.pt", dyn_format.Allowed(None, None))
    x = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    return dyn(x, mask=torch.zeros(2, 1, 4, 4, dtype=torch.float64))


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


def normalised_nothing(data: Data) -> None:
    tensor = data["stages"][0]["attributes"]["position"]["tensor"]
    data["tensors"][tensor]["data"] = torch.zeros(0, 4, 4, dtype=torch.float64)
    position = {"node": "stages_0_position"}
    calls("aten._weight_norm.default", position, position)(data)


def empty_step(data: Data) -> None:
    name = next(iter(data["modules"][2]["tensors"]))
    calls_slice = {"tuple": [{"node": name}, 0, 0, 0]}
    computed("steps", 0, "target", "aten.slice.Tensor")(data)
    computed("steps", 0, "args", calls_slice)(data)
    computed("steps", 0, "kwargs", {})(data)


class Own:
    """A class of outputs that nobody registered."""


Pair = namedtuple("Pair", ["a", "b"])


class Registered:
    pass


NAME = f"{Registered.__module__}.Registered"
PAIR = f"{Pair.__module__}.Pair"


def context_of_code() -> Any:
    """The structure of an output of a class that keeps something beside its tensors."""
    return pytree.TreeSpec(dict, [Own()], [pytree.treespec_leaf()])


ARGS = "stages[0].graph[23] (node 'gelu_default').args"

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
        "torch's weights-only loader refuses it",
        "is not a dyn.pt, or is damaged",
        "If it is a model, compile it with s2d-compile dyn.pt",
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
        put("version", 2),
        "its format has version 2",
        "2",
        "this package reads versions up to 1",
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
    "computed otherwise": of(
        "original",
        lambda data: computed("weight", data["modules"][2]["arguments"]["bias"])(data),
        "modules[2].arguments",
        "its weight and bias are",
        "not [(4, 4, 3, 3), (4,)]",
    ),
    # stages
    "no such module": attention(
        drop("stages", 0, "modules", "patches"),
        "stages[0].graph",
        "'stages_0_patches' calls 'patches'",
        "which is not there",
    ),
    "no such tensor": attention(
        drop("stages", 0, "attributes", "position"),
        "stages[0].graph",
        "'stages_0_position' reads 'position'",
        "which is not there",
    ),
    "name of a module": attention(
        put("stages", 0, "modules", "forward", 0),
        "stages[0].modules",
        "'forward'",
        "is no name, or one that torch uses itself",
    ),
    "long name": attention(
        put("stages", 0, "modules", ".".join("a" * 70), 0),
        "stages[0].modules",
        "'a.a.a",
        "has more than 60 parts",
    ),
    "module in a module": attention(
        held_apart,
        "stages[0].modules",
        "'patches.inner'",
        "lies inside another module, or is there twice",
    ),
    "interface": attention(
        put("interfaces", 0, "inputs", 0, "image"),
        "interfaces[0].inputs[0]",
        "'image'",
        'is neither ["input", k] nor ["feature", stage, k]',
    ),
    "number of inputs": attention(
        lambda data: data["interfaces"][0]["inputs"].pop(),
        "stage 1",
        "its graph takes 2 inputs",
        "and its interface 1",
    ),
    "feature of nobody": attention(
        put("interfaces", 1, "inputs", 2, ["feature", 0, 9]),
        "stage 2",
        "it takes ('feature', 0, 9)",
        "which no earlier stage hands on",
    ),
    "outputs": attention(
        put("interfaces", 0, "features", 9),
        "stage 1",
        "its outputs",
        "are not those of the network",
    ),
    "a number as feature": attention(
        no_output_feature,
        "stage 1",
        "a feature that it hands on",
        "is no value of its graph",
    ),
    # graphs
    "two kinds": attention(argument({"a": 1, "b": 2}), ARGS, "a dict", "is not an argument"),
    "short slice": attention(argument({"slice": [1]}), ARGS, "a slice has 1 parts", "instead of 3"),
    "device": attention(argument({"device": "abacus"}), ARGS, "'abacus'", "is not a device"),
    "later node": attention(
        argument({"node": "output"}),
        ARGS,
        "'node' 'output'",
        "is no argument, or a node that comes later",
    ),
    "keyword": attention(
        node(23, "kwargs", {"approximately": "tanh"}),
        "stages[0].graph[23] (node 'gelu_default').kwargs",
        "'approximately'",
        "is no argument of the operator",
    ),
    "kind of node": attention(
        node(23, "op", "call_method"),
        "stages[0].graph[23] (node 'gelu_default')",
        "'call_method'",
        "is no kind of node",
    ),
    "name of a node": attention(
        node(23, "name", "mask"),
        "stages[0].graph[23] (node 'mask')",
        "its name",
        "is taken, or is no identifier",
    ),
    "two outputs": attention(
        node(23, "op", "output"),
        "stages[0].graph[23]",
        "node 'gelu_default'",
        "a graph has one output, at its end",
    ),
    "two inputs": attention(
        swap_placeholder, "stages[0].graph[1]", "'image'", "two inputs have the name"
    ),
    "name of a target": attention(
        node(2, "target", "a b"),
        "stages[0].graph[2] (node 'stages_0_patches').target",
        "'a b'",
        "is not a name of letters, digits and dots",
    ),
    "arguments in a list": attention(node(23, "args", {"list": []}), ARGS, "they are", "no tuple"),
    "argument of an input": attention(
        argument(1, 0), "stages[0].graph[0] (node 'image').args", "a placeholder", "has none"
    ),
    "number for a module": attention(
        argument(1, 2),
        "stages[0].graph[2] (node 'stages_0_patches').args",
        "a module",
        "takes values of the graph",
    ),
    "text in a sum": attention(
        lambda data: (target("operator.add")(data), argument("a")(data)),
        ARGS,
        "add",
        "computes with numbers",
    ),
    "power": attention(
        lambda data: (target("operator.pow")(data), argument(99)(data)),
        ARGS,
        "a power",
        "has a number above 64",
    ),
    "turns": attention(
        calls("aten.linalg_matrix_power.default", NODE, 10**9),
        ARGS,
        "aten.linalg_matrix_power.default",
        "has a number above",
    ),
    "recurrent with other arguments": attention(
        calls("aten.lstm.input", NODE),
        ARGS,
        "aten.lstm.input",
        "is used in a way that no network uses it",
    ),
    "recurrent without weights": attention(
        calls("aten.lstm.input", NODE, [], [], True, 1, 0.0, False, False, False),
        ARGS,
        "aten.lstm.input",
        "has not the weights of 1 layers",
    ),
    "recurrent without states": attention(
        calls("aten.lstm.input", NODE, [], [NODE] * 4, True, 1, 0.0, False, False, False),
        ARGS,
        "aten.lstm.input",
        "has not two states",
    ),
    "normalised value": attention(
        calls("aten._weight_norm.default", NODE, NODE),
        "stages[0].graph",
        "gelu_default",
        "normalises something else than a parameter",
    ),
    "normalised nothing": attention(
        normalised_nothing,
        "stages[0].graph",
        "gelu_default",
        "normalises a parameter without elements",
    ),
    "computed from no elements": of(
        "original",
        empty_step,
        "modules[2].arguments",
        "'value0'",
        "in its weight has no elements",
    ),
    # operators
    "no operator's name": attention(
        target("relu"),
        "stages[0].graph[23] (node 'gelu_default').target",
        "'relu'",
        "is not the name of an operator",
    ),
    "no operator": attention(
        target("aten.absent.default"),
        "stages[0].graph[23] (node 'gelu_default').target",
        "'aten.absent.default'",
        "does not exist in torch",
        "install the version that the file was made with",
    ),
    "impure": attention(
        target("aten.relu_.default"),
        "stages[0].graph[23] (node 'gelu_default').target",
        "'aten.relu_.default'",
        "is not one that a dyn.pt may hold (it is not pure)",
        "use one that computes from its arguments alone",
    ),
    "foreign": attention(
        target("mylib.soft.default"),
        "stages[0].graph[23] (node 'gelu_default').target",
        "'mylib.soft.default'",
        "a file may not choose what else is run",
        'load(path, operators=["mylib::soft"])',
    ),
    "looked at and run": said(
        stand_in,
        "mylib.soft.default",
        "was not allowed when the file was read",
        "it cannot run",
        "allow it with load(path, operators=[...])",
    ),
    # structures
    "context of a tuple": attention(
        spec({"kind": "tuple", "context": 5}),
        "output_spec.context",
        "5",
        "stands where nothing belongs",
    ),
    "factory": attention(
        spec({"kind": "defaultdict", "context": ["open", ["a", "b"]]}),
        "output_spec.context",
        "a list",
        "is no factory of values and keys",
    ),
    "kind of structure": attention(
        spec({"kind": "code", "context": None}),
        "output_spec.kind",
        "'code'",
        "is no kind of structure",
    ),
    "keys": attention(
        spec({"kind": "dict", "context": ["a"]}),
        "output_spec.context",
        "it has",
        "not one key per value",
    ),
    "same keys": attention(
        spec({"kind": "dict", "context": ["a", "a"]}),
        "output_spec.context",
        "two values",
        "have one key",
    ),
    "foreign class": attention(
        spec({"kind": "class", "class": "mylib.Output", "context": None}),
        "the network takes or returns",
        "'mylib.Output'",
        "a file may not choose which classes are used",
        "import that class and hand it in: load(path, types=[Output])",
    ),
    "other fields": attention(
        spec({"kind": "namedtuple", "class": PAIR, "context": ["a", "c"]}),
        "types",
        "['a', 'c']",
        "has not the fields",
        "hand in the class that the model was compiled with",
        allowed=dyn_format.Allowed((), {PAIR: Pair}),
    ),
    "class that is not registered": attention(
        spec({"kind": "class", "class": NAME, "context": None}),
        NAME,
        "Registered",
        "is not registered with torch.utils._pytree in this process",
        "import what registers it first",
        allowed=dyn_format.Allowed((), {NAME: Registered}),
    ),
    "fields of a named tuple": attention(
        spec({"kind": "namedtuple", "class": "mylib.Pair", "context": ["a"]}),
        "the named tuple 'Pair'",
        "'Pair'",
        "it has not one field per value",
    ),
    "name of a field": attention(
        spec({"kind": "namedtuple", "class": "mylib.Pair", "context": ["a", "b c"]}),
        "the named tuple 'Pair'",
        "it has a name",
        "that is no identifier",
    ),
    "same fields": attention(
        spec({"kind": "namedtuple", "class": "mylib.Pair", "context": ["a", "a"]}),
        "the named tuple 'Pair'",
        "two of its fields",
        "have one name",
    ),
    # writing
    "code as argument": said(
        lambda folder: encode(print, "stage 1, node 'a'"),
        "stage 1, node 'a'",
        "an argument of type builtin_function_or_method",
        "cannot be stored in a dyn.pt",
        "give the node nodes, numbers, text, and lists of these",
    ),
    "foreign module": said(
        lambda folder: encode_module(nn.Bilinear(2, 2, 2), "stage 1, mix"),
        "stage 1, mix",
        "modules of class torch.nn.modules.linear.Bilinear",
        "cannot be stored in a dyn.pt, which holds",
        "make it of these",
    ),
    "function": said(
        lambda folder: operator_to_name(len, "stage 1, node 'a'"),
        "stage 1, node 'a'",
        "'len'",
        "is a Python function, which a dyn.pt cannot hold",
        "express the node with ATen operators",
    ),
    "defaultdict": said(
        lambda folder: encode_structure(
            pytree.tree_structure(defaultdict(Own, {"a": torch.zeros(1)}))
        ),
        "the network returns",
        "a defaultdict of <class",
        "which a dyn.pt cannot hold",
        "return a plain dict",
    ),
    "context": said(
        lambda folder: encode_structure(context_of_code()),
        "the network takes or returns",
        "with a Own beside its tensors",
        "which a dyn.pt cannot hold",
        "use tuples, lists and dicts of tensors",
    ),
}
