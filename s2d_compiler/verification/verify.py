"""The whole verification of a staged network against its original."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import PlanError, VerifyError
from s2d_compiler.exit_placement import ExitPlacement, place_exits
from s2d_compiler.plans import AnyPlan
from s2d_compiler.program import Program
from s2d_compiler.provenance import Slice
from s2d_compiler.structure import encode_structure
from s2d_compiler.submodules import part_of
from s2d_compiler.tracing import capture, evaluation_mode
from s2d_compiler.verification.arguments import Value
from s2d_compiler.verification.depth import (
    DepthSpecification,
    compare_stage_costs,
    head_slices,
)
from s2d_compiler.verification.network import Network, StageRun, place
from s2d_compiler.verification.operators import Operators
from s2d_compiler.verification.runs import (
    compare_costs,
    compare_shapes,
    cost_of_original,
    require_nothing_hidden,
)
from s2d_compiler.verification.specification import Specification
from s2d_compiler.verification.static import Environment, terms_of
from s2d_compiler.verification.terms import Keys
from s2d_compiler.verification.weights import Weights, compare_weights
from s2d_compiler.verification.words import DAMAGED

#: Two sizes that tell a batch from a number in a graph, and neighbours in it from each other.
BATCHES = (2, 3)


@dataclass(frozen=True)
class Verification:
    """What was shown of a staged network.

    Attributes:
        stages: Number of stages, all of which compute what the plan says.
        nodes: Number of graph nodes that were followed.
        terms: Number of numbers that were followed through the stages.
        weights: Which tensors hold the original's numbers.
    """

    stages: int
    nodes: int
    terms: int
    weights: Weights


def verify(
    model: nn.Module,
    dyn: DynamicModel,
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    submodule: str | None = None,
    trained: bool = False,
) -> Verification:
    """Show that a staged network is what its plan makes of a model.

    Structural, not sampled: what every stage computes is derived twice, from the model and the
    plan, and from the network's graphs, down to single elements of parameters; see
    ``s2d_compiler.verification``. Costs are counted while the network runs once.

    Args:
        model: The original, with the weights that were compiled.
        dyn: The network.
        example_inputs: As given to ``transform``; needed where inputs are no floating-point
            tensors.
        example_kwargs: Likewise.
        submodule: The part of the model that was compiled.
        trained: Whether parameters and batch-norm statistics may hold other numbers.

    Raises:
        VerifyError: The network is something else; the message names the first place.
        CaptureError, InputShapeError, UsageError: The model cannot be captured.
    """
    require_nothing_hidden(dyn)
    program = _captured(part_of(model, submodule), dyn, example_inputs, example_kwargs)
    return verify_captured(program, dyn, trained=trained)


def verify_captured(
    program: Program,
    dyn: DynamicModel,
    *,
    trained: bool = False,
    expectations: Sequence[Expectation] = (),
) -> Verification:
    """Like ``verify``, against a program that was captured before.

    Args:
        program: The original.
        dyn: The network.
        trained: As in ``verify``.
        expectations: What the program and a plan make, if that is known.
    """
    require_nothing_hidden(dyn)
    _compare_interfaces(dyn, program)
    if not expectations or expectations[0].assignment.plan != dyn.plan:
        expectations = Expectation.all_of(program, dyn.plan)
    assignment = expectations[0].assignment
    _compare_owners(assignment, dyn)
    nodes = terms = 0
    for expectation in expectations:
        nodes, more = expectation.compare(dyn)
        terms += more
    heads = assignment.parameters() if isinstance(assignment, ExitPlacement) else {}
    weights = compare_weights(dyn, program, heads)
    if weights.changed and not trained:
        raise VerifyError(
            f"{len(weights.changed)} of {weights.equal + len(weights.changed)} tensors hold other "
            f"numbers, or numbers of another type, than the original, {weights.changed[0]} first; "
            "what the stages compute with them is what the plan says. If the network was trained "
            "since, say so (--trained, trained=True)."
        )
    with evaluation_mode(dyn):
        compare_shapes(dyn, program)
        compare_costs(dyn, program, expectations[0].original)
    if isinstance(assignment, ExitPlacement):
        compare_stage_costs(dyn, assignment)
    return Verification(len(dyn.stages), nodes, terms, weights)


def _captured(
    part: nn.Module,
    dyn: DynamicModel,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
) -> Program:
    parts = dyn.parts
    if example_inputs is None and example_kwargs is None:
        if parts.batch is None and parts.input_spec is None and len(parts.input_shapes) == 1:
            return capture(part, None, parts.input_shapes[0])
        first = next((t for t in part.parameters() if t.is_floating_point()), torch.zeros(()))
        batch = parts.batch or BATCHES[0]
        tensors = [
            torch.zeros(batch, *shape, dtype=first.dtype, device=first.device)
            for shape in parts.input_shapes
        ]
        if parts.input_spec is None:
            example_inputs = tensors
        else:
            args, kwargs = pytree.tree_unflatten(tensors, parts.input_spec)
            example_inputs, example_kwargs = args, kwargs
    return capture(part, example_inputs, None, example_kwargs)


def _compare_interfaces(dyn: DynamicModel, program: Program) -> None:
    parts = dyn.parts
    for name, mine, original in (
        ("takes inputs of shapes", parts.input_shapes, program.input_shapes),
        ("takes batches of", parts.batch, program.batch),
        ("returns", *map(_structure, (parts.output_spec, program.output_spec))),
        ("is called with", *map(_structure, (parts.input_spec, program.input_spec))),
    ):
        if mine != original:
            raise VerifyError(
                f"the network {name} {mine}, the model {original}; give the model and the example "
                "inputs that it was made from."
            )
    stages = parts.plan.stages
    if len(dyn.stages) != stages or len(parts.interfaces) != stages:
        raise VerifyError(f"the network has {len(dyn.stages)} stages, its plan {stages}; {DAMAGED}")


def _structure(spec: Any) -> Any:
    return None if spec is None else encode_structure(spec)


def _compare_owners(assignment: StageAssignment | ExitPlacement, dyn: DynamicModel) -> None:
    owners = np.asarray(dyn.parts.owners, dtype=np.int64)
    if isinstance(assignment, ExitPlacement):
        if len(owners):
            raise VerifyError(
                f"the network says the stages of {len(owners)} channels, and exits along depth "
                f"cut none; {DAMAGED}"
            )
        return
    if len(owners) != len(assignment.owners):
        raise VerifyError(
            f"the network says the stages of {len(owners)} channels, the model has "
            f"{len(assignment.owners)}; {DAMAGED}"
        )
    if not np.array_equal(owners, assignment.owners):
        atom = int(np.flatnonzero(owners != assignment.owners)[0])
        writers = next(f.writers for f in assignment.channels.families if atom in f.atoms)
        raise VerifyError(
            f"a channel of {writers[0] if writers else 'the model'} is in stage {owners[atom]}, by "
            f"the plan and the model's weights in stage {assignment.owners[atom]}; it was "
            "made from other weights, or with another plan; compile the model again."
        )


# -- stages ----------------------------------------------------------------------------------------


class Expectation:
    """What a model and a plan make of every exit, in terms.

    It can be compared with many networks.

    Args:
        assignment: The model's program, its channels, the plan and the owners; or the exits that
            a plan puts along its depth.
        batch: Size of the batch, where the model leaves it free.
    """

    def __init__(self, assignment: StageAssignment | ExitPlacement, batch: int = BATCHES[0]):
        self.assignment = assignment
        self.operators = Operators(Keys())
        program = assignment.program
        batch = program.batch or batch
        self.inputs = [
            Value(self.operators.keys.elements(_of_input(k, len(shape) + 1), (batch, *shape)))
            for k, shape in enumerate(program.input_shapes)
        ]
        self.exits: list[list[Any]] = []
        for found in self._environments(keep=False):
            leaves = program.output_leaves
            self.exits.append([found[v] if isinstance(v, fx.Node) else v for v in leaves])

    @functools.cached_property
    def original(self) -> int:
        """MACs of the model for one sample."""
        return cost_of_original(self.assignment.program)

    @classmethod
    def all_of(cls, program: Program, plan: AnyPlan) -> list[Expectation]:
        """What a plan makes of a captured model, for batches of several sizes.

        Raises:
            VerifyError: The plan does not fit the model.
        """
        batches = BATCHES[:1] if program.batch is not None else BATCHES
        try:
            assignment: StageAssignment | ExitPlacement
            if isinstance(plan, DepthPlan):
                assignment = place_exits(program, plan)
            else:
                assignment = assign(program, analyse_channels(program), plan)
            return [cls(assignment, batch) for batch in batches]
        except PlanError as error:
            raise VerifyError(
                f"the network's plan does not fit the model: {error}; give the model that it was "
                "made from."
            ) from error

    def environment(self, number: int) -> Environment:
        """Values of all nodes in the run of a stage, counted from 0; computed again."""
        return next(itertools.islice(self._environments(keep=True), number, None))

    def _environments(self, *, keep: bool) -> Iterator[Environment]:
        if isinstance(self.assignment, ExitPlacement):
            exits = DepthSpecification(self.assignment, self.operators, self.inputs)
            yield from exits.exits(keep=keep)
            return
        specification = Specification(self.assignment, self.operators, self.inputs)
        for number in range(self.assignment.plan.stages):
            if number < self.assignment.thin_stages:
                yield specification.next_stage(keep=keep)
            else:
                yield specification.static(keep=keep)

    def compare(self, dyn: DynamicModel) -> tuple[int, int]:
        """Run a network's stages; returns the number of nodes and of terms.

        Raises:
            VerifyError: One computes something else.
        """
        network = self._network(dyn)
        nodes = terms = 0
        for number, expected in enumerate(self.exits):
            run = network.run(number)
            if len(run.leaves) != len(expected):
                raise VerifyError(
                    f"stage {number + 1} returns {len(run.leaves)} outputs, the model "
                    f"{len(expected)}; {DAMAGED}"
                )
            for k, (mine, want) in enumerate(zip(run.leaves, expected, strict=True)):
                if not _is_same(mine, want):
                    raise VerifyError(self._first_difference(dyn, number, k, want, mine))
            nodes += run.nodes
            terms += run.terms
        unread = sorted(network.handed - network.read)
        if unread:
            stage, position = unread[0]
            raise VerifyError(
                f"stage {stage + 1} hands on a value (number {position + 1}) that no later stage "
                f"reads; {DAMAGED}"
            )
        return nodes, terms

    def _network(self, dyn: DynamicModel) -> Network:
        heads = head_slices(self.assignment) if isinstance(self.assignment, ExitPlacement) else {}
        return Network(dyn, self.assignment.program, self.operators, self.inputs, heads)

    def _first_difference(
        self, dyn: DynamicModel, number: int, output: int, want: Any, mine: Any
    ) -> str:
        """Where a stage first computes something that the plan has nowhere."""
        network = self._network(dyn)
        for earlier in range(number):
            network.run(earlier)
        run = network.run(number, keep=True)
        return _first_difference(number, run, self.environment(number), output, want, mine)


def _of_input(number: int, rank: int) -> Slice:
    return Slice(f"input {number}", (None,) * rank)


def _is_same(mine: Any, want: Any) -> bool:
    if isinstance(want, Value) != isinstance(mine, Value):
        return False
    if isinstance(want, Value):
        return want.terms.shape == mine.terms.shape and torch.equal(want.terms, mine.terms)
    return type(want) is type(mine) and bool(want == mine)


def _first_difference(
    number: int, run: StageRun, expected: Environment, output: int, want: Any, mine: Any
) -> str:
    """Where a stage first computes something that the plan has nowhere."""
    known = torch.cat([t.reshape(-1) for t in terms_of(list(expected.values()))])
    known = torch.sort(known).values
    for node, value in run.values.items():
        for terms in terms_of([value]):
            flat = terms.reshape(-1)
            flat = flat[flat != 0]
            if not flat.numel():
                continue
            at = torch.searchsorted(known, flat).clamp(max=len(known) - 1)
            missing = int((known[at] != flat).sum())
            if missing:
                share = f"{missing} of the {flat.numel()} numbers that it computes are none"
                if missing == flat.numel():
                    share = f"none of the {missing} numbers that it computes is one"
                return (
                    f"{place(number, node)}: {share} that the plan gives stage {number + 1}; "
                    f"operator, operands, settings or slice differ; {DAMAGED}"
                )
    if isinstance(want, Value) and isinstance(mine, Value):
        if want.terms.shape != mine.terms.shape:
            return (
                f"stage {number + 1}, output {output + 1} has shape {tuple(mine.terms.shape)}, "
                f"the plan gives {tuple(want.terms.shape)}; {DAMAGED}"
            )
        wrong = int((want.terms != mine.terms).sum())
        return (
            f"stage {number + 1}, output {output + 1}: {wrong} of {mine.terms.numel()} numbers are "
            f"not the ones at their place, values are swapped or missing; {DAMAGED}"
        )
    return (
        f"stage {number + 1}, output {output + 1} is {mine!r}, the plan gives {want!r}; {DAMAGED}"
    )
