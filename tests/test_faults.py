"""Where the system refuses, and others write, the old file or the new one is there, whole."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from s2d_compiler import Plan
from s2d_compiler.errors import OutputError
from s2d_compiler.output import HIDDEN, atomic_write, check_writable
from tests.faults import (
    PLAN,
    answer,
    as_nobody,
    files,
    hidden_files,
    needs_fork,
    networks,
    small_disk,
    start,
    wait,
)

pytestmark = needs_fork


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
    folder: Path,
    way: str,
    share: float,
):
    """torch.save makes an error of its own of what the disk says; people see the disk's."""
    old, new = files()
    target = folder / "dyn.pt"
    target.write_bytes(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(new) * share), limits[1]))
    try:
        with pytest.raises(OutputError, match="the file is larger than the file system allows"):
            networks()[1].save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == old
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
    folder: Path,
    existing: bool,
):
    old, _ = files()

    def fill() -> str:
        try:
            small_disk(folder, 2 * len(old))
        except OSError as error:
            return f"skip: {error}"
        (folder / "other").write_bytes(bytes(len(old) // 2))
        if existing:
            (folder / "dyn.pt").write_bytes(old)
        else:
            (folder / "more").write_bytes(old)
        try:
            networks()[1].save(folder / "dyn.pt")
        except OutputError as error:
            if existing:
                assert (folder / "dyn.pt").read_bytes() == old
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
