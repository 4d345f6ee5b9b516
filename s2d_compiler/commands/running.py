"""Running a command: printing what it found, errors as sentences and exit statuses."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError
from rich.console import Console, ConsoleDimensions
from rich.measure import Measurement

from s2d_compiler.commands.options import REPORTING, Reporting, Result
from s2d_compiler.errors import OutputError, S2DError, UsageError
from s2d_compiler.interrupts import Terminated, terminable

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Loggers whose warnings the commands show: the package's own, and Python's ``warnings``.
_LOGGERS = ("s2d_compiler", "passes", "py.warnings")
#: A page that any table fits on.
_WIDE = ConsoleDimensions(width=10_000, height=50)


def run(program: str, app: App, argv: Sequence[str] | None) -> int:
    """Run the command that some words ask for, and print what it found or why it failed.

    Args:
        program: The program's name, for messages.
        app: Its commands.
        argv: The words after the name; those of this process when None.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Until the options are read, or where they cannot be, what was asked for is taken as it stands.
    reporting = Reporting("--quiet" in words, "--json" in words, "--debug" in words)
    try:
        call, bound, injected = app.parse_args(words, exit_on_error=False, print_error=False)
        reporting = bound.arguments.get("reporting", REPORTING)
        if "command_line" in injected:
            bound.arguments["command_line"] = shlex.join([program, *words])
        with terminable(), _logging(reporting), _explaining_memory(program):
            result = call(*bound.args, **bound.kwargs)
        if isinstance(result, Result):
            _show(result, reporting)
    except CycloptsError as error:
        text = " ".join(str(error).split())
        return _fail(
            program, UsageError(f"{text} {program} --help lists what there is."), reporting
        )
    except S2DError as error:
        return _fail(program, error, reporting)
    except Terminated as error:
        _say(sys.stderr, f"{program}: terminated")
        return 128 + error.signal
    except KeyboardInterrupt:
        _say(sys.stderr, f"{program}: interrupted")
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except Exception as error:
        return _fail_by_defect(program, error, reporting)
    return 0


@contextmanager
def _explaining_memory(program: str) -> Iterator[None]:
    """For what no step of the command explains better."""
    from s2d_compiler.memory import explained

    with explained(program, "close other programs"):
        yield


def _show(result: Result, reporting: Reporting) -> None:
    if reporting.as_json:
        _say(sys.stdout, json.dumps(result.document, indent=2))
    elif not reporting.quiet:
        _say(sys.stdout, *result.text)


def _fail(program: str, error: S2DError, reporting: Reporting) -> int:
    return _report_error(program, error, str(error), reporting, status=2)


def _fail_by_defect(program: str, error: Exception, reporting: Reporting) -> int:
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    remedy = "" if reporting.debug else "; run it again with --debug and"
    text = (
        f"{type(error).__name__}: {first.strip()[:300]}{notes}. This is a defect of s2d-compiler"
        f"{remedy or ';'} report what it prints."
    )
    return _report_error(program, error, text, reporting, status=1)


def _report_error(
    program: str, error: Exception, text: str, reporting: Reporting, *, status: int
) -> int:
    if reporting.debug:
        _say(sys.stderr, "".join(traceback.format_exception(error)).rstrip())
    _say(sys.stderr, f"{program}: {text}")
    if reporting.as_json:
        document = {"error": {"type": type(error).__name__, "message": text}}
        try:
            _say(sys.stdout, json.dumps(document, indent=2))
        except (BrokenPipeError, OutputError):
            _abandon_stdout()
    return status


def _say(stream: Any, *parts: RenderableType) -> None:
    """Print text as it stands, and tables as wide as they are, whatever the terminal's width.

    Raises:
        OutputError: The stream cannot be written, but still has a reader.
    """
    if stream is None:  # closed by whoever started the command
        return
    encoding = stream.encoding or "utf-8"
    try:
        text = _rendered(Console(file=stream, markup=False, highlight=False), parts)
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon_stdout()
        raise OutputError(
            f"the output cannot be printed ({error.strerror or error}); send it elsewhere, or to a "
            "file with room"
        ) from error


def _rendered(console: Console, parts: Sequence[RenderableType]) -> str:
    with console.capture() as capture:
        for part in parts:
            console.size = _WIDE
            if not isinstance(part, str):
                width = Measurement.get(console, console.options, part).maximum
                console.size = ConsoleDimensions(width, _WIDE.height)
            console.print(part, soft_wrap=isinstance(part, str))
    return capture.get()


def _abandon_stdout() -> None:
    """Nobody reads it: let nothing that is still buffered complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _logging(reporting: Reporting) -> Iterator[None]:
    """Show what the package logs on stderr while a command runs."""
    level = logging.ERROR if reporting.quiet else logging.WARNING
    if reporting.debug:
        level = logging.DEBUG
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (old_level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


class _Formatter(logging.Formatter):
    """``warning: text``, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "py.warnings":
            text = text.splitlines()[0]
        return f"{record.levelname.lower()}: {text}"
