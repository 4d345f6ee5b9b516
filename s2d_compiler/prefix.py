"""One exit of a staged network as a module of its own."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from s2d_compiler.attributes import graph_module
from s2d_compiler.dynamic import DynamicParts


class StagePrefix(nn.Module):
    """The stages up to one exit; calling it returns that exit's output.

    Made by ``DynamicModel.at_stage``. Parameters are the staged network's own, under the same
    names; the heads of earlier stages, and whatever else this exit does not need, are left out.

    Args:
        stages: All stages of the network.
        parts: What else it is made of.
        stage: The exit, from 1.
    """

    def __init__(self, stages: list[fx.GraphModule], parts: DynamicParts, stage: int):
        super().__init__()
        self.stage = stage
        self.parts = parts
        self.inputs: dict[int, tuple[tuple[Any, ...], ...]] = {}
        self.handed: dict[int, tuple[int, ...]] = {}
        kept: dict[str, nn.Module] = {}
        needed: set[tuple[int, int]] = set()
        for number in range(stage - 1, -1, -1):
            positions = tuple(sorted(k for source, k in needed if source == number))
            is_last = number == stage - 1
            if not positions and not is_last:
                continue
            graph, used = _trimmed(stages[number], positions, with_outputs=is_last)
            where = parts.interfaces[number].inputs
            self.inputs[number] = tuple(where[k] for k in used)
            self.handed[number] = positions
            needed |= {(w[1], w[2]) for w in self.inputs[number] if w[0] == "feature"}
            kept[str(number)] = graph
        self.stages = nn.ModuleDict(dict(reversed(kept.items())))
        self.training = any(module.training for module in stages)

    @property
    def macs(self) -> int:
        """MACs per sample of one call: the stages that it runs, without the earlier heads."""
        graphs = [
            stage.graph for stage in self.stages.values() if isinstance(stage, fx.GraphModule)
        ]
        return sum(int(node.meta.get("macs", 0)) for graph in graphs for node in graph.nodes)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the stages that this exit needs.

        Returns:
            The exit's output, of the original's structure.

        Raises:
            InputShapeError: The inputs are not of the shape the network was compiled for.
        """
        given = self.parts.flat_inputs(inputs, keywords)
        features: dict[tuple[int, int], Any] = {}
        leaves: tuple[Any, ...] = ()
        for name, stage in self.stages.items():
            number = int(name)
            arguments = [
                given[where[1]] if where[0] == "input" else features[where[1], where[2]]
                for where in self.inputs[number]
            ]
            leaves, handed = stage(*arguments)
            features.update(
                ((number, k), value) for k, value in zip(self.handed[number], handed, strict=True)
            )
        return self.parts.structured(leaves)


def _trimmed(
    stage: fx.GraphModule, features: tuple[int, ...], *, with_outputs: bool
) -> tuple[fx.GraphModule, list[int]]:
    """A stage without what computes other features, and without its head unless it is wanted.

    Returns:
        The stage, and which of its inputs are left.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(stage.graph, {}))
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    outputs: Any = output.args[0]
    leaves, handed = outputs
    output.args = ((leaves if with_outputs else (), tuple(handed[k] for k in features)),)
    graph_module(stage, graph, "Untrimmed").graph.eliminate_dead_code()
    used = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for position, node in enumerate(placeholders):
        if node.users:
            used.append(position)
        else:
            graph.erase_node(node)
    trimmed = graph_module(stage, graph, type(stage).__name__)
    trimmed.training = stage.training
    return trimmed, used
