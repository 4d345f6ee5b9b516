"""Every place of the package at which an error of its own is raised, from the source.

A site is a ``raise`` of one of the package's error classes, or a call of one of the few functions
that raise what their caller wrote (``TELLERS``). Which of them an error came from is in its
traceback, and in those of the errors that it was made from.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from s2d_compiler import errors

ROOT = Path(__file__).parent.parent.parent
CLASSES = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.S2DError)
} | {"RefusedError", "ArchiveError", "UnsoundError"}  # their texts end up in errors of the package
TELLERS = {"fail", "damaged"}
"""Functions that raise the text that they are given: their calls are the sites."""
TELLERS_OF = {"s2d_compiler/reading.py": {"_fail"}}
"""The same, of one file."""
EXPLAINERS = {"_explain"}
"""Functions that return an error: ``raise _explain(...)`` is a site."""


@dataclass(frozen=True, order=True)
class Site:
    """One place that refuses."""

    file: str
    first: int
    last: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.first} in {self.function}: {self.text}"


@cache
def all_sites() -> frozenset[Site]:
    """The sites of both packages."""
    found: set[Site] = set()
    for top in ("s2d_compiler", "passes"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found |= sites_in(path.read_text(), name)
    return frozenset(found)


def sites_in(source: str, file: str) -> set[Site]:
    """The sites of one file."""
    return set(_sites(ast.parse(source), file, "module"))


def raised_names() -> set[str]:
    """What is raised by name and called, anywhere in the packages."""
    found: set[str] = set()
    for top in ("s2d_compiler", "passes"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    found.add(ast.unparse(node.exc.func))
    return found


def _sites(node: ast.AST, file: str, function: str) -> Iterator[Site]:
    tellers = TELLERS | TELLERS_OF.get(file, set())
    for child in ast.iter_child_nodes(node):
        here = child.name if isinstance(child, ast.FunctionDef) else function
        called = child.exc if isinstance(child, ast.Raise) else child
        called = called.func if isinstance(called, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else ""
        makes = name in CLASSES | EXPLAINERS and here not in tellers | EXPLAINERS
        if isinstance(child, ast.Raise) and makes:
            yield _site(child, file, here)
            continue
        if name in tellers:
            yield _site(child, file, here)
        elif makes and name not in EXPLAINERS:  # handed to a function: the statement is the place
            yield _site(node if isinstance(node, ast.expr) else child, file, here)
        yield from _sites(child, file, here)


def _site(node: Any, file: str, function: str) -> Site:
    text = " ".join(ast.unparse(node).split())
    return Site(file, node.lineno, node.end_lineno or node.lineno, function, text[:150])


def sites_of(error: BaseException) -> set[Site]:
    """The sites that an error came from: its own, and those of what it was made from."""
    found: set[Site] = set()
    while True:
        traceback = error.__traceback__
        lines: list[tuple[str, int]] = []
        while traceback is not None:
            lines.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
            traceback = traceback.tb_next
        for file, line in reversed(lines):
            if here := [s for s in all_sites() if _is_at(s, file, line)]:
                found.add(min(here, key=lambda s: s.last - s.first))
                break
        cause = error.__cause__ or error.__context__
        if cause is None:
            return found
        error = cause


def _is_at(site: Site, file: str, line: int) -> bool:
    return site.first <= line <= site.last and Path(file) == ROOT / site.file
