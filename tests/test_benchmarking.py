"""``s2d bench``: forced exits, break-even, interleaving, what is printed, drawn and recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2d_compiler import DynamicModel, cli, load, transform
from s2d_compiler.benchmarking import Benchmark, benchmark
from s2d_compiler.benchmarking.forcing import ForcedExits, spread
from s2d_compiler.benchmarking.profiling import Breakdown, break_down, excess, kind_of
from s2d_compiler.benchmarking.results import break_even
from s2d_compiler.benchmarking.timer import interleaved, percentile, typical
from s2d_compiler.commands.benchmarking import break_even_text, read_distribution
from s2d_compiler.errors import UsageError
from s2d_compiler.tracing import capture

PLAN = {
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "input_shape": [3, 8, 8],
}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def dyn() -> DynamicModel:
    return transform(build(), PLAN)


@pytest.fixture(scope="module")
def found(dyn: DynamicModel) -> Benchmark:
    program = capture(build(), None, (3, 8, 8))
    return benchmark(
        dyn, program, batches=(1, 5), backends=("eager",), distribution=(0.6, 0.25, 0.15),
        rounds=2, seconds=0.0,
    )  # fmt: skip


def test_spread_rounds_by_largest_remainders() -> None:
    assert spread((0.6, 0.25, 0.15), 20) == [0] * 12 + [1] * 5 + [2] * 3
    assert spread((0.6, 0.25, 0.15), 1) == [0]
    assert spread((0.5, 0.5), 3) in ([0, 0, 1], [0, 1, 1])
    for count in range(50):
        assert len(spread((0.7, 0.2, 0.1), count)) == count


@pytest.mark.parametrize("batch", [1, 2, 7, 20])
def test_samples_leave_in_the_given_shares(dyn: DynamicModel, batch: int) -> None:
    forced = ForcedExits((0.6, 0.25, 0.15), batch)
    x, stages = torch.randn(batch, 3, 8, 8), []
    for _ in range(forced.calls):
        forced.begin()
        stages += dyn.predict(x, forced.policy).stage.tolist()
    assert sorted(stages) == spread((0.6, 0.25, 0.15), batch * forced.calls)


def test_turns_are_taken_in_both_directions() -> None:
    order: list[str] = []

    def run(name: str) -> Any:
        return lambda: (order.append(name), (1.0, 2.0))[1]

    found = interleaved({"a": run("a"), "b": run("b")}, rounds=3, seconds=0.0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(turns) for turns in found.values()] == [3, 3]


def test_percentiles_in_milliseconds() -> None:
    turns = [[(0.001,), (0.003,)], [(0.010,)], [(0.002,)]]
    assert typical(turns, 0) == pytest.approx(2.0)  # of medians 2, 10 and 2
    assert percentile(turns, 0, 50) == pytest.approx(2.5)


def test_break_even() -> None:
    # Half of the samples at 2 and half at 8 cost 5 on average.
    assert break_even([2.0], [1.0], last=8.0, static=5.0) == pytest.approx(0.5)
    assert break_even([1.0, 3.0], [0.3, 0.1], last=8.0, static=5.0) == pytest.approx(3 / 6.5)
    assert break_even([2.0], [1.0], last=4.0, static=5.0) == 0
    assert break_even([6.0], [1.0], last=8.0, static=5.0) is None
    assert break_even([1.0, 3.0], [0.0, 0.0], last=8.0, static=5.0) == pytest.approx(0.5)
    assert break_even([], [], last=8.0, static=5.0) is None
    assert "never" in break_even_text(None)
    assert "even when" in break_even_text(0.0)
    assert "50%" in break_even_text(0.5)


def test_what_a_benchmark_finds(found: Benchmark, dyn: DynamicModel) -> None:
    assert [batch.batch for batch in found.batches] == [1, 5]
    for batch in found.batches:
        assert {s.form for s in batch.static} == {"eager nchw", "eager nhwc"}
        assert batch.static[0].typical == min(s.typical for s in batch.static)
        (form,) = batch.dynamic
        assert form.form == "eager"
        times = [e.typical for e in form.exits]
        assert times == sorted(times)
        assert all(e.p50 <= e.p95 for e in form.exits)
        for row, stage in zip(form.exits, dyn.cost.stages, strict=True):
            assert row.macs == stage.cumulative_macs / dyn.cost.original_macs
            assert row.time == pytest.approx(row.typical / batch.static[0].typical)
            assert row.efficiency == pytest.approx(row.macs / (row.time or math.nan))
        assert form.throughput == pytest.approx(batch.batch / form.mixed * 1000)
    assert json.loads(json.dumps(found.to_dict()))["distribution"] == [0.6, 0.25, 0.15]


def test_without_the_original(dyn: DynamicModel) -> None:
    found = benchmark(dyn, None, batches=(2,), backends=("eager",), rounds=1, seconds=0.0)
    (batch,) = found.batches
    assert batch.static == ()
    assert batch.dynamic[0].exits[0].efficiency is None
    assert batch.dynamic[0].speedup is None


def test_a_form_that_fails_is_left_out(dyn: DynamicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the compiler says no\nat length")

    monkeypatch.setattr(
        "s2d_compiler.benchmarking.measuring.optimize_static", lambda *a, **k: Broken()
    )
    program = capture(build(), None, (3, 8, 8))
    found = benchmark(dyn, program, batches=(2,), backends=("eager",), rounds=1, seconds=0.0)
    assert found.skipped["static eager nhwc, batch 2"] == "RuntimeError: the compiler says no"
    assert found.batches[0].static == ()


def test_shares_are_read() -> None:
    assert read_distribution("60/25/15", 3) == (0.6, 0.25, 0.15)
    assert sum(read_distribution("33.3/33.3/33.3", 3)) == pytest.approx(1)
    assert read_distribution(None, 4) == (0.25,) * 4
    for text in ("60/40", "60/25/16.5", "a/b/c", "120/-10/-10", "nan/50/50", ""):
        with pytest.raises(UsageError, match="--distribution"):
            read_distribution(text, 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dyn: DynamicModel) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(build(), "model.pt")
    dyn.save("dyn.pt")
    return tmp_path


QUICK = "--batch 1 3 --backends eager --rounds 1 --seconds 0 --threads 1"


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"bench dyn.pt --static model.pt --distribution 60/25/15 {QUICK}"
    assert cli.main(words.split()) == 0
    printed = capsys.readouterr().out
    for part in ("batch 1", "batch 3", "efficiency", "static eager nhwc", "samples/s", "60/25/15"):
        assert part in printed
    assert torch.get_num_threads() >= 1


def test_the_command_records_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(f"bench dyn.pt --record --plot p.svg --json {QUICK}".split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["static"] is None
    assert document["batches"][0]["dynamic"][0]["exits"][0]["efficiency"] is None
    assert (folder / "p.svg").read_text().count("<svg") == 1
    timings = load("dyn.pt").settings.timings
    assert timings is not None
    assert timings.batch_sizes == (1, 2, 3)
    assert timings.to_dict() == document["recorded"]


def test_the_command_without_a_compiler(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    words = f"bench dyn.pt --static model.pt {QUICK.replace('eager', 'eager inductor')}"
    assert cli.main(words.split()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: inductor: no C++ compiler was found" in printed
    assert "static eager nhwc" in printed


def test_where_the_time_goes() -> None:
    static = break_down(lambda: torch.cat([torch.ones(10), torch.ones(10)]).relu(), runs=2)
    assert static.total == pytest.approx(sum(static.milliseconds.values()))
    assert static.calls["concatenation"] == 1
    for operator, kind in (
        ("mkldnn::_convolution_pointwise", "convolution"), ("aten::addmm", "matrix product"),
        ("aten::cat", "concatenation"), ("aten::native_batch_norm", "norm"),
        ("aten::max_pool2d", "pooling"), ("aten::copy_", "copy"),
        ("aten::relu", "elementwise and others"),
    ):  # fmt: skip
        assert kind_of(operator) == kind
    dynamic = Breakdown({"convolution": 5.0, "concatenation": 2.0}, {})
    found = excess(dynamic, Breakdown({"convolution": 8.0}, {}), macs=0.5)
    assert found == [("concatenation", 2.0), ("convolution", 1.0)]
