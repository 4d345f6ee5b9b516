"""dyn.pt: its stages, their graphs, operators and structures, and what cannot be written."""

from __future__ import annotations

import copy
from collections import defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.prune
import torch.utils._pytree as pytree
from torch import nn

from s2d_compiler import format as dyn_format
from s2d_compiler.format import from_data
from s2d_compiler.graph_codec import encode
from s2d_compiler.module_codec import encode_module
from s2d_compiler.operator_names import operator_to_name
from s2d_compiler.structure import encode_structure
from tests.errors.stored import (
    NODE,
    Data,
    argument,
    attention,
    calls,
    drop,
    node,
    put,
    said,
    stored,
    target,
)

ARGS = "stages[0].graph[23] (node 'gelu_default').args"


def spec(row: Any) -> Callable[[Data], None]:
    return put("output_spec", {"children": [None, None], **row})


def swap_placeholder(data: Data) -> None:
    data["stages"][0]["graph"][1]["target"] = "image"


def held_apart(data: Data) -> None:
    data["stages"][0]["modules"]["patches.inner"] = 1


def no_output_feature(data: Data) -> None:
    output = data["stages"][0]["graph"][-1]["args"]["tuple"][0]["tuple"]
    output[1]["tuple"][0] = 5


def stand_in(folder: Path) -> object:
    """A network that was only looked at is run."""
    data = copy.deepcopy(stored("attention"))
    data["stages"][0]["graph"][23]["target"] = "mylib.soft.default"
    dyn = from_data(data, "dyn.pt", dyn_format.Allowed(None, None))
    x = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    return dyn(x, mask=torch.zeros(2, 1, 4, 4, dtype=torch.float64))


def normalised_nothing(data: Data) -> None:
    tensor = data["stages"][0]["attributes"]["position"]["tensor"]
    data["tensors"][tensor]["data"] = torch.zeros(0, 4, 4, dtype=torch.float64)
    position = {"node": "stages_0_position"}
    calls("aten._weight_norm.default", position, position)(data)


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


def pruned() -> nn.Module:
    layer = nn.Linear(4, 4)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 3)
    return layer


CASES = {
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
    "hooked module": said(
        lambda folder: encode_module(pruned(), "stage 1, mix"),
        "stage 1, mix",
        "this Linear has a hook",
        "which a dyn.pt cannot hold",
        "take it away before saving",
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
