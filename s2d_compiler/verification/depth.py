"""Exits along depth in terms: the model as it is, and heads on the values that the plan names.

Written after docs/exits-along-depth.md, apart from the pass that builds heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.analysis.cost import static_macs
from s2d_compiler.depth_plan import HEADS
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import VerifyError
from s2d_compiler.exit_heads import ExitHead
from s2d_compiler.exit_placement import ExitPlacement
from s2d_compiler.provenance import Slice
from s2d_compiler.verification.arguments import Value
from s2d_compiler.verification.layers import Held
from s2d_compiler.verification.operators import Operators
from s2d_compiler.verification.static import Environment, StaticRun
from s2d_compiler.verification.words import DAMAGED

aten = torch.ops.aten
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def head_slices(placement: ExitPlacement) -> dict[str, Slice]:
    """The heads' tensors, by their names in the staged network, as sources of terms."""
    return {
        f"stages.{number}.{placement.head_name}.{layer}.{key}": _slice(number, layer, key, rank)
        for number, head in enumerate(placement.heads)
        for layer, rank in _ranks(head).items()
        for key, rank in (("weight", rank), ("bias", 1))
    }


def _slice(number: int, layer: str, key: str, rank: int) -> Slice:
    return Slice(f"exit head {number + 1}: {layer}.{key}", (None,) * rank)


def _ranks(head: ExitHead) -> Mapping[str, int]:
    """Dimensions of every layer's weight."""
    spatial = len(head.shape) - 2 if head.is_grid else 0
    convolutions = {f"conv{k}": 2 + spatial for k in range(1, HEADS[head.kind] + 1)}
    return {**convolutions, "linear": 2}


class DepthSpecification(StaticRun):
    """Runs the model once, and every head on what the model computes.

    Args:
        placement: The model's program, and the exits that the plan puts into it.
        operators: What operators do to terms.
        inputs: Terms of the network's inputs.
    """

    def __init__(self, placement: ExitPlacement, operators: Operators, inputs: Any):
        super().__init__(placement.program, operators, inputs)
        self.placement = placement

    def exits(self, *, keep: bool) -> Iterator[Environment]:
        """Per stage, the value of the output and, with ``keep``, those of all nodes."""
        places = {self.program.by_name[head.place.node] for head in self.placement.heads}
        found = self.run(self._plain, lambda node: keep or node in places)
        (leaf,) = self.leaves
        for number, head in enumerate(self.placement.heads):
            inside = self._head(number, head, found[self.program.by_name[head.place.node]])
            steps = {fx.Node(fx.Graph(), f"h{k}", "placeholder", "h", (), {}): v
                     for k, v in enumerate(inside)} if keep else {}  # fmt: skip
            yield {**(found if keep else {}), **steps, leaf: inside[-1]}
        yield found

    def _head(self, number: int, head: ExitHead, x: Value) -> list[Value]:
        """Values inside a head, its output last."""
        batch, channel = head.place.batch, head.place.channel
        places = [d for d in range(len(head.shape)) if d not in (batch, channel)]
        inside: list[Value] = []
        count = HEADS[head.kind]
        is_grid = count and head.is_grid
        order = (batch, channel, *places) if is_grid else (batch, *places, channel)
        x = Value(x.terms.permute(order))
        channels = head.shape[channel]
        for step in range(1, count + 1):
            layer: nn.Module = nn.Linear(channels, head.width, device="meta")
            if is_grid:
                kind = _CONVOLUTIONS[len(places)]
                layer = kind(channels, head.width, 3, padding=1, device="meta")
            inside.append(self._layer(number, f"conv{step}", layer, x, head))
            inside.append(self.operators.apply(aten.relu.default, (inside[-1],), {}))
            x, channels = inside[-1], head.width
        if places:
            first = 2 if is_grid else 1
            dims = list(range(first, first + len(places)))
            inside.append(self.operators.apply(aten.mean.dim, (x, dims), {}))
            x = inside[-1]
        linear = nn.Linear(channels, head.classes, device="meta")
        inside.append(self._layer(number, "linear", linear, x, head))
        for node in self.placement.tail:
            operand, x = node.all_input_nodes[0], inside[-1]
            given: Any = {operand: x}
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
            inside.append(self.operators.apply(node.target, args, kwargs))
        return inside

    def _layer(self, number: int, name: str, layer: nn.Module, x: Value, head: ExitHead) -> Value:
        rank = _ranks(head)[name]
        slices = {k: _slice(number, name, k, n) for k, n in (("weight", rank), ("bias", 1))}
        return self._module(Held(layer, slices), x)


def compare_stage_costs(dyn: DynamicModel, placement: ExitPlacement) -> None:
    """Require that every stage costs what its part of the model and its head do.

    Raises:
        VerifyError: One computes more, or less.
    """
    program = placement.program
    done: set[fx.Node] = set()
    expected: list[int] = []
    places = [program.by_name[head.place.node] for head in placement.heads]
    for number, place in enumerate([*places, program.output]):
        stack, macs = [place], 0
        while stack:
            node = stack.pop()
            if node in done:
                continue
            done.add(node)
            stack += node.all_input_nodes
            if node.op in ("call_module", "call_function"):
                macs += static_macs(program, node)
        head = placement.heads[number].macs if number < len(places) else 0
        expected.append(macs + head)
    for number, (stage, macs) in enumerate(zip(dyn.cost.stages, expected, strict=True), start=1):
        if stage.macs != macs:
            raise VerifyError(
                f"stage {number} costs {stage.macs:,} MACs, its part of the model and its head "
                f"{macs:,}: it computes what belongs to another stage; {DAMAGED}"
            )
