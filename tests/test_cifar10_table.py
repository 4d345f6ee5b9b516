"""The CIFAR-10 table: its rows can be made, and its figures are not measured where chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.cifar10.__main__ import main
from benchmarks.cifar10.choosing import OMEGA, Halves, budgets, reward, within
from benchmarks.cifar10.exporting import export
from benchmarks.cifar10.page import write_page
from benchmarks.cifar10.rows import NETWORKS, Row, rows_of
from benchmarks.cifar10.training import Work, _recipe
from s2d_compiler import Recipe, transform
from s2d_compiler.calibration import Records

MACS = [10, 20, 40]


def records(seed: int = 0, count: int = 600, stages: int = 3, shift: int = 0) -> Records:
    """Exits of which later ones are better, and confidences that say something about it."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    hardness = random.random((count, 1))
    right = hardness < np.linspace(0.7, 0.9, stages)
    confidence = np.clip(1 - hardness * 0.8 + random.normal(0, 0.1, (count, stages)), 0.1, 1.0)
    return Records(
        labels=labels,
        predictions=np.where(right, labels[:, None], (labels[:, None] + 1 + shift) % 10),
        measures={"confidence": confidence, "entropy": 1 - confidence, "margin": confidence},
        classes=10,
        network="0" * 64,
        data="made up",
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_can_be_compiled(network: str) -> None:
    rows = rows_of(network)
    assert len({row.name for row in rows}) == len(rows)
    assert rows[0].name == "static"
    assert not rows[0].needs_static
    assert all(row.times == rows[-1].times for row in rows if row.table == "ablation")
    main = [row for row in rows if row.table == "main"]
    assert all(row.times == 1 or row.group == "thin" for row in main)
    for row in rows if network == "resnet20" else main[-1:]:
        dyn = transform(row.build(), row.plan)
        assert len(dyn.stages) == row.plan.get("stages", 3)


def test_each_half_chooses_for_the_other() -> None:
    found = records()
    halves = Halves(found, MACS)
    assert sorted(np.concatenate(halves.halves)) == list(range(600))
    settings = [[point for point in frontier if point.macs <= 20][-1] for frontier in
                halves.frontiers]  # fmt: skip
    chosen = halves.chosen(lambda points: [p for p in points if p.macs <= 20][-1])
    certainty = found.measures["confidence"]
    right = cost = 0.0
    for own, other in ((0, 1), (1, 0)):
        for sample in halves.halves[other]:
            first, second = settings[own].thresholds
            stage = 0 if certainty[sample, 0] >= first else 1 if certainty[sample, 1] >= second \
                else 2  # fmt: skip
            right += found.right[sample, stage]
            cost += MACS[stage]
    assert chosen.accuracy == pytest.approx(right / 600)
    assert chosen.macs == pytest.approx(cost / 600)
    assert sum(chosen.left) == pytest.approx(1)


def test_confidences_that_say_nothing_gain_nothing() -> None:
    """Measured where they were chosen, random thresholds look better than each exit; here not."""
    gains = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        right = random.random((200, 2)) < 0.5
        labels = np.zeros(200, dtype=np.int64)
        noise = random.random((200, 2))
        found = Records(labels, np.where(right, 0, 1),
                        {"confidence": noise, "entropy": noise / 2, "margin": noise}, 2, "0" * 64,
                        "noise")  # fmt: skip
        halves = Halves(found, [10, 20])
        best = halves.chosen(lambda points: points[-1])
        own = np.mean([frontier[-1].accuracy for frontier in halves.frontiers])
        gains.append((best.accuracy - 0.5, own - 0.5))
    honest, fitted = np.mean(gains, axis=0)
    assert fitted > 0.03
    assert abs(honest) < 0.03


def test_reward_is_the_papers() -> None:
    halves = Halves(records(), MACS)
    best = reward(halves.frontiers[0])
    value = best.accuracy * best.macs**OMEGA
    assert all(value >= p.accuracy * p.macs**OMEGA for p in halves.frontiers[0])


def test_as_accurate_as_another_network() -> None:
    halves = Halves(records(), MACS)
    worse = records().right[:, 0]
    cheap, dear = halves.as_accurate_as(worse), halves.as_accurate_as(records().right[:, -1])
    assert cheap is not None
    assert dear is not None
    assert cheap.macs < dear.macs < 40
    assert halves.as_accurate_as(np.ones(600, dtype=bool)) is None


def test_budgets_rise() -> None:
    curve = budgets(Halves(records(), MACS), 9)
    assert curve[0].macs == pytest.approx(10, abs=0.5)
    assert curve[-1].accuracy > curve[0].accuracy + 0.1


def test_page_is_written_from_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "resnet20"
    folder.mkdir(parents=True)
    names = ("static", "thin-8", "s2d-4-1-3", "ablation-base", "ablation-l1")
    for row in (row for row in rows_of("resnet20") if row.name in names):
        stages = int(row.plan["stages"])
        records(2 if row.name == "ablation-l1" else 1, stages=stages).save(
            folder / f"{row.name}.npz"
        )
        (folder / f"{row.name}.json").write_text(json.dumps(about(row, MACS[-stages:])))
    page = tmp_path / "cifar10.md"
    write_page(tmp_path / "results", page, Console(quiet=True))
    text = page.read_text()
    assert (tmp_path / "cifar10-resnet20.svg").stat().st_size > 5000
    accuracy = 100 * records(1, stages=1).right.mean()
    line = next(line for line in text.splitlines() if line.startswith("| static |"))
    assert f"| {accuracy:.2f} |" in line
    assert "+0.00 ± 0.00" in line
    assert text.count("| S2D 4/1/3, full reuse |") == 4
    main, ablation = text.split("### ResNet-20: one plan, one thing changed at a time")
    assert "L1 order" not in main
    assert "| full reuse, index order, from the static weights, distilled | 10.0, 20.0, 40.0 |" \
        in ablation  # fmt: skip
    line = next(line for line in ablation.splitlines() if line.startswith("| L1 order |"))
    gain = 100 * (records(2).right[:, -1].mean() - records(1).right[:, -1].mean())
    assert f"| {gain:+.2f} ± " in line


def test_page_says_what_equal_accuracy_costs(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "resnet20"
    folder.mkdir(parents=True)
    for name, stages in (("static", 1), ("thin-8", 1), ("s2d-4-1-3", 3)):
        row = next(row for row in rows_of("resnet20") if row.name == name)
        found = records(1, stages=3)
        if stages == 1:  # as right as the middle exit, and as one that nothing reaches
            right = found.right[:, 1] if name == "thin-8" else np.ones(600, dtype=bool)
            found = Records(
                labels=found.labels,
                predictions=np.where(right, found.labels, (found.labels + 1) % 10)[:, None],
                measures={key: value[:, :1] for key, value in found.measures.items()},
                classes=10, network="0" * 64, data="made up",
            )  # fmt: skip
        found.save(folder / f"{name}.npz")
        (folder / f"{name}.json").write_text(json.dumps(about(row, MACS[-stages:])))
    page = tmp_path / "cifar10.md"
    write_page(tmp_path / "results", page, Console(quiet=True))
    text = page.read_text()
    budget = text.split("Accuracy (%) at equal cost")[1].split("Who leaves")[0].splitlines()
    assert budget[2] == "| network | 20.0 | 40.0 |"
    assert not any(line.startswith(("| static |", "| static, 8")) and "| 20" in line
                   for line in budget)  # fmt: skip
    both = Halves(records(1, stages=3), [10_000_000 * n for n in (1, 2, 4)])
    share = [100 * both.chosen(within(limit)).accuracy for limit in (2e7, 4e7)]
    assert f"| S2D 4/1/3, full reuse | {share[0]:.2f} (" in budget[-2]
    assert f" | {share[1]:.2f} (" in budget[-2]
    lines = text.split("Million MACs at equal accuracy")[1].splitlines()
    assert lines[2] == "| network | static: 40.0 | static, 8 of 16 wide: 40.0 |"
    staged = records(1, stages=3)
    same = Halves(staged, [10_000_000 * n for n in (1, 2, 4)]).as_accurate_as(staged.right[:, 1])
    assert same is not None
    assert lines[4].startswith(f"| S2D 4/1/3, full reuse | not reached | {same.macs / 1e6:.1f} (")


def test_nothing_is_left_out_or_replaced_without_a_word(tmp_path: Path) -> None:
    results = tmp_path / "results"
    given = {"work": tmp_path / "work", "results": results, "page": tmp_path / "cifar10.md"}
    for options, said in (
        ({"rows": ["statik"], "data": "x.npz"}, "statik is no row of resnet20; there are static"),
        ({"examples": "nope", "data": "x.npz"}, "nope is no row"),
        ({"examples": "static"}, "take --data"),
        ({"network": "resnet21"}, "resnet21 is none of resnet20"),
        ({"rows": ["s2d-4-1-3"], "data": "x.npz"}, "starts from the row static"),
    ):
        with pytest.raises(SystemExit, match=said):
            main(**{**given, **options})  # type: ignore[arg-type]
    kept = results / "resnet20" / "static.json"
    static = rows_of("resnet20")[0]
    kept.write_text(json.dumps(about(static, [40])))
    with pytest.raises(SystemExit, match="made by another recipe"):
        main(**given, rows=["static"], data="x.npz", epochs=1)  # type: ignore[arg-type]
    place = Work("resnet20", "x.npz", tmp_path / "work", results, Recipe(epochs=1), 0.1, "cpu")
    with pytest.raises(SystemExit, match="train the row s2d-4-1-3 before"):
        export("s2d-4-1-3", place, tmp_path / "examples")
    assert not (tmp_path / "examples").exists()
    assert all(_recipe(row, place, 3).epochs == 1 for row in rows_of("resnet20") if row.times <= 1)


def about(row: Row, macs: list[int]) -> dict[str, object]:
    recipe = {"epochs": 1, "batch_size": 2, "schedule": "step", "lr": 0.1, "weight_decay": 0.0,
              "precision": "float32"}  # fmt: skip
    return {"macs": [1_000_000 * m for m in macs], "plan": dict(row.plan), "recipe": recipe,
            "torch": "2", "device": "cpu"}  # fmt: skip
