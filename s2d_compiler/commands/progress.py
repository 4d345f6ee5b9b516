"""How far long work is: a bar on stderr, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from s2d_compiler.commands.options import Reporting

__all__ = ["progress"]

T = TypeVar("T")


def progress(items: Iterable[T], total: int, text: str, reporting: Reporting) -> Iterator[T]:
    """Hand on items and show how many there were; the bar goes away at the end.

    Args:
        items: What is worked on, one after the other.
        total: How many there will be.
        text: What is being done, such as "evaluating".
        reporting: Nothing is shown with ``--quiet`` or ``--json``.
    """
    shown = sys.stderr is not None and sys.stderr.isatty()
    if not shown or reporting.quiet or reporting.as_json:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description=text, total=total, console=console, transient=True)
