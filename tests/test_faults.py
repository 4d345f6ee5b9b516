"""Whatever strikes while a file is written: the old file or the new one is there, and whole.

``make faults`` tries every line of the writing and hundreds of random moments; here are some.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

from s2d_compiler import DynamicModel, Plan, cli, load, transform
from s2d_compiler import format as format_
from s2d_compiler.errors import OutputError
from s2d_compiler.interrupts import terminable
from s2d_compiler.output import HIDDEN, atomic_write, check_writable
from tests.faults import (
    answer,
    as_nobody,
    many,
    needs_fork,
    signal_at_line,
    small_disk,
    start,
    wait,
)

pytestmark = needs_fork
PLAN = {
    "stages": 2,
    "groups": 4,
    "default": {"split": [2], "concat": "all"},
    "input_shape": [3, 8, 8],
}
#: Ways to write: without a name until the file is whole, and with a hidden one.
WAYS = ["unnamed", "hidden"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "hidden":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no unnamed files")
    return str(request.param)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[DynamicModel, DynamicModel]:
    """Two networks whose files differ."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        made.append(transform(model.eval(), PLAN))
    return made[0], made[1]


@pytest.fixture
def old_and_new(networks: tuple[DynamicModel, DynamicModel], tmp_path: Path) -> tuple[bytes, bytes]:
    found = []
    for dyn in networks:
        dyn.save(tmp_path / "sample.pt")
        load(tmp_path / "sample.pt")
        found.append((tmp_path / "sample.pt").read_bytes())
    (tmp_path / "sample.pt").unlink()
    assert found[0] != found[1]
    return found[0], found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --------------------------------------------------------------------------------------
# The system refuses


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("step", ["open", "write", "flush", "fsync", "link", "chmod", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_any_step(folder: Path, way: str, step: str, number: int, exists: bool):
    target = folder / "a.bin"
    if exists:
        target.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        if step == "write":
            refusing(number)()
        if step == "flush":
            file.flush = refusing(number)  # type: ignore[method-assign]

    with pytest.MonkeyPatch.context() as patch:
        if step in ("open", "fsync", "link", "replace"):
            patch.setattr(os, step, refusing(number))
        if step == "chmod":
            patch.setattr(os, "chmod", refusing(number))
            patch.setattr(os, "fchmod", refusing(number))
        try:
            atomic_write(target, write)
            failed = ""
        except OutputError as error:
            failed = str(error)
    steps = {"open", "write", "flush", "fsync"} | (
        ({"link"} if way == "unnamed" else set()) | ({"replace"} if way == "hidden" else set())
    )
    steps |= {"chmod", "replace"} if exists else set()
    assert bool(failed) == (step in steps)
    if failed:
        assert failed.startswith(f"{target} cannot be written: the disk ")
        assert os.listdir(folder) == (["a.bin"] if exists else [])
        assert not exists or target.read_bytes() == b"old"
    else:
        assert target.read_bytes() == b"new"
        assert os.listdir(folder) == ["a.bin"]


def test_an_unnamed_file_that_cannot_get_a_name_is_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "link", refusing(errno.EXDEV))
    for content in (b"first" * 10_000, b"second"):
        atomic_write(folder / "a.bin", lambda file, content=content: file.write(content))
        assert (folder / "a.bin").read_bytes() == content
        assert os.listdir(folder) == ["a.bin"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_network_that_does_not_fit_on_the_disk(
    networks: tuple[DynamicModel, DynamicModel],
    old_and_new: tuple[bytes, bytes],
    folder: Path,
    way: str,
    share: float,
):
    """torch.save makes an error of its own of what the disk says; people see the disk's."""
    target = folder / "dyn.pt"
    target.write_bytes(old_and_new[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(old_and_new[1]) * share), limits[1]))
    try:
        with pytest.raises(OutputError, match="the file is larger than the file system allows"):
            networks[1].save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == old_and_new[0]
    assert os.listdir(folder) == ["dyn.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_device_that_is_always_full(folder: Path):
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(OutputError, match="the disk is full"),
    ):
        atomic_write(folder / "a.pt", lambda _: torch.save({"a": torch.ones(100)}, full))
    assert os.listdir(folder) == []


def test_an_error_of_another_place_is_not_the_reason(folder: Path):
    """Saving in an except clause, the error that is being handled did not stop the writing."""

    def write(_: BinaryIO) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):  # noqa: PT012
        try:
            refusing(errno.ENOSPC)()
        except OSError:
            atomic_write(folder / "a.bin", write)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(
    networks: tuple[DynamicModel, DynamicModel],
    old_and_new: tuple[bytes, bytes],
    folder: Path,
    existing: bool,
):
    def fill() -> str:
        try:
            small_disk(folder, 2 * len(old_and_new[0]))
        except OSError as error:
            return f"skip: {error}"
        (folder / "other").write_bytes(bytes(len(old_and_new[0]) // 2))
        if existing:
            (folder / "dyn.pt").write_bytes(old_and_new[0])
        else:
            (folder / "more").write_bytes(old_and_new[0])
        try:
            networks[1].save(folder / "dyn.pt")
        except OutputError as error:
            if existing:
                assert (folder / "dyn.pt").read_bytes() == old_and_new[0]
            return f"{sorted(os.listdir(folder))} {error}"
        return "written"

    said = answer(fill)
    if said.startswith("skip"):
        pytest.skip(f"no small file system can be mounted ({said})")
    left = ["dyn.pt", "other"] if existing else ["more", "other"]
    assert said.startswith(f"{left} {folder / 'dyn.pt'} cannot be written: the disk is full")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_places_that_one_may_not_write_to(what: str):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan.json").write_text("old")
        (folder / "plan.json").chmod(0o444 if what == "file" else 0o666)
        folder.chmod(0o555 if what == "folder" else 0o777)

        def write() -> str:
            os.chdir("/")
            as_nobody()
            said = []
            for act in (check_writable, Plan.from_dict(PLAN).save):
                for file in ("plan.json", "new.json")[: 2 if what == "folder" else 1]:
                    with pytest.raises(OutputError) as caught:
                        act(folder / file)
                    said.append(str(caught.value))
            return "\n".join(said)

        for line in answer(write).splitlines():
            assert "permission denied; choose a place that you may write to" in line
        assert (folder / "plan.json").read_text() == "old"
        assert os.listdir(folder) == ["plan.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_is_removed_meanwhile(folder: Path, way: str, exists: bool):
    if exists:
        (folder / "a.bin").write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        shutil.rmtree(folder)

    with pytest.raises(OutputError, match="its folder was removed meanwhile; create it again"):
        atomic_write(folder / "a.bin", write)
    assert not folder.exists()


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(OutputError, match="does not exist; create it first"):
        Plan.from_dict(PLAN).save(tmp_path / "missing" / "plan.json")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------
# Interruptions


def hidden_files(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if HIDDEN.fullmatch(name)]


SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("sent", SIGNALS, ids=lambda s: s.name)
def test_an_interruption_at_any_line_of_the_writing(
    networks: tuple[DynamicModel, DynamicModel],
    old_and_new: tuple[bytes, bytes],
    folder: Path,
    way: str,
    exists: bool,
    sent: signal.Signals,
):
    old, new = old_and_new
    target = folder / "dyn.pt"

    def save(number: int) -> int:
        count = signal_at_line(number, sent)
        with terminable():
            networks[1].save(target)
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
    networks[1].save(target)
    assert os.listdir(folder) == ["dyn.pt"]
    assert target.read_bytes() == new


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Compiles a small network, quietly. SIGINT is as on a terminal, however the tests run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    torch.save(model.eval(), "model.pt")
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


# --------------------------------------------------------------------------------------
# Several writers


def abandoned(folder: Path, target: str = "a.bin") -> Path:
    """The hidden file of a writer that was killed."""

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(start(lambda: atomic_write(folder / target, write))) == -signal.SIGKILL
    (name,) = hidden_files(folder)
    return folder / name


def test_what_dead_writers_left_is_removed_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    dead = abandoned(folder)
    host = HIDDEN.fullmatch(dead.name)[1]  # type: ignore[index]
    others = [
        folder / dead.name.replace(host, "0" * 8),  # another computer's: who knows
        folder / ".a.bin.s2d-mine",
        folder / "a.bin.swp",
    ]
    for path in others:
        path.touch()

    def write(file: BinaryIO) -> None:
        file.write(b"outer")
        (alive,) = [folder / n for n in hidden_files(folder) if folder / n not in others]
        atomic_write(folder / "b.bin", lambda inner: inner.write(b"inner"))
        assert alive.exists()

    atomic_write(folder / "a.bin", write)
    assert not dead.exists()
    expected = [*(path.name for path in others), "a.bin", "b.bin"]
    assert sorted(os.listdir(folder)) == sorted(expected)
    assert (folder / "a.bin").read_bytes() == b"outer"


def test_a_hidden_file_that_is_removed_before_it_is_locked_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr("s2d_compiler.output._lock", lock := Removing(folder))
    atomic_write(folder / "a.bin", lambda file: file.write(b"new"))
    assert (folder / "a.bin").read_bytes() == b"new"
    assert lock.calls == 2


class Removing:
    """Locks nothing, and removes the first hidden file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, 0

    def __call__(self, descriptor: int) -> bool:
        self.calls += 1
        if self.calls == 1:
            for name in hidden_files(self.folder):
                (self.folder / name).unlink()
        return True


def test_where_files_cannot_be_locked_nothing_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    dead = abandoned(folder)
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    atomic_write(folder / "a.bin", lambda file: file.write(b"new"))
    assert sorted(os.listdir(folder)) == sorted([dead.name, "a.bin"])


def test_two_processes_that_write_one_file_do_not_mix(folder: Path, way: str):
    contents = [bytes([value]) * (1 << 20) for value in (1, 2)]
    target = folder / "a.bin"
    target.write_bytes(contents[0])

    def write(content: bytes) -> None:
        def slowly(file: BinaryIO) -> None:
            for piece in range(16):
                file.write(content[piece << 16 : (piece + 1) << 16])
                time.sleep(0.0003)

        for _ in range(12):
            atomic_write(target, slowly)

    children = [start(lambda content=content: write(content)) for content in contents]
    seen = set()
    for _ in range(200):
        with target.open("rb") as file:
            seen.add(file.read())
        time.sleep(0.001)
    assert [wait(child) for child in children] == [0, 0]
    assert seen <= set(contents)
    assert target.read_bytes() in contents
    assert os.listdir(folder) == ["a.bin"]


def test_the_file_can_be_read_back_while_it_is_written(folder: Path, way: str):
    """torch.save and others seek in the file that they write."""

    def write(file: BinaryIO) -> None:
        file.write(b"....new")
        file.seek(0)
        file.write(b"very")
        file.seek(0)
        assert file.read() == b"verynew"
        file.seek(0, io.SEEK_END)

    atomic_write(folder / "a.bin", write)
    assert (folder / "a.bin").read_bytes() == b"verynew"
