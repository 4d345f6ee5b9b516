"""Passes in the wrong order, graphs that a pass left broken, and rules that read wrongly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from passes.base import Pass, PassResult
from passes.exits import AddExits
from passes.mask import MaskChannels
from s2d_compiler import Plan
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.compiler import default_pipeline
from s2d_compiler.errors import PassError
from s2d_compiler.layout import layout
from s2d_compiler.staging import StageBuilder, new_staged_graph
from s2d_compiler.tracing import capture
from s2d_compiler.verifier import verify_graph
from tests import test_passes as corruptions
from tests.errors.case import Case


class Halves(nn.Module):
    """Its second half of channels belongs to stage 2 alone, and a mean has a version each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        second = x[:, 4:].relu()
        x = x * x.mean(1, keepdim=True)
        return self.head(torch.cat([x[:, :4], second], 1).mean((2, 3)))


def assigned() -> StageAssignment:
    torch.manual_seed(0)
    program = capture(Halves(), (torch.zeros(2, 3, 8, 8),))
    return assign(program, analyse_channels(program), Plan.uniform(2, 8, concat="all"))


def graph(assignment: StageAssignment, *steps: str) -> fx.GraphModule:
    made = new_staged_graph(assignment)
    for each in default_pipeline(assignment).passes:
        if each.name in steps:
            made = each.run(made).graph_module
    return made


def refused(trigger: Callable[[], object], *parts: str) -> Case:
    def quietly(folder: Path) -> object:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempted to insert a get_attr")
            return trigger()

    return Case(quietly, PassError, *parts)


def corrupted(corrupt: Callable[[fx.GraphModule], object], *parts: str) -> Case:
    """A graph with exits in which one thing was changed."""

    def trigger() -> object:
        steps = corruptions.STEPS["exits"]
        broken = corruptions.after(corruptions.assigned("residual", corruptions.TWO), *steps)
        corrupt(broken)
        return verify_graph(broken)

    return refused(trigger, *parts)


def in_a_stage(corrupt: Callable[[fx.GraphModule], object], *parts: str) -> Case:
    """A network of extracted stages, in one of which one thing was changed."""

    def trigger() -> object:
        steps = corruptions.STEPS["extract"]
        network = corruptions.after(corruptions.assigned("residual", corruptions.TWO), *steps)
        stage = network.get_submodule("stages.0")
        assert isinstance(stage, fx.GraphModule)
        corrupt(stage)
        return verify_graph(network)

    return refused(trigger, *parts)


def reading(read: Callable[[StageBuilder, dict[str, fx.Node]], object], *parts: str) -> Case:
    """A rule that asks for what it cannot have; nodes by the name of their operator."""

    def trigger() -> object:
        assignment = assigned()
        made = new_staged_graph(assignment)
        builder = StageBuilder(made, assignment)
        output = next(node for node in made.graph.nodes if node.op == "output")
        nodes: dict[str, fx.Node] = {}
        for node in assignment.program.nodes:
            nodes.setdefault(str(getattr(node.target, "_opname", node.target)), node)
        with builder.inserting_before(output):
            return read(builder, nodes)

    return refused(trigger, *parts)


@dataclass(frozen=True)
class Hides(Pass):
    """Changes a graph and says that it did not."""

    name: ClassVar[str] = "hides"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        output.args = (tuple(reversed(output.args[0])),)
        return PassResult(graph_module, changed=False)


FIRST = layout((1, 4, 1, 1), np.array([0, 1]))


def no_exits() -> object:
    assignment = assigned()
    made = graph(assignment, "split-channels")
    return AddExits(assignment).ensures(made)


def no_masked_exits() -> object:
    assignment = assigned()
    return MaskChannels(assignment).ensures(new_staged_graph(assignment))


CASES = {
    "no masked exits": refused(
        no_masked_exits,
        "mask-channels left",
        "as output",
        "must be a tuple of 2 exits",
        "give output.args one per stage",
    ),
    "order": refused(
        lambda: AddExits(assignment := assigned()).run(new_staged_graph(assignment)),
        "add-exits",
        "this one is empty",
        "needs a graph that is split",
        "run it after split-channels",
    ),
    "hidden change": refused(
        lambda: Hides().run(graph(assigned(), "split-channels", "add-exits"), verify=True),
        "hides",
        "changed the graph",
        "said that it did not",
        "return PassResult(graph_module, changed=True)",
    ),
    "no such pass": refused(
        lambda: default_pipeline(assigned()).index("add-exit"),
        "no pass is named",
        "'add-exit'",
        "the pipeline has",
        "split-channels, ",
    ),
    "no exits": refused(
        no_exits,
        "add-exits left",
        "as output",
        "must be a tuple of 2 exits",
        "give output.args one per stage",
    ),
    # the verifier
    "no stage": corrupted(
        corruptions.no_stage,
        "node 'stages_1_bn1'",
        "(call_module stages.1.bn1)",
        "has no stage",
        "set meta['stage']",
    ),
    "later stage": corrupted(
        corruptions.later_stage,
        "of stage 1",
        "reads 'stages_1_conv1' of stage 2",
        "a stage reads itself and earlier ones only",
        "change its meta['stage'], or what it reads",
    ),
    "exit of a later stage": corrupted(
        corruptions.exit_of_a_later_stage,
        "the exit of stage 1",
        "'stages_1_fc' of stage 2",
        "an exit reads its own stage and earlier ones only",
        "give the output another",
    ),
    "no module": corrupted(
        corruptions.no_module,
        "node ",
        "'stages.0.gone'",
        "does not exist",
        "put it into the graph module before the node",
    ),
    "slice of nothing": corrupted(
        corruptions.slice_of_nothing,
        "meta['slices']",
        "'stages.0.gone.weight'",
        "does not exist",
        "drop the entry of what a pass removes",
    ),
    "slice of another rank": corrupted(
        corruptions.slice_of_another_rank,
        "stages.1.conv2.weight",
        "has shape (4, 8, 3, 3)",
        "its slice 2 dimensions",
        "change its entry in meta['slices'] with the tensor",
    ),
    "slice of another length": corrupted(
        corruptions.slice_of_another_length,
        "stages.1.conv2.weight",
        "has shape (4, 8, 3, 3)",
        "its slice 3 positions along one of them",
        "change its entry in meta['slices'] with the tensor",
    ),
    "node in another stage": in_a_stage(
        corruptions.node_in_another_stage,
        "node ",
        "of stage 2",
        "stands in stage 1",
        "extract each stage's own nodes only",
    ),
    # what rules read
    "tensor as a number": reading(
        lambda builder, nodes: builder.scalar(nodes["relu"], 1),
        "relu",
        "is a tensor",
        "scalar() reads numbers only",
        "read it with read() or full()",
    ),
    "another frame": reading(
        lambda builder, nodes: builder.read(nodes["relu"], layout((1, 5, 1, 1), np.array([0])), 2),
        "relu",
        "not (1, 5, 1, 1)",
        "channels lie along (1, 4, 1, 1)",
        "read it with a layout of its own frame",
    ),
    "nothing to read": reading(
        lambda builder, nodes: builder.any_part(nodes["relu"], 1),
        "relu",
        "stage 1 can read nothing of it",
        "later stages own all of it",
        "read it with full()",
    ),
    "a later stage's": reading(
        lambda builder, nodes: builder.read(
            nodes["relu"], layout((1, 4, 1, 1), np.array([0, 1])), 1
        ),
        "relu",
        "would read channels of stage 2",
        "a stage reads itself and earlier ones only",
        "read it with full()",
    ),
    "a version for nobody": reading(
        lambda builder, nodes: builder.full(nodes["mean"], 0),
        "mean",
        "one stage's version of it",
        "what is nobody's would read",
        "read it for a stage, from 1",
    ),
    "positions elsewhere": reading(
        lambda builder, nodes: builder.choose(
            builder.part(nodes["relu"], 2),  # type: ignore[arg-type]
            FIRST,
            layout((1, 4, 1, 1), np.array([2, 3])),
            2,
        ),
        "relu",
        "positions (2, 3)",
        "are not in this part alone",
        "read them with read()",
    ),
}
