"""dyn.pt from a stranger: every lie in its data is refused with a sentence."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d_compiler import load
from s2d_compiler.errors import FormatError
from s2d_compiler.operator_names import operator_from_name
from tests.data_mutations import OPERATORS, deep, quantized
from tests.hostile import (
    Change,
    Data,
    argument,
    huge_step,
    laughs,
    module_of,
    network,
    node_of,
    put,
    refusal,
    steps,
    tensor,
)


@pytest.fixture
def data() -> Data:
    return network(0)


@pytest.fixture
def computed() -> Data:
    return network(1)


def node(kind: str, key: str, value: Any, stage: int = 0) -> Change:
    return lambda data: node_of(data, kind, stage).update({key: value})


def renamed(kind: str, name: str) -> Change:
    """Give what a stage holds another name, consistently."""

    def change(data: Data) -> None:
        row = node_of(data, kind)
        table = data["stages"][0]["modules" if kind == "call_module" else "attributes"]
        table[name] = table.pop(row["target"])
        row["target"] = name

    return change


def loop(data: Data) -> None:
    node_of(data, "call_function")["args"] = row = {"tuple": []}
    row["tuple"].append(row)


def twice(data: Data) -> None:
    data["stages"][1] = data["stages"][0]


def smuggled(data: Data) -> None:
    """A mapping whose own attributes take the place of its methods."""
    bag = OrderedDict(data["provenance"])
    bag.__dict__["items"] = set
    data["provenance"] = bag


def no_stages(data: Data) -> None:
    for key in ("stages", "interfaces"):
        data[key].clear()


STRUCTURES: dict[str, tuple[Any, str]] = {
    "key missing": ({"kind": "dict", "context": ["a"], "children": []}, "not one key per value"),
    "key no text": ({"kind": "dict", "context": [[]], "children": [None]}, "one key per value"),
    "key twice": ({"kind": "dict", "context": [1, 1], "children": [None] * 2}, "have one key"),
    "deque": ({"kind": "deque", "context": -3, "children": [None]}, "-3 is below 1"),
    "tuple": ({"kind": "tuple", "context": "x", "children": [None]}, "where nothing belongs"),
    "factory": ({"kind": "defaultdict", "context": ["eval", []], "children": []}, "no factory"),
    "kind": ({"kind": "os.system", "context": None, "children": []}, "no kind of structure"),
    "class": ({"kind": "class", "class": "os.system", "context": None, "children": []}, "hand it"),
    "fields": (
        {"kind": "namedtuple", "class": "a.B", "context": ["x', eval('1'"], "children": [None]},
        "no identifier",
    ),
    "field twice": (
        {"kind": "namedtuple", "class": "a.B", "context": ["x", "x"], "children": [None] * 2},
        "two of its fields",
    ),
    "leaves": ({"kind": "tuple", "context": None, "children": [None] * 3}, "not those of the netw"),
    "no object": ([None], "a list stands where a dict belongs"),
}

CHANGES: dict[str, tuple[Change, str]] = {
    # arguments of layers
    "huge": (argument("Linear", "in_features", 10**9), "they are|it is .* not"),
    "huge product": (argument("Conv2d", "kernel_size", [2**31 - 1] * 2), "cannot be made|it is"),
    "beyond": (argument("Linear", "in_features", 2**31), "is not a whole number from 0"),
    "negative": (argument("Linear", "out_features", -1), "-1 is not a whole number from 0"),
    "bool as number": (argument("Linear", "in_features", True), "True is not a whole number"),
    "text as number": (argument("Conv2d", "groups", "1"), "'1' is not a whole number from 1"),
    "no groups": (argument("Conv2d", "groups", 0), "0 is not a whole number from 1"),
    "no stride": (argument("Conv2d", "stride", [0, 1]), "is not 2 whole numbers from 1"),
    "three sizes": (argument("Conv2d", "kernel_size", [3, 3, 3]), "is not 2 whole numbers"),
    "padding word": (argument("Conv2d", "padding", "full"), '"same" or "valid"'),
    "NaN": (argument("BatchNorm2d", "eps", float("nan")), "nan is not a number from 0"),
    "endless": (argument("BatchNorm2d", "momentum", float("inf")), "inf is not a number from 0"),
    "number as bool": (argument("BatchNorm2d", "affine", 1), "1 is not True or False"),
    "more arguments": (argument("Linear", "device", "cuda"), "has not the arguments"),
    "class": (lambda d: module_of(d, "PReLU").update({"class": "Module"}), "may hold"),
    "class of ours": (put("modules", 0, "class", "ComputedLayer"), "has not the arguments"),
    # references
    "negative position": (put("stages", 0, "modules", "0", -1), "-1 is below 0"),
    "position beyond": (put("stages", 0, "modules", "0", 99), "99 is above"),
    "bool as position": (put("stages", 0, "modules", "0", True), "True is no whole number"),
    # names
    **{
        f"module {name}": (renamed("call_module", name), "no name, or one that torch uses")
        for name in ("forward", "__class__", "_modules", "training", "graph", "a.__dict__")
    },
    "empty part": (renamed("call_module", "a..b"), "not a name of letters"),
    "code as name": (renamed("call_module", "a);import os;(b"), "not a name of letters"),
    "keyword": (node("call_function", "name", "class"), "no identifier"),
    "name twice": (node("call_function", "name", "input_1"), "its name is taken|no argument"),
    "number as name": (node("call_function", "name", 3), "3 stands where text belongs"),
    "key no text": (lambda d: d["stages"][0]["modules"].update({1: 0}), "1 stands where text"),
    "escape sequence": (put("report", "notes", ["\x1b[2J"]), "characters that no name has"),
    # graphs
    "kind": (node("call_function", "op", "call_method"), "no kind of node"),
    "default": (node("placeholder", "args", {"tuple": [1]}), "a placeholder has none"),
    "no output": (lambda d: d["stages"][0]["graph"].pop(), "has one output, at its end"),
    "node in itself": (
        lambda d: node_of(d, "call_module").update(
            args={"tuple": [{"node": node_of(d, "call_module")["name"]}]}
        ),
        "a node that comes later",
    ),
    "argument": (node("call_function", "args", {"tuple": [{"eval": "1"}]}), "text|no argument"),
    "device": (node("call_function", "args", {"tuple": [{"device": "x:y"}]}), "not a device"),
    "slice": (node("call_function", "args", {"tuple": [{"slice": []}]}), "0 parts instead of 3"),
    "large number": (node("call_function", "args", {"tuple": [2**64]}), "larger than 64 bits"),
    "endless loop": (
        lambda d: node_of(d, "call_function").update(
            target="aten.matrix_power.default", args={"tuple": [{"node": "input_1"}, 2**62]}
        ),
        "has a number above",
    ),
    "weights of a recurrent layer": (
        lambda d: node_of(d, "call_function").update(
            target="aten.lstm.input",
            args={
                "tuple": [
                    *({"node": "input_1"}, {"list": []}, {"list": []}),
                    *(True, 1, 0.0, False, False, False),
                ]
            },
        ),
        "has not the weights of 1 layers",
    ),
    "power": (
        lambda d: node_of(d, "call_function").update(
            target="operator.pow", args={"tuple": [10**9, 10**9]}
        ),
        "a power has a number above",
    ),
    "long text": (
        lambda d: node_of(d, "call_function").update(
            target="operator.mul", args={"tuple": ["a", 2**40]}
        ),
        "computes with numbers",
    ),
    # containers
    "in itself": (loop, "lies in itself"),
    "in two places": (twice, "in two places"),
    "doubling": (laughs, "in one another|in two places"),
    "deep": (put("made_by", {"x": deep(150)}), "in one another"),
    "attributes": (smuggled, "instruction BUILD|builtins.set"),
    "set": (put("made_by", {"x": set()}), "EMPTY_SET|builtins.set|refuses it|would use"),
    "bytes": (put("made_by", {"x": b"x"}), "_codecs.encode"),
    "complex": (put("made_by", {"x": 1j}), "builtins.complex"),
    # tensors
    "expanded": (tensor(lambda t: t[:1, :1, :1, :1].expand(t.shape)), "all lie in the file"),
    "view": (tensor(lambda t: torch.cat([t, t])[: len(t)]), "all lie in the file"),
    "overlapping": (tensor(lambda t: t.flatten().as_strided(t.shape, (1, 1, 1, 1))), "all lie"),
    "sparse": (tensor(lambda t: t.to_sparse()), "_rebuild_sparse_tensor"),
    "meta": (tensor(lambda t: t.to("meta")), "_rebuild_meta_tensor_no_storage"),
    "quantized": (tensor(quantized), "_rebuild_qtensor"),
    "conjugate": (tensor(lambda t: torch.complex(t, t).conj()), "other than 6 arguments"),
    "parameter": (tensor(torch.nn.Parameter), "_rebuild_parameter"),
    "shape": (tensor(lambda t: t[None].clone()), "it is .* not"),
    "no tensor": (tensor(lambda t: 3), "no tensor of numbers"),
    "gradient of whole numbers": (tensor(lambda t: t.int()), "numbers have no gradient"),
    # what stages hand on
    "later stage": (put("interfaces", 0, "inputs", 0, ["feature", 1, 0]), "no earlier stage"),
    "own value": (put("interfaces", 1, "inputs", 0, ["feature", 1, 0]), "no earlier stage"),
    "no such feature": (put("interfaces", 1, "inputs", 0, ["feature", 0, 99]), "no earlier stage"),
    "half a place": (put("interfaces", 1, "inputs", 0, ["input", 0.5]), "0.5 is no whole number"),
    "more features": (put("interfaces", 0, "features", 99), "not those of the network"),
    "fewer inputs": (put("interfaces", 1, "inputs", []), "its interface 0"),
    "no stages": (no_stages, "0 stages with 0 interfaces"),
    # numbers beside the network
    "cost NaN": (put("cost", "stages", 0, "macs", float("nan")), "nan is no whole number"),
    "cost negative": (put("cost", "original_macs", -1), "-1 is below 0"),
    "cost huge": (put("cost", "original_parameters", 10**30), "larger than 64 bits"),
    "cost sum": (put("cost", "stages", 1, "cumulative_macs", 7), "7 is not the sum"),
    "share": (put("report", "cut_share", float("nan")), "no share from 0 to 1"),
    "batch": (put("batch", float("inf")), "inf is no whole number"),
    "input shape": (put("input_shapes", [[3, -8, 8]]), "-8 is below 0"),
    "owners": (put("owners", torch.tensor([1, 9], dtype=torch.int16)), "9 is above 2"),
    "plan": (put("plan", "groups", 10**6), "plan: groups: 1000000 is too many"),
    "provenance": (
        lambda d: d["provenance"]["slices"].update(
            {next(iter(d["provenance"]["slices"])): [1, []]}
        ),
        "1 stands where text belongs",
    ),
    "slice of another shape": (
        lambda d: d["provenance"]["slices"].update(
            {next(iter(d["provenance"]["slices"])): ["a", []]}
        ),
        "the slice is not of the shape",
    ),
    "version": (put("version", True), "its format has version True"),
    "format": (put("format", ["s2d"]), "is not a dyn.pt"),
    **{
        f"structure: {name}": (put("output_spec", row), message)
        for name, (row, message) in STRUCTURES.items()
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_lie_is_refused_with_a_sentence(data: Data, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    change(data)
    text = refusal(data, tmp_path / "dyn.pt")
    assert re.search(message, text), text


@pytest.mark.parametrize("name", ["a.graph", "a.code.meta", "input_1", "torch", "self_"])
def test_names_that_only_look_taken(data: Data, tmp_path: Path, name: str) -> None:
    renamed("call_module", name)(data)
    torch.save(data, tmp_path / "dyn.pt")
    outputs = load(tmp_path / "dyn.pt")(torch.randn(2, 3, 8, 8))
    assert len(outputs) == 2


def empty_norm(data: Data) -> None:
    """Weight norm of a parameter without elements, beside the one that the weight is."""
    row = module_of(data, "ComputedLayer")
    row["tensors"]["none"] = {"tensor": len(data["tensors"]), "saved": True}
    empty = {"data": torch.zeros(0), "parameter": True, "requires_grad": False}
    data["tensors"].append(empty)
    norm = next(step for step in steps(data) if step["target"] == "aten._weight_norm.default")
    steps(data).append(
        {**norm, "name": "more", "args": {"tuple": [{"node": "none"}, {"node": "none"}, 0]}}
    )


COMPUTED: dict[str, tuple[Change, str]] = {
    "huge": (huge_step, "its weight and bias are|cannot be computed"),
    "writing": (lambda d: steps(d)[0].update(target="aten.relu_.default"), "not pure"),
    "file": (lambda d: steps(d)[0].update(target="aten.from_file.default"), "not pure"),
    "itself": (lambda d: steps(d)[0].update(args={"tuple": [{"node": "value0"}]}), "comes later"),
    "norm of nothing": (empty_norm, "whose norm is taken, has no elements|cannot be computed"),
    "no weight": (
        lambda d: module_of(d, "ComputedLayer")["arguments"].update(weight="nothing"),
        "none of its values",
    ),
    "inner": (
        lambda d: module_of(d, "ComputedLayer")["arguments"].update(
            layer=module_of(d, "ComputedLayer")["arguments"]
        ),
        "in itself|missing",
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights(computed: Data, tmp_path: Path, name: str) -> None:
    change, message = COMPUTED[name]
    change(computed)
    text = refusal(computed, tmp_path / "dyn.pt")
    assert re.search(message, text), text


def plan(**changes: Any) -> Change:
    return lambda data: data["plan"].update(changes)


def another_plan(data: Data) -> None:
    data["plan"] = network(0)["plan"]


DEPTH: dict[str, tuple[Change, str]] = {
    "exits no list": (plan(exits="1"), "plan: exits: .* is no list"),
    "exits of none": (plan(exits=[None]), r"plan: exits\[0\]: null is neither"),
    "not a number": (plan(exits=[float("nan")]), r"plan: exits\[0\]: NaN is no fraction"),
    "one exit more": (plan(exits=["1", "a", 0.95], head="linear"), "but the plan has 4"),
    "no exits": (plan(exits=[], head="linear"), "there are none"),
    "exits by a preset": (plan(exits=[], preset="ddi", head=[]), "but the plan has 1"),
    "heads": (plan(head=["linear"]), "1 kinds for 2 exits"),
    "wide": (plan(width=10**9), "is no number of channels"),
    "seed": (plan(seed=-1), "seed: -1 is no whole number"),
    "a plan that cuts": (another_plan, "report.*missing|but the plan has"),
    "report": (lambda d: d["report"]["exits"][0].update(macs=-1), "macs: -1 is below 0"),
    "report of none": (lambda d: d["report"].pop("exits"), "'exits' is missing"),
    "report of text": (lambda d: d["report"]["exits"][0].update(is_cut="no"), "neither True nor"),
}


@pytest.mark.parametrize("name", DEPTH)
def test_exits_along_depth(tmp_path: Path, name: str) -> None:
    data = network(3)
    change, message = DEPTH[name]
    change(data)
    text = refusal(data, tmp_path / "dyn.pt")
    assert re.search(message, text), text


# -- operators ---------------------------------------------------------------------------------

NEVER = """aten.from_file.default aten.save.default aten.warn.default aten.relu_.default
aten.add.out aten.resize.default aten.as_strided.default aten.set.source_Tensor aten.set_.default
aten.record_stream.default aten._cuda_getCurrentRawStream.default aten.pin_memory.default
aten._print.default aten.backward.default aten.manual_seed.default aten.copy_.default
profiler._record_function_enter.default prim.Print.default os.system.default builtins.eval
aten.relu.__class__ aten..default ...  operator.attrgetter aten.relu aten.format.default""".split()


@pytest.mark.parametrize("name", NEVER)
def test_operators_that_no_file_may_name(data: Data, tmp_path: Path, name: str) -> None:
    node_of(data, "call_function")["target"] = name
    torch.save(data, tmp_path / "dyn.pt")
    with pytest.raises(FormatError, match=r"operator|may not choose"):
        load(tmp_path / "dyn.pt")


def test_what_writes_or_is_not_of_networks_needs_more_than_a_name() -> None:
    """Of all operators that torch has, those that a file may name change nothing but their result,
    and most of torch's own internals are not among them."""
    taken = []
    for name in OPERATORS:
        try:
            target = operator_from_name(name, "here")
        except FormatError:
            continue
        taken.append(target)
        assert not target._schema.is_mutable, name
        assert "backward" not in name, name
        assert target.namespace in ("aten", "torchvision"), name
    names = {target._opname for target in taken}
    assert {"conv2d", "_softmax", "scaled_dot_product_attention"} <= names
    assert not names & {"_fft_r2c", "_stack", "mkldnn_linear", "_linalg_svd", "_cudnn_rnn"}
    assert 800 < len(taken) < 1100


def test_permission_is_named_and_helps(data: Data, tmp_path: Path) -> None:
    node_of(data, "call_function")["target"] = "aten._stack.default"
    torch.save(data, tmp_path / "dyn.pt")
    with pytest.raises(FormatError, match=r'operators=\["aten::_stack"\]'):
        load(tmp_path / "dyn.pt")
    load(tmp_path / "dyn.pt", operators=["aten::_stack"])
