"""What a test of one operator wants shown of a small model: all forms of it compute the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s2d_compiler import DynamicModel, Plan
from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import ChannelAnalysis, analyse_channels
from s2d_compiler.checking import check
from s2d_compiler.compiler import compile_program
from s2d_compiler.program import Program
from s2d_compiler.tracing import capture
from tests.consequences import attention_as_written, count_macs, count_stage_macs

HALVES = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
PLANS: tuple[dict[str, Any], ...] = (
    {"stages": 3, "groups": 8, "default": {"split": [3, 6], "concat": "none"}},
    HALVES | {"order": "l1"},
)


@dataclass(frozen=True)
class Proved:
    """A model's program, its channels, and what every plan made of it."""

    program: Program
    channels: ChannelAnalysis
    results: tuple[DynamicModel, ...]

    @property
    def unknown(self) -> dict[str, str]:
        """Operator or class -> why it is versioned whole."""
        return {use.operator: use.reason for use in self.channels.unknown}

    def rows(self, layer: str) -> list[int]:
        return [int(atom) for atom in self.channels.layers[layer].rows]

    def columns(self, layer: str) -> list[int]:
        return [int(atom) for atom in self.channels.layers[layer].columns[0]]


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model in float64 none of whose parameters is zero or equal to another."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return model


def inputs(shape: tuple[int, ...], batch: int = 4) -> Tensor:
    return torch.randn(
        batch, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def proved(model: nn.Module, shape: tuple[int, ...], *, counted: bool = True) -> Proved:
    """Show of a model that its program equals it for any batch, that every plan's stages equal
    the masked form, and that every stage costs what torch's own counter sees it run.

    Args:
        model: Changed in place to random weights in float64.
        shape: Of an input without the batch.
        counted: Whether torch's counter sees all that the model multiplies.
    """
    x = inputs(shape)
    program = capture(shaken(model), input_shape=shape)
    channels = analyse_channels(program)
    with torch.no_grad(), attention_as_written():
        for batch in (1, 3) if program.batch is None else (program.batch,):
            (got,), want = program.graph_module(x[:batch]), model(x[:batch])
            assert torch.allclose(got, want, rtol=1e-11, atol=1e-11), "the program is another"
    results = []
    for data in PLANS:
        plan = Plan.from_dict(data)
        assignment = assign(program, channels, plan)
        dyn = compile_program(program, plan, assignment=assignment)
        proof = check(dyn, assignment)
        assert not proof.is_vacuous
        assert max(proof.errors) < 1e-9
        if counted:
            assert [s.macs for s in dyn.cost.stages] == count_stage_macs(dyn, x[:1])
            with attention_as_written():
                assert dyn.cost.original_macs == count_macs(lambda: model(x[:1]))
        if program.batch is None:
            one, all_ = dyn(x[:1]), dyn(x)
            for a, b in zip(tree_leaves(one), tree_leaves(all_), strict=True):
                assert torch.allclose(a, b[:1], rtol=1e-11, atol=1e-11)
        results.append(dyn)
    return Proved(program, channels, tuple(results))
