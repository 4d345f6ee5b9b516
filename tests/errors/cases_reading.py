"""Model files: what they are, what is in them, and the functions that build networks."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d_compiler import reading
from s2d_compiler.reading import read_model
from tests.errors.case import Case
from tests.errors.stored import FOLDER
from tests.errors.written import REMEDY, content, pickled, said, saved, zipped

RESNET = "torchvision.models:resnet18"


class Own(nn.Module):
    """A class that is no torch's."""


def architecture(arch: str, place: str, value: str, rule: str, remedy: str, **given: Any) -> Case:
    def trigger(folder: Path) -> object:
        source = "from torch import nn\ndef build(n=3): return nn.Linear(3, n)\nnumber = 5\n"
        Path("net_of_errors.py").write_text(source + "def count(): return 5\n")
        Path("breaks_in_errors.py").write_text("1 / 0\n")
        torch.save(nn.Linear(3, 3).state_dict(), "model.pt")
        try:
            return read_model("model.pt", arch=arch, **given)
        finally:
            sys.modules.pop("net_of_errors", None)

    return said(trigger, place, value, rule, remedy)


def state(change: dict[str, object], place: str, value: str, rule: str, remedy: str) -> Case:
    def trigger(folder: Path) -> object:
        Path("net_of_errors.py").write_text(
            "from torch import nn\ndef build(): return nn.Linear(3, 3)\n"
        )
        torch.save(nn.Linear(3, 3).state_dict() | change, "model.pt")
        try:
            return read_model("model.pt", arch="net_of_errors:build")
        finally:
            sys.modules.pop("net_of_errors", None)

    return said(trigger, place, value, rule, remedy)


def with_device(folder: Path) -> object:
    os.mkfifo("model.pt")
    return read_model("model.pt")


def already_compiled(folder: Path) -> object:
    Path("model.pt").write_bytes((FOLDER / "dyn-v1-original.pt").read_bytes())
    return read_model("model.pt")


def emptied() -> nn.Module:
    model = nn.Linear(2, 2)
    del model.__dict__["in_features"]
    return model


def exported(trust: bool, *parts: str) -> Case:
    def trigger(folder: Path) -> object:
        program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, "model.pt2")
        if trust:  # the archive stays one, its program does not
            with zipfile.ZipFile("model.pt2") as file:
                entries = {e.filename: file.read(e) for e in file.infolist()}
            changed = {k: b"{}" if k.endswith(".json") else v for k, v in entries.items()}
            Path("model.pt2").write_bytes(zipped(changed))
        return read_model("model.pt2", trust=trust)

    return said(trigger, *parts)


TENSORS = pickled(b"\x80\x02}.")


CASES = {
    # what kind of file
    "no file": said(
        lambda folder: read_model("model.pt"),
        "model.pt",
        "model.pt",
        "there is no such file",
        "check the path",
    ),
    "folder": said(
        lambda folder: read_model("."), ".", ".", "this is a folder", "name the model's file"
    ),
    "pipe": said(
        with_device, "model.pt", "model.pt", "this is a device or a pipe", "name a plain file"
    ),
    "no name": said(
        lambda folder: read_model("a\0b"),
        "a\0b",
        "embedded null",
        "cannot be read",
        "check the path and your rights",
    ),
    "empty": content(b"", "model.pt", "the file", "is empty", "save or copy the model again"),
    "other content": content(
        b"GGUF123",
        "model.pt",
        "this is a GGUF file",
        "a model is saved with torch.save or as .safetensors",
        "name one",
    ),
    **{
        f"signature {signature!r}": content(
            signature + b"...", "model.pt", text, "a model is saved with torch.save", "name one"
        )
        for signature, text in reading._SIGNATURES
    },
    "ONNX": content(
        b"\x08\x0a\x12\x07pytorch",
        "model.onnx",
        "this is an ONNX file",
        "which torch does not read",
        "save the original network",
        name="model.onnx",
    ),
    "text": content(
        b"stages: 3", "model.pt", "this is a text file", "a model is saved with", "name one"
    ),
    "tar": content(
        bytes(257) + b"ustar", "model.pt", "this is a tar archive", "is saved with", "name one"
    ),
    "cut off": content(
        TENSORS[:40], "model.pt", "not a zip file", "is damaged or cut off", "copy it again"
    ),
    "TorchScript": content(
        zipped({"a/code/x.py": b""}),
        "model.pt",
        "this is a TorchScript archive",
        "whose code cannot be captured",
        "load the original Python model and save its state dict",
    ),
    "other archive": content(
        zipped({"a/b": b""}),
        "model.pt",
        "this is a zip archive",
        "but none that torch.save wrote",
        "name one that is",
    ),
    "name twice": content(
        zipped({"a/data.pkl": b"", "a/data.pkl*": b""}),
        "model.pt",
        "two of its parts",
        "have one name",
        "copy it again",
    ),
    "name outside": content(
        zipped({"a/../data.pkl": b""}),
        "model.pt",
        "a part has a name",
        "that leads out of it",
        "copy it again",
    ),
    "larger than the file": content(
        zipped({"a/data.pkl": bytes(1 << 20)}, zipfile.ZIP_DEFLATED),
        "model.pt",
        "its parts",
        "claim to be larger than the file",
        "copy it again",
    ),
    "two tables of contents": content(
        TENSORS + TENSORS,
        "model.pt",
        "it has two tables of contents",
        "that differ",
        "copy it again",
    ),
    "exported": exported(
        False,
        "model.pt2",
        "this is an exported program",
        "loading one is not safe",
        "pass --trust if you trust its origin",
    ),
    "exported and changed": exported(
        True,
        "model.pt2",
        "Error",
        "torch cannot load this exported program",
        "copy it again, or export it with torch",
    ),
    "safetensors": content(
        b"text",
        "model.safetensors",
        "Error",
        "damaged, or no safetensors file",
        "copy it again",
        name="model.safetensors",
    ),
    # what is in it
    "compiled already": said(
        already_compiled,
        "model.pt",
        "this is a compiled network",
        "already",
        "look at it with s2d show model.pt",
    ),
    "a list": saved(
        lambda: [1],
        "model.pt",
        "an object of type list",
        "neither a network nor a state dict",
        "save one of these with torch.save",
    ),
    "state dict alone": saved(
        lambda: {"model": nn.Linear(2, 2).state_dict()},
        'model.pt, under "model"',
        "this is a state dict (2 tensors)",
        "which has no architecture",
        "name the function that builds it: --arch torchvision.models:resnet18",
    ),
    "own class": saved(
        Own,
        "model.pt: refused",
        f"{Own.__module__}.Own",
        "reading it would use",
        REMEDY,
    ),
    "own class, old format": saved(
        nn.ReLU,
        "model.pt: refused",
        "torch.nn.modules.activation.ReLU",
        "reading it would use",
        "a whole model in this old format can also be saved again by a newer torch",
        legacy=True,
    ),
    "other protocol": content(
        b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
        "model.pt: refused",
        "its pickle has instructions",
        "that torch.save does not write unless told to (pickle_protocol)",
        "save it again without",
    ),
    "another pickle": content(
        b"\x80\x02}.",
        "model.pt",
        "Error",
        "torch cannot read it",
        "copy or save it again",
    ),
    "trusted, from a script": content(
        pickled(b"\x80\x02c__main__\nAbsentNet\n)\x81."),
        "model.pt",
        "AttributeError",
        "reading it raised",
        "move the class to a module and save the model again, or save a state dict",
        trust=True,
    ),
    "trusted, and broken": content(
        pickled(b"\x80\x02cbuiltins\nint\nX\x01\x00\x00\x00a\x85R."),
        "model.pt",
        "ValueError",
        "reading it raised",
        "make that work, or save a state dict",
        trust=True,
    ),
    "trusted in vain": content(
        pickled(b"\x80\x02cabsent_of_errors\nNet\n)\x81."),
        "model.pt",
        "ModuleNotFoundError: No module named 'absent_of_errors'",
        "reading it raised",
        "install that module, or run this from the folder that holds it",
        trust=True,
    ),
    "without its content": saved(
        emptied,
        "model.pt",
        "AttributeError",
        "the model is damaged or incomplete",
        "save it again",
    ),
    "meta": saved(
        lambda: nn.Linear(2, 2, device="meta"),
        "model.pt",
        "weight",
        "has no numbers (it is on the meta device)",
        "save a filled model",
    ),
    # the function that builds
    "arguments alone": said(
        lambda folder: read_model("model.pt", arch_kwargs={"n": 3}),
        "--arch-kwargs",
        "--arch-kwargs",
        "are given without --arch",
        "name the function they go to",
    ),
    "no function": architecture(
        "resnet18",
        "--arch 'resnet18'",
        "resnet18",
        "not of the form module:function",
        "such as torchvision.models:resnet18",
    ),
    "keys": architecture(
        RESNET,
        "--arch-kwargs",
        "{3: 3}",
        "the keys must be strings",
        "rename them",
        arch_kwargs={3: 3},
    ),
    "refused arguments": architecture(
        "net_of_errors:build",
        "--arch net_of_errors:build",
        "build(m=3)",
        "raised TypeError",
        "its arguments are given with --arch-kwargs",
        arch_kwargs={"m": 3},
    ),
    "a number": architecture(
        "net_of_errors:count",
        "--arch net_of_errors:count",
        "it returned a int",
        "not a torch.nn.Module",
        "name a function that builds the network and returns it",
    ),
    "no module": architecture(
        "absent_of_errors:build",
        "--arch absent_of_errors:build",
        "'absent_of_errors'",
        "there is no module",
        "install it, or run this from the folder that holds it",
    ),
    "broken module": architecture(
        "breaks_in_errors:build",
        "--arch breaks_in_errors:build",
        "ZeroDivisionError",
        "importing breaks_in_errors raised",
        "correct that module",
    ),
    "no such function": architecture(
        "net_of_errors:buildd",
        "--arch net_of_errors:buildd",
        "'buildd'",
        "net_of_errors has no",
        "near it are build",
    ),
    "no such function, nothing near": architecture(
        "net_of_errors:zzzz",
        "--arch net_of_errors:zzzz",
        "'zzzz'",
        "net_of_errors has no",
        "name a function that it has",
    ),
    "constant": architecture(
        "net_of_errors:number",
        "--arch net_of_errors:number",
        "this is a int",
        "not a function that builds a network",
        "name a function or a class",
    ),
    "another state dict": state(
        {"a": torch.zeros(1)},
        "model.pt does not fit --arch net_of_errors:build",
        "it has a",
        "beyond the architecture",
        "name the function that built it, and its arguments with --arch-kwargs",
    ),
    "other classes": state(
        {"weight": torch.zeros(7, 3), "bias": torch.zeros(7)},
        "model.pt does not fit --arch net_of_errors:build",
        "weight is [7, 3]",
        "where [3, 3] belongs",
        "--arch-kwargs '{\"num_classes\": 7}'",
    ),
    "text for a tensor": state(
        {"weight": "text"},
        "model.pt does not fit --arch net_of_errors:build",
        "RuntimeError",
        "loading raised",
        "save the state dict again",
    ),
}
