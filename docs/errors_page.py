"""Write docs/errors.md from the docstrings of the errors: ``python -m docs.errors_page``."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from s2d_compiler import errors

PAGE = Path(__file__).with_name("errors.md")
_HEAD = """# Errors

Every message names the place, the value found there, the rule that it breaks, and what to do.
This page is made from `s2d_compiler/errors.py` by `python -m docs.errors_page`.
"""


def page() -> str:
    """The page: a section per class, in the order of the source."""
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.S2DError)
    ]
    return "\n".join([_HEAD, *map(_section, classes)])


def example_of(kind: type) -> str | None:
    """The message that a class's docstring shows, on one line."""
    found = re.search(r"^Example:\n((?:    .*\n)+)", _text(kind), re.MULTILINE)
    return None if found is None else " ".join(found[1].split())


def _text(kind: type) -> str:
    return f"{inspect.getdoc(kind)}\n"


def _section(kind: type) -> str:
    text = re.sub("``([^`]+)``", r"`\1`", _text(kind))
    text = re.sub(r"^Example:\n((?:    .*\n)+)", _quoted, text, flags=re.MULTILINE)
    text = re.sub(r"^What to do:\n((?:    .*\n)+)", _remedy, text, flags=re.MULTILINE)
    return f"## {kind.__name__}\n\n{text}"


def _quoted(found: re.Match[str]) -> str:
    return f"```\n{textwrap.fill(' '.join(found[1].split()), 98)}\n```\n"


def _remedy(found: re.Match[str]) -> str:
    return f"**What to do.** {textwrap.dedent(found[1])}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
