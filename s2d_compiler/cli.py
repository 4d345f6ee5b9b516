"""The commands: ``s2d-compile``, and ``s2d`` with ``compile``, ``inspect``, ``train``,
``calibrate``, ``show``, ``verify``, ``eval``, ``bench``, ``report``.

A command computes its ``Result`` and prints nothing; ``commands.running`` prints it, as text or as
JSON, and turns errors into a sentence and an exit status:

- 0: done.
- 1: a defect of s2d-compiler.
- 2: a mistake in what was handed in (an `S2DError`, or an option that does not exist), or too
  little memory or disk for it.
- 130: interrupted. 143: terminated (SIGTERM). 129: the terminal is gone (SIGHUP). 141: whoever
  read the output stopped reading.

Errors and warnings go to stderr. With ``--json`` stdout holds one JSON document whatever
happens: the result, or ``{"error": {"type": ..., "message": ...}}``.
"""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts import App, Parameter

from s2d_compiler._version import __version__
from s2d_compiler.commands.benchmarking import benchmark_network
from s2d_compiler.commands.calibrating import calibrate_network
from s2d_compiler.commands.compiling import compile_model
from s2d_compiler.commands.evaluating import evaluate_network
from s2d_compiler.commands.inspecting import inspect
from s2d_compiler.commands.reporting import report_network
from s2d_compiler.commands.running import run
from s2d_compiler.commands.showing import show
from s2d_compiler.commands.training import train_network
from s2d_compiler.commands.verifying import verify_network

__all__ = ["compile_main", "main"]


def _app(name: str, text: str) -> App:
    return App(
        name=name,
        help=text,
        help_format="plaintext",
        version=f"s2d-compiler {__version__}",
        default_parameter=Parameter(negative=""),
        suppress_keyboard_interrupt=False,
    )


def compile_main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2d-compile``; returns the exit status."""
    app = _app("s2d-compile", "")
    app.default(compile_model)
    return run("s2d-compile", app, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2d``; returns the exit status."""
    app = _app("s2d", "Turn a trained network into a dynamic one: stages with early exits.")
    app.command(compile_model, name="compile")
    app.command(inspect)
    app.command(train_network, name="train")
    app.command(calibrate_network, name="calibrate")
    app.command(show)
    app.command(verify_network, name="verify")
    app.command(evaluate_network, name="eval")
    app.command(benchmark_network, name="bench")
    app.command(report_network, name="report")
    return run("s2d", app, argv)
