"""The plots of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from s2d_compiler.evaluation import Evaluation
from s2d_compiler.evaluation.drawing import fill_trade_off
from s2d_compiler.plots import COLORS, svg_for_page
from s2d_compiler.reporting.reliability import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["reliability_figure", "trade_off_figure"]

#: Colours of plots as the page's style has them, for light and for dark.
_VARIABLES = {
    **{color.lower(): f"var(--c{n})" for n, color in enumerate(COLORS[:6], start=1)},
    "#000000": "var(--ink)",
    "#666666": "var(--muted)",
    "#b0b0b0": "var(--line)",
    "#ffffff": "var(--card)",
}


def trade_off_figure(evaluation: Evaluation, static_accuracy: float | None) -> Markup:
    """Accuracy against MACs over thresholds (S2DNAS, figure 6)."""

    def draw(axes: Axes) -> None:
        fill_trade_off(axes, evaluation, static_accuracy)

    return Markup(svg_for_page("trade-off", draw, (6.6, 4.4), _VARIABLES))


def reliability_figure(
    stage: int, plain: Reliability, scaled: Reliability | None, threshold: float | None
) -> Markup:
    """Accuracy against confidence at one exit.

    Args:
        stage: From 1.
        plain: Without a temperature.
        scaled: With the one that is stored; None without one.
        threshold: Of confidence, from which on samples leave here; None where there is none.
    """

    def draw(axes: Axes) -> None:
        used = scaled or plain
        axes.bar(used.confidence, used.share, width=0.05, color="0.4", alpha=0.25, linewidth=0,
                 label="share of the samples")  # fmt: skip
        axes.plot(
            [0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="as sure as right"
        )
        if scaled is not None:
            axes.plot(plain.confidence, plain.accuracy, "--", color=COLORS[4],
                      linewidth=1.2, label="without temperature")  # fmt: skip
        axes.plot(used.confidence, used.accuracy, color=COLORS[0], linewidth=1.2, alpha=0.6)
        axes.scatter(used.confidence, used.accuracy, [8 + 90 * share for share in used.share],
                     COLORS[0], linewidth=0, zorder=3, label="accuracy (size: share)")  # fmt: skip
        if threshold is not None:
            axes.axvline(threshold, color=COLORS[1], linewidth=1.2, label="leave from here")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.set_title(f"stage {stage}", loc="left")
        axes.legend(loc="upper left", fontsize=8)

    return Markup(svg_for_page(f"reliability-{stage}", draw, (3.6, 3.5), _VARIABLES))
