"""Output files appear whole or not at all, and keep what surrounds them."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from s2d_compiler.errors import OutputError
from s2d_compiler.output import atomic_write, check_writable


def write(content: bytes):
    return lambda file: file.write(content)


def test_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.bin", write(b"new"))
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable("a.bin")
    atomic_write("a.bin", write(b"new"))
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_failure_keeps_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)):
        atomic_write(target, fail)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_old_file_stands_while_the_new_one_is_written(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def look(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"

    atomic_write(target, look)
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_file_follows_the_umask(tmp_path: Path, mask: int, expected: int) -> None:
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "a.bin", write(b""))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == expected


def test_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.touch()
    target.chmod(0o640)
    atomic_write(target, write(b"new"))
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a.bin"
    link = tmp_path / "link.bin"
    link.symlink_to(target)
    for content in (b"first, the target does not exist", b"then it does"):
        atomic_write(link, write(content))
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert os.listdir(tmp_path / "real") == ["a.bin"]


REFUSED = {
    "": "the output path is empty",
    "missing/a.bin": "does not exist; create it first",
    "folder": "is a folder; name a file in it",
    "file/a.bin": "a part of the path is a file",
    "n" * 300: "the name is too long",
    "nul\0": "is no file name",
    "circle": "symbolic links form a circle",
    "pipe": "a device or a pipe",
}


@pytest.mark.parametrize("act", [check_writable, lambda path: atomic_write(path, write(b"new"))])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, act) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError) as caught:
        act(name)
    assert REFUSED[name] in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "a.bin")


def test_write_protected_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    target.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permission denied"):
        atomic_write(target, write(b"new"))


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: both fail in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.bin cannot be written: the file is larger"):
            atomic_write(tmp_path / "a.bin", write(bytes(1 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_check_writable_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.bin").write_bytes(b"old")
    check_writable(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
