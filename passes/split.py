"""Split: cut every layer's channels into one thin layer per stage.

Source: S2DNAS, section 3.2, "Split".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.base import EMPTY, SPLIT, Pass, PassResult, require_form
from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.labels import has_atoms
from s2d_compiler.program import is_scalar
from s2d_compiler.staging import StageBuilder


@dataclass(frozen=True)
class SplitChannels(Pass):
    """Emit every value of the static program as parts, one per stage.

    Each weighted layer becomes thin layers that read only what their own stage, and nobody,
    owns. Prediction layers stay one layer, which reads everything. The graph computes what
    the original does with all connections between stages removed.
    """

    name: ClassVar[str] = "split-channels"
    verified: ClassVar[bool] = False  # the graph is whole once it has exits
    assignment: StageAssignment

    def __repr__(self) -> str:
        return f"SplitChannels(stages={self.assignment.stages})"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, EMPTY)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        builder = StageBuilder(graph_module, self.assignment)
        with builder.inserting_before(output):
            output.args = (self._split(builder),)
        graph_module.meta["form"] = SPLIT
        return PassResult(graph_module, changed=True)

    def _split(self, builder: StageBuilder) -> tuple[Any, ...]:
        last = self.assignment.thin_stages
        for node in self.assignment.program.nodes:
            if node.op == "output" or is_scalar(node) or node.op in ("placeholder", "get_attr"):
                continue
            if has_atoms(builder.labels(node)):
                for stage in range(1, last + 1):
                    builder.part(node, stage)
        return exit_of(builder, self.assignment, last)


def exit_of(builder: StageBuilder, assignment: StageAssignment, stage: int) -> tuple[Any, ...]:
    """The static program's flat outputs as a stage sees them; what is no tensor stays."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        return builder.scalar(value, stage) if is_scalar(value) else builder.full(value, stage)

    return tuple(leaf(value) for value in assignment.program.output_leaves)
