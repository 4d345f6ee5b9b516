"""Too little memory ends with a sentence: which step, how much it asked for, what helps."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from s2d_compiler import cli, load, transform
from s2d_compiler.errors import FormatError, OutOfMemoryError, S2DError
from s2d_compiler.memory import explained, is_out_of_memory
from s2d_compiler.output import atomic_write
from tests.faults import PLAN, answer, needs_fork
from tests.faults import network as make_network

BASIC = ("model.pt", "--splits", "spec.json", "-o", "dyn.pt")


def cpu() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 9663676416 bytes. Error code 12 (Cannot allocate memory)"
    )


def cuda() -> Exception:
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.9 GiB"
    )


def array() -> Exception:
    try:
        np.empty(1 << 60, dtype=np.uint8)
    except MemoryError as error:
        return error
    pytest.skip("this system promises any amount of memory")


FAILURES: dict[str, tuple[Callable[[], Exception], str]] = {
    "python": (MemoryError, "(how much was not said)"),
    "cpu": (cpu, "(9.00 GiB, 9,663,676,416 bytes, asked for at once)"),
    "cuda": (cuda, "(20.00 GiB asked for at once)"),
    "numpy": (array, "(1.00 EiB asked for at once)"),
    "system": (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), "(how much was not said)"),
}


def failing(failure: str) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise FAILURES[failure][0]()

    return fail


@pytest.fixture
def network() -> nn.Module:
    return make_network(0)


@pytest.fixture
def folder(network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(network, "model.pt")
    Path("spec.json").write_text(json.dumps(PLAN))
    return tmp_path


# --------------------------------------------------------------------------------------
# Recognising it


@pytest.mark.parametrize("failure", FAILURES)
def test_every_kind_is_recognised_and_its_amount_said(failure: str):
    make, amount = FAILURES[failure]
    assert is_out_of_memory(make())
    with pytest.raises(OutOfMemoryError) as caught, explained("thinking", "think of less"):
        raise make()
    assert str(caught.value) == (
        f"thinking takes more memory than there is free {amount}; think of less, or use a computer "
        "with more memory."
    )


def test_what_code_in_between_made_of_it_does_not_hide_it():
    with pytest.raises(OutOfMemoryError), explained("thinking", "think of less"):
        raise FormatError("it is damaged") from cpu()


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), OSError(errno.ENOENT, "gone")])
def test_other_errors_pass(error: Exception):
    with pytest.raises(type(error)), explained("thinking", "think of less"):
        raise error


def test_the_innermost_step_is_named():
    with (
        pytest.raises(OutOfMemoryError, match=r"^inner takes"),
        explained("outer", "help"),
        explained("inner", "help"),
    ):
        raise MemoryError


# --------------------------------------------------------------------------------------
# At every step of a command

STEPS = {
    "torch.load": "reading model.pt",
    "torch.export.export": "capturing the model",
    "s2d_compiler.tracing.canonicalize": "capturing the model",
    "s2d_compiler.analysis.channels._propagate": "following the model's channels",
    "s2d_compiler.compiler.fill": "building the stages",
    "passes.split.SplitChannels.call": "building the stages",
    "s2d_compiler.checking.random_program": "the self-check, which runs the network in double",
    "s2d_compiler.checking.masked_outputs": "the self-check, which runs the network in double",
    "torch.save": "writing dyn.pt",
    "s2d_compiler.commands.compiling._origin": "s2d-compile",
}


@pytest.mark.parametrize("step", STEPS)
def test_a_command_says_which_step(
    folder: Path, step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(step, failing("cpu"))
    Path("dyn.pt").write_text("earlier")
    assert cli.compile_main(BASIC) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"s2d-compile: {STEPS[step]}")
    assert "takes more memory than there is free (9.00 GiB, 9,663,676,416 bytes" in captured.err
    assert captured.err.count("\n") == 1
    assert ("--no-check" in captured.err) == ("self-check" in captured.err)
    assert Path("dyn.pt").read_text() == "earlier"
    assert sorted(os.listdir()) == ["dyn.pt", "model.pt", "spec.json"]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_capture_without_memory_is_no_fixed_batch(
    network: nn.Module, failure: str, monkeypatch: pytest.MonkeyPatch
):
    """Capturing a second time, for one batch size, must not hide it."""
    export, calls = torch.export.export, []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            failing(failure)()
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", once)
    with pytest.raises(OutOfMemoryError, match="capturing the model"):
        transform(network, PLAN)


def test_following_movement_without_memory_is_no_lack_of_a_rule(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("s2d_compiler.rules.movement.move", failing("cpu"))
    with pytest.raises(OutOfMemoryError, match="following the model's channels"):
        transform(network, PLAN)


def test_reading_a_compiled_network(network: nn.Module, folder: Path, monkeypatch):
    transform(network, PLAN).save("dyn.pt")
    monkeypatch.setattr(torch, "load", failing("cpu"))
    with pytest.raises(OutOfMemoryError, match=r"reading dyn\.pt .* bytes, asked for at once"):
        load("dyn.pt")
    assert cli.main(["show", "dyn.pt"]) == 2


def test_writing_leaves_the_old_file(folder: Path):
    Path("a.bin").write_bytes(b"old")
    with pytest.raises(MemoryError):
        atomic_write("a.bin", failing("python"))
    assert Path("a.bin").read_bytes() == b"old"


# --------------------------------------------------------------------------------------
# Really


def limited(more: int) -> None:
    """Let this process have ``more`` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs to know its own size"
)


@needs_fork
@needs_proc
@pytest.mark.parametrize(
    ("shape", "step"), [("3x16000x16000", "capturing the model"), ("3x2048x2048", "self-check")]
)
def test_a_limit_on_memory(network: nn.Module, folder: Path, shape: str, step: str):
    """The capture takes an example of five images; the check four in double precision."""
    layers = [network[0], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).eval()
    torch.save(model, "model.pt")
    transform(model, PLAN)  # imports what is imported late

    def run() -> str:
        limited(600 << 20)
        with open("said", "w") as said, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", said)
            status = cli.compile_main([*BASIC, "--input-shape", shape, "--quiet"])
        return f"{status} {Path('said').read_text()}"

    said = answer(run)
    assert said.startswith("2 s2d-compile: ")
    assert step in said
    assert "takes more memory than there is free (" in said
    assert "bytes, asked for at once); " in said
    assert not Path("dyn.pt").exists()


@needs_fork
@needs_proc
def test_a_file_that_is_larger_than_the_memory(folder: Path):
    torch.save({"weight": torch.zeros(1 << 25)}, "large.pt")

    def read() -> str:
        limited(64 << 20)
        from s2d_compiler.reading import read_model

        try:
            read_model("large.pt", arch="torchvision.models:resnet18")
        except S2DError as error:
            return f"{type(error).__name__}: {error}"
        return "read"

    said = answer(read)
    assert said.startswith("OutOfMemoryError: reading large.pt takes more memory than there is")
    assert "134,217,728 bytes, asked for at once" in said
