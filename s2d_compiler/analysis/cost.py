"""Cost: multiply-accumulates per sample (papers say FLOPs for MACs) and parameters."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from s2d_compiler.analysis.channels import layer_macs, layer_positions
from s2d_compiler.attributes import read
from s2d_compiler.computed import weight_macs, weight_shape
from s2d_compiler.fields import Fields, as_number, as_text, damaged, fields_of, shown
from s2d_compiler.program import Program
from s2d_compiler.rules import UNKNOWN, find_rule
from s2d_compiler.rules.layers import is_layer


@dataclass(frozen=True, slots=True)
class LayerCost:
    """MACs per sample of one operator or layer of a stage."""

    name: str
    operator: str
    macs: int
    parameters: int


@dataclass(frozen=True, slots=True)
class StageCost:
    """Cost of one stage.

    Attributes:
        macs: MACs per sample of this stage alone, head included.
        cumulative_macs: MACs per sample up to and with this stage's exit.
        parameters: Parameters that this stage adds.
        layers: What has MACs or parameters, in order.
    """

    macs: int
    cumulative_macs: int
    parameters: int
    layers: tuple[LayerCost, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a staged network beside the original's; prints as a table."""

    stages: tuple[StageCost, ...]
    original_macs: int
    original_parameters: int

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=88, no_color=True).print(self.table())
        return text.getvalue().rstrip()

    def table(self) -> Any:
        """The stage table, for rich."""
        from rich.table import Table

        macs, parameters = self.original_macs, self.original_parameters
        table = Table(caption=f"original: {macs:,} MACs per sample, {parameters:,} parameters")
        for title in ("stage", "MACs", "cumulative MACs", "of original", "parameters"):
            table.add_column(title, justify="right")
        for number, stage in enumerate(self.stages, start=1):
            share = stage.cumulative_macs / self.original_macs if self.original_macs else 0.0
            table.add_row(
                str(number),
                f"{stage.macs:,}",
                f"{stage.cumulative_macs:,}",
                f"{share:.3f}",
                f"{stage.parameters:,}",
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and ``dyn.pt``."""
        return {
            "original_macs": self.original_macs,
            "original_parameters": self.original_parameters,
            "stages": [
                {
                    "macs": s.macs,
                    "cumulative_macs": s.cumulative_macs,
                    "parameters": s.parameters,
                    "layers": [
                        [row.name, row.operator, row.macs, row.parameters] for row in s.layers
                    ],
                }
                for s in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | Fields) -> Cost:
        """Read what ``to_dict`` wrote.

        Raises:
            FormatError: A count is none, or the stages do not add up.
        """
        data = fields_of(data, "cost")
        stages: list[StageCost] = []
        total = 0
        for row in data.rows("stages"):
            macs, cumulative = row.number("macs"), row.number("cumulative_macs")
            total += macs
            if cumulative != total:
                damaged(row.at("cumulative_macs"), f"{cumulative} is not the sum {total}")
            layers = tuple(_layer_cost(item, row) for item in row.items("layers"))
            stages.append(StageCost(macs, cumulative, row.number("parameters"), layers))
        original = data.number("original_macs"), data.number("original_parameters")
        return cls(tuple(stages), *original)


def _layer_cost(item: Any, row: Fields) -> LayerCost:
    if type(item) is not list or len(item) != 4:
        damaged(row.at("layers"), f"{shown(item)} is not name, operator, MACs and parameters")
    name, operator, *counts = item
    place = row.at("layers")
    macs, parameters = (as_number(count, place) for count in counts)
    return LayerCost(as_text(name, place), as_text(operator, place), macs, parameters)


def static_macs(program: Program, node: fx.Node) -> int:
    """MACs per sample of one node of the static program."""
    if is_layer(node):
        return layer_macs(program, node)
    rule = find_rule(node) or UNKNOWN
    return rule.macs(node)


def node_macs(program: Program, stage: fx.GraphModule, node: fx.Node) -> int:
    """MACs per sample of one node of a stage subgraph."""
    origin = program.by_name.get(str(node.meta.get("origin", "")))
    if node.op == "call_module" and "head_positions" in node.meta:  # a layer of an exit's own
        weight = weight_shape(stage.get_submodule(str(node.target)))
        return math.prod(weight) * int(node.meta["head_positions"])
    if origin is None:
        return 0
    if node.op == "call_module" and is_layer(origin):
        module = stage.get_submodule(str(node.target))
        macs = math.prod(weight_shape(module)) * layer_positions(origin) + weight_macs(module)
    elif node.op == "call_function" and node.target is origin.target:
        macs = (find_rule(origin) or UNKNOWN).macs(origin)
    else:
        return 0
    taken, total = node.meta.get("share", (1, 1))
    return int(macs * taken // total)


def cost_of(
    program: Program, stages: list[fx.GraphModule], of_buffers: Collection[int] = ()
) -> Cost:
    """Sum up the counts that the cost pass wrote.

    Args:
        program: The original.
        stages: The stage subgraphs.
        of_buffers: Ids of tensors that count as no parameters: slices of the original's buffers.
    """
    seen: set[int] = set(of_buffers)
    rows: list[StageCost] = []
    total = 0
    for stage in stages:
        layers = [row for node in stage.graph.nodes if (row := _row(stage, node, seen)) is not None]
        macs = sum(row.macs for row in layers)
        total += macs
        rows.append(StageCost(macs, total, sum(row.parameters for row in layers), tuple(layers)))
    original = sum(
        static_macs(program, n) for n in program.nodes if n.op in ("call_module", "call_function")
    )
    held = {
        id(p): p.numel()
        for name, p in program.graph_module.named_parameters()
        if program.sources.get(name) not in program.buffers
    }
    parameters = sum(held.values())
    return Cost(tuple(rows), original, parameters)


def _row(stage: fx.GraphModule, node: fx.Node, seen: set[int]) -> LayerCost | None:
    macs = int(node.meta.get("macs", 0))
    held: list[nn.Parameter] = []
    if node.op == "call_module":
        held = list(stage.get_submodule(str(node.target)).parameters())
    elif node.op == "get_attr":
        value = read(stage, str(node.target))
        held = [value] if isinstance(value, nn.Parameter) else []
    fresh = [p for p in held if id(p) not in seen]
    seen.update(id(p) for p in fresh)
    parameters = sum(p.numel() for p in fresh)
    if not macs and not parameters:
        return None
    return LayerCost(str(node.target), str(node.meta.get("kind") or node.target), macs, parameters)
