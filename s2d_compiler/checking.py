"""The compiler checks its own result: masked equivalence in float64, and every weight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.compiler import Steps, compile_program
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import CheckError
from s2d_compiler.masked_evaluation import masked_outputs, static_outputs
from s2d_compiler.memory import explained
from s2d_compiler.program import Program
from s2d_compiler.thin import originals
from s2d_compiler.threads import one_thread

log = logging.getLogger(__name__)

#: Largest error, relative to the spread of the output over inputs.
TOLERANCE = 1e-9
#: Spread over size below which outputs are too nearly constant to prove anything.
VACUOUS = 1e-6
_ATTEMPTS = 3
DEFECT = "a defect of the compiler; please report the model and the plan."
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True, slots=True)
class Proof:
    """What the self-check found.

    Attributes:
        errors: Per stage, the largest error relative to the spread of its output.
        spreads: Per stage, the spread of the output relative to its size.
        tensors: How many stage tensors were compared with the original's.
    """

    errors: tuple[float, ...]
    spreads: tuple[float, ...]
    tensors: int

    @property
    def is_vacuous(self) -> bool:
        return min(self.spreads, default=1.0) < VACUOUS

    def __str__(self) -> str:
        worst = max(self.errors, default=0.0)
        stages = len(self.errors)
        return (
            f"largest error {worst:.1e} of the output's spread over {stages} stages "
            f"(limit {TOLERANCE:.0e})"
        )


@explained(
    "the self-check, which runs the network in double precision,",
    "skip it (--no-check), or give a smaller input shape (--input-shape)",
)
def check(
    dyn: DynamicModel,
    assignment: StageAssignment,
    *,
    seed: int = 0,
    batch: int = 4,
    steps: Steps | None = None,
) -> Proof:
    """Prove a fresh transform result.

    The stage graphs are built once more from a float64 copy of the program with random
    parameters and batch-norm statistics taken from a batch (so that outputs depend on
    inputs), and compared with the masked form on random inputs. The graphs must be the same
    as ``dyn``'s, and every tensor of ``dyn`` must be its slice of the original.

    Args:
        dyn: The result.
        assignment: What it was made from.
        seed: Of the random weights and inputs.
        batch: Number of inputs.
        steps: The ``pipeline`` argument that it was made with, if any.

    Raises:
        CheckError: Any of this differs.
        OutOfMemoryError: There is too little memory for it.
    """
    tensors = check_weights(dyn, assignment.program)
    with one_thread(when=dyn.cost.original_macs * batch <= _SMALL):
        proof = attempts(lambda each: _compare(dyn, assignment, each, batch, steps), seed)
    require_within(proof, "the masked form")
    return replace(proof, tensors=tensors)


def require_within(proof: Proof, expected: str) -> None:
    """Require that no error is above the limit.

    Raises:
        CheckError: One is.
    """
    for stage, error in enumerate(proof.errors, start=1):
        if not error <= TOLERANCE:
            raise CheckError(
                f"stage {stage} differs from {expected} by {error:.2e} of the output's spread "
                f"(limit {TOLERANCE:.0e}): the result is not what the plan "
                f"says, {DEFECT}"
            )


def attempts(compared: Callable[[int], Proof], seed: int) -> Proof:
    """Compare with new random weights until the outputs depend on the inputs."""
    for attempt in range(_ATTEMPTS):
        proof = compared(seed + attempt)
        if not proof.is_vacuous:
            return proof
    log.warning(
        "the check is inconclusive: with random weights the outputs hardly depend on the input"
    )
    return proof


#: MACs up to which one thread is faster than many: small operators wait for each other.
_SMALL = 2_000_000_000


def check_weights(dyn: DynamicModel, program: Program) -> int:
    """Compare every tensor of a staged network with its slice of the original.

    Raises:
        CheckError: One differs.
    """
    sources = originals(program)
    state = dyn.state_dict()
    for name, where in dyn.provenance.items():
        expected = where.take(sources[where.source].detach())
        if not torch.equal(torch.nan_to_num(state[name]), torch.nan_to_num(expected)):
            raise CheckError(
                f"{name} is not the slice of {where.source} that its provenance says: it was "
                f"changed, or this is {DEFECT}"
            )
    return len(dyn.provenance)


def _compare(
    dyn: DynamicModel, assignment: StageAssignment, seed: int, batch: int, steps: Steps | None
) -> Proof:
    generator = torch.Generator().manual_seed(seed)
    program = random_program(assignment.program, generator)
    program_inputs = random_inputs(program, generator, batch)
    settle(program.graph_module, program_inputs)
    mine = replace(assignment, program=program)
    staged = compile_program(program, assignment.plan, assignment=mine, pipeline=steps)
    require_same_graphs(dyn, staged)
    with torch.no_grad():
        found = list(staged.exits_of(program_inputs))
    expected = masked_outputs(mine, program_inputs)
    if assignment.plan.final == "original":
        expected.append(static_outputs(mine, program_inputs))
    errors, spreads = [], []
    for stage, (got, want) in enumerate(zip(found, expected, strict=True)):
        error, spread = compare(_flat(got), want)
        log.debug("stage %d: error %.2e, spread %.2e", stage + 1, error, spread)
        errors.append(error)
        spreads.append(spread)
    return Proof(tuple(errors), tuple(spreads), 0)


def _flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def compare(found: Iterable[Any], expected: Iterable[Any]) -> tuple[float, float]:
    """Compare flat outputs leaf by leaf.

    Returns:
        The largest error of a leaf, relative to its spread over inputs, or to its size where
        that spread is too narrow to prove anything; and the widest spread relative to size.
    """
    worst, widest = 0.0, 0.0
    for got, want in zip(found, expected, strict=True):
        error, spread = _compare_leaf(got, want)
        worst, widest = max(worst, error), max(widest, spread)
    return worst, widest


def _compare_leaf(got: Any, want: Any) -> tuple[float, float]:
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        return (0.0 if type(got) is type(want) and got == want else float("inf")), 0.0
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf"), 0.0
    if not want.numel():
        return 0.0, 0.0
    finite = torch.isfinite(want) if want.is_floating_point() else torch.ones_like(want).bool()
    if not torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()):
        return float("inf"), 0.0
    got, want = (torch.where(finite, v, torch.zeros_like(v)).double() for v in (got, want))
    size = float(want.abs().max())
    centre = want.mean(dim=0, keepdim=True) if want.dim() else want
    spread = float((want - centre).abs().max()) / size if size else 0.0
    error = float((got - want).abs().max())
    if error != error:
        return float("inf"), spread
    scale = size * spread if spread >= VACUOUS else size
    return (error / scale if scale else (0.0 if error == 0 else float("inf"))), spread


def require_same_graphs(dyn: DynamicModel, staged: DynamicModel) -> None:
    """Require that building a network again gives the same stages.

    Raises:
        CheckError: One differs.
    """
    for number, (a, b) in enumerate(zip(dyn.stages, staged.stages, strict=True), start=1):
        if _without_types(a) != _without_types(b):
            raise CheckError(
                f"stage {number} is built differently the second time, and both graphs must be "
                f"equal: it was changed, or this is {DEFECT}"
            )


def _without_types(stage: Any) -> str:
    """A stage's graph with every floating-point type that it names called the same."""
    text = str(stage.graph)
    for dtype in _FLOATS:
        text = text.replace(str(dtype), str(torch.float64))
    return text


# -- a program whose outputs depend on its inputs ----------------------------------------------


def random_program(program: Program, generator: torch.Generator) -> Program:
    """A float64 copy on the CPU with random parameters."""
    root = _double_copy(program.graph_module)
    for node in root.graph.nodes:
        args, kwargs = tree_map_only(
            torch.dtype, lambda d: torch.float64 if d in _FLOATS else d, (node.args, node.kwargs)
        )
        node.args, node.kwargs = args, kwargs
    root.recompile()
    drawn: dict[str, torch.Tensor] = {}
    for name, parameter in root.named_parameters():
        parameter.data = _random(parameter, name, generator)
        drawn[program.sources.get(name, name)] = parameter.data
    for name, buffer in root.named_buffers():  # what a layer takes as its weight is read elsewhere
        same = drawn.get(program.sources.get(name, name))
        if same is not None:
            buffer.copy_(same)
    return replace(program, graph_module=root)


def _double_copy(module: Any) -> Any:
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            data = torch.empty_like(tensor, dtype=torch.float64, device="cpu")
            data.copy_(tensor.detach())
        else:
            data = tensor.detach().cpu().clone()
        same = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
        memo[id(tensor)] = same
    return copy.deepcopy(module, memo)


def _random(parameter: torch.Tensor, name: str, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if parameter.dim() >= 2:
        fan_in = max(1, parameter[0].numel())
        return noise.mul(float((2.0 / fan_in) ** 0.5))
    return 1.0 + 0.2 * noise if name.endswith("weight") else 0.2 * noise


def random_inputs(
    program: Program, generator: torch.Generator, batch: int
) -> tuple[torch.Tensor, ...]:
    """Random float64 inputs; integers are drawn from those of the example, and what is neither
    (masks) is as in the example."""
    return tuple(_random_input(example, program, generator, batch) for example in program.examples)


def _random_input(
    example: torch.Tensor, program: Program, generator: torch.Generator, batch: int
) -> torch.Tensor:
    shape = (program.batch or batch, *example.shape[1:]) if example.dim() else ()
    if not example.is_floating_point():
        kept = example.detach().cpu()
        if example.dtype == torch.bool or not kept.dim() or not kept.numel():
            return kept[:1].expand(shape) if kept.dim() else kept
        picked = torch.randint(kept.numel(), shape, generator=generator)
        return kept.reshape(-1)[picked]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def settle(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Set batch-norm statistics from one batch, in evaluation order."""
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    try:
        with torch.no_grad():
            model(*inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
