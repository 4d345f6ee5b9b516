"""Accuracy against MACs as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d_compiler.evaluation.evaluating import Evaluation
from s2d_compiler.plots import COLORS, write_plot
from s2d_compiler.runtime.policies import Deadline, MacsBudget, Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_trade_off", "fill_trade_off", "policy_text"]


def draw_trade_off(
    evaluation: Evaluation, path: Path, title: str, static_accuracy: float | None = None
) -> None:
    """Draw accuracy against MACs over all thresholds, as S2DNAS, figure 6 does.

    Args:
        evaluation: What was measured.
        path: Where to, .png, .svg or .pdf.
        title: What stands above it.
        static_accuracy: Of the original on the same samples, if known.

    Raises:
        UsageError, OutputError: It cannot be written.
    """

    def draw(axes: Axes) -> None:
        axes.set_title(title, loc="left")
        fill_trade_off(axes, evaluation, static_accuracy)

    write_plot(path, draw)


def fill_trade_off(axes: Axes, evaluation: Evaluation, static_accuracy: float | None) -> None:
    """Draw accuracy against MACs into axes, without a title."""
    unit, word = _unit(evaluation.original_macs)
    _curves(axes, evaluation, unit)
    _points(axes, evaluation, unit, static_accuracy)
    _name_stages(axes, evaluation, unit)
    axes.set_xlabel(f"{word}MACs per sample, mean")
    axes.set_ylabel(f"accuracy on {evaluation.samples:,} samples (%)")
    axes.set_xlim(left=0)
    _leave_room(axes, evaluation, static_accuracy)
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    if evaluation.original_macs:
        scaling = _scaling(100 * unit / evaluation.original_macs)
        share = axes.secondary_xaxis("top", functions=scaling)
        share.set_xlabel("of the original's MACs (%)")


def _scaling(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return lambda value: value * factor, lambda value: value / factor


def _curves(axes: Axes, evaluation: Evaluation, unit: float) -> None:
    curves = evaluation.trade_off
    if len(evaluation.stages) > 2:
        axes.plot(
            [point.macs / unit for point in curves.single],
            [100 * point.accuracy for point in curves.single],
            color=COLORS[4], linestyle="--", linewidth=1.6, zorder=2,
            label="one threshold for all stages",
        )  # fmt: skip
    best = [(point.macs, point.accuracy) for point in curves.frontier]
    best.append((evaluation.stages[-1].macs, best[-1][1]))  # no more can be spent
    axes.plot(
        [macs / unit for macs, _ in best],
        [100 * accuracy for _, accuracy in best],
        color=COLORS[0], linewidth=2, drawstyle="steps-post", zorder=3,
        label="best thresholds on these samples",
    )  # fmt: skip


def _points(axes: Axes, evaluation: Evaluation, unit: float, static_accuracy: float | None) -> None:
    axes.plot(
        [stage.macs / unit for stage in evaluation.stages],
        [100 * stage.accuracy for stage in evaluation.stages],
        "o", color=COLORS[2], markersize=6, zorder=4, label="one stage for all samples",
    )  # fmt: skip
    if evaluation.accuracy is not None and evaluation.macs is not None:
        assert evaluation.policy is not None
        axes.plot(
            [evaluation.macs / unit], [100 * evaluation.accuracy], "*", color=COLORS[1],
            markersize=14, markeredgecolor="white", zorder=6,
            label=policy_text(evaluation.policy),
        )  # fmt: skip
    static = evaluation.original_macs / unit
    if static_accuracy is None:
        axes.axvline(static, color="0.4", linestyle=":", label="the original's cost")
    else:
        axes.plot([static], [100 * static_accuracy], "D", color="black", markersize=7, zorder=5,
                  label="the original")  # fmt: skip


def _name_stages(axes: Axes, evaluation: Evaluation, unit: float) -> None:
    """Below each point; below the name before it, where that would be written over."""
    below, before = 0, -float("inf")
    for number, stage in enumerate(evaluation.stages, start=1):
        is_near = stage.macs - before < 0.12 * max(evaluation.original_macs, stage.macs)
        below, before = (below + 1 if is_near else 0), stage.macs
        axes.annotate(
            f"stage {number}", (stage.macs / unit, 100 * stage.accuracy), (5, -13 - 11 * below),
            textcoords="offset points", color=COLORS[2],
        )  # fmt: skip


def _leave_room(axes: Axes, evaluation: Evaluation, static_accuracy: float | None) -> None:
    """Show all points, and no more of what is worse than all of them."""
    points = [*evaluation.trade_off.frontier, *evaluation.trade_off.single]
    shares = [p.accuracy for p in points] + [s.accuracy for s in evaluation.stages]
    shares += [value for value in (static_accuracy, evaluation.accuracy) if value is not None]
    low, high = 100 * min(shares), 100 * max(shares)
    room = max(high - low, 2.0)
    axes.set_ylim(max(0.0, low - 0.35 * room), min(100.5, high + 0.08 * room))


def _unit(macs: int) -> tuple[float, str]:
    for unit, word in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
        if macs >= unit:
            return unit, word
    return 1.0, ""


def policy_text(policy: Policy) -> str:
    """A policy on one line, such as ``confidence ≥ 0.9, 0.8``."""
    if isinstance(policy, MacsBudget):
        text = f"at most {policy.macs:,} MACs per {policy.per}"
    elif isinstance(policy, Deadline):
        text = f"within {policy.milliseconds:g} ms"
    else:
        sign = "≥" if policy.larger_is_certain else "≤"
        values = [f"{v:.4g}" if math.isfinite(v) else "never" for v in policy.values]
        measure = policy.measure if isinstance(policy.measure, str) else "own measure"
        return f"{measure} {sign} {', '.join(values)}" if values else "one stage"
    return text if policy.thresholds is None else f"{text}, {policy_text(policy.thresholds)}"
