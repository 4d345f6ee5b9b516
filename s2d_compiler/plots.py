"""Plots in files and pages: matplotlib without a display, files whole or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from s2d_compiler.errors import UsageError
from s2d_compiler.output import atomic_write, check_writable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "check_matplotlib", "check_plot", "svg_for_page", "write_plot"]

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
    check_matplotlib("--plot")
    check_writable(path)


def check_matplotlib(place: str) -> None:
    """Require what draws plots.

    Args:
        place: What needs it, for the message.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{place}: matplotlib, which draws plots, cannot be imported ({error}); install it: "
            "pip install 's2d-compiler[plots]'"
        ) from error


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
    with _style():
        figure = _figure(draw, size)
        kind = path.suffix.lower().removeprefix(".")
        dated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

        def write(file: BinaryIO) -> None:
            figure.savefig(file, format=kind, dpi=160, metadata=dated[kind])

        atomic_write(path, write)


def svg_for_page(
    name: str, draw: Callable[[Axes], None], size: tuple[float, float], colors: Mapping[str, str]
) -> str:
    """Draw a plot as an ``<svg>`` element that stands in a page and follows its colours.

    Args:
        name: Of this plot; another one for each plot of the page, so that their ids differ.
        draw: Is given empty axes.
        size: Width and height in inches.
        colors: What stands for a colour such as ``#000000`` (lower case) in the page's style.
    """
    text = io.StringIO()
    with _style(salt=name):
        figure = _figure(draw, size)
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: colors.get(m[0], m[0]), svg)


def _figure(draw: Callable[[Axes], None], size: tuple[float, float]) -> Figure:
    """A figure with one plot; neither a window nor the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    return figure


@contextmanager
def _style(salt: str = "s2d") -> Iterator[None]:
    """The style of all plots.

    Args:
        salt: What the ids in an SVG come from, so that they are the same every time.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        yield
