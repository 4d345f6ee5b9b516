"""Pickles made by hand, and models in which something lies where it does not belong."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from s2d_compiler import load, whole_model
from s2d_compiler.errors import FormatError
from tests.errors.case import Case
from tests.errors.written import REMEDY, content, pickled, saved


def hand_written(data: bytes, value: str, rule: str, *more: str, **given: Any) -> Case:
    return content(pickled(data), "model.pt: refused", value, rule, *(more or (REMEDY,)), **given)


def unsound(change: Callable[[nn.Module], object], *parts: str) -> Case:
    """A layer in whose insides something lies that does not belong there."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.ReLU())
        change(model)
        return model

    return saved(make, "model.pt: refused", *parts, REMEDY)


def held(name: Any, value: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.__dict__[name] = value

    return change


def nested(depth: int) -> nn.Module:
    model: nn.Module = nn.ReLU()
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


def in_lists(depth: int) -> Any:
    inner: Any = []
    for _ in range(depth):
        inner = [inner]
    return inner


def hidden(depth: int) -> nn.Module:
    """Layers that lie in attributes of one another."""
    model: nn.Module = nn.ReLU()
    for _ in range(depth):
        outer = nn.ReLU()
        outer.__dict__["inner"] = [model]
        model = outer
    return model


def with_attribute() -> OrderedDict[str, object]:
    table: OrderedDict[str, object] = OrderedDict()
    table.update = 5  # type: ignore[assignment, method-assign]
    return table


def dyn(data: bytes, value: str, rule: str, remedy: str) -> Case:
    """A dyn.pt of these bytes."""

    def trigger(folder: Path) -> object:
        Path("dyn.pt").write_bytes(data)
        return load("dyn.pt")

    return Case(trigger, FormatError, "dyn.pt", value, rule, remedy)


RELU = b"ctorch.nn.modules.activation\nReLU\n"


_SIZE = unsound(held("a", torch.Size([2])), "a is a torch.Size", "which is no setting")


def as_if_sizes_were_unknown(folder: Path) -> object:
    """torch's reader makes nothing that is unknown; another release may."""
    known = tuple(kind for kind in whole_model._PLAIN if kind is not torch.Size)
    with mock.patch.object(whole_model, "_PLAIN", known):
        return _SIZE.trigger(folder)


CASES = {
    # pickles
    "absent class": hand_written(
        b"\x80\x02ctorch.nn.modules.conv\nAbsent\n.",
        "it holds torch.nn.modules.conv.Absent",
        "does not have",
    ),
    "no layer": hand_written(
        b"\x80\x02ctorchvision.models.resnet\nresnet18\n.",
        "torchvision.models.resnet.resnet18",
        "which is no class of a layer",
    ),
    "damaged pickle": hand_written(
        b"\x80\x02" + RELU + b"R.", "pop from empty list", "its pickle is damaged"
    ),
    "tuple": hand_written(b"\x80\x02)\x86.", "a tuple lacks items", "its pickle is damaged"),
    "called result": hand_written(
        b"\x80\x02cfunctools\npartial\n" + RELU + b"\x85R)R.",
        "its pickle calls something",
        "that it computed itself",
    ),
    "called class": hand_written(
        b"\x80\x02" + RELU + b")R.",
        "its pickle calls torch.nn.modules.activation.ReLU",
        "which saving a model never writes",
    ),
    "room for bytes": hand_written(
        b"\x80\x02c__builtin__\nbytearray\nK\x05\x85R.",
        "its pickle makes room for bytes",
        "that it does not hold",
    ),
    "rebuilt tensor": hand_written(
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n" + RELU + b"\x85R.",
        "its pickle rebuilds a tensor",
        "with something else than torch does",
    ),
    "instance of a result": hand_written(
        b"\x80\x02" + RELU + b")\x81)\x81.",
        "its pickle makes an instance of something",
        "that it computed itself",
    ),
    "instance with arguments": hand_written(
        b"\x80\x02" + RELU + b"K\x01\x85\x81.",
        "its pickle makes a torch.nn.modules.activation.ReLU with arguments",
        "which saving never writes",
    ),
    "filled twice": hand_written(
        b"\x80\x02" + RELU + b")\x81}b}b.",
        "its pickle fills something",
        "that is no new instance of a layer",
    ),
    # pickles of data
    "instruction": dyn(
        pickled(b"\x80\x02}0}."),
        "its pickle has the instruction POP",
        "which torch.save does not write",
        "save it again, with the default pickle protocol",
    ),
    "instruction of no data": dyn(
        pickled(b"\x80\x02" + RELU + b")\x81."),
        "reading it would use 'torch.nn.modules.activation.ReLU'",
        "is not a dyn.pt, or is damaged",
        "it may be a model, which s2d-compile dyn.pt",
    ),
    "a call in data": dyn(
        pickled(b"\x80\x02ctorch\nFloatStorage\n)R."),
        "its pickle calls something that builds no tensor",
        "is not a dyn.pt, or is damaged",
        "it may be a model, which s2d-compile dyn.pt",
    ),
    "a call with too little": dyn(
        pickled(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."),
        "with other than 6 arguments",
        "is not a dyn.pt, or is damaged",
        "it may be a model, which s2d-compile dyn.pt",
    ),
    # insides of models
    "layers in one another": saved(
        lambda: nested(105),
        "model.pt: refused",
        "0.0.0.0",
        "more than 100 layers lie in one another",
        REMEDY,
    ),
    "no table": unsound(held("_buffers", 5), "the model", "it has no _buffers"),
    "attributes of a table": unsound(
        held("_buffers", with_attribute()), "its table _buffers", "has attributes"
    ),
    "name with a dot": unsound(
        held("_modules", {"a.b": nn.ReLU()}), "_modules has the name 'a.b'", "which is none"
    ),
    "layer over a method": unsound(
        held("_modules", {"forward": nn.ReLU()}), "forward", "hides what Sequential defines"
    ),
    "number for a layer": unsound(held("_modules", {"a": 5}), "a is", "is no layer"),
    "tensor for a parameter": unsound(
        held("_parameters", {"w": torch.zeros(1)}), "w is", "is no parameter"
    ),
    "number for a name": unsound(held(5, 5), "5: an attribute", "has a name that is no text"),
    "hook": unsound(
        held("_forward_hooks", OrderedDict({0: F.relu})),
        "_forward_hooks: it holds a hook",
        "which runs code",
    ),
    "attribute over a method": unsound(
        held("forward", 5), "forward", "hides what Sequential defines under that name"
    ),
    "name of Python's": unsound(
        held("__wrapped__", 5), "__wrapped__", "is a name that Python uses itself"
    ),
    "lists in one another": unsound(
        held("a", in_lists(110)), "a: more than", "100 lists or dicts lie in one another"
    ),
    "size": replace(_SIZE, trigger=as_if_sizes_were_unknown),
    "hidden layers": unsound(
        held("a", [nested(40)]), "a.0.0.0", "layers lie in one another too deeply"
    ),
    "attribute of a setting": unsound(
        held("a", Namespace(_get_kwargs=5)), "under '_get_kwargs'", "hides what its class defines"
    ),
    "inside itself": unsound(
        lambda model: model._modules.update({"a": model}), "a Sequential", "lies inside itself"
    ),
    "endless": saved(
        lambda: hidden(500),
        "model.pt: refused",
        "it is nested",
        "too deeply",
        "it is damaged or made to do harm",
    ),
}
