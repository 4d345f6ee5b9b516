"""One thread where many would wait for each other, or add up in another order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread(*, when: bool = True) -> Iterator[None]:
    """Let torch compute in one thread, and afterwards in as many as before."""
    before = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
