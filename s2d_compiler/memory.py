"""Out of memory, said in a sentence: which step, how much it asked for, what to do.

Python, numpy, torch's CPU allocator and CUDA each have an exception of their own for it, and
code in between turns them into others. ``explained`` recognises all of them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s2d_compiler.errors import OutOfMemoryError

__all__ = ["explained", "is_out_of_memory", "let_through"]

#: What a RuntimeError says where torch, or a library below it, got no memory.
_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
)
#: torch's "tried to allocate 4096 bytes", CUDA's "Tried to allocate 20.00 GiB.", numpy's "Unable
#: to allocate 8.00 GiB for an array".
_AMOUNT = re.compile(
    r"(?:tried|unable) to allocate ([0-9]+(?:\.[0-9]+)?) ?(bytes|[KMGTPE]iB)", re.IGNORECASE
)


@contextmanager
def explained(step: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory, in a block or a decorated function, into a sentence.

    Args:
        step: What is being done, as in "capturing the model".
        remedy: What helps, as in "give a smaller input shape".

    Raises:
        OutOfMemoryError: The block ran out of memory, whatever it made of that.
    """
    try:
        yield
    except OutOfMemoryError:  # of a step in this one
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OutOfMemoryError(
            f"{step} takes more memory than there is free{_amount(reason)}; {remedy}, or use a "
            "computer with more memory."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this exception itself says that there is too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def let_through(error: BaseException) -> None:
    """Raise an exception again if it is about memory, where others of its class are expected."""
    if is_out_of_memory(error):
        raise error


def _reason(error: BaseException) -> BaseException | None:
    """The exception that others were made from, if it says so."""
    found: BaseException | None = error
    while found is not None and not is_out_of_memory(found):
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return found


def _amount(reason: BaseException) -> str:
    found = _AMOUNT.search(str(reason))
    if found is None:
        return " (how much was not said)"
    number, unit = found.groups()
    if unit != "bytes":
        return f" ({number} {unit} asked for at once)"
    return f" ({int(number) / 2**30:,.2f} GiB, {int(number):,} bytes, asked for at once)"
