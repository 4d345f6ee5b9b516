"""Whatever interrupts the writing of a file, the old or the new one is there, whole.

``make faults`` tries every line of the writing and hundreds of random moments; here are some.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from s2d_compiler import cli, load
from s2d_compiler import format as format_
from s2d_compiler.interrupts import terminable
from s2d_compiler.output import atomic_write
from tests.faults import (
    PLAN,
    files,
    hidden_files,
    many,
    needs_fork,
    network,
    networks,
    signal_at_line,
    start,
    wait,
)

pytestmark = needs_fork


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("sent", SIGNALS, ids=lambda s: s.name)
def test_an_interruption_at_any_line_of_the_writing(
    folder: Path,
    way: str,
    exists: bool,
    sent: signal.Signals,
):
    old, new = files()
    target = folder / "dyn.pt"

    def save(number: int) -> int:
        count = signal_at_line(number, sent)
        with terminable():
            networks()[1].save(target)
        return 1 if count() < number else 0

    litter, seen, number, tried = 0, set(), 1, 0
    while True:
        target.unlink(missing_ok=True)
        if exists:
            target.write_bytes(old)
        status = wait(start(lambda number=number: save(number)))
        if status == 1:  # there is no such line
            break
        # An interrupt in a clean-up may be swallowed: then the file is new, and all is done.
        assert status in ((-sent,) if sent == signal.SIGKILL else (130, 0))
        content = target.read_bytes() if target.exists() else b""
        assert content in (new, old if exists else b"")
        seen.add(content)
        hidden = hidden_files(folder)
        assert sorted(os.listdir(folder)) == sorted([*hidden, *["dyn.pt"][: bool(content)]])
        litter += bool(hidden)
        tried += 1
        number += 1 if many() else random.Random(number).randint(5, 9)
    assert len(seen) == 2
    print(f"{tried} moments, of which {litter} left a hidden file")
    if sent != signal.SIGKILL or (way == "unnamed" and not exists):
        assert litter == 0
    elif way == "unnamed":
        assert litter <= max(1, tried // 10)  # between the link and the move
    networks()[1].save(target)
    assert os.listdir(folder) == ["dyn.pt"]
    assert target.read_bytes() == new


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Compiles a small network, quietly. SIGINT is as on a terminal, however the tests run."""
    monkeypatch.chdir(tmp_path)
    torch.save(network(0), "model.pt")
    Path("spec.json").write_text(json.dumps(PLAN))
    words = ["model.pt", "--splits", "spec.json", "-o", "out/dyn.pt", "--quiet"]
    Path("out").mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: cli.compile_main(words)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("when", ["any time", "writing"])
@pytest.mark.parametrize("sent", SIGNALS, ids=lambda s: s.name)
def test_a_command_that_is_interrupted(command: Callable[[], int], sent: signal.Signals, when: str):
    target = Path("out/dyn.pt")
    began = time.monotonic()
    written = 0.0

    def clock(path: Any, write: Any) -> None:
        nonlocal written
        start = time.monotonic()
        atomic_write(path, write)
        written = time.monotonic() - start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format_, "atomic_write", clock)
        assert command() == 0
    whole = time.monotonic() - began
    new = target.read_bytes()
    chance = random.Random(f"{sent} {when}")
    endings: Counter[tuple[int, bool]] = Counter()
    for number in range(100 if many() else 2):
        exists = number % 2 == 0
        target.unlink(missing_ok=True)
        if exists:
            target.write_bytes(b"old")
        read, write = os.pipe()

        def run(write: int = write) -> int:
            def announced(path: Any, fill: Any) -> None:
                os.write(write, b"x")
                atomic_write(path, fill)

            if when == "writing":
                format_.atomic_write = announced  # type: ignore[attr-defined]
            else:
                os.write(write, b"x")
            return command()

        child = start(run)
        os.read(read, 1)
        time.sleep(chance.uniform(0, 1.2) * (written if when == "writing" else whole))
        os.kill(child, sent)
        status = wait(child)
        os.close(read)
        os.close(write)
        expected = -sent if sent == signal.SIGKILL else 128 + sent
        assert status in (expected, 0, -sent)
        content = target.read_bytes() if target.exists() else b""
        assert content in (new, b"old" if exists else b"")
        assert status != 0 or content == new
        hidden = hidden_files(Path("out"))
        assert sorted(os.listdir("out")) == sorted([*hidden, *["dyn.pt"][: bool(content)]])
        assert sent == signal.SIGKILL or not hidden
        endings[status, content == new] += 1
    print(f"(exit status, whether the file is new): times {dict(endings)}")
    assert command() == 0
    assert os.listdir("out") == ["dyn.pt"]
    load("out/dyn.pt")


def test_terminating_is_said_and_has_its_status(
    command: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def terminate(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("s2d_compiler.tracing.capture", terminate)
    assert command() == 143
    assert capsys.readouterr().err == "s2d-compile: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupt_that_the_capture_swallows_is_heeded(
    command: Callable[[], int],
    sent: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """C++ between makes an ordinary error of it, after which the batch size would be fixed."""
    export, calls = torch.export.export, []

    def swallow(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        try:
            os.kill(os.getpid(), sent)
        except KeyboardInterrupt:
            raise RuntimeError("a Python error in a callback") from None
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", swallow)
    assert command() == 128 + sent
    assert len(calls) == 1
    assert "defect" not in capsys.readouterr().err
    assert os.listdir("out") == []


def test_an_interrupt_that_is_swallowed_without_trace_is_heeded_before_the_writing(
    command: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    from s2d_compiler import compiler

    fill = compiler.fill

    def swallow(*args: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        fill(*args)

    monkeypatch.setattr(compiler, "fill", swallow)
    assert command() == 130
    assert os.listdir("out") == []
    monkeypatch.setattr(compiler, "fill", fill)
    assert command() == 0


class InterruptedFile:
    """A file whose ``number``-th write is interrupted."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self.file, self.left = file, number

    def write(self, data: bytes) -> int:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def test_an_interrupt_in_a_write_that_torch_makes_is_an_interrupt(folder: Path, way: str):
    """torch finds its archive incomplete, and raises that after the interrupt."""
    target = folder / "a.pt"
    target.write_bytes(b"old")
    number = 1
    while target.read_bytes() == b"old":

        def write(file: BinaryIO, number: int = number) -> None:
            data = {"a": torch.ones(9), "b": torch.ones(9)}
            torch.save(data, InterruptedFile(file, number))  # type: ignore[arg-type]

        with contextlib.suppress(KeyboardInterrupt):
            atomic_write(target, write)
        assert os.listdir(folder) == ["a.pt"]
        number += 1
    assert number > 10
    assert torch.load(target, weights_only=True)["b"].sum() == 9
