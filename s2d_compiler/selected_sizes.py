"""Sizes that export leaves open though they never change.

What a mask selects has a size that ``torch.export`` does not know, also where the mask is a
constant of the model: it writes an *unbacked* symbol (``u0``). Such a size is found by running the
model, and written into the graph's record of shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from s2d_compiler.errors import CaptureError


def settle_sizes(graph_module: fx.GraphModule, examples: Sequence[torch.Tensor]) -> None:
    """Replace unbacked symbols in the shapes of a captured graph by the sizes that they have.

    Args:
        graph_module: The captured model.
        examples: Inputs that it can run on.

    Raises:
        CaptureError: A size depends on the values of the inputs.
    """
    nodes = [n for n in graph_module.graph.nodes if any(_open(s) for s in _sizes(n))]
    if not nodes:
        return
    runs = []
    for inputs in (examples, [_others(x) for x in examples]):
        recorder = _Recorder(graph_module)
        with torch.no_grad():
            recorder.run(*inputs)
        runs.append(recorder.found)
    for symbol, size in runs[0].items():
        if runs[1].get(symbol) != size:
            raise CaptureError(
                f"the size of {nodes[0].name} depends on the values of the input: {size} for one, "
                f"{runs[1].get(symbol)} for another. Values of tensors must not decide what runs; "
                "multiply by the mask instead of selecting with it."
            )
    for node in nodes:
        _settle(node, runs[0])


class _Recorder(fx.Interpreter):
    """Notes the number that every unbacked symbol stands for."""

    def __init__(self, graph_module: fx.GraphModule):
        super().__init__(graph_module)
        self.found: dict[Any, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        sizes = tuple(result.shape) if isinstance(result, torch.Tensor) else (result,)
        for size, real in zip(_sizes(n), sizes, strict=False):
            if _open(size) and size.node.expr.is_Symbol:
                self.found.setdefault(size.node.expr, int(real))
        return result


def _sizes(node: fx.Node) -> Iterator[Any]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        yield from value.shape
    elif isinstance(value, torch.SymInt):
        yield value


def _open(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _others(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point():
        return x
    generator = torch.Generator(device=x.device).manual_seed(0)
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x)


def _settle(node: fx.Node, found: dict[Any, int]) -> None:
    def known(size: Any) -> Any:
        if not _open(size):
            return size
        expression = size.node.expr.subs(found)
        return int(expression) if not expression.free_symbols else size

    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        shape = [known(size) for size in value.shape]
        with value.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    else:
        node.meta["val"] = known(value)
