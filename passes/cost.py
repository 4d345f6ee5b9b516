"""Count multiply-accumulates: every node of every stage, per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.base import STAGES, Pass, PassResult, require_form
from s2d_compiler.analysis.cost import node_macs
from s2d_compiler.program import Program


@dataclass(frozen=True)
class CountCost(Pass):
    """Write ``meta["macs"]`` (MACs per sample) to the nodes of the stage subgraphs.

    Layers are counted from the weights that the stage holds, so the count is of what runs.
    """

    name: ClassVar[str] = "count-cost"
    program: Program

    def __repr__(self) -> str:
        return "CountCost()"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, STAGES)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for called in graph_module.graph.nodes:
            if called.op != "call_module":
                continue
            stage = graph_module.get_submodule(str(called.target))
            assert isinstance(stage, fx.GraphModule)
            for node in stage.graph.nodes:
                node.meta["macs"] = node_macs(self.program, stage, node)
        return PassResult(graph_module, changed=False)
