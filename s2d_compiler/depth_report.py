"""Report of a network with exits along depth: where they stand, and what their heads are."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from s2d_compiler.depth_plan import depth_text
from s2d_compiler.exit_placement import ExitPlacement
from s2d_compiler.fields import Fields, fields_of
from s2d_compiler.program import Dropped
from s2d_compiler.report import folded, plain, section


@dataclass(frozen=True, slots=True)
class ExitReport:
    """One exit before the last.

    Attributes:
        exit: What the plan calls its place.
        node: The node of the captured program after which it stands.
        operator: What computes it.
        path: Module path of that in the original.
        is_cut: Whether everything later flows through this value.
        head: Kind of its head.
        channels: Channels that the head reads.
        resolution: Positions per sample and channel.
        macs: MACs per sample of the original's part of it, all earlier parts included.
        head_macs: MACs per sample of the head.
        features: How many values its stage hands on.
    """

    exit: str
    node: str
    operator: str
    path: str
    is_cut: bool
    head: str
    channels: int
    resolution: str
    macs: int
    head_macs: int
    features: int

    def text(self, original_macs: int) -> str:
        """One line."""
        share = f"{self.macs / original_macs:.1%} of the MACs" if original_macs else "no MACs"
        at = f"{self.operator} in {self.path}" if self.path else f"{self.operator} ({self.node})"
        inside = "" if self.is_cut else ", inside a block"
        handed = "1 value" if self.features == 1 else f"{self.features} values"
        return (
            f"{self.exit}: after {at} ({share}{inside}), {self.channels} channels at "
            f"{self.resolution}; {self.head} head, {self.head_macs:,} MACs; hands on {handed}"
        )


@dataclass(frozen=True, slots=True)
class DepthReport:
    """What the compiler did to a model; prints as text.

    Attributes:
        exits: Every exit before the last, in order.
        tail: What heads do to their logits because the original does: operators.
        dropped: What evaluation-mode capture left out.
        notes: Sentences about the capture.
        nodes: Number of nodes in the captured program.
        original_macs: MACs per sample of the original.
    """

    exits: tuple[ExitReport, ...]
    tail: tuple[str, ...]
    dropped: Dropped
    notes: tuple[str, ...]
    nodes: int
    original_macs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and ``dyn.pt``."""
        result: dict[str, Any] = plain(asdict(self))
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | Fields) -> DepthReport:
        """Read what ``to_dict`` wrote.

        Raises:
            FormatError: Something is missing, or of another kind.
        """
        data = fields_of(data, "report")
        dropped = data.inner("dropped")
        return cls(
            exits=tuple(
                ExitReport(
                    exit=row.text("exit"),
                    node=row.text("node"),
                    operator=row.text("operator"),
                    path=row.text("path"),
                    is_cut=row.flag("is_cut"),
                    head=row.text("head"),
                    channels=row.number("channels"),
                    resolution=row.text("resolution"),
                    macs=row.number("macs"),
                    head_macs=row.number("head_macs"),
                    features=row.number("features"),
                )
                for row in data.rows("exits")
            ),
            tail=data.texts("tail"),
            dropped=Dropped(dropped.texts("modules"), dropped.texts("unused")),
            notes=data.texts("notes"),
            nodes=data.number("nodes"),
            original_macs=data.number("original_macs"),
        )

    def __str__(self) -> str:
        text = io.StringIO()
        count = "1 exit" if len(self.exits) == 1 else f"{len(self.exits)} exits"
        text.write(f"{count} along depth before the original's own\n")
        section(text, "exits", [row.text(self.original_macs) for row in self.exits], most=40)
        section(text, "as in the original, heads end with", list(self.tail))
        section(
            text,
            "not in the graph (not run in evaluation mode on such an input)",
            folded([*self.dropped.modules, *self.dropped.unused]),
        )
        section(text, "notes", list(self.notes))
        return text.getvalue().rstrip()


def depth_report_of(
    placement: ExitPlacement, stages: Sequence[fx.GraphModule], original_macs: int
) -> DepthReport:
    """What the plan puts into the program, and what the stages hand on for it."""
    program = placement.program
    rows = []
    for wanted, head, stage in zip(placement.plan.exits, placement.heads, stages[:-1], strict=True):
        output: Any = next(n for n in reversed(stage.graph.nodes) if n.op == "output").args[0]
        place = head.place
        rows.append(
            ExitReport(
                exit=depth_text(wanted),
                node=place.node,
                operator=place.operator,
                path=place.path,
                is_cut=place.is_cut,
                head=head.kind,
                channels=place.channels,
                resolution=place.resolution,
                macs=place.macs,
                head_macs=head.macs,
                features=len(output[1]),
            )
        )
    return DepthReport(
        exits=tuple(rows),
        tail=tuple(str(node.target) for node in placement.tail),
        dropped=program.dropped,
        notes=program.notes,
        nodes=len(program.by_name),
        original_macs=original_macs,
    )
