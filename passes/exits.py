"""Exits: one prediction per stage.

Source: S2DNAS, section 3.2: the prediction layer concatenates the features of all previous
stages, and every stage has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.base import EXITS, SPLIT, Pass, PassResult, remove_unused, require_form
from passes.split import exit_of
from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.errors import PassError
from s2d_compiler.staging import StageBuilder


@dataclass(frozen=True)
class AddExits(Pass):
    """Give every stage an exit head.

    Stage t's head reads the channels of all stages up to t and starts as the original's
    columns for them plus its bias. What follows a prediction layer is repeated per head. A
    network without prediction layers returns, at stage t, the channels of stages up to t
    and zeros elsewhere. The output becomes a tuple with one entry per stage.
    """

    name: ClassVar[str] = "add-exits"
    assignment: StageAssignment

    def __repr__(self) -> str:
        return f"AddExits(stages={self.assignment.stages})"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, SPLIT)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        output = next(node for node in graph.nodes if node.op == "output")
        builder = StageBuilder(graph_module, self.assignment, reuse=True)
        with builder.inserting_before(output):
            exits = tuple(
                exit_of(builder, self.assignment, stage)
                for stage in range(1, self.assignment.thin_stages + 1)
            )
        output.args = (exits,)
        graph_module.meta["form"] = EXITS
        remove_unused(graph)
        return PassResult(graph_module, changed=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        exits = output.args[0]
        if not isinstance(exits, tuple) or len(exits) != self.assignment.thin_stages:
            raise PassError(
                f"{self.name} left {str(exits)[:80]} as output, which must be a tuple of "
                f"{self.assignment.thin_stages} exits; give output.args one per stage"
            )
