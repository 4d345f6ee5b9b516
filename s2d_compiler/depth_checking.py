"""The compiler checks its own exits along depth: in float64, and every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from s2d_compiler.checking import (
    DEFECT,
    Proof,
    attempts,
    check_weights,
    compare,
    random_inputs,
    random_program,
    require_same_graphs,
    require_within,
    settle,
)
from s2d_compiler.compiler import Steps, compile_program
from s2d_compiler.depth_plan import HEADS
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import CheckError
from s2d_compiler.exit_heads import ExitHead
from s2d_compiler.exit_placement import ExitPlacement
from s2d_compiler.memory import explained

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@explained(
    "the self-check, which runs the network in double precision,",
    "skip it (--no-check), or give a smaller input shape (--input-shape)",
)
def check_depth(
    dyn: DynamicModel,
    placement: ExitPlacement,
    *,
    seed: int = 0,
    batch: int = 4,
    steps: Steps | None = None,
) -> Proof:
    """Prove a fresh network with exits along depth.

    The stages are built once more from a float64 copy of the program with random parameters; their
    last exit must equal the program's output bit for bit, every earlier one its head, computed
    apart from the graph, on what the program itself computes at its place. The graphs must be the
    same as ``dyn``'s, and every tensor of ``dyn`` the original's, or what the seed gives.

    Args:
        dyn: The result.
        placement: What it was made from.
        seed: Of the random weights and inputs.
        batch: Number of inputs.
        steps: The ``pipeline`` argument that it was made with, if any.

    Raises:
        CheckError: Any of this differs.
        OutOfMemoryError: There is too little memory for it.
    """
    tensors = check_weights(dyn, placement.program) + _check_heads(dyn, placement)
    proof = attempts(lambda each: _compare(dyn, placement, each, batch, steps), seed)
    require_within(proof, "the head on the original's value")
    return replace(proof, tensors=tensors)


def _check_heads(dyn: DynamicModel, placement: ExitPlacement) -> int:
    state = dyn.state_dict()
    expected = placement.parameters()
    for name, tensor in expected.items():
        if name not in state or not torch.equal(state[name].cpu(), tensor):
            raise CheckError(
                f"{name} does not hold what the plan's seed gives: it was changed, or this is "
                f"{DEFECT}"
            )
    return len(expected)


def _compare(
    dyn: DynamicModel, placement: ExitPlacement, seed: int, batch: int, steps: Steps | None
) -> Proof:
    generator = torch.Generator().manual_seed(seed)
    program = random_program(placement.program, generator)
    inputs = random_inputs(program, generator, batch)
    settle(program.graph_module, inputs)
    mine = placement.of(program)
    staged = compile_program(program, placement.plan, assignment=mine, pipeline=steps)
    require_same_graphs(dyn, staged)
    state = staged.state_dict()
    with torch.no_grad():
        found = [torch.utils._pytree.tree_leaves(exit_) for exit_ in staged.exits_of(inputs)]
        recorder = _Recorder(program.graph_module, {h.place.node for h in mine.heads})
        last = torch.utils._pytree.tree_leaves(recorder.run(*inputs))
        expected = [
            [_exit(mine, number, head, recorder.values[head.place.node], state)]
            for number, head in enumerate(mine.heads)
        ]
    pairs = [compare(got, want) for got, want in zip(found, [*expected, last], strict=True)]
    if not torch.equal(found[-1][0].nan_to_num(), last[0].nan_to_num()):
        raise CheckError(
            f"the last exit differs from the original by {pairs[-1][0]:.2e} of the output's "
            f"spread, and both must be equal bit for bit: {DEFECT}"
        )
    return Proof(tuple(error for error, _ in pairs), tuple(spread for _, spread in pairs), 0)


class _Recorder(fx.Interpreter):
    """Runs a program and keeps some of its values."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]):
        super().__init__(module)
        self.wanted = wanted
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = value
        return value


def _exit(
    placement: ExitPlacement,
    number: int,
    head: ExitHead,
    x: torch.Tensor,
    state: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """What a head makes of a value, written out."""

    def tensors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        path = f"stages.{number}.{placement.head_name}.{name}"
        return state[f"{path}.weight"], state[f"{path}.bias"]

    x = x.movedim((head.place.batch, head.place.channel), (0, 1))
    for step in range(1, HEADS[head.kind] + 1):
        weight, bias = tensors(f"conv{step}")
        if head.is_grid:
            x = _CONVOLUTIONS[x.dim() - 2](x, weight, bias, padding=1)
        else:
            x = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        x = x.clamp(min=0)
    x = F.linear(x.flatten(2).mean(2) if x.dim() > 2 else x, *tensors("linear"))
    for node in placement.tail:
        given: Any = {node.all_input_nodes[0]: x}
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        operator: Any = node.target
        x = operator(*args, **kwargs)
    return x
