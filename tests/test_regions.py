"""Regions of another gradient or autocast mode: inlined, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from s2d_compiler.errors import CaptureError
from s2d_compiler.program import Program
from s2d_compiler.regions import inline_regions
from s2d_compiler.tracing import capture
from tests.proofs import inputs, proved, shaken

SHAPE = (3, 4, 4)


class Model(nn.Module):
    """A stem, a body, and two layers behind it."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.out, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.out(self.body(self, self.stem(x))).relu().mean((2, 3)))


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(x * m.scale)
    return x * gate


def with_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.conv(x)
    return y * m.scale


def layers_without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.conv(x).relu()
    return m.conv(y)


def several_results(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        a, b = x.chunk(2, 1)
        c = a * b
    return torch.cat([c, a + b], 1) * m.scale


def an_operand_handed_through(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y, z = x, x + m.scale
    return y * z


def nested(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * m.scale
        with torch.enable_grad():
            z = m.conv(y)
            with torch.no_grad():
                w = z.relu()
        y = w + z
    return y


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.conv(x.clamp(-3, 3)) * m.scale


def both_modes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        gate = torch.sigmoid(x)
    return m.conv(x) * gate


def written_in_place(m: Any, x: Tensor) -> Tensor:
    y = x + m.scale
    with torch.no_grad():
        y[:, :2] *= 0.5
        y.relu_()
    return y


def twice(m: Any, x: Tensor) -> Tensor:
    return without_autocast(m, without_autocast(m, x).tanh())


BODIES = [
    without_gradients,
    with_gradients,
    layers_without_gradients,
    several_results,
    an_operand_handed_through,
    nested,
    without_autocast,
    both_modes,
    written_in_place,
    twice,
]


def exported(model: nn.Module) -> fx.GraphModule:
    """The graph as it is captured, regions and all."""
    with torch.no_grad():
        return torch.export.export(model, (inputs(SHAPE, 2),), strict=False).graph_module


def regions(program: Program | fx.GraphModule) -> list[str]:
    module = program if isinstance(program, fx.GraphModule) else program.graph_module
    nodes = module.graph.nodes
    return [n.name for n in nodes if "wrap_with" in str(n.target) or "submod" in str(n.target)]


@pytest.mark.parametrize("body", BODIES)
def test_regions_are_inlined(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = Model(body)
    found = proved(model, SHAPE)
    assert not found.unknown
    assert not regions(found.program)
    assert found.program.batch is None
    x = inputs(SHAPE, 3)
    assert torch.equal(found.program.graph_module(x)[0], model(x))


@pytest.mark.parametrize("body", [nested, several_results, both_modes, without_autocast])
def test_a_captured_graph_with_regions_and_the_inlined_one_are_the_same(
    body: Callable[[Any, Tensor], Tensor],
) -> None:
    with torch.enable_grad():
        module = torch.export.export(
            shaken(Model(body)), (inputs(SHAPE, 2),), strict=False
        ).graph_module
    assert regions(module), "nothing to inline"
    graph = inline_regions(module)
    graph.lint()
    assert not regions(fx.GraphModule(module, graph))
    shapes = [tuple(n.meta["val"].shape) for n in graph.nodes if n.op == "placeholder"]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    got, want = fx.GraphModule(module, graph)(*given), module(*given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_graph_without_regions_is_handed_back() -> None:
    module = exported(shaken(Model(lambda m, x: m.conv(x))))
    assert inline_regions(module) is module.graph


def test_autocast_inside_a_model_is_refused() -> None:
    """What it would run in half precision is not written in a graph."""

    def body(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.conv(x).float()

    with pytest.raises(CaptureError, match="turns autocast on inside itself") as caught:
        capture(Model(body).eval(), input_shape=SHAPE)
    assert "bfloat16" in str(caught.value)
    assert "run the whole network under autocast instead" in str(caught.value)
