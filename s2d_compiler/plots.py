"""Plots in files: matplotlib without a display, and files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from s2d_compiler.errors import UsageError
from s2d_compiler.output import atomic_write, check_writable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

__all__ = ["COLORS", "check_plot", "write_plot"]

FORMATS = ("png", "svg", "pdf")
#: Told apart by the colour-blind, too (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "s2d",  # the same file every time
    "svg.fonttype": "none",
}


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be written, before long work begins.

    Raises:
        UsageError: No such format, or matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise UsageError(
            f"--plot: {path.name} ends like no format that plots are written in; end it with "
            ".png, .svg or .pdf"
        )
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--plot: matplotlib, which draws plots, cannot be imported ({error}); install it: pip "
            "install 's2d-compiler[plots]'"
        ) from error
    check_writable(path)


def write_plot(
    path: Path, draw: Callable[[Axes], None], size: tuple[float, float] = (7.2, 4.8)
) -> None:
    """Draw a plot and write it.

    Args:
        path: Ends with .png, .svg or .pdf.
        draw: Is given empty axes.
        size: Width and height in inches, of 160 pixels each.

    Raises:
        UsageError, OutputError: As ``check_plot`` does.
    """
    check_plot(path)
    with _style() as (figure_class, canvas_class):
        figure = figure_class(figsize=size, layout="constrained")
        canvas_class(figure)
        draw(figure.subplots())
        kind = path.suffix.lower().removeprefix(".")
        dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

        def write(file: BinaryIO) -> None:
            figure.savefig(file, format=kind, dpi=160, metadata=dated[kind])

        atomic_write(path, write)


@contextmanager
def _style() -> Iterator[tuple[Any, Any]]:
    """Neither a window nor the state of pyplot."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure, FigureCanvasAgg
