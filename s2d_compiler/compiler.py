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
from passes.depth_exits import AddDepthExits
from passes.exits import AddExits
from passes.extract import ExtractStages
from passes.original import AppendOriginal
from passes.split import SplitChannels
from s2d_compiler._version import __version__
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.analysis.cost import cost_of
from s2d_compiler.attributes import find
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.depth_report import DepthReport, depth_report_of
from s2d_compiler.dynamic import DynamicModel, DynamicParts, interfaces_of
from s2d_compiler.exit_placement import ExitPlacement, place_exits
from s2d_compiler.memory import explained
from s2d_compiler.plan import Plan
from s2d_compiler.plans import AnyPlan, plan_from_dict
from s2d_compiler.program import Program
from s2d_compiler.provenance import Slice
from s2d_compiler.report import Report, report_of
from s2d_compiler.staging import new_staged_graph, staged_graph_of
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


def depth_pipeline(placement: ExitPlacement) -> Pipeline:
    """The passes that put exits along depth, in order."""
    return Pipeline((AddDepthExits(placement), ExtractStages(), CountCost(placement.program)))


def transform(
    model: nn.Module,
    plan: AnyPlan | Mapping[str, Any],
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
        plan: A plan that cuts channels or one that puts exits along depth, or what
            ``Plan.from_dict`` or ``DepthPlan.from_dict`` takes.
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
    if not isinstance(plan, Plan | DepthPlan):
        plan = plan_from_dict(plan)
    part = part_of(model, submodule)
    program = capture(part, example_inputs, plan.input_shape, example_kwargs)
    if submodule is not None:
        made_by = {"submodule": submodule, **(made_by or {})}
    return compile_program(program, plan, pipeline=pipeline, between=between, made_by=made_by)


@explained("building the stages", "compile a part of the model (--submodule)")
def compile_program(
    program: Program,
    plan: AnyPlan,
    *,
    pipeline: Steps | None = None,
    between: Between | None = None,
    made_by: Mapping[str, Any] | None = None,
    assignment: StageAssignment | ExitPlacement | None = None,
) -> DynamicModel:
    """Like ``transform``, from a program that was captured before.

    Args:
        program: The captured model.
        plan: The plan.
        pipeline: As in ``transform``.
        between: Likewise.
        made_by: Likewise.
        assignment: What the plan makes of the program, if that is known.

    Raises:
        OutOfMemoryError: The stages do not fit in memory beside the original.
    """
    if isinstance(plan, DepthPlan):
        placement = assignment if isinstance(assignment, ExitPlacement) else None
        placement = placement or place_exits(program, plan)
        return _compile_depth(placement, pipeline, between, made_by or {})
    if not isinstance(assignment, StageAssignment):
        assignment = assign(program, analyse_channels(program), plan)
    steps = default_pipeline(assignment)
    if pipeline is not None:
        steps = pipeline(steps)
    network = steps.run(new_staged_graph(assignment), between)
    owners = tuple(assignment.owners.tolist())
    return _dynamic_model(
        network, program, plan, lambda graphs: report_of(assignment, graphs), owners, made_by or {}
    )


def _compile_depth(
    placement: ExitPlacement,
    pipeline: Steps | None,
    between: Between | None,
    made_by: Mapping[str, Any],
) -> DynamicModel:
    """A program with exits along its depth."""
    steps = depth_pipeline(placement)
    if pipeline is not None:
        steps = pipeline(steps)
    network = steps.run(staged_graph_of(placement.program), between)

    def reported(graphs: list[fx.GraphModule]) -> DepthReport:
        return depth_report_of(placement, graphs, cost_of(placement.program, []).original_macs)

    return _dynamic_model(network, placement.program, placement.plan, reported, (), made_by)


def _dynamic_model(
    network: fx.GraphModule,
    program: Program,
    plan: AnyPlan,
    reported: Callable[[list[fx.GraphModule]], Report | DepthReport],
    owners: tuple[int, ...],
    made_by: Mapping[str, Any],
) -> DynamicModel:
    slices: Mapping[str, Slice] = network.meta["slices"]
    fill(network, slices, program)
    interfaces = interfaces_of(network)
    stages = [network.get_submodule(f"stages.{i}") for i in range(len(interfaces))]
    graphs = [s for s in stages if isinstance(s, fx.GraphModule)]
    _move_indices(graphs, program)
    parts = DynamicParts(
        plan=plan,
        cost=cost_of(program, graphs, _of_buffers(network, program)),
        report=reported(graphs),
        provenance={},
        interfaces=interfaces,
        owners=owners,
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
