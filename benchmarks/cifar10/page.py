"""The page: what every row reached, from the kept records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.cifar10.choosing import Chosen, Halves, budgets, reward, within
from benchmarks.cifar10.rows import NETWORKS, Row, rows_of
from s2d_compiler.calibration import Records
from s2d_compiler.output import atomic_write
from s2d_compiler.plots import COLORS, write_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_page"]

TITLES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "vgg16_bn": "VGG16-BN",
          "mobilenet_v2": "MobileNetV2"}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A row that was trained.

    Attributes:
        row: What it is.
        about: Its plan, cost and recipe as they were.
        records: What its exits say of the held-out images.
    """

    row: Row
    about: dict[str, Any]
    records: Records

    @property
    def gains(self) -> list[float]:
        """What each exit adds to the accuracy of the one before."""
        return [float(gain) for gain in np.diff(self.records.right.mean(0))]

    @property
    def macs(self) -> list[int]:
        return list(self.about["macs"])

    @cached_property
    def halves(self) -> Halves:
        return Halves(self.records, self.macs)

    @cached_property
    def best(self) -> Chosen:
        """With the thresholds of the highest reward."""
        return self.halves.chosen(reward)

    @cached_property
    def curve(self) -> list[Chosen]:
        return budgets(self.halves) if len(self.macs) > 1 else [self.best]


def write_page(results: Path, page: Path, console: Console) -> None:
    """Write the page and its plots from what is kept."""
    parts = [_INTRODUCTION]
    for network in NETWORKS:
        rows = _read(results / network, network)
        if rows and rows[0].row.name == "static":
            plot = page.parent / f"{page.stem}-{network}.svg"
            _plot([made for made in rows if made.row.table == "main"], plot, TITLES[network])
            parts.append(_network(rows, plot.name, TITLES[network]))
    if len(parts) > 1:
        text = "\n".join(parts)
        atomic_write(page, lambda stream: stream.write(text.encode()))
        console.print(f"written: {page}")
    else:
        console.print(f"no page is written: {results} holds no row static")


def _read(folder: Path, network: str) -> list[Made]:
    made = []
    for row in rows_of(network):
        about, records = folder / f"{row.name}.json", folder / f"{row.name}.npz"
        if about.exists() and records.exists():
            made.append(Made(row, json.loads(about.read_text()), Records.load(records)))
    return made


_INTRODUCTION = """\
# CIFAR-10

What staged networks reach on real images, beside what else one could do with the same network.
Made by `python -m benchmarks.cifar10 --data cifar10-train.npz --work build/cifar10`, which resumes
where it was interrupted; the page is written from the kept records (`benchmarks/results/cifar10`).

The figures are **validation figures**: 45,000 of CIFAR-10's training images train, 5,000 are held
out; the official test images were not used. Weights are those of the last epoch. Thresholds are
chosen on one half of the held-out images and measured on the other, both ways, so that for
thresholds no image chooses for itself. Plans were chosen by hand, *2/2 of 8, then the original*
after *4 of 8, then the original* was known; the learning rate from the static weights and the
stages' weights in the loss after five short trials of *S2D 4/1/3* on the held-out images, which
favours that plan, by an amount that such trials cannot tell from chance.

Within a table all rows have the same number of epochs, batch size, augmentation (zero-padded crops,
flips) and seed. In the loss of networks with several exits the last counts four times as much as
each of the others, unless a row says otherwise. Rows that start from the static network's weights
learn with its outputs beside the labels unless they say otherwise. They profit from its epochs as
well, so that they have had twice as many as static rows, but for those that say *trained on* or
*twice the epochs*. Thinner static networks learn from the same outputs, from scratch.

What the rows are: *8 of 16 wide* is the same network with 8 channels where the original has 16, and
half as many everywhere. *S2D 4/1/3* has three stages of 4, 1 and 3 eighths of the channels; with
*full reuse* each reads the features of all earlier ones. *Then the original*: the last stage is the
untouched static network, run whole by images that no earlier exit keeps, on top of what they cost.

What the figures do not say: 15 epochs are few (He et al. train ResNet-20 for 64,000 steps, some 180
epochs, and report 91.25% of the test images), and after longer training differences may be others.
Intervals are of the images alone: another seed would move each row, too, and was not tried. MACs
are not milliseconds ([early-exit-time.md](early-exit-time.md)).
"""


def _network(rows: Sequence[Made], plot: str, title: str) -> str:
    main = [made for made in rows if made.row.table == "main"]
    ablation = [made for made in rows if made.row.table == "ablation"]
    recipe, static = main[0].about["recipe"], main[0]
    lines = [
        f"\n## {title}\n",
        f"{recipe['epochs']} epochs each, batches of {recipe['batch_size']}, {recipe['schedule']} "
        f"schedule up to a learning rate of {recipe['lr']:g} (from the static weights: "
        f"{_start_lr(main)}), weight decay {recipe['weight_decay']:g}, {recipe['precision']}, "
        f"torch {static.about['torch']} on {static.about['device']}.\n",
        f"![accuracy against MACs]({plot})\n",
        _reading(main, static),
        _table(main, static),
        _equal(main),
        _same_cost(main, static),
        _stages(main),
    ]
    if ablation:
        lines.append(_ablation(ablation, title))
    return "\n".join(lines)


def _reading(rows: Sequence[Made], static: Made) -> str:
    """The answers to the questions that the table is made for, from the rows that are there."""
    staged = [made for made in rows if made.row.group == "staged"]
    if not staged:
        return ""
    right, half = static.records.right[:, -1], static.macs[-1] / 2

    def best(group: str, limit: float) -> tuple[Made, Chosen] | None:
        fit = [(m, m.halves.chosen(within(limit))) for m in rows
               if m.row.group == group and m.macs[0] <= limit]  # fmt: skip
        return max(fit, key=lambda pair: pair[1].accuracy) if fit else None

    lines = ["What the figures say:\n"]
    found = best("staged", half)
    if found is not None:
        lines.append(
            f"- Half of the MACs at no loss? Within {_million(half)} million MACs "
            f"*{found[0].row.text}* is the most accurate: {100 * found[1].accuracy:.2f}%, "
            f"{_difference(found[1].answers, right)} points to the static network."
        )
    same = [(m, c) for m in staged if (c := m.halves.as_accurate_as(right)) is not None]
    if same:
        made, chosen = min(same, key=lambda pair: pair[1].macs)
        lines.append(
            f"- As accurate as the static network is *{made.row.text}* from "
            f"{_million(chosen.macs)} million MACs on, {_fewer(chosen.macs, static)} fewer."
        )
    for thin in (made for made in rows if made.row.group == "thin"):
        limit = thin.macs[-1]
        others = [best(group, limit) for group in ("staged", "depth")]
        text = ", ".join(
            f"{100 * pair[1].accuracy:.2f}% (*{pair[0].row.text}*, "
            f"{_difference(pair[1].answers, thin.records.right[:, -1])} points)"
            for pair in others
            if pair is not None
        )
        lines.append(
            f"- At the {_million(limit)} million MACs of *{thin.row.text}* "
            f"({100 * thin.best.accuracy:.2f}%), networks with exits reach {text or 'nothing'}."
        )
    gains = "; ".join(
        f"*{made.row.text}* " + ", ".join(f"{100 * gain:+.2f}" for gain in made.gains)
        for made in staged
    )
    lines.append(f"- What each exit adds to the accuracy of the one before, in points: {gains}.")
    return "\n".join(lines) + "\n"


def _start_lr(rows: Sequence[Made]) -> str:
    rates = {made.about["recipe"]["lr"] for made in rows if made.row.starts_static}
    return ", ".join(f"{rate:g}" for rate in sorted(rates)) or "none yet"


def _table(rows: Sequence[Made], static: Made) -> str:
    lines = [
        "Accuracy of every exit by itself; then with the thresholds of the highest reward (S2DNAS, "
        "equation 2, exponent -0.06: 1% of the accuracy is given up for 15% of the cost); "
        "then with the cheapest thresholds that are as accurate as "
        "the static network on the images that choose (*not reached*: there are none for one half "
        "of the images at least, and the difference is that of the most accurate ones). "
        "Differences to the static network are paired, with 95% intervals.\n",
        "| network | million MACs up to each exit | accuracy of each exit (%) | "
        "highest reward: accuracy (%) | million MACs | fewer | "
        "as accurate as static: million MACs | fewer | difference (points) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    right = static.records.right[:, -1]
    for made in rows:
        best = made.best
        cells = [made.row.text, *_exits(made), f"{100 * best.accuracy:.2f}", _million(best.macs),
                 _fewer(best.macs, static)]  # fmt: skip
        same = made.halves.as_accurate_as(right)
        if same is None:
            cells += [
                "not reached",
                "",
                _difference(made.halves.chosen(lambda points: points[-1]).answers, right),
            ]
        else:
            cells += [_million(same.macs), _fewer(same.macs, static),
                      _difference(same.answers, right)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _equal(rows: Sequence[Made]) -> str:
    """What each network with exits costs where it is as accurate as each of the others."""
    dynamic = [made for made in rows if len(made.macs) > 1]
    others = sorted((made for made in rows if len(made.macs) == 1), key=lambda made: made.macs[-1])
    heads = "".join(f" {made.row.text}: {_million(made.macs[-1])} |" for made in others)
    lines = [
        "Million MACs at equal accuracy: the cheapest thresholds that are as accurate as the "
        "network named above on the images that choose, with the paired difference in points on "
        "the others. The network above costs what stands beside its name.\n",
        f"| network |{heads}",
        "|---|" + "---|" * len(others),
    ]
    for made in dynamic:
        cells = []
        for other in others:
            right = other.records.right[:, -1]
            same = made.halves.as_accurate_as(right)
            cells.append(
                "not reached"
                if same is None
                else f"{_million(same.macs)} ({_difference(same.answers, right)})"
            )
        lines.append("| " + " | ".join([made.row.text, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _same_cost(rows: Sequence[Made], static: Made) -> str:
    """How accurate each network is where it may cost no more than others, and half of static."""
    thin = sorted(made.macs[-1] for made in rows if len(made.macs) == 1)
    limits = sorted({*thin[:-1], static.macs[-1] / 2}) or thin
    heads = "".join(f" {_million(limit)} |" for limit in limits)
    lines = [
        "Accuracy (%) at equal cost: with the thresholds of the highest accuracy within so many "
        "million MACs per image on the images that choose, and the paired difference to the static "
        f"network. {_million(static.macs[-1] / 2)} million is half of what that costs, the others "
        "what the thinner ones cost.\n",
        f"| network |{heads}",
        "|---|" + "---|" * len(limits),
    ]
    right = static.records.right[:, -1]
    for made in rows:
        cells = []
        for limit in limits:
            found = made.halves.chosen(within(limit)) if made.macs[0] <= limit else None
            cells.append(
                ""
                if found is None
                else f"{100 * found.accuracy:.2f} ({_difference(found.answers, right)})"
            )
        if any(cells):
            lines.append("| " + " | ".join([made.row.text, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _ablation(rows: Sequence[Made], title: str) -> str:
    base, recipe = rows[0], rows[0].about["recipe"]
    lines = [
        f"### {title}: one plan, one thing changed at a time\n",
        f"S2D 4/1/3; the first line is what the others change. {recipe['epochs']} epochs each, so "
        "compare these rows with each other and not with those above.\n",
        "| changed | million MACs up to each exit | accuracy of each exit (%) | "
        "last exit against the first line (points) | "
        "highest reward: accuracy (%) | million MACs |",
        "|---|---|---|---|---|---|",
    ]
    for made in rows:
        right = made.records.right
        difference = _difference(right[:, -1], base.records.right[:, -1])
        cells = [made.row.text, *_exits(made), "" if made is base else difference,
                 f"{100 * made.best.accuracy:.2f}", _million(made.best.macs)]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _exits(made: Made) -> tuple[str, str]:
    """MACs up to each exit, and accuracy of each."""
    return (
        ", ".join(_million(m) for m in made.macs),
        ", ".join(f"{100 * a:.2f}" for a in made.records.right.mean(0)),
    )


def _million(macs: float) -> str:
    return f"{macs / 1e6:.1f}"


def _fewer(macs: float, static: Made) -> str:
    return f"{100 * (1 - macs / static.macs[-1]):.0f}%"


def _difference(mine: NDArray[np.bool_], other: NDArray[np.bool_]) -> str:
    each = mine.astype(float) - other.astype(float)
    half = 1.96 * each.std() / math.sqrt(len(each))
    return f"{100 * each.mean():+.2f} ± {100 * half:.2f}"


def _stages(rows: Sequence[Made]) -> str:
    lines = [
        "Who leaves where with the thresholds of the highest reward, and how many of these are "
        "right (S2DNAS, Table 2):\n",
        "| network | leave at each exit (%) | of these right (%) |",
        "|---|---|---|",
    ]
    for made in rows:
        if len(made.macs) > 1:
            left = ", ".join(f"{100 * share:.1f}" for share in made.best.left)
            right = ", ".join("-" if r is None else f"{100 * r:.1f}" for r in made.best.right)
            lines.append(f"| {made.row.text} | {left} | {right} |")
    return "\n".join(lines) + "\n"


def _plot(rows: Sequence[Made], path: Path, title: str) -> None:
    def draw(axes: Axes) -> None:
        static = [made for made in rows if made.row.group in ("static", "thin")]
        for has_teacher, marker in ((False, "o"), (True, "s")):
            points = sorted(
                (made.macs[-1] / 1e6, 100 * made.best.accuracy)
                for made in static
                if made.row.has_teacher == has_teacher
            )
            label = "static, full and thinner" + (", distilled" if has_teacher else "")
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker=marker, color="black", alpha=0.5 + 0.5 * has_teacher,
                          linestyle="--", linewidth=1, markersize=4, label=label)  # fmt: skip
        dynamic = [made for made in rows if made.row.group not in ("static", "thin")]
        for index, made in enumerate(dynamic):
            style = "-" if index < len(COLORS) - 1 else ":"
            axes.plot(
                [point.macs / 1e6 for point in made.curve],
                [100 * point.accuracy for point in made.curve],
                color=COLORS[index % (len(COLORS) - 1)],
                linestyle=style,
                linewidth=1.4,
                label=made.row.text,
            )
        axes.set_title(f"{title}, 5,000 held-out images", loc="left")
        axes.set_xlabel("million MACs per image, mean")
        axes.set_ylabel("accuracy (%)")
        axes.set_xlim(0, 1.05 * rows[0].macs[-1] / 1e6)
        axes.legend(loc="lower right", fontsize=7)

    write_plot(path, draw, (8.4, 6.0))
