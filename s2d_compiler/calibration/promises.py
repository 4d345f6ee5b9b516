"""A promise in place of a fit: what was found on some samples is tested on others.

Thresholds that just meet a target on the samples they were chosen on miss it on others about half
of the time. So the samples are parted at random. On the first part a path of thresholds is chosen,
from cautious to bold: the best for ever weaker forms of the target. On the second part each is
tested in that order, "it breaks the promise" being what is to be refuted at the promised error,
until one is not refuted; the last one before is taken. Whatever the path, a promise is false with
at most the error of one test, since the first false one on the path must be refuted for that.

Source: Angelopoulos, Bates, Candes, Jordan and Lei (2021), "Learn then Test: Calibrating
Predictive Algorithms to Achieve Risk Control", fixed sequence testing (section 3); for early
exits, Jazbec et al. (2024), "Fast yet Safe: Early-Exiting with Risk Control". The tests are in
``bounds``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from s2d_compiler.calibration.bounds import (
    accuracy_p_value,
    drop_p_value,
    loss_p_value,
    mean_p_value,
    samples_for_accuracy,
    samples_for_drop,
    samples_for_mean,
)
from s2d_compiler.calibration.instances import Floats, Integers
from s2d_compiler.calibration.solver import Solution, Solver, exits_of
from s2d_compiler.calibration.targets import MaxDrop, MeanBudget
from s2d_compiler.errors import CalibrationError

#: The share of the samples on which thresholds are chosen; the others test them.
CHOOSING = 0.35
#: Thresholds on the path.
_STEPS = 24
#: Shares of a drop that losses alone may use up in the steps before them.
_LOSSES = (0.2, 0.4, 0.6, 0.8)
#: How many standard deviations the first one keeps away from the target.
_FARTHEST = 5

DROP_BOUND = (
    "exact tail of the sum of wins and losses, maximised over the share that differs "
    "(Berger and Boos 1994)"
)
LOSS_BOUND = "exact binomial tail of the losses (Clopper and Pearson 1934)"
ACCURACY_BOUND = "exact binomial tail of the right answers (Clopper and Pearson 1934)"
MEAN_BOUND = "betting (Waudby-Smith and Ramdas 2024)"

Flags = NDArray[np.bool_]
#: Samples of one part: certainty (n, s - 1) and right (n, s).
Part = tuple[Floats, Flags]


@dataclass(frozen=True, slots=True)
class Promise:
    """Thresholds that keep a target on new samples of the same distribution.

    Attributes:
        solution: As found on the samples that chose it.
        confidence: The probability, over the samples, that it is kept.
        bound: The test, with its source.
        p_value: Of the test that the thresholds passed.
        tested: Number of thresholds tested, the one that failed included.
    """

    solution: Solution
    confidence: float
    bound: str
    p_value: float
    tested: int


def split(samples: int, seed: int) -> tuple[Integers, Integers]:
    """Rows that choose thresholds, and rows that test them, in random order."""
    order = np.random.default_rng(seed).permutation(samples)
    middle = math.floor(samples * CHOOSING)
    return order[:middle], order[middle:]


def require_samples(
    target: MaxDrop | MeanBudget, costs: tuple[float, ...], samples: int, confidence: float
) -> None:
    """Require as many samples as the promise takes at the least.

    Raises:
        CalibrationError: There are fewer; it says how many it takes.
    """
    error = 1 - confidence
    if isinstance(target, MeanBudget):
        low, high = costs[0], costs[-1]
        limit = (target.value(costs) - low) / (high - low) if high > low else 1.0
        tests = samples_for_mean(limit, error)
    elif target.against is None:
        tests = samples_for_drop(target.drop, error)
    else:
        tests = samples_for_accuracy(target.against - target.drop, error)
    if math.isinf(tests):
        raise CalibrationError(
            f"target: {target}, with a confidence of {confidence:.0%}: no number of samples can "
            "promise that, for there is no room for chance; allow a little more."
        )
    needed = math.ceil(tests / (1 - CHOOSING)) + 1
    if samples < max(needed, 10):
        raise CalibrationError(
            f"{samples:,} samples are too few to promise this ({target}) with a confidence of "
            f"{confidence:.0%}: it takes {max(needed, 10):,} at the least, and more where stages "
            "disagree; give more samples, a weaker target, or no --confidence."
        )


def promise(
    chosen: Part,
    tested: Part,
    costs: tuple[float, ...],
    target: MaxDrop | MeanBudget,
    confidence: float,
    lowest: float = -math.inf,
) -> Promise | None:
    """Thresholds that keep a target with a promised probability.

    Args:
        chosen: Samples that choose thresholds.
        tested: Others, in random order, that test them.
        costs: (s,) cumulative cost per sample.
        target: A drop or a mean budget.
        confidence: The probability that is promised.
        lowest: The threshold that lets everybody leave.

    Returns:
        None where not even the most cautious thresholds that leave early pass.
    """
    error = 1 - confidence
    p_value, bound = _test(chosen, tested, costs, target, error)
    passed: Promise | None = None
    for number, solution in enumerate(
        _path(chosen, len(tested[0]), costs, target, lowest), start=1
    ):
        found = p_value(solution)
        if found > error:
            return None if passed is None else replace(passed, tested=number)
        passed = Promise(solution, confidence, bound, found, number)
    return passed


def _path(
    chosen: Part, tests: int, costs: tuple[float, ...], target: MaxDrop | MeanBudget, lowest: float
) -> Iterator[Solution]:
    """Thresholds from cautious to bold, each once: best for targets up to the one asked for.

    The first is so far below it, in standard deviations of what is tested, that it should pass.
    """
    best: Solution | None = None
    for found in _steps(chosen, tests, costs, target, lowest):
        if best is None or (
            found.right > best.right if isinstance(target, MeanBudget) else found.cost < best.cost
        ):  # nothing is gained by testing what is no better
            best = found
            yield found


def _steps(
    chosen: Part, tests: int, costs: tuple[float, ...], target: MaxDrop | MeanBudget, lowest: float
) -> Iterator[Solution]:
    solver = Solver(*chosen, costs, lowest)
    near = solver.solve(target)
    deviation = _deviation(chosen, costs, target, near) / math.sqrt(tests)
    is_drop = isinstance(target, MaxDrop) and target.against is None
    distances = [deviation * _FARTHEST * (1 - step / (_STEPS - 1)) for step in range(_STEPS)]
    if isinstance(target, MeanBudget):
        room = target.value(costs) - costs[0]
        distances = [d for d in (room, room / 2) if d > distances[0]] + distances
    elif is_drop:
        yield from _cautious(chosen, costs, target, lowest)
    for distance in distances:
        found = solver.solve(_weaker(target, chosen, costs, distance), near)
        if found is not None and (any(found.cuts) or not is_drop):
            near = found
            yield found


def _cautious(
    chosen: Part, costs: tuple[float, ...], target: MaxDrop, lowest: float
) -> Iterator[Solution]:
    """The first steps for a drop: no sample loses, or few do, whatever others win."""
    certainty, right = chosen
    solver = Solver(certainty, right | ~right[:, -1:], costs, lowest)
    found = solver.solve(MaxDrop(0.0))
    if found is None:
        return
    for quarters in (1, 2, 3, 4):
        cuts = tuple(cut * quarters // 4 for cut in found.cuts)
        if any(cuts):
            yield solver.at(cuts)
    for share in _LOSSES:
        found = solver.solve(MaxDrop(target.drop * share), found)
        if found is not None and any(found.cuts):
            yield found


def _deviation(
    chosen: Part, costs: tuple[float, ...], target: MaxDrop | MeanBudget, near: Solution | None
) -> float:
    """Standard deviation, per sample, of what the target is about."""
    certainty, right = chosen
    if near is None:
        return 0.5 if isinstance(target, MaxDrop) else (costs[-1] - costs[0]) / 2
    exits = exits_of(certainty, near.thresholds)
    answers = right[np.arange(len(right)), exits].astype(float)
    if isinstance(target, MeanBudget):
        return max(float(np.asarray(costs)[exits].std()), 0.05 * (costs[-1] - costs[0]))
    compared = right[:, -1] - answers if target.against is None else answers
    return max(float(compared.std()), math.sqrt(target.drop))


def _weaker(
    target: MaxDrop | MeanBudget, chosen: Part, costs: tuple[float, ...], distance: float
) -> MaxDrop | MeanBudget:
    """The target at some distance on the safe side, on the samples that choose."""
    if isinstance(target, MeanBudget):
        return MeanBudget(macs=max(target.value(costs) - distance, costs[0]))
    reference = float(chosen[1][:, -1].mean()) if target.against is None else target.against
    return MaxDrop(0.0, against=min(max(reference - target.drop + distance, 0.0), 1.0))


def _test(
    chosen: Part,
    tested: Part,
    costs: tuple[float, ...],
    target: MaxDrop | MeanBudget,
    error: float,
) -> tuple[Callable[[Solution], float], str]:
    """The p-value of "these thresholds break the promise", and what it is called."""
    certainty, right = tested
    rows = np.arange(len(right))

    def answers(solution: Solution) -> tuple[Flags, Integers]:
        exits = exits_of(certainty, solution.thresholds)
        return right[rows, exits], exits

    if isinstance(target, MeanBudget):
        low, high = costs[0], costs[-1]
        spent = np.asarray([(c - low) / (high - low) if high > low else 0.0 for c in costs])
        limit = (target.value(costs) - low) / (high - low) if high > low else 2.0

        def mean(solution: Solution) -> float:
            before = spent[exits_of(chosen[0], solution.thresholds)]
            expected = float(before.mean()), float(before.var())
            return mean_p_value(spent[answers(solution)[1]], limit, error, expected)

        return mean, MEAN_BOUND
    if target.against is not None:
        least = target.against - target.drop
        return (
            lambda s: accuracy_p_value(int(answers(s)[0].sum()), len(right), least),
            ACCURACY_BOUND,
        )

    def counts(solution: Solution) -> tuple[int, int]:
        leaving = answers(solution)[0]
        last = right[:, -1]
        return int((last & ~leaving).sum()), int((leaving & ~last).sum())

    if _losses_alone(chosen, len(right), target.drop, error):
        return lambda s: loss_p_value(counts(s)[0], len(right), target.drop), LOSS_BOUND
    return (
        lambda s: drop_p_value(*counts(s), len(right), target.drop, error),
        DROP_BOUND,
    )


def _losses_alone(chosen: Part, tests: int, limit: float, error: float) -> bool:
    """Whether to count losses alone: where wins are rare or samples few, that test sees more.

    Decided on the samples that choose: how large a drop each test would let pass, if wins were as
    frequent as they are among the samples that a stage in between would let leave.
    """
    right = chosen[1]
    gains = float((right[:, 0] & ~right[:, -1]).mean()) / 2
    wins = round(gains * tests)

    def largest(passes: Callable[[int], bool]) -> int:
        found = -1
        while found < limit * tests + wins and passes(found + 1):
            found += 1
        return found

    alone = largest(lambda worse: loss_p_value(worse, tests, limit) <= error)
    both = largest(lambda worse: drop_p_value(worse, wins, tests, limit, error) <= error)
    return alone >= both
