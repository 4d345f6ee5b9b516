"""Reading models: what is read is bit-identical, what is refused runs nothing."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copy
import functools
import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import s2d_compiler  # noqa: F401  makes torchvision, and so timm, importable

# isort: split

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from s2d_compiler.errors import ModelFileError
from s2d_compiler.reading import describe_origin, read_model

TINY = "tiny_net_of_this_test"


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10)
    ).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype
        for key in first
    )


def unfilled(build: Callable[[], nn.Module]) -> nn.Module:
    """Build without spending time on initial weights, then fill with numbers."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.linspace(0, 1, tensor.numel()).reshape(tensor.shape))
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a module that builds networks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{TINY}.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    pass\n"
        "def build(classes=10):\n"
        "    return Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),\n"
        "               nn.Linear(4, classes))\n"
        "def number():\n"
        "    return 5\n"
        "class build_all:\n"
        "    pass\n"
        "constant = 5\n"
        "model = build()\n"
    )
    (tmp_path / "breaks.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    yield tmp_path
    for name in (TINY, "breaks", "exits"):
        sys.modules.pop(name, None)


def refusal(path: object, **options: Any) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_model(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "Traceback" not in message
    assert "\n" not in message
    return message


# Whole models

WHOLE = (
    {
        name: functools.partial(torchvision.models.get_model, name, weights=None, **options)
        for name, options in {
            "resnet18": {},
            "densenet121": {},
            "mobilenet_v2": {},
            "efficientnet_b0": {},
            "shufflenet_v2_x0_5": {},
            "googlenet": {"init_weights": False},
            "mnasnet0_5": {},
            "swin_t": {},
        }.items()
    }
    | {
        "vit": functools.partial(
            torchvision.models.VisionTransformer,
            image_size=32,
            patch_size=16,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=16,
        ),
        "transformer layer": functools.partial(nn.TransformerEncoderLayer, 8, 2, 16),
        "transformer layer with gelu": functools.partial(
            nn.TransformerEncoderLayer, 8, 2, 16, activation=nn.functional.gelu
        ),
    }
    | {
        f"timm {name}": functools.partial(timm.create_model, name)
        for name in ("resnet10t", "vit_tiny_patch16_224", "mobilenetv4_conv_small", "nf_regnet_b0")
    }
)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_are_read_bit_for_bit(tmp_path: Path, name: str) -> None:
    before = set(torch.serialization.get_safe_globals())
    model = unfilled(WHOLE[name]).eval()
    torch.save(model, tmp_path / "model.pt")
    again = read_model(tmp_path / "model.pt")
    assert type(again) is type(model)
    assert same(again, model)
    assert str(again) == str(model)
    assert not any(module.training for module in again.modules())
    assert set(torch.serialization.get_safe_globals()) == before


def test_training_flag_and_requires_grad_stay(tmp_path: Path) -> None:
    model = tiny().train()
    model[0].weight.requires_grad_(False)
    torch.save(model, tmp_path / "model.pt")
    again = read_model(tmp_path / "model.pt")
    assert all(module.training for module in again.modules())
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_precision_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(tiny().to(dtype), tmp_path / "model.pt")
    torch.save(tiny().to(dtype).state_dict(), tmp_path / "state.pt")
    assert read_model(tmp_path / "model.pt")[0].weight.dtype == dtype  # type: ignore[index]


@pytest.mark.parametrize("key", ["model", "net", "ema", "module"])
def test_checkpoint_with_a_whole_model(tmp_path: Path, key: str) -> None:
    model = tiny()
    torch.save({"epoch": 3, key: model, "optimizer": None}, tmp_path / "model.pt")
    assert same(read_model(tmp_path / "model.pt"), model)


def test_arch_beside_a_whole_model_is_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(tiny(), tmp_path / "model.pt")
    read_model(tmp_path / "model.pt", arch="torchvision.models:resnet18")
    assert "--arch torchvision.models:resnet18 is not needed" in caplog.text


class Own(nn.Module):
    pass


def test_own_class_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(Own(), tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt")
    assert f"refused: reading it would use {Own.__module__}.Own; save a state dict" in message
    assert "--arch module:function; or pass --trust, which lets the file run any code" in message


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    names = b"".join(b"cmodule%d\nNet\n" % number for number in range(9))
    message = refusal(archive(tmp_path, b"\x80\x02" + names + b"."))
    assert "module4.Net and 4 more" in message


# Hostile files


def archive(folder: Path, data: bytes, **more: bytes) -> Path:
    """What torch.save would write, with this pickle."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3"}.items():
            file.writestr(f"archive/{name}", content)
        for name, content in more.items():
            file.writestr(f"archive/{name}", content)
    return path


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __call__(self) -> None:
        """A pickle calls only what can be called."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def stumble(*_: object) -> None:
    raise AssertionError("code of the file ran")


HOSTILE = {
    "os.system": Calls(os.system, "touch ran"),
    "subprocess": Calls(subprocess.check_output, ["touch", "ran"]),
    "eval": Calls(eval, "open('ran', 'w')"),
    "exec": Calls(exec, "open('ran', 'w')"),
    "open": Calls(open, "ran", "w"),
    "import": Calls(__import__, "ran"),
    "getattr": Calls(getattr, "x", "upper"),
    "nested getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), "touch ran"),
    "partial called": Calls(functools.partial(open, "ran", "w")),
    "partial of open": functools.partial(open, "ran", "w"),
    "torch.load": Calls(torch.load, "ran"),
    "hub": Calls(torch.hub.load, "ran", "ran"),
    "timm factory": Calls(timm.create_model, "resnet18"),
    "torchvision factory": Calls(torchvision.models.resnet18),
    "graph module": Calls(torch.fx.GraphModule, {}, "x"),
    "layer made with arguments": Calls(nn.Conv2d, 3, 4, 3),
    "layer made without": Calls(nn.ReLU),
    "container made": Calls(nn.Sequential, nn.ReLU()),
    "tensor rebuilt by a layer": Calls(
        torch._tensor._rebuild_from_type_v2,  # type: ignore[attr-defined]
        nn.ReLU,
        torch.Tensor,
        (),
        {},
    ),
    "format with more arguments": Calls(timm.layers.Format, "x", "a b"),
    "inside a model": nn.Sequential(nn.ReLU(), nn.ReLU()),
}
HOSTILE["inside a model"].hook = HOSTILE["os.system"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(HOSTILE[name], "model.pt", _use_new_zipfile_serialization=zipped)
    for layer in (nn.Conv2d, nn.ReLU, nn.Sequential, timm.layers.Format):
        monkeypatch.setattr(layer, "__init__", stumble)
    monkeypatch.setattr(torch.hub, "load", stumble)
    for module in (builtins, os):
        for function in ("eval", "exec", "system"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, stumble)
    message = refusal("model.pt")
    assert "refused: " in message or not zipped
    assert "code of the file ran" not in message
    assert os.listdir() == ["model.pt"]
    monkeypatch.undo()


HAND_WRITTEN = {
    # a class from the memo, called
    b"\x80\x02ctorch.nn.modules.activation\nReLU\nq\x000h\x00)R.": "torch.save does not write",
    b"\x80\x02ctorch.nn.modules.activation\nReLU\nq\x00]h\x00a}h\x00)R.": "calls torch.nn.modules",
    # the result of a call, called
    b"\x80\x02cfunctools\npartial\nctorch.nn.modules.activation\nReLU\n\x85R)R.": "computed itself",
    b"\x80\x02ctorch.nn.modules.activation\nReLU\n)\x81)\x81.": "computed itself",
    # an instance made with arguments
    b"\x80\x02ctorch.nn.modules.activation\nReLU\nK\x01\x85\x81.": "with arguments",
    # a name with dots, a module that is no layer's, an import elsewhere, a class that is no layer
    b"\x80\x02ctorch.nn.modules.activation\nReLU.forward\n.": "does not have",
    b"\x80\x02ctorch.nn.modules.module\ntorch\n.": "is no class of a layer",
    b"\x80\x02ctorchvision.models.resnet\nImageClassification\n.": "is no class of a layer",
    b"\x80\x02ctorch.nn.modules.conv\nModule\n.": "an object of type type",
    b"\x80\x02ctorchvision.models.resnet\nWeightsEnum\n.": "is no class of a layer",
    b"\x80\x02ctorchvision.models.resnet\nresnet18\n.": "is no class of a layer",
    b"\x80\x02ctorchvision.models.feature_extraction\nDualGraphModule\n.": "no class of a layer",
    b"\x80\x02ctorchvision.modelsx\nA\n.": "would use torchvision.modelsx.A",
    b"\x80\x02ctorchvision.models.\nA\n.": "would use torchvision.models..A",
    b"\x80\x02ctorchvision.models.absent\nA\n.": "does not have",
    b"\x80\x02ctimm.models.absent\nA\n.": "which the installed timm 1",
    b"\x80\x02ctorch.nn.modules.conv\nAbsent\n.": "which the installed torch 2",
    b"\x80\x02cos\nsystem\n.": "os.system",
    b"\x80\x02cposix\nsystem\n.": "posix.system",
    # damage
    b"": "damaged",
    b"\x80\x02": "damaged",
    b"\x80\x02R.": "damaged",
    b"\x80\x02(R.": "damaged",
    b"\x80\x02t.": "damaged",
    b"\x80\x02h\x05.": "damaged",
    b"\x80\x02X\xff\xff\xff\xffa.": "damaged",
    b"\x80\x02)\x86.": "damaged",
    b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.": "pickle_protocol",
    b"\x80\x02" + b"(" * 100_000 + b".": "damaged",
    # data, not a model
    b"\x80\x02N.": "an object of type NoneType, neither a network nor a state dict",
    b"\x80\x02}.": "an empty dictionary",
    # an instance without its content
    b"\x80\x02ctorch.nn.modules.activation\nReLU\n)\x81.": "damaged or incomplete",
}


@pytest.mark.parametrize("data", HAND_WRITTEN)
def test_hand_written_pickles(tmp_path: Path, data: bytes) -> None:
    assert HAND_WRITTEN[data] in refusal(archive(tmp_path, data))


def test_numbers_beyond_the_file(tmp_path: Path) -> None:
    """A storage that claims to be larger than what lies in the file."""
    torch.save({"weight": torch.zeros(4)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as file:
        data = file.read("small/data.pkl")
    for small, large in (
        (b"K\x04tq", b"J\xff\xff\xff\x7ftq"),
        (b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    ):
        assert small in data
        path = archive(tmp_path, data.replace(small, large), **{"data/0": bytes(16)})
        assert "torch cannot read it" in refusal(path)


def test_archive_that_unpacks_to_more_than_it_weighs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data/0", bytes(1 << 22))
    assert "claim to be larger than the file" in refusal(tmp_path / "model.pt")


# State dicts


def wrapped(model: nn.Module, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in model.state_dict().items()}


STATES: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda model: model.state_dict(),
    **{
        key: lambda model, key=key: {"epoch": 3, key: model.state_dict()}  # type: ignore[misc]
        for key in ("state_dict", "model", "model_ema", "net", "ema_state_dict")
    },
    "twice nested": lambda model: {"model": {"state_dict": model.state_dict()}},
    "data parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: wrapped(model, "_orig_mod."),
    "compiled, parallel": lambda model: wrapped(model, "module._orig_mod."),
    "compiled inside": lambda model: {
        key.replace("0.", "0._orig_mod.", 1): value for key, value in model.state_dict().items()
    },
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "framework": lambda model: {"state_dict": wrapped(model, "model.")},
    "script's arguments": lambda model: {
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(lr=0.1),
    },
    "without counters": lambda model: {
        key: value for key, value in model.state_dict().items() if "num_batches" not in key
    },
    "parameters": lambda model: collections.OrderedDict(
        (key, nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value)
        for key, value in model.state_dict().items()
    ),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(here: Path, name: str, zipped: bool) -> None:
    model = tiny()
    if name == "script's arguments" and not zipped:
        pytest.skip("the old format is read without any class")
    torch.save(STATES[name](model), "model.pt", _use_new_zipfile_serialization=zipped)
    path, random = list(sys.path), torch.get_rng_state()
    again = read_model("model.pt", arch=f"{TINY}:build")
    assert same(again, model)
    assert type(again).__name__ == "Net"
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), random)
    assert "tensors), which has no architecture; name the function" in refusal("model.pt")


def test_state_dict_of_torchvision(tmp_path: Path) -> None:
    model = unfilled(lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=3))
    torch.save({"state_dict": wrapped(model, "module.")}, tmp_path / "model.pt")
    again = read_model(
        tmp_path / "model.pt",
        arch="torchvision.models:shufflenet_v2_x0_5",
        arch_kwargs={"num_classes": 3},
    )
    assert same(again, model)


def test_safetensors(here: Path) -> None:
    model = tiny().double()
    safetensors.torch.save_file(model.state_dict(), "model.safetensors")
    Path("model.bin").write_bytes(Path("model.safetensors").read_bytes())
    for name in ("model.safetensors", "model.bin"):
        assert same(read_model(name, arch=f"{TINY}:build"), model)
    Path("cut.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:300])
    assert "damaged, or no safetensors file" in refusal("cut.safetensors")
    assert f"{len(model.state_dict())} tensors" in refusal("model.safetensors")


def test_first_of_several_networks_is_read_and_said(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, average = tiny(), tiny()
    torch.save({"model_ema": average.state_dict(), "model": model.state_dict()}, "model.pt")
    assert same(read_model("model.pt", arch=f"{TINY}:build"), model)
    assert "model is read, not ['model_ema']" in caplog.text


def test_checkpoint_place_is_named(here: Path) -> None:
    torch.save({"model": {"state_dict": tiny().state_dict()}}, "model.pt")
    assert refusal("model.pt").startswith(
        'model.pt, under "model.state_dict": this is a state dict (9 tensors)'
    )


def without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "0.bias"), "it lacks 0.bias"),
        (lambda state: state | {"5.weight": torch.zeros(1)}, "it has 5.weight beyond"),
        (lambda state: {"a": torch.zeros(1)}, "it lacks 0.weight, 0.bias, 1.weight and 5 more"),
        (
            lambda state: state | {"0.weight": torch.zeros(4, 3, 5, 5)},
            "0.weight is [4, 3, 5, 5] where [4, 3, 3, 3] belongs",
        ),
        (
            lambda state: state | {"4.weight": torch.zeros(7, 4), "4.bias": torch.zeros(7)},
            "4.weight is [7, 4] where [10, 4] belongs (and 1 more); only the number of classes "
            "differs: give it to the function, often with --arch-kwargs '{\"num_classes\": 7}'",
        ),
        (lambda state: state | {"0.bias": "text"}, "loading raised"),
    ],
)
def test_state_dict_of_another_architecture(
    here: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    torch.save(change(dict(tiny().state_dict())), "model.pt")
    text = refusal("model.pt", arch=f"{TINY}:build")
    assert text.startswith(f"model.pt does not fit --arch {TINY}:build: ")
    assert message in text


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet18", "not of the form module:function, such as torchvision.models:resnet18"),
        (":resnet18", "not of the form"),
        ("torchvision.models:", "not of the form"),
        ("os.system('x'):f", "not of the form"),
        ("absent_here.net:build", "there is no module 'absent_here', neither installed nor in"),
        (f"{TINY}.inner:build", "there is no module"),
        ("torchvision.models:resnet_18", "has no 'resnet_18'; near it are "),
        (f"{TINY}:build.inner", "has no 'inner'"),
        (f"{TINY}:constant", "this is a int, not a function"),
        (f"{TINY}:model", "this is a Net, not a function"),
        (f"{TINY}:number", "it returned a int, not a torch.nn.Module"),
        (f"{TINY}:build_all", "it returned a build_all"),
        ("breaks:build", "importing breaks raised ModuleNotFoundError: No module named 'nothing"),
        ("exits:build", "importing exits raised SystemExit: 3"),
    ],
)
def test_architectures_that_do_not_build(here: Path, arch: str, message: str) -> None:
    torch.save(tiny().state_dict(), "model.pt")
    text = refusal("model.pt", arch=arch)
    assert text.startswith((f"--arch {arch}: ", f"--arch {arch!r}: "))
    assert message in text


def test_arguments_of_the_architecture(here: Path) -> None:
    torch.save(tiny().state_dict(), "model.pt")
    text = refusal("model.pt", arch=f"{TINY}:build", arch_kwargs={"clases": 3})
    assert "build(clases=3) raised TypeError: build() got an unexpected keyword" in text
    assert "given without --arch" in refusal("model.pt", arch_kwargs={"classes": 3})
    assert "keys must be strings" in refusal(
        "model.pt",
        arch=f"{TINY}:build",
        arch_kwargs={3: 3},  # type: ignore[dict-item]
    )


# Files that hold no model


def not_models(folder: Path) -> dict[str, str]:
    """Write one file of each kind; what is said about each, by name."""
    saved = io.BytesIO()
    torch.save(tiny(), saved)
    contents = {
        "empty.pt": (b"", "the file is empty"),
        "text.pt": (b"stages: 3\n", "this is a text file; a model is saved with torch.save"),
        "page.pt": (b"<!DOCTYPE html><html>", "this is a web page"),
        "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        "gzip.pt": (gzip.compress(saved.getvalue()), "compressed with gzip"),
        "bytes.pt": (bytes(range(256)) * 4, "this is no model file that torch reads"),
        "net.onnx": (b"\x08\x0a\x12\x07pytorch", "this is an ONNX file"),
        "plain.pkl": (pickle.dumps({"a": 1}, 2), "torch cannot read it"),
        "plain4.pkl": (pickle.dumps({"a": 1}, 4), "pickle_protocol"),
        "short.pt": (saved.getvalue()[:10], "damaged or cut off"),
        "cut.pt": (saved.getvalue()[: len(saved.getvalue()) // 2], "damaged or cut off"),
        "tail.pt": (saved.getvalue()[:-30], "damaged or cut off"),
        "flipped.pt": (saved.getvalue().replace(b"Conv2d", b"Conv9d"), ""),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    np.save(folder / "array.npy", np.zeros(3))
    np.savez(folder / "arrays.npz", np.zeros(3))
    with zipfile.ZipFile(folder / "other.zip", "w") as file:
        file.writestr("word/document.xml", "text")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 3, "lr": 0.1}, folder / "numbers.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save(tiny().to("meta"), folder / "meta.pt")
    torch.save(tiny(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return {name: message for name, (_, message) in contents.items()} | {
        "array.npy": "this is a numpy array",
        "arrays.npz": "this is a zip archive, but none that torch.save wrote",
        "other.zip": "this is a zip archive, but none that torch.save wrote",
        "list.pt": "it holds an object of type list, neither a network nor a state dict",
        "numbers.pt": 'it holds a dictionary ("epoch", "lr"), neither a network',
        "tensor.pt": "it holds an object of type Tensor",
        "meta.pt": "0.weight has no numbers (it is on the meta device)",
        "old.pt": "in this old format can also be saved again by a newer torch",
        "missing.pt": "there is no such file; check the path",
        "nul\0.pt": "cannot be read",
        ".": "this is a folder",
        "/dev/null": "this is a device or a pipe",
    }


def test_files_that_hold_no_model(tmp_path: Path) -> None:
    for name, message in not_models(tmp_path).items():
        text = refusal(tmp_path / name)
        assert text.startswith(str(tmp_path / name)), name
        assert message in text, name


def test_any_damage_ends_in_a_sentence(tmp_path: Path) -> None:
    """Bytes turned over in the pickle and in the archive's directory."""
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.ReLU()), path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 17):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with contextlib.suppress(ModelFileError):
            read_model(path)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = unfilled(lambda: timm.create_model("resnet10t"))
    torch.save(model, tmp_path / "model.pt")
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm is not installed (pip install timm)" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("trust", [False, True])
def test_torchscript(tmp_path: Path, trust: bool) -> None:
    source = "class M(torch.nn.Module):\n  pass"
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"model/{name}", b"\x80\x02}.")
        file.writestr("model/code/__torch__.py", source)
    message = refusal(tmp_path / "model.pt", trust=trust)
    assert "this is a TorchScript archive" in message
    assert "load the original Python model and save its state dict" in message


# Trust


def test_exported_program(tmp_path: Path) -> None:
    model = tiny()
    x = torch.rand(2, 3, 3, 3)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    message = refusal(tmp_path / "model.pt2")
    assert "torch's documentation says that loading one is not safe; pass --trust" in message
    again = read_model(tmp_path / "model.pt2", trust=True)
    assert torch.equal(again(x), model(x))


def test_trust_reads_own_classes_of_the_current_directory(here: Path) -> None:
    sys.path.insert(0, str(here))
    model = __import__(TINY).build()
    sys.path.remove(str(here))
    torch.save(model, "model.pt")
    del sys.modules[TINY]
    assert f"refused: reading it would use {TINY}.Net" in refusal("model.pt")
    assert same(read_model("model.pt", trust=True), model)


def test_trust_reads_state_dicts_too(here: Path) -> None:
    model = tiny()
    torch.save({"model": model.state_dict(), "best": np.float64(0.5)}, "model.pt")
    assert "refused: reading it would use numpy" in refusal("model.pt", arch=f"{TINY}:build")
    assert same(read_model("model.pt", arch=f"{TINY}:build", trust=True), model)


def test_trust_still_ends_in_sentences(here: Path) -> None:
    data = b"\x80\x02c__main__\nNet\n)\x81."
    message = refusal(archive(here, data), trust=True)
    assert "its class was defined in the script that saved it" in message
    message = refusal(archive(here, b"\x80\x02cabsent_here\nNet\n)\x81."), trust=True)
    assert "No module named 'absent_here'; install that module" in message
    for name in not_models(here):
        if name not in ("old.pt",):
            refusal(here / name, trust=True)


# Origin


def test_describe_origin(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"content")
    assert describe_origin(path) == {
        "file": "model.pt",
        "bytes": 7,
        "sha256": hashlib.sha256(b"content").hexdigest(),
    }
    with pytest.raises(ModelFileError, match="there is no such file"):
        describe_origin(tmp_path / "absent.pt")


def test_reading_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(tiny(), path)
    before = copy.copy(describe_origin(path))
    read_model(path)
    assert describe_origin(path) == before
