"""Model files from a stranger: no code of theirs, and none of torch's at their bidding, runs."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler.errors import ModelFileError
from s2d_compiler.reading import read_model
from tests.data_mutations import archive_of

CALL = functools.partial(nn.Linear, 10**9, 10**9)
"""What a pickle can make of what may be read: a call that would take four exabytes."""


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_model(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert len(text) < 700
    assert "\n" not in text
    return text


def with_pickle(path: Path, pickle: bytes) -> Path:
    names = {"data.pkl": pickle, "byteorder": b"little", "version": b"3"}
    path.write_bytes(archive_of([(f"m/{n}", c, zipfile.ZIP_STORED) for n, c in names.items()]))
    return path


# -- what lies in a module ---------------------------------------------------------------------

HOOKS = """_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks
_state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
_forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks_with_kwargs""".split()

METHODS = """forward state_dict named_modules named_parameters train eval apply _apply extra_repr
_call_impl _save_to_state_dict register_buffer""".split()

SPECIAL = "__call__ __class__ __dict__ __setstate__ __getattr__ __repr__ __deepcopy__".split()


def held(name: str, value: Any, where: int = 0) -> Callable[[nn.Sequential], object]:
    """Put something into a layer's ``__dict__``."""
    return lambda m: vars(m[where]).update({name: value})


def in_table(table: str, name: Any, value: Any) -> Callable[[nn.Sequential], object]:
    return lambda m: vars(m[0])[table].update({name: value})


def attributed(m: nn.Sequential) -> None:
    table = OrderedDict(vars(m)["_modules"])
    table.__dict__["values"] = CALL
    vars(m)["_modules"] = table


def parameter_attribute(m: nn.Sequential) -> None:
    m[0].weight.__dict__["detach"] = CALL


def inside_itself(m: nn.Sequential) -> None:
    vars(m[0])["_modules"]["again"] = m


def deep(m: nn.Sequential) -> None:
    for _ in range(120):
        vars(m)["_modules"]["0"] = inner = nn.Sequential(nn.ReLU())
        m = inner


SMUGGLED: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    **{name: (held(name, OrderedDict({0: CALL})), "it holds a hook") for name in HOOKS},
    **{f"method {name}": (held(name, CALL), "hides what Conv2d defines") for name in METHODS},
    **{f"special {name}": (held(name, CALL), "that Python uses itself") for name in SPECIAL},
    "number as layer": (in_table("_modules", "x", 3), "0.x is no layer"),
    "class as layer": (in_table("_modules", "x", nn.ReLU), "0.x is no layer"),
    "call as layer": (in_table("_modules", "x", CALL), "0.x is no layer"),
    "layer named forward": (in_table("_modules", "forward", nn.ReLU()), "0.forward hides"),
    "buffer named state_dict": (in_table("_buffers", "state_dict", torch.ones(1)), "hides"),
    "name with a dot": (in_table("_modules", "a.b", nn.ReLU()), "has the name 'a.b'"),
    "name no text": (in_table("_modules", 3, nn.ReLU()), "has the name 3"),
    "number as weight": (in_table("_parameters", "weight", 3), "0.weight is no parameter"),
    "layer as buffer": (in_table("_buffers", "b", nn.ReLU()), "0.b is no tensor"),
    "table of another kind": (held("_modules", []), "it has no _modules"),
    "attributes of a table": (attributed, "its table _modules has attributes"),
    "attribute of a parameter": (parameter_attribute, "hides what its class defines"),
    "layer inside itself": (inside_itself, "lies inside itself"),
    "deep": (deep, "more than 100 layers lie in one another"),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_lies_where_it_does_not_belong(tmp_path: Path, name: str) -> None:
    change, message = SMUGGLED[name]
    network = model()
    change(network)
    path = tmp_path / "model.pt"
    vars(network)["_s2d"] = 1
    torch.save(network, path)
    assert message in refusal(path)


def test_mappings_with_methods_of_their_own(tmp_path: Path) -> None:
    state = model().state_dict()
    state.__dict__["get"] = CALL
    torch.save({"model": state}, tmp_path / "model.pt")
    assert "hides what its class defines under 'get'" in refusal(tmp_path / "model.pt")


def test_settings_that_double_at_every_level(tmp_path: Path) -> None:
    network, value = model(), []
    for _ in range(60):
        value = [value, value]
    vars(network[0])["setting"] = value
    torch.save(network, tmp_path / "model.pt")
    read_model(tmp_path / "model.pt")
    torch.save({"a": value}, tmp_path / "model.pt")
    assert "neither a network nor a state dict" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.LSTM(3, 4, 2), nn.GRU(4, 4, bidirectional=True)),
        lambda: nn.TransformerEncoderLayer(8, 2),
        lambda: nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Hardswish(), nn.Flatten()),
        lambda: nn.ModuleDict({"a": nn.ModuleList([nn.ReLU()]), "b": nn.ParameterList([])}),
        lambda: nn.Sequential(shared := nn.Linear(2, 2), shared),
    ],
)
def test_models_as_they_are_saved_are_read(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    torch.save(build(), tmp_path / "model.pt")
    read_model(tmp_path / "model.pt")


# -- pickles by hand ---------------------------------------------------------------------------

RELU = b"ctorch.nn.modules.activation\nReLU\n)\x81"
PARTIAL = b"cfunctools\npartial\nctorch.nn.modules.linear\nLinear\n\x85R"


def text(word: str) -> bytes:
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


PICKLES: dict[str, tuple[bytes, str]] = {
    # the second filling would call what the first one put there
    "filled twice": (
        RELU + b"}" + text("__setstate__") + PARTIAL + b"sbK\x01b.",
        "fills something that is no new instance",
    ),
    "filled through the memo": (RELU + b"q\x00}b0h\x00}b.", "torch.save does not write"),
    "tensor filled": (b"ctorch._utils\n_rebuild_tensor\n)R)b.", "fills something"),
    "class filled": (b"ctorch.nn.modules.activation\nReLU\n}b.", "fills something"),
    # names with dots, and what lies in modules that may be named
    "dotted": (b"ctorch.nn.modules\nos.system\n.", "torch.nn.modules.os.system"),
    "dotted class": (b"ctorch.nn.modules.module\nModule.__init__\n.", "does not have"),
    "module": (b"ctorch.nn.modules\nactivation\n.", "is no class of a layer"),
    "module's import": (b"ctorch.nn.modules.module\nwarnings\n.", "is no class of a layer"),
    "old name": (b"c__builtin__\neval\n.", "eval"),
    "old module": (b"cos\nsystem\n.", "os.system"),
    "getattr": (b"cbuiltins\ngetattr\n.", "getattr"),
    "stack global": (b"\x80\x04" + b"\x8c\x02os\x8c\x06system\x93.", "pickle_protocol"),
    "dotted stack global": (
        b"\x80\x04" + b"\x8c\x10torch.nn.modules\x8c\x09os.system\x93.",
        "pickle_protocol",
    ),
    "graph module": (b"ctorch.fx.graph_module\nGraphModule\n.", "would use torch.fx"),
    "reducer": (b"ctorch.fx.graph_module\nreduce_graph_module\n.", "would use torch.fx"),
    "script module": (b"ctorch.jit._script\nRecursiveScriptModule\n.", "would use torch.jit"),
    # calls of what torch itself allows
    "room for bytes": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "room for bytes"),
    "room for numbers": (b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.", "calls torch.Tensor"),
    "storage": (b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.", "UntypedStorage"),
    "instance with size": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85\x81.", "arguments"),
    "wrapper": (b"ctorch._utils\n_rebuild_wrapper_subclass\n)R.", "_rebuild_wrapper_subclass"),
    "parameter": (b"ctorch.nn.parameter\nParameter\n)R.", "calls torch.nn.parameter.Parameter"),
    "layer called": (b"ctorch.nn.modules.linear\nLinear\nK\x01K\x01\x86R.", "calls torch.nn"),
    # instructions that torch.save does not write
    **{
        name: (code, "torch.save does not write|damaged|cannot read")
        for name, code in {
            "extension": b"\x82\x01.",
            "persistent": b"Pabc\n.",
            "instance": b"(ios\nsystem\n.",
            "object": b"(cos\nsystem\no.",
            "new object": RELU[:-2] + b")}\x92.",
            "copy": b"N2.",
            "long": b"\x8b\xff\xff\xff\x7f.",
            "text": b"V" + b"x" * 10 + b"\n.",
        }.items()
    },
    "persistent text": (text("x") + b"Q.", "cannot read it|persistent"),
    "persistent other": (text("module") + b"\x85Q.", "cannot read it|storage"),
    "memo": (b"h\x63.", "damaged"),
    "stack": (b"0.", "damaged|torch.save does not write"),
    "end": (b"N", "damaged|cannot read"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise AssertionError("code ran at a file's bidding")

    monkeypatch.setattr(nn.Linear, "__init__", stumble)
    monkeypatch.setattr(os, "system", stumble)
    code, message = PICKLES[name]
    code = code if code.startswith(b"\x80") else b"\x80\x02" + code
    found = refusal(with_pickle(tmp_path / "model.pt", code))
    assert any(part in found for part in message.split("|")), found
    assert "bidding" not in found


# -- memory, damage ----------------------------------------------------------------------------

SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from s2d_compiler.errors import ModelFileError
from s2d_compiler.reading import read_model
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28,) * 2)
for path in sys.argv[1:]:
    try:
        read_model(path)
    except ModelFileError as error:
        assert "allocate" not in str(error), error
    else:
        sys.exit(f"{path} was read")
"""


def test_files_that_claim_to_be_large(tmp_path: Path) -> None:
    """Each is refused by a process that may take 256 MiB."""
    for name in ("room for bytes", "room for numbers", "storage", "instance with size"):
        with_pickle(tmp_path / f"{name}.pt", b"\x80\x02" + PICKLES[name][0])
    for name in ("special __repr__", "_state_dict_hooks", "call as layer"):
        network = model()
        SMUGGLED[name][0](network)
        torch.save(network, tmp_path / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data/0", bytes(1 << 29))
    paths = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    network = model()
    torch.save(network, path)
    weight = network[0].weight.detach().numpy().tobytes()
    whole = path.read_bytes()
    pick = random.Random(0)
    for _ in range(20):
        flipped = bytearray(weight)
        flipped[pick.randrange(len(weight))] ^= 1 << pick.randrange(8)
        path.write_bytes(whole.replace(weight, bytes(flipped)))
        assert "checksum" in refusal(path)
