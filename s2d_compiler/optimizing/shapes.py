"""Shapes of all values of a staged network, by running it once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

log = logging.getLogger(__name__)


class _Recorder(fx.Interpreter):
    """Writes the shape, the size of an element and the batch to every node that it runs."""

    def __init__(self, graph_module: fx.GraphModule, batch: int):
        super().__init__(graph_module)
        self.batch = batch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["shape"] = tuple(value.shape)
            n.meta["itemsize"] = value.element_size()
            n.meta["batch"] = self.batch
            n.meta["dtype"] = value.dtype
        return value


@torch.no_grad()
def record_shapes(
    stages: Sequence[fx.GraphModule],
    wiring: Sequence[Sequence[tuple[Any, ...]]],
    inputs: Sequence[torch.Tensor],
) -> bool:
    """Run the stages on example inputs and note the shape of every value in its node's ``meta``.

    Args:
        stages: The stages, or one static graph.
        wiring: Per stage, ``("input", k)`` or ``("feature", stage, position)`` per placeholder.
        inputs: The network's inputs, (N, ...) each.

    Returns:
        Whether it worked; without shapes a graph can be run but not rewritten as far.
    """
    batch = next((len(v) for v in inputs if v.ndim), 1)
    features: dict[tuple[int, int], Any] = {}
    try:
        for number, (stage, places) in enumerate(zip(stages, wiring, strict=True)):
            arguments = [
                inputs[where[1]] if where[0] == "input" else features[where[1], where[2]]
                for where in places
            ]
            found = _Recorder(stage, batch).run(*arguments)
            if len(stages) > 1 or isinstance(found[-1], tuple | list):
                features.update({(number, k): value for k, value in enumerate(found[-1])})
    except Exception as error:  # a graph may run any operator, on inputs that nobody gave
        log.info("shapes unknown, layers are not rewritten by them: %s", str(error)[:200])
        for stage in stages:
            for node in stage.graph.nodes:
                node.meta.pop("shape", None)
        return False
    return True


def example_inputs(
    shapes: Sequence[tuple[int, ...]], batch: int, like: torch.Tensor | None
) -> list[torch.Tensor]:
    """Inputs of these shapes: zeros of the type and on the device of a parameter."""
    if like is None:
        return [torch.zeros((batch, *shape)) for shape in shapes]
    return [torch.zeros((batch, *shape), dtype=like.dtype, device=like.device) for shape in shapes]
