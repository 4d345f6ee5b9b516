"""Thresholds against brute force: every choice of recorded values, counted sample by sample."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.calibration import COSTS, brute_force, simulated
from s2d_compiler.calibration.instances import Floats, Instance
from s2d_compiler.calibration.lattice import Axis, count
from s2d_compiler.calibration.solver import Solver, between, exits_of, solve
from s2d_compiler.calibration.targets import (
    Enas4dMetric,
    MaxDrop,
    MeanBudget,
    Reward,
    Target,
    parse_target,
)
from s2d_compiler.errors import CalibrationError

TARGETS: tuple[Target, ...] = (
    Reward(),
    Reward(-0.5),
    Enas4dMetric(share=0.4),
    Enas4dMetric(share=0.3, omega=2.0),
    MeanBudget(share=0.35),
    MeanBudget(share=0.7),
    MaxDrop(0.0),
    MaxDrop(0.05),
    MaxDrop(0.0, against=0.5),
)


def every_choice(
    certainty: Floats, right: Floats, costs: tuple[float, ...], target: Target
) -> float:
    """The best score of all: leaving is decided by comparing values, one choice after the other."""
    values = [[math.inf, *np.unique(c[~np.isnan(c)])] for c in certainty.T]
    rows = np.arange(len(right))
    score = target.score(len(right), float(right[:, -1].sum()), costs)
    best = -math.inf
    for thresholds in itertools.product(*values):
        stage = np.full(len(right), len(thresholds))
        for t in reversed(range(len(thresholds))):
            stage = np.where(certainty[:, t] >= thresholds[t], t, stage)
        found = score(right[rows, stage].sum(), np.asarray(costs)[stage].sum())
        best = max(best, float(found))
    return best


def drawn(seed: int, samples: int, stages: int) -> tuple[Floats, Floats]:
    """Small instances with ties, constant and missing confidences."""
    draw = np.random.default_rng(seed)
    certainty = draw.random((samples, stages - 1))
    right = draw.random((samples, stages)) < np.sort(draw.random(stages))
    kind = seed % 6
    if kind == 1:
        certainty = np.round(certainty, 1)
    elif kind == 2:
        certainty[:, draw.integers(stages - 1)] = 0.5
    elif kind == 3:
        certainty[draw.random(certainty.shape) < 0.2] = np.nan
    elif kind == 4:
        right[:, 0] = draw.random(samples) < certainty[:, 0]
    elif kind == 5:
        certainty[:, 0] = np.nan
    return certainty, right


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_small_instances_of_three_stages_are_solved_as_by_brute_force(target: Target) -> None:
    costs, impossible = (1.0, 2.5, 6.0), 0
    for seed in range(36):
        certainty, right = drawn(seed, 5 + seed, 3)
        best = every_choice(certainty, right, costs, target)
        found = solve(certainty, right, costs, target)
        if best == -math.inf:
            assert found is None
            impossible += 1
            continue
        assert found is not None
        assert found.score >= best - 1e-3 * abs(best), (seed, found, best)
        assert found.score <= best + 1e-9 * abs(best)
    assert impossible < 20


@pytest.mark.parametrize("stages", [2, 4, 5])
def test_other_numbers_of_stages(stages: int) -> None:
    costs = (1.0, 1.5, 2.5, 4.0, 6.0)[:stages]
    for seed, target in itertools.product(range(3), TARGETS[::2]):
        certainty, right = drawn(seed, {2: 30, 4: 12, 5: 6}[stages], stages)
        best = every_choice(certainty, right, costs, target)
        found = solve(certainty, right, costs, target)
        assert (found is None) == (best == -math.inf)
        assert found is None or found.score == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(
    "target", TARGETS[:1] + TARGETS[2:3] + TARGETS[4:5] + TARGETS[7:8], ids=str
)
def test_realistic_exits_of_three_stages_are_solved_as_by_brute_force(target: Target) -> None:
    certainty, right = simulated(2500, 3, 4)
    best = brute_force(certainty, right, COSTS[3], target)
    found = solve(certainty, right, COSTS[3], target)
    assert found is not None
    assert best - 1e-3 * abs(best) <= found.score <= best + 1e-9 * abs(best)
    assert found.gap <= 1e-3


def test_brute_force_of_the_benchmark_is_brute_force() -> None:
    certainty, right = drawn(7, 25, 3)
    for target in TARGETS:
        best = every_choice(certainty, right, (1.0, 2.0, 5.0), target)
        assert brute_force(certainty, right, (1.0, 2.0, 5.0), target) == pytest.approx(best)


def test_with_five_stages_thresholds_are_close_to_the_best_of_two_million_choices() -> None:
    """More choices than a grid has points; what is left open is said."""
    costs = COSTS[5]
    for seed in range(1):
        certainty, right = simulated(2000, 5, seed)
        certainty = np.floor(certainty * 36) / 36  # few values, so that all choices can be counted
        instance = Instance.of(certainty, right, costs)
        axes = [
            Axis(np.arange(levels + 1), np.ones(levels + 1, dtype=bool))
            for levels in instance.levels
        ]
        counts = count(instance, axes, cells=False)
        assert counts.right.size > 100_000
        for target in (Reward(), MeanBudget(share=0.4), MaxDrop(0.005), Enas4dMetric(share=0.3)):
            score = target.score(len(right), float(right[:, -1].sum()), costs)
            best = float(score(counts.right, counts.cost).max())
            found = solve(certainty, right, costs, target)
            assert found is not None
            assert found.score >= best - 2e-3 * abs(best)
            assert found.score + found.gap * abs(found.score) >= best - 1e-4 * abs(best)


@pytest.mark.parametrize(("stages", "seconds"), [(3, 0.05), (5, 2.0)])
def test_ten_thousand_samples_are_solved_in_time(stages: int, seconds: float) -> None:
    """Processor time, the best of three runs: other work on the machine is not counted."""
    certainty, right = simulated(10_000, stages, 1)
    targets = (MaxDrop(0.005), MeanBudget(share=0.3), Reward(), Enas4dMetric(share=0.3))
    for target in targets[: 4 if stages == 3 else 2]:
        spent = []
        for _ in range(3):
            started = time.process_time()
            solve(certainty, right, COSTS[stages], target)
            spent.append(time.process_time() - started)
            if spent[-1] <= seconds:
                break
        assert min(spent) <= seconds, target


@given(st.integers(0, 10_000), st.integers(2, 4))
def test_counts_on_a_grid_and_their_bounds(seed: int, stages: int) -> None:
    """Every point is what its samples give, and no choice in a cell beats the cell's bound."""
    draw = np.random.default_rng(seed)
    certainty, right = drawn(seed, int(draw.integers(1, 25)), stages)
    instance = Instance.of(certainty, right, np.cumsum(draw.random(stages)))
    axes = []
    for levels in instance.levels:
        some = np.unique(draw.integers(0, levels + 1, int(draw.integers(1, 5))))
        single = np.append(draw.random(len(some) - 1) < 0.3, True)
        axes.append(Axis(some, single | np.append(np.diff(some) == 1, True)))
    counts = count(instance, axes)
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        right_here, cost_here = instance.totals(
            [int(axis.points[i]) for axis, i in zip(axes, place, strict=True)]
        )
        assert counts.right[place] == pytest.approx(right_here)
        assert counts.cost[place] == pytest.approx(cost_here)
        inside = [
            range(axis.points[i], axis.points[i] + 1 if axis.single[i] else axis.points[i + 1])
            for axis, i in zip(axes, place, strict=True)
        ]
        for cuts in itertools.product(*(list(r)[:4] for r in inside)):
            most, least = instance.totals(cuts)
            assert most <= counts.most_right[place] + 1e-9
            assert least >= counts.least_cost[place] - 1e-9


@given(st.integers(0, 10_000))
def test_fixing_some_stages_gives_a_smaller_problem_with_the_same_counts(seed: int) -> None:
    draw = np.random.default_rng(seed)
    certainty, right = drawn(seed, 20, 5)
    instance = Instance.of(certainty, right, (1, 2, 4, 5, 9))
    cuts = [int(draw.integers(0, levels + 1)) for levels in instance.levels]
    free = sorted(draw.choice(4, int(draw.integers(1, 4)), replace=False).tolist())
    smaller = instance.with_fixed(cuts, free)
    assert smaller.totals([cuts[t] for t in free]) == pytest.approx(instance.totals(cuts))
    assert smaller.samples <= instance.samples


@given(st.integers(0, 10_000), st.sampled_from(TARGETS))
def test_thresholds_let_leave_whom_the_solution_counts(seed: int, target: Target) -> None:
    certainty, right = drawn(seed, 30, 3)
    certainty = certainty.astype(np.float32).astype(float)
    solver = Solver(certainty, right, (1.0, 2.0, 5.0), lowest=0.0)
    found = solver.solve(target)
    if found is None:
        return
    exits = exits_of(certainty, found.thresholds)
    assert (exits == solver.instance.exits(found.cuts)).all()
    assert right[np.arange(30), exits].sum() == found.right
    assert np.asarray((1.0, 2.0, 5.0))[exits].mean() == pytest.approx(found.cost)
    single = [np.float32(t) for t in found.thresholds]  # as a network compares
    assert (exits_of(certainty.astype(np.float32), single) == exits).all()


def test_thresholds_lie_between_values_and_nobody_and_everybody_have_theirs() -> None:
    assert between(0.25, 0.75) == 0.5
    next_to_one = float(np.nextafter(np.float32(1), np.float32(0)))
    assert between(next_to_one, 1.0) == 1.0
    assert 0.1 < between(0.1, 0.1 + 1e-12) <= 0.1 + 1e-12
    certainty = np.array([[0.9], [0.8], [0.3], [np.nan]])
    early, late = np.array([[True, False]] * 4), np.array([[False, True]] * 4)
    everybody = solve(certainty, early, (1.0, 2.0), Reward(), lowest=0.0)
    nobody = solve(certainty, late, (1.0, 2.0), Reward(), lowest=0.0)
    assert everybody is not None
    assert nobody is not None
    assert everybody.thresholds == (0.0,)
    assert exits_of(certainty, everybody.thresholds).tolist() == [0, 0, 0, 1]
    assert nobody.thresholds == (math.inf,)


def test_samples_of_equal_confidence_leave_together() -> None:
    certainty = np.array([[0.9], [0.5], [0.5], [0.5], [0.1]])
    right = np.array([[1, 1], [1, 1], [0, 1], [1, 1], [0, 1]], dtype=bool)
    for target in TARGETS:
        found = solve(certainty, right, (0.2, 2.0), target)
        assert found is not None
        exits = exits_of(certainty, found.thresholds)
        assert len(set(exits[1:4].tolist())) == 1


def test_targets_as_text() -> None:
    assert parse_target("drop=0.5%") == MaxDrop(0.005)
    assert parse_target("drop=0.005, against=93.2%") == MaxDrop(0.005, 93.2 / 100)
    assert parse_target("macs=60%") == MeanBudget(share=0.6)
    assert parse_target("macs=2e8") == MeanBudget(macs=2e8)
    assert parse_target("ms=3.5") == MeanBudget(milliseconds=3.5)
    assert parse_target("reward") == Reward(-0.06)
    assert parse_target("reward=-0.2") == Reward(-0.2)
    assert parse_target("enas4d=30%,omega=0.1") == Enas4dMetric(share=0.3, omega=0.1)
    for text in ("", "drop", "drop=a", "drop=1%,drop=2%", "speed=3", "reward=0.06", "ms=-1",
                 "macs=0", "drop=2", "drop=1%,omega=3", "drop=1%,", "reward=nan"):  # fmt: skip
        with pytest.raises(CalibrationError):
            parse_target(text)
