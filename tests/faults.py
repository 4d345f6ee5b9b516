"""Children of the test process, to be killed or put under limits, and what they write.

A forked child has torch imported already, which takes a new process seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler import DynamicModel, output, transform
from s2d_compiler.output import HIDDEN
from tests.compiled import file_of


def start(act: Callable[[], int | None]) -> int:
    """Run ``act`` in a child; returns its process id. What it returns is its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn where there are threads
        child = os.fork()
    if child:
        return child
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = act() or 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def answer(act: Callable[[], object]) -> str:
    """What ``act`` returns in a child, or raises there, as text."""
    read, write = os.pipe()

    def say() -> None:
        try:
            text = str(act())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])

    child = start(say)
    os.close(write)
    with open(read, "rb") as file:
        text = file.read().decode()
    assert wait(child) == 0
    return text


def as_nobody() -> None:
    """Give up root's right to write anywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def small_disk(folder: Path, size: int) -> None:
    """Mount a file system of ``size`` bytes that only this process sees, and that ends with it.

    Raises:
        OSError: The system does not allow it.
    """
    libc: Any = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x00020000, 0x10000000, (1 << 18) | (1 << 14)
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        raise OSError(ctypes.get_errno(), "unshare")
    options = f"size={size}".encode()
    if libc.mount(b"none", b"/", None, private, None) or libc.mount(
        b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options
    ):
        raise OSError(ctypes.get_errno(), "mount")


def signal_at_line(number: int, sent: int) -> Callable[[], int]:
    """Send oneself a signal before the ``number``-th line that runs in ``output.py``.

    Returns:
        A function that counts the lines so far.
    """
    lines = 0

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == number:
                os.kill(os.getpid(), sent)
        return at_line

    def at_call(frame: FrameType, event: str, _: object) -> Any:
        return at_line if frame.f_code.co_filename == output.__file__ else None

    sys.settrace(at_call)
    return lambda: lines


PLAN = {
    "stages": 2,
    "groups": 4,
    "default": {"split": [2], "concat": "all"},
    "input_shape": [3, 8, 8],
}


def network(seed: int) -> nn.Module:
    """A network that ``PLAN`` fits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


@cache
def networks() -> tuple[DynamicModel, DynamicModel]:
    """Two compiled networks whose files differ."""
    return transform(network(0), PLAN), transform(network(1), PLAN)


@cache
def files() -> tuple[bytes, bytes]:
    """What is in their files."""
    old, new = (file_of(dyn) for dyn in networks())
    assert old != new
    return old, new


def hidden_files(folder: Path) -> list[str]:
    """What a killed writer may leave."""
    return [name for name in os.listdir(folder) if HIDDEN.fullmatch(name)]


def many() -> bool:
    """Whether to try every moment (``make faults``), not a few."""
    return os.environ.get("S2D_FAULTS") == "all"


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
