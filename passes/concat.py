"""Concat: let layers of later stages reuse what earlier stages computed.

Source: S2DNAS, section 3.2, "Concat" (the indicator matrices).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.base import SPLIT, Pass, PassResult, remove_unused, require_form
from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.staging import StageBuilder
from s2d_compiler.thin import remove_modules


@dataclass(frozen=True)
class ConcatFeatures(Pass):
    """Widen thin layers to read the earlier stages that the plan names for them.

    A layer's input becomes the concatenation of the parts, its weight the wider slice.
    Layers cut between groups read their own channels only and stay as they are.
    """

    name: ClassVar[str] = "concat-features"
    verified: ClassVar[bool] = False  # the graph is whole once it has exits
    assignment: StageAssignment

    def __repr__(self) -> str:
        return f"ConcatFeatures(stages={self.assignment.stages})"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, SPLIT)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        builder = StageBuilder(graph_module, self.assignment, reuse=True)
        wider = [
            n for n in graph_module.graph.nodes if "layer" in n.meta and self._is_wider(builder, n)
        ]
        remove_modules(graph_module, {str(n.target) for n in wider})
        for thin in wider:
            self._widen(builder, thin)
        if wider:
            remove_unused(graph_module.graph)
        return PassResult(graph_module, changed=bool(wider))

    def _is_wider(self, builder: StageBuilder, thin: fx.Node) -> bool:
        """Whether the plan lets this thin layer read more than its own stage."""
        node = self.assignment.program.by_name[thin.meta["layer"]]
        if builder.is_cut_between_groups(node):
            return False
        layer, stage = self.assignment.channels.layer_of[node.name], int(thin.meta["stage"])
        before = self.assignment.columns_alive(layer, stage, reuse=False)
        after = self.assignment.columns_alive(layer, stage, reuse=True)
        return not (before == after).all()

    def _widen(self, builder: StageBuilder, thin: fx.Node) -> None:
        node = self.assignment.program.by_name[thin.meta["layer"]]
        stage = int(thin.meta["stage"])
        with builder.inserting_before(thin):
            wide = builder.thin_layer(node, builder.own_layout(node, stage), stage)
        thin.replace_all_uses_with(wide)
        builder.replace_source(thin, wide)
        builder.graph.erase_node(thin)
