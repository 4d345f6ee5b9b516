"""The driver: capture, analyse, assign, and run the passes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.base import Pass, Pipeline
from passes.concat import ConcatFeatures
from passes.cost import CountCost
from passes.exits import AddExits
from passes.extract import ExtractStages
from passes.original import AppendOriginal
from passes.split import SplitChannels
from s2d_compiler._version import __version__
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.analysis.cost import cost_of
from s2d_compiler.attributes import find
from s2d_compiler.dynamic import DynamicModel, DynamicParts, interfaces_of
from s2d_compiler.memory import explained
from s2d_compiler.plan import Plan
from s2d_compiler.program import Program
from s2d_compiler.provenance import Slice
from s2d_compiler.report import report_of
from s2d_compiler.staging import new_staged_graph
from s2d_compiler.submodules import part_of
from s2d_compiler.thin import fill
from s2d_compiler.tracing import capture

Between = Callable[[Pass, fx.GraphModule], None]
Steps = Callable[[Pipeline], Pipeline]


def default_pipeline(assignment: StageAssignment) -> Pipeline:
    """The passes of a transform, in order."""
    passes: list[Pass] = [
        SplitChannels(assignment),
        ConcatFeatures(assignment),
        AddExits(assignment),
        ExtractStages(),
    ]
    if assignment.plan.final == "original":
        passes.append(AppendOriginal(assignment.program))
    passes.append(CountCost(assignment.program))
    return Pipeline(tuple(passes))


def transform(
    model: nn.Module,
    plan: Plan | Mapping[str, Any],
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    submodule: str | None = None,
    pipeline: Steps | None = None,
    between: Between | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> DynamicModel:
    """Rewrite a static model as a network of stages.

    Args:
        model: Any ``nn.Module`` that ``torch.export`` can capture; left untouched.
        plan: The plan, or what ``Plan.from_dict`` takes.
        example_inputs: Positional inputs: tensors with a batch in dimension 0, or tuples, lists
            and dicts of them; without them the plan's ``input_shape``, else the first
            convolution's channels at 224x224.
        example_kwargs: Keyword inputs, likewise; the result takes them by keyword, too.
        submodule: Path of the part to transform, such as ``"backbone"``; inputs, plan and
            result are about this part alone.
        pipeline: Given the default pipeline, returns the one to run (to add a pass).
        between: Called after each pass with the pass and the graph (to print it).
        made_by: What to record about the origin of the model.

    Returns:
        The staged network, in evaluation mode, on the model's device and in its types.

    Raises:
        PlanError: The plan does not fit the model.
        InputShapeError, CaptureError: The model cannot be captured.
        UsageError: There is no such submodule.
        OutOfMemoryError: Either takes more memory than there is.
    """
    if not isinstance(plan, Plan):
        plan = Plan.from_dict(plan)
    part = part_of(model, submodule)
    program = capture(part, example_inputs, plan.input_shape, example_kwargs)
    if submodule is not None:
        made_by = {"submodule": submodule, **(made_by or {})}
    return compile_program(program, plan, pipeline=pipeline, between=between, made_by=made_by)


@explained("building the stages", "compile a part of the model (--submodule)")
def compile_program(
    program: Program,
    plan: Plan,
    *,
    pipeline: Steps | None = None,
    between: Between | None = None,
    made_by: Mapping[str, Any] | None = None,
    assignment: StageAssignment | None = None,
) -> DynamicModel:
    """Like ``transform``, from a program that was captured before.

    Raises:
        OutOfMemoryError: The stages do not fit in memory beside the original.
    """
    if assignment is None:
        assignment = assign(program, analyse_channels(program), plan)
    steps = default_pipeline(assignment)
    if pipeline is not None:
        steps = pipeline(steps)
    network = steps.run(new_staged_graph(assignment), between)
    return _dynamic_model(network, assignment, made_by or {})


def _dynamic_model(
    network: fx.GraphModule, assignment: StageAssignment, made_by: Mapping[str, Any]
) -> DynamicModel:
    program, plan = assignment.program, assignment.plan
    slices: Mapping[str, Slice] = network.meta["slices"]
    fill(network, slices, program)
    interfaces = interfaces_of(network)
    stages = [network.get_submodule(f"stages.{i}") for i in range(len(interfaces))]
    graphs = [s for s in stages if isinstance(s, fx.GraphModule)]
    _move_indices(graphs, program)
    parts = DynamicParts(
        plan=plan,
        cost=cost_of(program, graphs, _of_buffers(network, program)),
        report=report_of(assignment, graphs),
        provenance={},
        interfaces=interfaces,
        owners=tuple(assignment.owners.tolist()),
        input_shapes=program.input_shapes,
        batch=program.batch,
        output_spec=program.output_spec,
        input_spec=program.input_spec,
        made_by={**versions(), **made_by},
    )
    dyn = DynamicModel(graphs, parts)
    known = set(dyn.state_dict(keep_vars=True))
    object.__setattr__(parts, "provenance", {k: v for k, v in slices.items() if k in known})
    return dyn.eval()


def _of_buffers(network: fx.GraphModule, program: Program) -> set[int]:
    """Ids of the tensors that are slices of the original's buffers."""
    slices: Mapping[str, Slice] = network.meta["slices"]
    return {id(find(network, k)) for k, s in slices.items() if s.source in program.buffers}


def _move_indices(stages: list[fx.GraphModule], program: Program) -> None:
    """Put index tensors on the model's device."""
    tensor = next(program.graph_module.parameters(), None)
    if tensor is None or tensor.device.type == "cpu":
        return
    for stage in stages:
        indices = dict(stage.named_children()).get("_indices")
        if indices is not None:
            indices.to(tensor.device)


def versions() -> dict[str, str]:
    """Versions of what makes a staged network."""
    return {
        "s2d_compiler": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
