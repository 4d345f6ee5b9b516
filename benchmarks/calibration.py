"""How good, how fast and how honest calibration is: ``python -m benchmarks.calibration``.

- ``solve``: thresholds against the best of all (brute force over every pair of recorded values),
  and the processor time it takes, for 10,000 simulated samples at 3 and 5 exits.
- ``promise``: thresholds promised with 95% from 1,000 draws of samples, and how often the promise
  is broken: simulated exits, whose true risk is known, and a small network on handwritten digits.

Both print Markdown tables, which ``docs/calibration.md`` holds.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import cyclopts
import numpy as np
import torch
from numpy.typing import NDArray

from s2d_compiler.calibration.instances import Floats, Instance
from s2d_compiler.calibration.promises import promise, split
from s2d_compiler.calibration.solver import Solver, exits_of
from s2d_compiler.calibration.targets import (
    Enas4dMetric,
    MaxDrop,
    MeanBudget,
    Reward,
    Target,
    parse_target,
)

app = cyclopts.App(name="python -m benchmarks.calibration", help=__doc__, version_flags=())
Flags = NDArray[np.bool_]
COSTS = {3: (0.06, 0.25, 0.68), 5: (0.06, 0.15, 0.25, 0.45, 0.68)}


def simulated(samples: int, stages: int, seed: int) -> tuple[Floats, Flags]:
    """Exits that are right more often the later they are, and the surer the likelier right.

    Returns:
        Certainty (n, s - 1) in single precision, and whether each exit is right (n, s).
    """
    draw = np.random.default_rng(seed)
    ease = 1.3 - 3.2 * draw.beta(0.6, 2.2, samples) + 0.8 * draw.normal(size=samples)
    scores = (
        ease[:, None] + np.linspace(0.3, 1.6, stages) + 0.7 * draw.normal(size=(samples, stages))
    )
    noise = 0.4 * draw.normal(size=(samples, stages))
    confidence = 1 / (1 + np.exp(-(np.abs(scores) * 1.5 + noise)))
    certainty = np.clip(confidence, 0.1, 1).astype(np.float32).astype(np.float64)
    return certainty[:, :-1], scores > 0


def brute_force(certainty: Floats, right: Flags, costs: Sequence[float], target: Target) -> float:
    """The highest score over all pairs of recorded values, counted another way: a sweep."""
    instance = Instance.of(certainty, right, costs)
    first, second = instance.groups
    samples = len(right)
    score = target.score(samples, float(right[:, -1].sum()), tuple(costs))
    order = np.argsort(first, kind="stable")
    ends = np.searchsorted(first[order], np.arange(instance.levels[0] + 1))
    y = right.astype(float)
    best, left = -np.inf, np.zeros(samples, dtype=bool)
    right_left, before = 0.0, 0
    for end in ends:  # the samples order[:end] leave at stage 1
        rows = order[before:end]
        left[rows] = True
        right_left += y[rows, 0].sum()
        before = int(end)
        here = ~left
        groups, levels = second[here], instance.levels[1]
        wins = np.bincount(groups, weights=y[here, 1] - y[here, 2], minlength=levels + 1)
        counts = np.bincount(groups, minlength=levels + 1)
        leaving = np.concatenate([[0], np.cumsum(counts[:levels])])
        found = right_left + y[here, 2].sum() + np.concatenate([[0], np.cumsum(wins[:levels])])
        staying = samples - before - leaving
        spent = before * costs[0] + leaving * costs[1] + staying * costs[2]
        best = max(best, float(np.max(score(found, spent))))
    return best


@app.command
def solve(*, samples: int = 10_000, instances: int = 3) -> None:
    """Compare with brute force, and measure processor time."""
    torch.set_num_threads(1)
    print(_machine())
    print("| stages | target | score | below brute force | gap | processor time |")
    print("|---:|---|---:|---:|---:|---:|")
    targets: tuple[Target, ...] = (
        Reward(), Enas4dMetric(share=0.3), MeanBudget(share=0.3), MaxDrop(0.005),
    )  # fmt: skip
    for stages, costs in COSTS.items():
        for target in targets:
            for seed in range(instances):
                certainty, right = simulated(samples, stages, seed)
                started = time.process_time()
                found = Solver(certainty, right, costs).solve(target)
                spent = time.process_time() - started
                assert found is not None
                below = "not counted"
                if stages == 3:
                    best = brute_force(certainty, right, costs, target)
                    below = f"{max(0.0, (best - found.score) / abs(best)):.3%}"
                print(
                    f"| {stages} | {target} | {found.score:.6g} | {below} | {found.gap:.2%} | "
                    f"{spent * 1000:.0f} ms |"
                )


@app.command
def promises(*, draws: int = 1000, digits: bool = True) -> None:
    """Count broken promises."""
    torch.set_num_threads(1)
    print(_machine())
    print(
        "| exits | samples | target | broken | none promised | mean slack | cost or accuracy "
        "promised | fitted on as many |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    if digits:
        exits, costs = digit_exits()
        for text in ("drop=2%", "macs=25%"):
            _count("digits", exits, costs, 600, text, draws)
        for text in ("drop=2%", "macs=25%"):
            _count("digits, parted", exits, costs, 600, text, draws, replace=False)
    population = simulated(100_000, 3, 77)
    for text in ("drop=1%", "macs=45%", "drop=1%,against=94%"):
        _count("simulated", population, COSTS[3], 2000, text, draws)
    for text in ("drop=1%", "macs=45%"):
        _count("simulated", population, COSTS[3], 10_000, text, draws)


def _count(
    what: str,
    population: tuple[Floats, Flags],
    costs: tuple[float, ...],
    samples: int,
    text: str,
    draws: int,
    *,
    replace: bool = True,
) -> None:
    """Draw samples, promise, and look at the population (or, without replacement, the rest)."""
    target = parse_target(text)
    assert isinstance(target, MaxDrop | MeanBudget)
    certainty, right = population
    broken, none, slack, reached, fitted = 0, 0, [], [], []
    for draw in range(draws):
        generator = np.random.default_rng((draw, samples))
        if replace:
            rows, rest = generator.integers(0, len(right), samples), np.arange(len(right))
        else:
            order = generator.permutation(len(right))
            rows, rest = order[:samples], order[samples:]
        choosing, testing = (rows[part] for part in split(samples, draw))
        found = promise(
            (certainty[choosing], right[choosing]), (certainty[testing], right[testing]),
            costs, target, 0.95,
        )  # fmt: skip
        if found is None:
            none += 1
            continue
        over, good = _risk(certainty[rest], right[rest], costs, target, found.solution.thresholds)
        broken += over > 0
        slack.append(-over)
        reached.append(good)
        if draw % 10 == 0:
            fit = Solver(certainty[rows], right[rows], costs).solve(target)
            assert fit is not None
            fitted.append(_risk(certainty[rest], right[rest], costs, target, fit.thresholds))
    scale = 1.0 if isinstance(target, MaxDrop) else costs[-1]
    missed = np.mean([over > 0 for over, _ in fitted])
    print(
        f"| {what} | {samples:,} | {target} | {broken / draws:.1%} | {none / draws:.1%} | "
        f"{np.mean(slack) / scale:.2%} | {np.mean(reached):.2%} | "
        f"{np.mean([good for _, good in fitted]):.2%}, missed {missed:.0%} |",
        flush=True,
    )


def _risk(
    certainty: Floats,
    right: Flags,
    costs: tuple[float, ...],
    target: MaxDrop | MeanBudget,
    thresholds: Sequence[float],
) -> tuple[float, float]:
    """By how much a target is exceeded, and the cost (share of the last stage's) or accuracy."""
    exits = exits_of(certainty, thresholds)
    accuracy = float(right[np.arange(len(right)), exits].mean())
    cost = float(np.asarray(costs)[exits].mean())
    if isinstance(target, MeanBudget):
        return cost - target.value(costs), accuracy
    reference = float(right[:, -1].mean()) if target.against is None else target.against
    return reference - accuracy - target.drop, cost / costs[-1]


def digit_exits() -> tuple[tuple[Floats, Flags], tuple[float, ...]]:
    """Exits of the digits' network of ``examples``, trained on a third of them, on the others."""
    from examples import digits
    from s2d_compiler import Plan, transform
    from s2d_compiler.calibration import record

    digits.HELD_OUT = 1200
    digits.load_data.cache_clear()
    torch.manual_seed(0)
    model = digits.build()
    digits.fit(model, 15)
    dyn = transform(model, Plan.load("examples/digits.json"))
    digits.fit(dyn, 15, lr=5e-3)
    _, held_out = digits.load_data()
    records = record(dyn, [(held_out.images, held_out.labels)], data="digits")
    costs = tuple(float(stage.cumulative_macs) for stage in dyn.cost.stages)
    print(f"<!-- digits: {', '.join(f'{a:.1%}' for a in records.right.mean(0))} right -->")
    return (records.certainty("confidence"), records.right), costs


def _machine() -> str:
    def processor() -> Iterator[str]:
        yield platform.machine()
        yield f"Python {platform.python_version()}"
        yield f"numpy {np.__version__}"
        yield f"torch {torch.__version__}"

    return f"One core, {', '.join(processor())}\n"


def main(argv: Any = None) -> None:
    """Run the command that the words ask for."""
    app(argv)


if __name__ == "__main__":
    main()
