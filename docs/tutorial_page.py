"""Run what docs/tutorial.md says: ``python -m docs.tutorial_page [--write]``.

In the page, a fenced block ``python NAME`` or ``json NAME`` is a file to save, ``sh`` holds
commands to run in the folder of these files, and ``text`` after it is what they print; ``--write``
fills that in.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from s2d_compiler import cli

PAGE = Path(__file__).with_name("tutorial.md")
_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = {"s2d": cli.main, "s2d-compile": cli.compile_main}


@dataclass(frozen=True, slots=True)
class Step:
    """A fenced block that is a file, or commands and what they print.

    Attributes:
        name: Of the file; empty for commands.
        text: The file, or the commands, one a line.
        output: What the page says that they print; None where it does not say.
        span: Where that stands in the page.
    """

    name: str
    text: str
    output: str | None = None
    span: tuple[int, int] = (0, 0)


def steps(page: str) -> list[Step]:
    """Files and commands in the order of the page."""
    found: list[Step] = []
    for block in _BLOCK.finditer(page):
        kind, name, text = block.groups()
        if kind == "text":
            found[-1] = Step("", found[-1].text, text, block.span(3))
        else:
            found.append(Step(name or "", text))
    return found


def run(page: str, folder: Path) -> Iterator[tuple[Step, str]]:
    """Save the files, run the commands, and give what these print.

    Raises:
        RuntimeError: A command failed.
    """
    for step in steps(page):
        if step.name:
            (folder / step.name).write_text(step.text)
            continue
        lines = step.text.replace("\\\n", " ").splitlines()
        yield step, "".join(_printed(line, folder) for line in lines)


def _printed(line: str, folder: Path) -> str:
    program, *words = shlex.split(line)
    if program == "python":  # with the package of this checkout
        paths = [str(PAGE.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, text=True,
                              capture_output=True)  # fmt: skip
        status, printed, said = done.returncode, done.stdout, done.stderr
    else:
        stream = io.StringIO()
        with chdir(folder), redirect_stdout(stream):
            status, printed, said = _PROGRAMS[program](words), stream.getvalue(), ""
    if status:
        raise RuntimeError(f"{line!r} ended with {status}: {printed}{said}")
    return "".join(f"{row.rstrip()}\n" for row in printed.splitlines())


def written(page: str, folder: Path) -> str:
    """The page with what its commands print here."""
    for step, printed in reversed(list(run(page, folder))):
        if step.output is not None:
            page = page[: step.span[0]] + printed + page[step.span[1] :]
    return page


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        text = written(PAGE.read_text(), Path(made))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    else:
        print(text)
