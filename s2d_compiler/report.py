"""Report: what was cut, what was left whole, and why."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import fx

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.cost import static_macs
from s2d_compiler.analysis.labels import Labels, is_versioned
from s2d_compiler.fields import Fields, as_number, as_text, damaged, fields_of, shown
from s2d_compiler.program import Dropped, is_scalar, operator_name, path_of
from s2d_compiler.rules.layers import is_layer


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of the original.

    Attributes:
        layer: Module path.
        status: ``cut`` (every stage owns output channels), ``prediction``, ``shared`` (a weight
            without a channel axis, one for all stages), or ``whole``.
        reason: Why it is whole, else empty.
        resolution: Resolution of its input.
        macs: MACs per sample in the original.
        channels: Output channels per stage.
    """

    layer: str
    status: str
    reason: str
    resolution: str
    macs: int
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CoupledUse:
    """An operator that mixes channels without weights and runs once per stage."""

    node: str
    operator: str
    path: str


@dataclass(frozen=True, slots=True)
class FallbackUse:
    """A use of an operator without a rule: every stage runs it at full size.

    Attributes:
        node: Its name in the program.
        operator: Operator or module class.
        path: Module path in the original.
        reason: Why there is no rule for it.
        macs: MACs per sample of one run at full size.
        runs: How many stages run it.
        extra_macs: MACs per sample of all runs beyond the one of the original.
    """

    node: str
    operator: str
    path: str
    reason: str
    macs: int
    runs: int
    extra_macs: int


@dataclass(frozen=True, slots=True)
class Fallback:
    """The same fallback in one or more places, such as the blocks of a network.

    Attributes:
        operator: Operator or module class.
        path: Module path, numbers that differ replaced by ``*``.
        reason: Why there is no rule for it.
        uses: The places.
    """

    operator: str
    path: str
    reason: str
    uses: tuple[FallbackUse, ...]

    @property
    def extra_macs(self) -> int:
        """MACs per sample of all runs in all places beyond those of the original."""
        return sum(use.extra_macs for use in self.uses)

    @property
    def macs(self) -> int:
        """MACs per sample of one run in all places."""
        return sum(use.macs for use in self.uses)

    def text(self, original_macs: int) -> str:
        """One line, with the share of the original's MACs."""
        places = f" ({len(self.uses)} places)" if len(self.uses) > 1 else ""
        cost = f"no MACs, run {max(use.runs for use in self.uses)} times"
        if self.macs:
            share = f" ({self.extra_macs / original_macs:.1%} of it)" if original_macs else ""
            cost = (
                f"{self.macs:,} MACs a run, {self.extra_macs:,} more than the original over all "
                f"stages{share}"
            )
        return f"{self.operator} {_inside(self.path)}{places}: {self.reason}; {cost}"


#: Title of the list of fallbacks.
FALLBACKS = "without a rule, run once per stage at full size, costliest first (docs/operators.md)"


def grouped(uses: Sequence[FallbackUse]) -> tuple[Fallback, ...]:
    """Uses of one operator that differ in the numbers of their paths alone, costliest first."""
    groups: dict[tuple[str, str, str], list[FallbackUse]] = {}
    for use in uses:
        key = (use.operator, re.sub(r"\d+", "*", use.path), use.reason)
        groups.setdefault(key, []).append(use)
    found = [
        Fallback(operator, path if len(same) > 1 else same[0].path, reason, tuple(same))
        for (operator, path, reason), same in groups.items()
    ]
    return tuple(sorted(found, key=lambda g: (-g.extra_macs, -g.macs, -len(g.uses))))


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler did to a model; prints as text.

    Attributes:
        layers: Every weighted layer and matrix product, in program order.
        coupled: Coupled operators.
        unknown: Uses of operators without a rule, the costliest first.
        dropped: What evaluation-mode capture left out.
        notes: Sentences about the capture.
        cut_share: Share of the original's MACs in cut layers, prediction layers included.
        nodes: Number of nodes in the captured program.
        stage_one: Where stage 1 costs more than 0.35 of the original: kind of layer, MACs.
        original_macs: MACs per sample of the original.
    """

    layers: tuple[LayerReport, ...]
    coupled: tuple[CoupledUse, ...]
    unknown: tuple[FallbackUse, ...]
    dropped: Dropped
    notes: tuple[str, ...]
    cut_share: float
    nodes: int
    stage_one: tuple[tuple[str, int], ...] = ()
    original_macs: int = 0

    @property
    def whole(self) -> tuple[LayerReport, ...]:
        """Layers that were not cut, the costliest first."""
        return tuple(sorted((r for r in self.layers if r.status == "whole"), key=lambda r: -r.macs))

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Operators without a rule, grouped by place, the costliest first."""
        return grouped(self.unknown)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and ``dyn.pt``."""
        result: dict[str, Any] = plain(asdict(self))
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | Fields) -> Report:
        """Read what ``to_dict`` wrote.

        Raises:
            FormatError: Something is missing, or of another kind.
        """
        data = fields_of(data, "report")
        share, dropped = data.value("cut_share"), data.inner("dropped")
        if type(share) not in (int, float) or not 0 <= share <= 1:
            damaged(data.at("cut_share"), f"{shown(share)} is no share from 0 to 1")
        return cls(
            layers=tuple(
                LayerReport(
                    layer=row.text("layer"),
                    status=row.text("status"),
                    reason=row.text("reason"),
                    resolution=row.text("resolution"),
                    macs=row.number("macs"),
                    channels=row.numbers("channels"),
                )
                for row in data.rows("layers")
            ),
            coupled=tuple(
                CoupledUse(row.text("node"), row.text("operator"), row.text("path"))
                for row in data.rows("coupled")
            ),
            unknown=tuple(
                FallbackUse(
                    node=row.text("node"),
                    operator=row.text("operator"),
                    path=row.text("path"),
                    reason=row.text("reason"),
                    macs=row.number("macs"),
                    runs=row.number("runs"),
                    extra_macs=row.number("extra_macs"),
                )
                for row in data.rows("unknown")
            ),
            dropped=Dropped(dropped.texts("modules"), dropped.texts("unused")),
            notes=data.texts("notes"),
            cut_share=float(share),
            nodes=data.number("nodes"),
            stage_one=tuple(_kind_and_macs(item, data) for item in data.items("stage_one")),
            original_macs=data.number("original_macs"),
        )

    def __str__(self) -> str:
        text = io.StringIO()
        cut = sum(r.status == "cut" for r in self.layers)
        heads = [r.layer for r in self.layers if r.status == "prediction"]
        count = len(self.layers)
        text.write(f"{cut} of {count} layers cut, {self.cut_share:.1%} of the MACs in cut layers\n")
        named = ", ".join(heads) if heads else "none (the output is the features)"
        text.write(f"exit heads from: {named}\n")
        if self.stage_one and self.original_macs:
            share = sum(m for _, m in self.stage_one) / self.original_macs
            rows = [f"{m / self.original_macs:.3f} {kind}" for kind, m in self.stage_one]
            section(text, f"stage 1 costs {share:.3f} of the original", rows)
        section(
            text, "left whole", [f"{r.layer}: {r.reason} ({r.macs:,} MACs)" for r in self.whole]
        )
        section(
            text,
            "coupled, run once per stage",
            [f"{c.operator} {_inside(c.path)}" for c in self.coupled],
        )
        section(text, FALLBACKS, [group.text(self.original_macs) for group in self.fallbacks])
        section(
            text,
            "not in the graph (not run in evaluation mode on such an input)",
            folded([*self.dropped.modules, *self.dropped.unused]),
        )
        section(text, "notes", list(self.notes))
        return text.getvalue().rstrip()


def _inside(path: str) -> str:
    return f"in {path}" if path else "at the top level"


def folded(paths: Sequence[str]) -> list[str]:
    """Paths that differ in numbers only, as one line with their count."""
    patterns: dict[str, list[str]] = {}
    for path in paths:
        patterns.setdefault(re.sub(r"\d+", "*", path), []).append(path)
    return [same[0] if len(same) == 1 else f"{p} ({len(same)})" for p, same in patterns.items()]


def section(text: io.StringIO, title: str, rows: Sequence[str], most: int = 12) -> None:
    """Write a list under a title, nothing for an empty one."""
    if not rows:
        return
    text.write(f"{title}:\n")
    for row in rows[:most]:
        text.write(f"  {row}\n")
    if len(rows) > most:
        text.write(f"  and {len(rows) - most} more\n")


def plain(value: Any) -> Any:
    """Data with lists for tuples."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def report_of(assignment: StageAssignment, stages: Sequence[fx.GraphModule] = ()) -> Report:
    """What the plan does to every layer of the program."""
    program, channels = assignment.program, assignment.channels
    rows: list[LayerReport] = []
    reasons = {u.node: u.reason for u in (*channels.unknown, *channels.refused)}
    for node in program.nodes:
        macs = static_macs(program, node) if node.op in ("call_module", "call_function") else 0
        name = channels.layer_of.get(node.name)
        if name is None and not macs:
            continue
        if name is None:
            status, reason, owned = _status_without_channels(assignment, node, reasons)
            rows.append(
                LayerReport(path_of(node) or operator_name(node), status, reason, "", macs, owned)
            )
            continue
        layer = channels.layers[name]
        status, reason, owned = _status(assignment, node.name, name)
        rows.append(LayerReport(name, status, reason, layer.resolution, macs, owned))
    total = sum(r.macs for r in rows)
    cut = sum(r.macs for r in rows if r.status != "whole")
    return Report(
        layers=tuple(rows),
        coupled=tuple(
            CoupledUse(n, operator_name(program.by_name[n]), path_of(program.by_name[n]))
            for n in channels.coupled
        ),
        unknown=_fallback_uses(assignment, stages),
        dropped=program.dropped,
        notes=program.notes,
        cut_share=cut / total if total else 1.0,
        nodes=len(program.by_name),
        stage_one=stage_one_costs(assignment, stages[0], total) if len(stages) > 1 else (),
        original_macs=total,
    )


def _fallback_uses(
    assignment: StageAssignment, stages: Sequence[fx.GraphModule]
) -> tuple[FallbackUse, ...]:
    """What operators without a rule cost in the stages that run them, the costliest first."""
    program = assignment.program
    runs: dict[str, list[int]] = {}
    for stage in stages:
        here: dict[str, int] = {}
        for node in stage.graph.nodes:
            origin = program.by_name.get(str(node.meta.get("origin", "")))
            if origin is None or origin.op != node.op:
                continue
            if node.op == "call_module" or node.target is origin.target:
                macs = int(node.meta.get("macs", 0))
                here[origin.name] = here.get(origin.name, 0) + macs
        for name, macs in here.items():
            runs.setdefault(name, []).append(macs)
    uses = [
        FallbackUse(
            *(u.node, u.operator, u.path, u.reason, u.macs),
            runs=len(runs.get(u.node, ())),
            extra_macs=max(0, sum(runs.get(u.node, ())) - u.macs),
        )
        for u in assignment.channels.unknown
    ]
    return tuple(sorted(uses, key=lambda u: (-u.extra_macs, -u.macs)))


def _status_without_channels(
    assignment: StageAssignment, node: fx.Node, reasons: Mapping[str, str]
) -> tuple[str, str, tuple[int, ...]]:
    """Status of a product of values, or of a layer whose weight has no channel axis.

    A product is cut if every stage runs it on channels of its own: those of its result, or,
    where each stage has its own version of the result, those of an operand.
    """
    channels = assignment.channels
    if node.name in reasons:
        return "whole", reasons[node.name], ()
    if is_layer(node):
        return "shared", "", ()
    labels = channels.labels[node.name]
    owned = _owned(assignment, labels)
    if all(owned):
        return "cut", "", owned
    if not any(owned) and is_versioned(labels):
        operands = [channels.labels[n.name] for n in node.all_input_nodes if not is_scalar(n)]
        if any(all(_owned(assignment, a)) for a in operands):
            return "cut", "", ()
        return "whole", "every stage runs it at full size", ()
    if not any(owned):
        return "whole", "it depends on no channel, so it runs once", ()
    return "whole", _too_few(labels[labels >= 0], owned), owned


def _owned(assignment: StageAssignment, labels: Labels) -> tuple[int, ...]:
    """How many positions each stage owns."""
    owners = assignment.owner_of(labels)
    return tuple(int((owners == stage).sum()) for stage in range(1, assignment.thin_stages + 1))


def _too_few(labels: Labels, owned: tuple[int, ...]) -> str:
    """Why some stages own none of these channels."""
    empty = ", ".join(str(i) for i, count in enumerate(owned, start=1) if not count)
    count, atoms = labels.size, len(np.unique(labels))
    if count == atoms:
        return f"it has {count} to share out, so stage {empty} owns none"
    return (
        f"its {count} channels move as {atoms} (tied by the operators between layers), "
        f"so stage {empty} owns none"
    )


def _status(assignment: StageAssignment, node: str, name: str) -> tuple[str, str, tuple[int, ...]]:
    channels = assignment.channels
    if node in channels.predictions:
        return "prediction", "", ()
    rows = channels.layers[name].rows
    owned = _owned(assignment, rows)
    if all(owned):
        return "cut", "", owned
    pinned = {a for family in channels.families for a in family.atoms[: family.pinned]}
    if pinned.issuperset(rows.tolist()):
        return "whole", "its output gates channels of others, so it belongs to stage 1", owned
    return "whole", _too_few(rows, owned), owned


def _kind_and_macs(item: Any, data: Fields) -> tuple[str, int]:
    place = data.at("stage_one")
    if type(item) is not list or len(item) != 2:
        damaged(place, f"{shown(item)} is not a kind of layer and its MACs")
    return as_text(item[0], place), as_number(item[1], place)


#: Share of the original above which a report says what stage 1 pays for.
STAGE_ONE_LIMIT = 0.35


def stage_one_costs(
    assignment: StageAssignment, stage: fx.GraphModule, original: int
) -> tuple[tuple[str, int], ...]:
    """MACs of stage 1 by what keeps them from falling with the square of its channels."""
    program, channels = assignment.program, assignment.channels
    unknown = {u.node for u in channels.unknown}
    costs: dict[str, int] = {}
    for node in stage.graph.nodes:
        macs = int(node.meta.get("macs", 0))
        origin = program.by_name.get(str(node.meta.get("origin", "")))
        if not macs or origin is None:
            continue
        kind = "dense layers"
        layer = channels.layers.get(channels.layer_of.get(origin.name, ""))
        if origin.name in channels.predictions:
            kind = "exit heads, whose rows stay whole"
        elif origin.name in unknown or layer is None:
            kind = "operators at full size"
        elif int(getattr(program.module(origin), "groups", 1)) > 1:
            kind = "grouped and depthwise layers, which fall with their channels only"
        elif all((c < 0).all() for c in layer.columns):
            kind = "layers that read the input itself, whose columns stay whole"
        costs[kind] = costs.get(kind, 0) + macs
    if original and sum(costs.values()) <= STAGE_ONE_LIMIT * original:
        return ()
    return tuple(sorted(costs.items(), key=lambda item: -item[1]))
