"""The command line, output files, and too little memory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from s2d_compiler import cli, load, output
from s2d_compiler.commands import running
from s2d_compiler.errors import OutOfMemoryError, OutputError, S2DError, UsageError
from s2d_compiler.output import atomic_write, check_writable
from tests.errors.case import Case
from tests.errors.stored import FOLDER

PLAN = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}


def raising(program: str, error: S2DError, reporting: object) -> int:
    """In place of printing an error."""
    raise error


def command(error: type[S2DError], words: str, *parts: str) -> Case:
    """A command line, in a folder with a model, a plan and a compiled network."""

    def trigger(folder: Path) -> object:
        torch.save(nn.Conv2d(3, 8, 3), "model.pt")
        Path("spec.json").write_text(json.dumps(PLAN))
        Path("dyn.pt").write_bytes((FOLDER / "dyn-v1-original.pt").read_bytes())
        with mock.patch.object(running, "_fail", raising):
            return cli.main(words.split())

    return Case(trigger, error, *parts)


def full_terminal(folder: Path) -> object:
    with open("/dev/full", "w") as stream, mock.patch.object(running, "_abandon_stdout"):
        try:
            return running._say(stream, "text")
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def writing(path: str, *parts: str, make: Callable[[], object] = lambda: None) -> Case:
    def trigger(folder: Path) -> object:
        make()
        return atomic_write(path, lambda file: file.write(b"content"))

    return Case(trigger, OutputError, *parts)


def refused_by_the_system(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def system(number: int, value: str, remedy: str) -> Case:
    """The system refuses while the file is filled."""

    def fill(file: object) -> None:
        raise refused_by_the_system(number)

    return Case(
        lambda folder: atomic_write("out.pt", fill),
        OutputError,
        "out.pt",
        value,
        "cannot be written",
        remedy,
    )


@contextmanager
def protected() -> Iterator[None]:
    """Rights as others than root have them."""
    with mock.patch.object(os, "access", return_value=False):
        yield


def write_protected(folder: Path) -> object:
    Path("out.pt").write_bytes(b"")
    with protected():
        return atomic_write("out.pt", lambda file: None)


def no_drafts(folder: Path) -> object:
    error = refused_by_the_system(errno.EROFS)
    with (
        mock.patch.object(output._Draft, "_open_hidden", side_effect=error),
        mock.patch.object(output._Draft, "_open_unnamed", side_effect=error),
    ):
        return check_writable("out.pt")


def no_memory(folder: Path) -> object:
    error = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4294967296 bytes."
    )
    path = FOLDER / "dyn-v1-original.pt"
    with mock.patch.object(torch, "load", side_effect=error):
        return load(path)


CASES: dict[str, Any] = {
    "shape of a network": command(
        UsageError,
        "verify model.pt dyn.pt --input-shape 3x9x9",
        "--input-shape",
        "3x9x9",
        "is not what dyn.pt takes",
        "leave the option out",
    ),
    "no such option": command(
        UsageError, "show dyn.pt --grahp 1", "--grahp", "--grahp", "Unknown option", "s2d --help"
    ),
    "input shape": command(
        UsageError,
        "inspect model.pt --input-shape 3,8",
        "--input-shape",
        '"3,8"',
        "is no shape",
        "such as 3x224x224",
    ),
    "arch-kwargs": command(
        UsageError,
        "inspect model.pt --arch-kwargs {n:3}",
        "--arch-kwargs",
        "Expecting property name",
        "not JSON",
        """write an object, such as '{"num_classes": 10}'""",
    ),
    "arch-kwargs a list": command(
        UsageError,
        "inspect model.pt --arch-kwargs [3]",
        "--arch-kwargs",
        "[3]",
        "is no object",
        """write an object, such as '{"num_classes": 10}'""",
    ),
    "onto the model": command(
        OutputError,
        "compile model.pt --splits spec.json -o model.pt",
        "model.pt",
        "model.pt",
        "is the model itself",
        "name another file to write",
    ),
    "onto a plan": command(
        OutputError,
        "inspect model.pt --input-shape 3x8x8 --write-plan spec.json",
        "spec.json",
        "exists",
        "may hold your edits",
        "name another file, or pass --force to replace it",
    ),
    "no such stage": command(
        UsageError,
        "show dyn.pt --graph 9",
        "--graph",
        "9",
        "is no stage",
        "dyn.pt has stages 1 to 3, give one",
    ),
    "full terminal": Case(
        full_terminal,
        OutputError,
        "the output",
        "No space left on device",
        "cannot be printed",
        "send it elsewhere, or to a file with room",
    ),
    # output files
    "no path": writing("", "the output path", "the output path", "is empty", "name a file"),
    "no folder": writing(
        "absent/out.pt", "absent/out.pt", "absent", "does not exist", "create it first"
    ),
    "folder": writing(".", ".", ".", "is a folder", "name a file in it"),
    "pipe": writing(
        "out.pt",
        "out.pt",
        "is a device or a pipe",
        "only plain files are written whole",
        "name one",
        make=lambda: os.mkfifo("out.pt"),
    ),
    "null": writing("a\0b", "'a\\x00b'", "embedded null", "is no file name", "name a file"),
    "long name": writing(
        "a" * 300, "a" * 300, "the name is too long", "cannot be written", "choose a shorter one"
    ),
    "write-protected": Case(
        write_protected,
        OutputError,
        "out.pt",
        "permission denied",
        "cannot be written",
        "choose a place that you may write to",
    ),
    "no drafts": Case(
        no_drafts,
        OutputError,
        "out.pt",
        "the file system is read-only",
        "cannot be written",
        "choose another folder",
    ),
    "another fault": system(errno.EPIPE, "Broken pipe", "choose another place"),
    **{
        f"fault {errno.errorcode[number]}": system(number, *reason.split("; "))
        for number, reason in output._REASONS.items()
    },
    # memory
    "memory": Case(
        no_memory,
        OutOfMemoryError,
        "reading ",
        "4.00 GiB, 4,294,967,296 bytes, asked for at once",
        "takes more memory than there is free",
        "or use a computer with more memory",
    ),
}
