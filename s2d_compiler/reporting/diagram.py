"""The stages as a drawing: where everything stands, for a template that draws it.

Stages are rows. A stage of a width plan has a box per resolution group, as high as its share of
the group's channels; what later stages read goes down in lanes from box to box. Stages along depth
follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from s2d_compiler.analysis.cost import Cost
from s2d_compiler.depth_report import DepthReport
from s2d_compiler.dynamic import StagedNetwork
from s2d_compiler.plan import Plan
from s2d_compiler.report import LayerReport, Report

__all__ = ["Box", "Column", "DepthSegment", "Lane", "Row", "WidthDiagram", "depth_segments",
           "width_diagram"]  # fmt: skip

_LEFT, _TOP = 96.0, 46.0
_BOX, _GAP, _HEIGHT = 64.0, 56.0, 84.0
#: More resolution groups than this are not drawn.
_COLUMNS = 7


@dataclass(frozen=True, slots=True)
class Box:
    """The channels of one stage at one resolution; of a head, its exit."""

    stage: int
    x: float
    y: float
    width: float
    height: float
    channels: int
    total: int

    @property
    def middle(self) -> float:
        """Where flows meet it."""
        return self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class Lane:
    """What a stage hands to a later one at one resolution.

    Attributes:
        stage: Who hands it on, from 1.
        reader: Who reads it.
        x, top, bottom: Where it runs.
        width: By the share of the channels.
        layers: How many layers of the reader read it, of ``of``.
        of: How many there are.
    """

    stage: int
    reader: int
    x: float
    top: float
    bottom: float
    width: float
    layers: int
    of: int


@dataclass(frozen=True, slots=True)
class Column:
    """A resolution group, or the heads.

    Attributes:
        title: The resolution.
        note: How many layers.
        x: The middle.
        boxes: One per stage; None where it owns nothing.
        lanes: From earlier to later stages.
    """

    title: str
    note: str
    x: float
    boxes: tuple[Box | None, ...]
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A stage: where it stands, and the boxes that its data pass through."""

    stage: int
    y: float
    flows: tuple[tuple[Box, Box], ...]


@dataclass(frozen=True, slots=True)
class WidthDiagram:
    """Everything of a width plan.

    Attributes:
        left_out: Resolution groups that are not drawn.
        original: Middle of the row of the untouched network, where the last stage is that.
    """

    width: float
    height: float
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    left_out: int
    original: float | None


def width_diagram(network: StagedNetwork) -> WidthDiagram | None:
    """Lay out the stages of a width plan; None where no layer is cut."""
    plan, report = network.parts.plan, network.parts.report
    assert isinstance(plan, Plan)
    assert isinstance(report, Report)
    thin = plan.stages - (plan.final == "original")
    groups: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        if layer.resolution and len(layer.channels) >= thin and layer.status == "cut":
            groups.setdefault(layer.resolution, []).append(layer)
    if not groups:
        return None
    kept = sorted(groups, key=lambda name: -sum(row.macs for row in groups[name]))[:_COLUMNS]
    columns = [
        _column(plan, name, groups[name], thin, number)
        for number, name in enumerate(name for name in groups if name in kept)
    ]
    columns.append(_heads(thin, len(columns)))
    rows = tuple(_row(stage, columns) for stage in range(1, thin + 1))
    original = _middle(plan.stages) if thin < plan.stages else None
    return WidthDiagram(
        _LEFT + len(columns) * (_BOX + _GAP) + 110,
        _TOP + plan.stages * _HEIGHT,
        tuple(columns), rows, len(groups) - len(kept), original,
    )  # fmt: skip


def _middle(stage: int) -> float:
    return _TOP + (stage - 0.5) * _HEIGHT


def _left(column: int) -> float:
    return _LEFT + column * (_BOX + _GAP)


def _column(plan: Plan, name: str, layers: Sequence[LayerReport], thin: int, number: int) -> Column:
    owned = [sum(layer.channels[stage] for layer in layers) for stage in range(thin)]
    total = max(1, sum(owned))
    boxes = []
    for stage, channels in enumerate(owned, start=1):
        height = max(5.0, (_HEIGHT - 24) * channels / total)
        y = _middle(stage) - height / 2
        made = Box(stage, _left(number), y, _BOX, height, channels, total)
        boxes.append(made if channels else None)
    reading = [plan.reads(name, layer.layer) for layer in layers]
    counts = {
        pair: sum(pair in pairs for pairs in reading)
        for pair in sorted(frozenset().union(*reading))
    }
    lanes = _lanes(boxes, counts, len(layers))
    note = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    return Column(name, note, _left(number) + _BOX / 2, tuple(boxes), lanes)


def _heads(thin: int, number: int) -> Column:
    """Exits: each reads all stages up to its own."""
    boxes = [
        Box(stage, _left(number), _middle(stage) - 12, _BOX, 24, 1, thin)
        for stage in range(1, thin + 1)
    ]
    counts = {(j, i): 1 for j in range(2, thin + 1) for i in range(1, j)}
    lanes = _lanes(boxes, counts, 1)
    return Column("exit heads", "", _left(number) + _BOX / 2, tuple(boxes), lanes)


def _lanes(
    boxes: Sequence[Box | None], counts: dict[tuple[int, int], int], layers: int
) -> tuple[Lane, ...]:
    found = []
    for (later, earlier), count in counts.items():
        source, target = boxes[earlier - 1], boxes[later - 1]
        if source is None or target is None or not count:
            continue
        x = source.x + source.width * earlier / len(boxes)
        width = 1.5 + 8 * source.channels / source.total / max(1, len(boxes) - 2)
        found.append(
            Lane(earlier, later, x, source.y + source.height, target.y, width, count, layers)
        )
    return tuple(found)


def _row(stage: int, columns: Sequence[Column]) -> Row:
    boxes = [box for column in columns if (box := column.boxes[stage - 1]) is not None]
    return Row(stage, _middle(stage), tuple(pairwise(boxes)))


# -- along depth -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DepthSegment:
    """The part of the original that one stage runs.

    Attributes:
        stage: From 1.
        x, width: Where it stands; as wide as its share of the MACs.
        share: Of the original's MACs.
        place: What the plan calls the exit behind it; empty for the last.
        head: The exit's head, and its MACs.
        handed: How many values it hands on.
    """

    stage: int
    x: float
    width: float
    share: float
    place: str
    head: str
    handed: int


def depth_segments(report: DepthReport, cost: Cost) -> tuple[DepthSegment, ...]:
    """Lay out the stages of a plan with exits along depth."""
    original = max(1, report.original_macs)
    ends = [row.macs for row in report.exits] + [report.original_macs]
    found: list[DepthSegment] = []
    x, before = 70.0, 0
    for number, (_, end) in enumerate(zip(cost.stages, ends, strict=True)):
        share = (end - before) / original
        width = max(104.0, 640 * share)
        last = number == len(report.exits)
        row = None if last else report.exits[number]
        found.append(
            DepthSegment(
                number + 1, x, width, share,
                "" if row is None else row.exit,
                "the original's own" if row is None else f"{row.head} head",
                0 if row is None else row.features,
            )
        )  # fmt: skip
        x += width + 44
        before = end
    return tuple(found)
