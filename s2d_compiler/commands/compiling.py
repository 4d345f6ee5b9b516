"""``s2d-compile``: from a trained network and a plan to a staged network."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from s2d_compiler.commands.options import (
    REPORTING,
    SOURCE,
    CommandLine,
    ModelSource,
    Reporting,
    Result,
    capture_for,
    document_of,
    require_other_file,
)
from s2d_compiler.output import check_writable
from s2d_compiler.plans import AnyPlan, load_plan

if TYPE_CHECKING:
    from torch import fx

    from s2d_compiler.checking import Proof
    from s2d_compiler.compiler import Between
    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.program import Program


def compile_model(
    model: Path,
    /,
    *,
    splits: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    source: ModelSource = SOURCE,
    no_check: bool = False,
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**62))] = 0,
    print_passes: bool = False,
    reporting: Reporting = REPORTING,
    command_line: CommandLine = "",
) -> Result:
    """Rewrite a trained network as a dynamic one: stages with early exits.

    By the plan, stages are slices of the channels of every layer, or parts of its depth ("exits").

    Args:
        model: The trained network: a file of torch.save, or .safetensors.
        splits: The plan, a JSON file; s2d inspect MODEL --write-plan FILE writes one to edit. One
            with "exits" puts exits along depth.
        output: The file to write; an existing one is replaced.
        no_check: Skip the proof in float64 that the result is what the plan says.
        seed: Seed of the random numbers of that proof.
        print_passes: Print the graph after each pass, on stderr.
    """
    shape = source.shape
    plan = load_plan(splits)
    if shape is not None:
        plan = replace(plan, input_shape=shape)
    require_other_file(output, {"the model": model, "the plan": splits})
    check_writable(output)
    made_by = {"command": command_line, "model": _origin(model), "seed": seed}
    if source.submodule is not None:
        made_by["submodule"] = source.submodule
    program = capture_for(source.read(model), plan.input_shape)
    between = _print_pass if print_passes and not reporting.quiet else None
    dyn, proof = _compile(program, plan, made_by, between, None if no_check else seed)
    dyn.save(output)
    document = {"output": str(output), **document_of(dyn), "proof": _proof_document(proof)}
    written = f"written: {output}{_permissions(dyn)}"
    following = _next(dyn, output, _teacher(model, source))
    rest = f"{dyn.report}\n{_proof_line(proof)}\n\n{written}\n{following}"
    return Result(document, [dyn.cost.table(), rest])


def _origin(model: Path) -> dict[str, Any]:
    from s2d_compiler.reading import describe_origin

    return dict(describe_origin(model))


def _compile(
    program: Program,
    plan: AnyPlan,
    made_by: Mapping[str, Any],
    between: Between | None,
    seed: int | None,
) -> tuple[DynamicModel, Proof | None]:
    """Compile, and prove the result unless there is no seed for it."""
    from s2d_compiler.analysis.assignment import assign
    from s2d_compiler.analysis.channels import analyse_channels
    from s2d_compiler.checking import check
    from s2d_compiler.compiler import compile_program
    from s2d_compiler.depth_checking import check_depth
    from s2d_compiler.depth_plan import DepthPlan
    from s2d_compiler.exit_placement import place_exits

    made_by = {**made_by, "checked": seed is not None}
    if isinstance(plan, DepthPlan):
        placement = place_exits(program, plan)
        dyn = compile_program(program, plan, between=between, made_by=made_by, assignment=placement)
        return dyn, None if seed is None else check_depth(dyn, placement, seed=seed)
    assignment = assign(program, analyse_channels(program), plan)
    dyn = compile_program(program, plan, between=between, made_by=made_by, assignment=assignment)
    return dyn, None if seed is None else check(dyn, assignment, seed=seed)


def _print_pass(step: Any, graph_module: fx.GraphModule) -> None:
    """Print the graph that a pass left, and the stages that it calls."""
    print(f"== after {step.name}\n{str(graph_module.graph).strip()}", file=sys.stderr)
    for name, stage in graph_module.named_modules():
        if name and hasattr(stage, "graph"):
            print(f"-- {name}\n{str(stage.graph).strip()}", file=sys.stderr)


def _proof_document(proof: Proof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    return {
        "errors": list(proof.errors),
        "spreads": list(proof.spreads),
        "tensors": proof.tensors,
        "is_vacuous": proof.is_vacuous,
    }


def _proof_line(proof: Proof | None) -> str:
    if proof is None:
        return "not checked (--no-check)"
    if proof.is_vacuous:
        return "checked in float64, inconclusive: the outputs hardly depend on the input"
    return f"checked in float64: {proof}"


def _permissions(dyn: DynamicModel) -> str:
    """What reading the file takes beyond its name, if anything."""
    from s2d_compiler.format import permissions

    operators, types = permissions(dyn)
    needed = [f"operators={json.dumps(operators)}"] if operators else []
    needed += [f"types=[{', '.join(types)}]"] if types else []
    return f" (read it with load(path, {', '.join(needed)}))" if needed else ""


def _teacher(model: Path, source: ModelSource) -> str:
    """The original as options of ``s2d train``."""
    return f"--teacher {shlex.quote(str(model))} {source.as_options()}".rstrip()


def _next(dyn: DynamicModel, output: Path, teacher: str) -> str:
    """What the stages are good for as they are, and what to do."""
    from s2d_compiler.depth_plan import DepthPlan

    if dyn.plan.stages == 1:
        return "The one stage computes what the original does; there is nothing to train."
    who = "The exits are untrained: the stages do not have the original's accuracy yet"
    if isinstance(dyn.plan, DepthPlan) or dyn.plan.final == "original":
        who = (
            "The exits are untrained: all stages but the last, which is the original itself, do "
            "not have its accuracy yet"
        )
    part = dyn.parts.made_by.get("submodule")
    if part is not None:
        return (
            f"{who}.\nNext: put an exit where the part was, model.{part} = "
            f'load("{output}").at_stage(1), and fine-tune; examples/detector_backbone.py shows how.'
        )
    return (
        f"{who}.\nNext: train the stages of a classifier with s2d train {shlex.quote(str(output))} "
        f"{teacher} --data ... -o FILE (docs/tutorial.md); of another network in Python, with the "
        "sum of the stages' losses."
    )
