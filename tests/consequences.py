"""The consequences of docs/semantics.md, checked on one network and one plan.

``check_all`` raises ``Broken`` with every consequence that does not hold, and otherwise
says what was measured, vacuous stages included: a stage whose output hardly depends on the
input shows nothing, and callers must draw again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from tests import assignment
from tests.reference import Structure, masked_outputs, read_assignment

if TYPE_CHECKING:
    from s2d_compiler import Plan

TOLERANCE = 1e-9
"""Largest error, in units of the output's spread over inputs."""
VACUOUS = 1e-6
"""A spread below this share of the output's size is no result."""


class Broken(AssertionError):
    """At least one consequence does not hold."""


@dataclass
class Measured:
    """What ``check_all`` found.

    Attributes:
        errors: per stage the masked form's error over the output's spread.
        vacuous: stages, from 1, whose outputs show nothing.
        dyn: the transformed network.
    """

    errors: list[float]
    vacuous: list[int]
    dyn: Any


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def spread(output: Any) -> tuple[float, float]:
    """Largest deviation over inputs from the mean over inputs, and largest magnitude."""
    deviations = [float((t - t.mean(0)).abs().max()) for t in tensors(output)]
    sizes = [float(t.abs().max()) for t in tensors(output)]
    return max(deviations), max(sizes)


def is_vacuous(output: Any) -> bool:
    """Whether *some* tensor of the output hardly depends on the input."""
    return any(
        not float((t - t.mean(0)).abs().max()) > VACUOUS * float(t.abs().max())
        for t in tensors(output)
    )


def relative_error(got: Any, wanted: Any) -> float:
    """Largest error over the spread of the wanted output, tensor by tensor."""
    worst = 0.0
    pairs = zip(tensors(got), tensors(wanted), strict=True)
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        error = float((a - b).abs().max())
        deviation = float((b - b.mean(0)).abs().max())
        if math.isnan(error):
            return math.inf
        if error > 0:
            worst = max(worst, error / deviation if deviation else math.inf)
    return worst


def same_structure(got: Any, wanted: Any) -> bool:
    return bool(tree_flatten(got)[1] == tree_flatten(wanted)[1])


@contextmanager
def attention_as_written() -> Iterator[None]:
    """Without the fused attention that modules fall into in eval mode: it rounds differently."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# --------------------------------------------------------------------------------------
# The consequences, one by one; each yields what is wrong, in words


def masked_equivalence(
    model: nn.Module, dyn: Any, x: Tensor, structure: Structure, measured: Measured
) -> Iterator[str]:
    """Stage t's outputs are those of the masked form; fills ``measured``.

    The masked form is made twice: from provenance, and from the plan alone. The second one
    shows that rows that provenance leaves out were dead.
    """
    found = read_assignment(structure, dyn)
    planned = assignment.planned_assignment(structure, dyn.plan, found)
    with torch.no_grad(), attention_as_written():
        got = dyn(x)
        wanted = by_plan = masked_outputs(model, dyn, x, structure, found)
        if planned != found:
            by_plan = masked_outputs(model, dyn, x, structure, planned)
        original = model(x)
    if not isinstance(got, tuple) or len(got) != dyn.plan.stages:
        yield f"{type(got).__name__} of {len(got)} outputs from {dyn.plan.stages} stages"
        return
    for stage, (a, b, c) in enumerate(zip(got, wanted, by_plan, strict=True), 1):
        if not same_structure(a, original):
            yield f"stage {stage}'s output has another structure than the original's"
            continue
        error = relative_error(a, b)
        from_plan = relative_error(a, c)
        measured.errors.append(max(error, from_plan))
        if is_vacuous(b):
            measured.vacuous.append(stage)
        elif not error <= TOLERANCE:
            yield f"stage {stage} differs from the masked form by {error:.1e} of the spread"
        elif not from_plan <= TOLERANCE:
            yield f"stage {stage} differs from what the plan says by {from_plan:.1e} of the spread"
    if dyn.plan.stages == 1 or dyn.plan.final == "original":
        error = relative_error(got[-1], original)
        limit = 0.0 if dyn.plan.final == "original" else TOLERANCE
        if not is_vacuous(original) and not error <= limit:
            yield f"the last output differs from the original's by {error:.1e} of the spread"


def causality(dyn: Any, x: Tensor, *, thorough: bool = True) -> Iterator[str]:
    """Outputs of stages <= t stay the same bit for bit whatever later stages hold.

    Not-a-number spreads through all arithmetic; ``thorough`` also tries other numbers.
    """
    with torch.no_grad():
        before = dyn(x)
        for stage in range(1, len(dyn.stages)):
            for how in (_not_a_number, _negated) if thorough else (_not_a_number,):
                with how(_only_after(dyn, stage)):
                    after = dyn(x)
                for t in range(stage):
                    if not _identical(before[t], after[t]):
                        yield (
                            f"stage {t + 1}'s output depends on weights of stages > {stage} "
                            f"({how.__name__.strip('_')})"
                        )
        if not _identical(before, dyn(x)):
            yield "the same input twice gives different outputs"


def _only_after(dyn: Any, stage: int) -> list[Tensor]:
    """Parameters and buffers, of those in the state dict, that only later stages have."""

    def held(stages: Sequence[nn.Module]) -> list[Tensor]:
        return [t for s in stages for t in s.state_dict(keep_vars=True).values()]

    early = {t.data_ptr() for t in held(dyn.stages[:stage])}
    late = dict.fromkeys(held(dyn.stages[stage:]))
    return [t for t in late if t.data_ptr() not in early]


@contextmanager
def _negated(owned: Sequence[Tensor]) -> Iterator[None]:
    for t in owned:
        t.data.neg_()
    try:
        yield
    finally:
        for t in owned:
            t.data.neg_()


@contextmanager
def _not_a_number(owned: Sequence[Tensor]) -> Iterator[None]:
    kept = [t.data for t in owned]
    for t in owned:
        if t.is_floating_point():
            t.data = torch.full((), math.nan, dtype=t.dtype).expand(t.shape)
    try:
        yield
    finally:
        for t, data in zip(owned, kept, strict=True):
            t.data = data


def _identical(a: Any, b: Any) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(torch.equal(one, other) and not bool(one.isnan().any()) for one, other in pairs)


def count_macs(function: Callable[[], Any]) -> int:
    """Multiply-accumulates that ``function`` runs, by torch's own counter."""
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        function()
    return int(counter.get_total_flops()) // 2


def count_stage_macs(dyn: Any, x: Tensor) -> list[int]:
    """Multiply-accumulates of every stage alone while ``dyn`` runs all of them."""
    totals = [0] * len(dyn.stages)
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        handles = []
        for number, stage in enumerate(dyn.stages):

            def enter(_module: nn.Module, _inputs: Any, number: int = number) -> None:
                totals[number] -= int(counter.get_total_flops())

            def leave(_module: nn.Module, _in: Any, _out: Any, number: int = number) -> None:
                totals[number] += int(counter.get_total_flops())

            handles += [
                stage.register_forward_pre_hook(enter),
                stage.register_forward_hook(leave),
            ]
        dyn(x)
        everything = int(counter.get_total_flops())
    for handle in handles:
        handle.remove()
    assert sum(totals) == everything, "operators outside the stages were counted"
    return [total // 2 for total in totals]


def conservation(model: nn.Module, dyn: Any, x: Tensor) -> Iterator[str]:
    """The cost table says what runs, per sample."""
    counted = count_stage_macs(dyn, x[:1])
    cumulative = 0
    for number, (macs, stage) in enumerate(zip(counted, dyn.cost.stages, strict=True), 1):
        cumulative += macs
        if stage.macs != macs or stage.cumulative_macs != cumulative:
            yield (
                f"stage {number} costs {stage.macs} ({stage.cumulative_macs} cumulative) by "
                f"the table, {macs} ({cumulative}) by the counter"
            )
    original = count_macs(lambda: model(x[:1]))
    if dyn.cost.original_macs != original:
        yield f"the original costs {dyn.cost.original_macs} by the table, {original} by the counter"
    if dyn.plan.stages == 1 and cumulative != original:
        yield f"one stage runs {cumulative} MACs where the original runs {original}"
    parameters = sum(p.numel() for p in model.parameters())
    if dyn.cost.original_parameters != parameters:
        yield f"{dyn.cost.original_parameters} original parameters, not {parameters}"


def round_trip(dyn: Any, x: Tensor, path: Path) -> Iterator[str]:
    """What is loaded is what was saved, bit for bit."""
    from s2d_compiler import load

    dyn.save(path)
    loaded = load(path)
    if loaded.plan != dyn.plan:
        yield f"loaded plan {loaded.plan}, saved {dyn.plan}"
    if loaded.cost != dyn.cost:
        yield f"loaded cost {loaded.cost}, saved {dyn.cost}"
    if dict(loaded.provenance) != dict(dyn.provenance):
        yield "loaded provenance differs from what was saved"
    if loaded.report.to_dict() != dyn.report.to_dict():
        yield "loaded report differs from what was saved"
    if loaded.training != dyn.training:
        yield f"saved with training={dyn.training}, loaded with {loaded.training}"
    state, other = dyn.state_dict(), loaded.state_dict()
    if list(state) != list(other) or any(not torch.equal(state[k], other[k]) for k in state):
        yield "loaded state dict differs from what was saved"
    with torch.no_grad():
        if not _identical(dyn(x), loaded(x)):
            yield "loaded network gives other outputs"


def batch_sizes(dyn: Any, x: Tensor) -> Iterator[str]:
    """Any batch size gives the same rows."""
    with torch.no_grad():
        whole = dyn(x)
        for count in (1, len(x) - 1):
            part = dyn(x[:count])
            for stage, (a, b) in enumerate(zip(part, whole, strict=True), 1):
                for one, other in zip(tensors(a), tensors(b), strict=True):
                    deviation = float((other - other.mean(0)).abs().max())
                    error = float((one - other[:count]).abs().max())
                    if not error <= 1e-9 * deviation + 1e-13 * float(other.abs().max()):
                        yield f"batch {count} changes stage {stage}'s output by {error:.1e}"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What must not change in the original: contents, identities, flags, hooks."""
    state = {
        name: (t.data_ptr(), t.requires_grad, zlib.crc32(t.detach().contiguous().numpy().data))
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    flags = {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    }
    return {"state": state, "flags": flags}


# --------------------------------------------------------------------------------------


def check_all(
    model: nn.Module,
    plan: Plan,
    x: Tensor,
    *,
    path: Path | None = None,
    structure: Structure | None = None,
    thorough: bool = True,
) -> Measured:
    """Transform ``model`` by ``plan`` and check every consequence.

    Args:
        model: settled (see ``networks.settle``), in float64. Its training flags are the
            caller's choice; they are the same afterwards.
        plan: valid for the model.
        x: (N, C, H, W), N at least 2.
        path: where to save for the round trip; none, no round trip.
        structure: of the model, if at hand.
        thorough: see ``causality``.

    Raises:
        Broken: with all that does not hold.
    """
    from s2d_compiler import transform

    before = fingerprint(model)
    dyn = transform(model, plan, (x[:2],))
    broken = []
    if fingerprint(model) != before:
        broken.append("transform changed the original")
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        measured = Measured([], [], dyn)
        broken += check_dyn(model, dyn, x, measured, path, structure, thorough)
    finally:
        for module in trained:
            module.training = True
    if broken:
        raise Broken("\n".join(dict.fromkeys(broken)))
    return measured


def check_dyn(
    model: nn.Module,
    dyn: Any,
    x: Tensor,
    measured: Measured,
    path: Path | None = None,
    structure: Structure | None = None,
    thorough: bool = True,
) -> list[str]:
    """All that does not hold of ``dyn`` as a transform of ``model`` (in eval mode)."""
    dyn.eval()
    structure = structure or Structure(model, x)
    broken = assignment.violations(model, structure, dyn, dyn.plan)
    broken += masked_equivalence(model, dyn, x, structure, measured)
    broken += causality(dyn, x, thorough=thorough)
    broken += conservation(model, dyn, x)
    broken += batch_sizes(dyn, x)
    if path is not None:
        broken += round_trip(dyn, x, path)
    return broken
