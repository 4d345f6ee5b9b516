"""Signals that ask a command to end are taken for interrupts, and none of them is lost.

An interrupt is an exception that strikes anywhere, also where C++ called Python and drops what is
raised, or makes an ordinary error of it. What goes on then may take another way than it would
have, and end with another result. So interrupts are noted, and heeded before a file is put in
place.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Terminated", "heed", "noted", "terminable"]

#: SIGHUP comes when the terminal is closed; not every system has it.
_ENDING = ("SIGTERM", "SIGHUP")
_received: list[int] = []


class Terminated(KeyboardInterrupt):
    """The process was asked to end; whatever cleans up after an interrupt does so for this, too.

    Attributes:
        signal: Number of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def terminable() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` or ``Terminated`` for a signal, in the block or at its end.

    Signals that the caller takes or ignores are left to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _numbers()}
    mine = [n for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)]
    _received.clear()
    for number in mine:
        signal.signal(number, _note)
    try:
        try:
            yield
        except Exception:
            heed()
            raise
        heed()
    finally:
        for number in mine:
            signal.signal(number, before[number])
        _received.clear()


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Let the work in the block come to a good place before it ends for a signal.

    The block is given a function that says whether a signal came; once one did, the block is to
    end soon, and the interrupt is raised after it. A second signal interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in _numbers()}
    mine = [
        n for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler, _note)
    ]
    received: list[int] = []

    def again(number: int) -> None:
        if before[number] is _note:
            _received.append(number)
        _raise(number)

    def note(number: int, frame: object) -> None:
        if received:
            again(number)
        received.append(number)

    for number in mine:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number in mine:
            signal.signal(number, before[number])
    if received:
        again(received[0])


def heed() -> None:
    """Raise the interrupt that came earlier in a ``terminable`` block, if any did."""
    if _received:
        _raise(_received[0])


def _numbers() -> list[int]:
    return [signal.SIGINT, *(getattr(signal, name) for name in _ENDING if hasattr(signal, name))]


def _note(number: int, frame: object) -> None:
    _received.append(number)
    _raise(number)


def _raise(number: int) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
