"""``s2d eval``: exits and accuracy per stage, accuracy against MACs, and the plot of it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d_compiler import DynamicModel, Plan, cli, load, transform
from s2d_compiler.calibration import calibrate, record
from s2d_compiler.commands.options import ModelSource
from s2d_compiler.commands.policy_options import read_policy
from s2d_compiler.data import Preprocessing, batches, open_data
from s2d_compiler.errors import (
    CalibrationError,
    CheckError,
    DataError,
    PolicyError,
    UsageError,
)
from s2d_compiler.evaluation import evaluate, evaluate_records, trade_off
from s2d_compiler.evaluation.drawing import draw_trade_off, policy_text
from s2d_compiler.evaluation.evaluating import interval, right_of
from s2d_compiler.runtime import Deadline, MacsBudget, Policy, Thresholds, measure_values

SAMPLES = 60
POLICIES = [
    Thresholds((0.5, 0.45)),
    Thresholds((1.05, 1.25), "entropy"),
    Thresholds((math.inf, 0.1), "margin", (0.5, 2.0, 1.0)),
    Thresholds((3.1, 2.0), lambda output: output.abs().sum(1)),
    MacsBudget(10**9),
]


def network(classes: int = 4, seed: int = 0) -> DynamicModel:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(3)
    plan = Plan.from_dict(
        {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"},
         "input_shape": [3, 8, 8]}
    )  # fmt: skip
    return transform(model, plan).eval()


def samples(classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
    return inputs, torch.randint(classes, (SAMPLES,), generator=generator)


def in_batches(size: int, classes: int = 4) -> Any:
    inputs, labels = samples(classes)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=policy_text)
@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_table_is_what_each_sample_alone_says(policy: Policy, size: int) -> None:
    """Sample by sample, from the outputs of all stages, with the policy applied by hand."""
    dyn = network()
    found = evaluate(dyn, in_batches(size), policy)
    inputs, labels = samples()
    with torch.no_grad():
        outputs = dyn(inputs)
    leaving, right, macs = [0] * 3, [0] * 3, 0
    for n in range(SAMPLES):
        stage = next(t for t in range(3) if t == 2 or leaves(policy, outputs[t][n : n + 1], t))
        leaving[stage] += 1
        right[stage] += int(outputs[stage][n].argmax() == labels[n])
        macs += dyn.cost.stages[stage].cumulative_macs
    assert [stage.leaving for stage in found.stages] == leaving
    assert [stage.right for stage in found.stages] == right
    assert found.accuracy == sum(right) / SAMPLES
    assert found.macs == macs / SAMPLES
    for stage, output in zip(found.stages, outputs, strict=True):
        assert stage.accuracy == pytest.approx(float((output.argmax(1) == labels).double().mean()))


def leaves(policy: Policy, output: Tensor, stage: int) -> bool:
    if isinstance(policy, MacsBudget):
        return False
    assert isinstance(policy, Thresholds)
    if callable(policy.measure):
        return bool(policy.measure(output) >= policy.values[stage])
    temperature = policy.temperatures[stage] if policy.temperatures else 1.0
    value = float(measure_values(policy.measure, output, temperature))
    bound = policy.values[stage]
    return value <= bound if policy.measure == "entropy" else value >= bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("policy", POLICIES, ids=policy_text)
def test_a_gpu_finds_the_same(policy: Policy) -> None:
    """In float64, whose kernels round finely everywhere."""
    here = [(inputs.double(), labels) for inputs, labels in in_batches(20)]
    there = [(inputs.cuda(), labels.cuda()) for inputs, labels in here]
    on_cpu = evaluate(network().double(), here, policy)
    on_gpu = evaluate(network().double().cuda(), there, policy)
    assert on_gpu.stages == on_cpu.stages
    assert (on_gpu.accuracy, on_gpu.macs) == (on_cpu.accuracy, on_cpu.macs)


def test_policies_differ_on_these_samples() -> None:
    """Otherwise the test above would show little."""
    found = [evaluate(network(), in_batches(60), policy).stages for policy in POLICIES]
    assert len({tuple(s.leaving for s in stages) for stages in found}) == len(POLICIES)
    assert all(stage.leaving for stage in found[0])


def test_without_a_policy_the_exits_by_themselves() -> None:
    found = evaluate(network(), in_batches(20))
    assert found.accuracy is found.macs is found.policy is None
    assert all(stage.leaving is None for stage in found.stages)
    assert json.loads(json.dumps(found.to_dict()))["accuracy"] is None


def test_predict_and_the_stages_must_agree() -> None:
    dyn = network()

    def other(inputs: Any, policy: Any = None) -> Any:
        honest = DynamicModel.predict(dyn, inputs, policy)
        return dataclasses.replace(honest, stage=honest.stage.flip(0))

    with mock.patch.object(dyn, "predict", other), pytest.raises(CheckError, match="differ by"):
        evaluate(dyn, in_batches(60), POLICIES[0])


@pytest.mark.parametrize(
    "policy",
    [None, *POLICIES[:3], Thresholds((math.inf, -0.0)), Thresholds((-math.inf, 1.3), "entropy")],
    ids=lambda policy: "none" if policy is None else policy_text(policy),
)
def test_records_say_what_the_samples_say(policy: Policy | None) -> None:
    """NaNs included, of which some samples reach the last exit."""
    dyn = network()
    parts = in_batches(20)
    parts[1][0][3:5] = math.nan
    records = record(dyn, parts, data="drawn", logits=True)
    found, expected = evaluate_records(dyn, records, policy), evaluate(dyn, parts, policy)
    assert found.to_dict() == expected.to_dict()
    assert policy is None or found.nan_confidences == 6


@pytest.mark.parametrize("measure", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_records_and_batches_decide_alike_beside_a_threshold(
    measure: str, kind: torch.dtype
) -> None:
    """At a sample's own value, and just off it, where single precision rounds the threshold."""
    dyn = network().to(kind)
    inputs, labels = samples()
    parts = [(inputs.to(kind), labels)]
    records = record(dyn, parts, logits=True)
    for temperatures in (None, (0.7, 1.3, 2.0)):
        with torch.no_grad():
            output = next(iter(dyn.exits(parts[0][0])))
        value = float(measure_values(measure, output, temperatures[0] if temperatures else 1.0)[5])
        said = []
        for bound in (value - 1e-9, value, value + 1e-9):
            never = -math.inf if measure == "entropy" else math.inf
            policy = Thresholds((bound, never), measure, temperatures)
            found = evaluate_records(dyn, records, policy)
            assert found.to_dict() == evaluate(dyn, parts, policy).to_dict()
            said.append(found.stages[0].leaving)
        assert sorted(set(said))[1] - sorted(set(said))[0] == 1


def test_batches_of_one_size_cost_what_their_last_sample_does() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 15 * self.last(self.first(x).relu().mean((2, 3)).reshape(4, 8))
            return out

    plan = {"stages": 3, "groups": 4, "default": {"split": [1, 2], "concat": "all"}}
    dyn = transform(Fixed().eval(), plan, (torch.zeros(4, 3, 8, 8),))
    assert dyn.parts.batch == 4
    records = record(dyn, in_batches(4))
    values = torch.from_numpy(records.measures["confidence"])
    bounds = [float(values[:, stage].quantile(0.4)) for stage in (0, 1)]
    policy = Thresholds(tuple(bounds))
    found = evaluate_records(dyn, records, policy)
    assert found == evaluate(dyn, in_batches(4), policy)
    alone = sum(s.macs * (s.leaving or 0) for s in found.stages) / SAMPLES
    assert found.macs is not None
    assert found.macs > 1.1 * alone


def test_infinite_logits_are_read_alike() -> None:
    dyn = network()
    parts = in_batches(60)
    finite = dyn.forward

    def infinite(inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.masked_fill(output > 0.3, math.inf) for output in finite(inputs))

    with mock.patch.object(dyn, "forward", infinite):
        found, expected = evaluate_records(dyn, record(dyn, parts)), evaluate(dyn, parts)
    assert found.to_dict() == expected.to_dict()
    assert found.stages != evaluate(dyn, parts).stages


def test_a_threshold_that_no_entropy_comes_to_is_refused_where_it_is_asked_for() -> None:
    dyn = network()
    records = record(dyn, in_batches(60))
    for values, refused in (((1.5, 0.1), True), ((0.1, 1.5), True), ((1.4, 9.0), False)):
        policy = Thresholds(values, "entropy")
        for run in (
            lambda policy=policy: evaluate(dyn, in_batches(60), policy),
            lambda policy=policy: evaluate_records(dyn, records, policy),
        ):
            if refused:
                with pytest.raises(PolicyError, match="above the largest entropy of 4 classes"):
                    run()
            else:
                assert run().stages[0].leaving == SAMPLES


def test_a_part_of_records_is_that_part_of_the_samples() -> None:
    dyn = network()
    parts = in_batches(20)
    whole = record(dyn, parts, data="drawn", logits=True)
    half = whole.part(slice(20, None), "[20:]")
    assert half.data == "drawn[20:]"
    policy = POLICIES[2]
    assert evaluate_records(dyn, half, policy) == dataclasses.replace(
        evaluate(dyn, parts[1:], policy)
    )


@pytest.mark.parametrize("rows", [slice(None, None, -1), slice(50, 10, -3), slice(-5, None)])
@pytest.mark.parametrize("temperature", [False, True])
def test_parts_in_any_order_are_calibrated_and_evaluated(rows: slice, temperature: bool) -> None:
    dyn = network()
    inputs, labels = samples()
    chosen = torch.arange(SAMPLES)[range(SAMPLES)[rows]]
    part = record(dyn, in_batches(20), logits=True).part(rows, "[...]")
    calibrate(dyn, part, "macs=70%", temperature=temperature)
    policy = dyn.settings.policy
    expected = evaluate(dyn, [(inputs[chosen], labels[chosen])], policy)
    assert evaluate_records(dyn, part, policy).stages == expected.stages


def test_what_records_do_not_say() -> None:
    dyn = network()
    records = record(dyn, in_batches(20), data="drawn")
    for policy, said in (
        (POLICIES[2], "no logits, which the policy's temperatures"),
        (POLICIES[3], "no measure of one's own"),
        (POLICIES[4], "under a MacsBudget who leaves depends on more"),
        (Thresholds((0.5,)), "1 for a network of 3 stages"),
    ):
        with pytest.raises((CalibrationError, PolicyError), match=said):
            evaluate_records(dyn, records, policy)
    with pytest.raises(CalibrationError, match="of another network"):
        evaluate_records(network(seed=1), records)
    fewer = dataclasses.replace(
        records,
        predictions=records.predictions[:, :2],
        measures={name: values[:, :2] for name, values in records.measures.items()},
    )
    with pytest.raises(CalibrationError, match="of another network"):
        evaluate_records(dyn, fewer)
    with pytest.raises(CalibrationError, match=r"\[60:\] holds none of their 60 samples"):
        records.part(slice(60, None), "[60:]")


def test_nan_is_counted_and_never_right() -> None:
    dyn = network()
    inputs, labels = samples()
    inputs[3] = math.nan
    found = evaluate(dyn, [(inputs, labels)], Thresholds((0.0, 0.0)))
    assert found.nan_confidences == 3
    assert [stage.leaving for stage in found.stages] == [SAMPLES - 1, 0, 1]
    assert found.stages[2].right == 0
    assert not right_of(torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))
    assert not right_of(torch.tensor([[math.nan, 1.0]]), torch.tensor([1]))


def test_one_logit_is_two_classes() -> None:
    logits = torch.tensor([[2.0], [-1.0], [0.5]])
    assert right_of(logits, torch.tensor([1, 0, 0])).tolist() == [True, True, False]


class Odd(nn.Module):
    """One logit without a column, of an image and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Linear(17, 1)

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        pooled = self.first(x).relu().mean((2, 3))
        out: Tensor = self.second(torch.cat([pooled, number], 1)).squeeze(1)
        return out


def test_one_logit_without_a_column_and_two_inputs_from_records_to_accuracy() -> None:
    """``calibrate``, ``predict`` and ``evaluate`` read the same outputs in the same way."""
    images, labels = samples(2)
    inputs = (images, torch.randn(SAMPLES, 1, generator=torch.Generator().manual_seed(4)))
    plan = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}}
    dyn = transform(Odd().eval(), plan, inputs)
    found = calibrate(dyn, record(dyn, [(inputs, labels)]), "macs=70%")
    policy = dyn.settings.policy
    assert policy is not None
    said = evaluate(dyn, [(inputs, labels)], policy)
    shares = [stage.leaving / SAMPLES for stage in said.stages if stage.leaving is not None]
    assert shares == pytest.approx(found.exit_rates)
    right = (dyn.predict(inputs, policy).output > 0).long() == labels
    assert said.accuracy == pytest.approx(float(right.double().mean()))
    assert said.macs == pytest.approx(found.mean_cost)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid()], ids=["softmax", "sigmoid"])
def test_probabilities_are_warned_of(last: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    classes = 1 if isinstance(last, nn.Sigmoid) else 4
    layers = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, classes), last]
    model = nn.Sequential(*layers).eval()
    plan = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}
    evaluate(transform(model, plan, (torch.zeros(1, 3, 8, 8),)), in_batches(20, 2))
    assert "take the softmax or sigmoid out" in caplog.text
    caplog.clear()
    evaluate(network(), in_batches(20))
    assert "probabilities" not in caplog.text


def test_what_is_no_classifier() -> None:
    dyn = network()
    with (
        mock.patch.object(dyn, "forward", lambda inputs: (torch.zeros(len(inputs), 2, 4, 4),)),
        pytest.raises(DataError, match=r"shape \(60, 2, 4, 4\)"),
    ):
        evaluate(dyn, in_batches(60))
    with pytest.raises(DataError, match="0 samples"):
        evaluate(dyn, [])


# -- accuracy against cost -----------------------------------------------------------------------


def brute_force(values: Any, correct: Any, macs: Any) -> list[tuple[float, float]]:
    """Every combination of thresholds, sample by sample."""
    exits = len(macs) - 1
    grids = [[*sorted({v[t] for v in values if v[t] == v[t]}), math.inf] for t in range(exits)]
    found = []
    for thresholds in itertools.product(*grids):
        right = cost = 0.0
        for v, c in zip(values, correct, strict=True):
            stage = next(t for t in range(exits + 1) if t == exits or v[t] >= thresholds[t])
            right += c[stage]
            cost += macs[stage]
        found.append((cost / len(values), right / len(values)))
    return found


@settings(max_examples=60)
@given(st.data())
def test_the_frontier_is_that_of_brute_force(data: Any) -> None:
    stages, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    numbers = st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.9, 1.0, math.nan])
    values = [data.draw(st.tuples(*[numbers] * stages)) for _ in range(count)]
    correct = [data.draw(st.tuples(*[st.booleans()] * stages)) for _ in range(count)]
    steps = data.draw(st.lists(st.integers(1, 50), min_size=stages, max_size=stages))
    macs = list(itertools.accumulate(steps))
    found = trade_off(torch.tensor(values, dtype=torch.float64), torch.tensor(correct), macs)
    assert found.is_exhaustive
    every = brute_force(values, correct, macs)
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(every, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1] + 1e-9:
            best.append((cost, accuracy))
    assert [(p.macs, p.accuracy) for p in found.frontier] == [pytest.approx(p) for p in best]
    for point in (*found.frontier, *found.single):
        expected = brute_point(values, correct, macs, point.thresholds)
        assert (point.macs, point.accuracy) == pytest.approx(expected)
    assert found.single[-1].macs == pytest.approx(max(every)[0])


def brute_point(values: Any, correct: Any, macs: Any, thresholds: Any) -> tuple[float, float]:
    stages = [
        next(t for t in range(len(macs)) if t == len(macs) - 1 or v[t] >= thresholds[t])
        for v in values
    ]
    rights = [c[t] for t, c in zip(stages, correct, strict=True)]
    return sum(macs[t] for t in stages) / len(values), sum(rights) / len(values)


def test_the_frontier_of_many_samples_is_close_to_the_best() -> None:
    """Quantiles where there are too many thresholds: hardly worse, and every point is real."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3000, 4, generator=generator).double()
    correct = torch.rand(3000, 4, generator=generator) < values
    found = trade_off(values, correct, [1, 3, 7, 20])
    assert not found.is_exhaustive
    for point in found.frontier[::40]:
        expected = brute_point(values.tolist(), correct.tolist(), [1, 3, 7, 20], point.thresholds)
        assert (point.macs, point.accuracy) == pytest.approx(expected)
    costs = [p.macs for p in found.frontier]
    assert costs == sorted(costs)
    best = max(p.accuracy for p in found.single)
    assert found.frontier[-1].accuracy >= best - 0.005


def test_entropy_counts_the_other_way_round() -> None:
    values = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).double()
    correct = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    up = trade_off(values, correct, [1, 2, 4])
    down = trade_off(-values, correct, [1, 2, 4], "entropy")
    assert [(p.macs, p.accuracy) for p in up.frontier] == [
        (p.macs, p.accuracy) for p in down.frontier
    ]
    assert down.frontier[0].thresholds == tuple(-t for t in up.frontier[0].thresholds)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_intervals_hold_the_share(count: int, share: float) -> None:
    low, high = interval(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    numpy.savez("a.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=numpy.uint8),
                labels=rng.integers(0, 4, 40))  # fmt: skip
    dyn = network()
    dyn.save("bare.pt")
    dyn.settings = dataclasses.replace(
        dyn.settings,
        policy=Thresholds((0.5, 0.45)),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    )
    dyn.save("dyn.pt")
    return tmp_path


def test_the_command_says_what_evaluate_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what is stored: policy and preprocessing."""
    assert cli.main(["eval", "dyn.pt", "--data", "a.npz", "--json", "--batch-size", "16"]) == 0
    document = json.loads(capsys.readouterr().out)
    dyn = load("dyn.pt").eval()
    assert dyn.settings.preprocessing is not None
    every = batches(open_data("a.npz"), dyn.settings.preprocessing, 40)
    expected = evaluate(dyn, every, dyn.settings.policy).to_dict()
    assert {key: document[key] for key in expected} == json.loads(json.dumps(expected))
    assert document["preprocessing"] == dyn.settings.preprocessing.to_dict()
    assert document["accuracy"] != document["stages"][2]["accuracy"]


def test_half_of_the_records_choose_and_the_command_evaluates_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without images, once what the exits say of them is recorded."""
    words = ["calibrate", "dyn.pt", "--target", "macs=60%", "--records", "r.npz"]
    assert cli.main([*words, "--data", "a.npz"]) == 0
    (folder / "a.npz").rename(folder / "gone.npz")
    assert cli.main([*words, "--split", "[:30]", "-o", "half.pt"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "30 of 40 samples, read from r.npz" in said
    assert "on 30 samples" in said
    assert cli.main(["eval", "half.pt", "--records", "r.npz", "--split", "[30:]", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    dyn = load("half.pt").eval()
    assert dyn.settings.preprocessing is not None
    rest = batches(open_data("gone.npz", "[30:]"), dyn.settings.preprocessing, 10)
    expected = evaluate(dyn, rest, dyn.settings.policy).to_dict()
    assert {key: document[key] for key in expected} == json.loads(json.dumps(expected))
    assert document["samples"] == 10
    assert document["data"] == "a.npz[30:]"
    assert cli.main(["eval", "half.pt", "--records", "r.npz", "--split", "[30:]"]) == 0
    assert "were chosen on" not in capsys.readouterr().err
    assert cli.main(["eval", "half.pt", "--records", "r.npz", "--split", "[:30]"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the stored thresholds were chosen on samples of a.npz[:30]" in said
    for words, said in (
        (["--records", "r.npz", "--data", "gone.npz"], "--data is given too"),
        (["--records", "r.npz", "--static", "half.pt"], "--static is given too"),
        (["--records", "r.npz", "--split", "test[:3]"], "the split 'test' (of which records"),
        (["--records", "r.npz", "--mean", "0.1"], "another preprocessing is named"),
        (["--records", "r.npz", "--split", "[40:]"], "holds none of their 40 samples"),
        (["--records", "none.npz"], "no such file of records"),
    ):
        assert cli.main(["eval", "half.pt", *words]) == 2, words
        assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "dyn.pt", "--data", "a.npz"]) == 0
    said = capsys.readouterr()
    assert "confidence ≥ 0.5, 0.45: " in said.out
    assert "right of 40 samples (95% interval" in said.out
    assert not said.err  # no bar where nobody looks
    assert cli.main(["eval", "bare.pt", "--data", "a.npz"]) == 0
    said = capsys.readouterr()
    assert "no policy is stored or given" in said.out
    assert "pixels are only scaled" in said.err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("option", [None, "--quiet", "--json"])
def test_long_work_shows_progress_on_a_terminal(
    folder: Path, option: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal())
    words = ["eval", "dyn.pt", "--data", "a.npz", "--batch-size", "4"]
    assert cli.main([*words, *([option] if option else [])]) == 0
    assert isinstance(sys.stderr, _Terminal)
    assert ("evaluating dyn.pt" in sys.stderr.getvalue()) == (option is None)


def test_beside_the_original(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "eval dyn.pt --data a.npz --json --static model.pt"
    with mock.patch.object(ModelSource, "read", return_value=_Constant()):
        assert cli.main(words.split()) == 0
    document = json.loads(capsys.readouterr().out)
    labels = open_data("a.npz").labels
    assert document["static_accuracy"] == pytest.approx(float((labels == 2).double().mean()))


class _Constant(nn.Module):
    """Says class 2 of everything."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(4)[2].expand(len(x), 4)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot(folder: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / f"plot.{suffix}"
    words = ["eval", "dyn.pt", "--data", "a.npz", "--plot", str(path)]
    assert cli.main(words) == 0
    first = path.read_bytes()
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert first.startswith(start)
    assert cli.main(words) == 0
    assert path.read_bytes() == first
    if suffix == "svg":
        text = first.decode()
        for word in ("one threshold for all stages", "stage 3", "confidence ≥ 0.5, 0.45",
                     "MACs per sample", "dyn.pt on a.npz", "original"):  # fmt: skip
            assert word in text, word
    assert "plot: " in capsys.readouterr().out


def test_the_plot_shows_the_points(tmp_path: Path) -> None:
    """Read back from the axes: what is drawn is what was measured."""
    found = evaluate(network(), in_batches(60), POLICIES[0])
    drawn: dict[str, Any] = {}

    def write(path: Path, draw: Any) -> None:
        from matplotlib.figure import Figure

        axes = Figure().subplots()
        draw(axes)
        drawn.update({str(line.get_label()): line.get_xydata() for line in axes.lines})
        drawn["limits"] = axes.get_ylim()

    with mock.patch("s2d_compiler.evaluation.drawing.write_plot", write):
        draw_trade_off(found, tmp_path / "a.png", "title", 0.75)
    assert found.accuracy is not None
    assert found.macs is not None
    unit = 1e3
    assert drawn["the original"].tolist() == [[found.original_macs / unit, 75.0]]
    assert drawn["confidence ≥ 0.5, 0.45"].tolist() == [[found.macs / unit, 100 * found.accuracy]]
    assert drawn["one stage for all samples"].tolist() == [
        [s.macs / unit, 100 * s.accuracy] for s in found.stages
    ]
    best = drawn["best thresholds on these samples"]
    assert (numpy.diff(best[:, 0]) >= 0).all()
    low, high = drawn["limits"]
    assert all(low < y < high for points in list(drawn.values())[:-1] for _, y in points)


def test_a_plot_that_cannot_be_written_is_refused_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ("--plot absent/a.png", "absent does not exist"),
        ("--plot a.gif", "end it with .png"),
    ):
        with mock.patch("s2d_compiler.format.load", side_effect=AssertionError):
            assert cli.main(["eval", "dyn.pt", "--data", "a.npz", *words.split()]) == 2
        assert said in capsys.readouterr().err
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        assert cli.main(["eval", "dyn.pt", "--data", "a.npz", "--plot", "a.png"]) == 2
    assert "pip install 's2d-compiler[plots]'" in capsys.readouterr().err
    assert not list(folder.glob("*.png"))


def test_what_the_command_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = numpy.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=numpy.uint8)
    numpy.savez("many.npz", images=images, labels=numpy.arange(5))
    numpy.savez("large.npz", images=rng.random((5, 9, 9, 3)), labels=numpy.zeros(5, int))
    for words, said in (
        ("--data many.npz", "the label 4, and the network tells 4 classes apart"),
        ("--data large.npz", "3x9x9 after preprocessing"),
        ("--data a.npz --policy 0.5", "1 for a network of 3 stages"),
        ("--data a.npz --policy 0.5,1.5", "1.5 at stage 2 is no value of confidence"),
        ("--data a.npz --policy often", "is no policy; write stored"),
        ("--data a.npz --policy macs:3", "below what stage 1 costs"),
        ("--data a.npz --policy ms:3", "no times are recorded"),
        ("--data a.npz --device gpu7", "'gpu7' cannot be used here"),
        ("--data a.npz --input-shape 3x9x9", "3x9x9 is not what dyn.pt takes, 3x8x8"),
        ("", "--data: nothing is named"),
    ):
        assert cli.main(["eval", "dyn.pt", *words.split()]) == 2, words
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("0.9,0.8", Thresholds((0.9, 0.8))),
        ("entropy:0.2,never", Thresholds((0.2, -math.inf), "entropy")),
        ("margin:never,0.5", Thresholds((math.inf, 0.5), "margin")),
        ("macs:1_000_000", MacsBudget(1_000_000)),
        ("macs:2.5e9", MacsBudget(2_500_000_000)),
        ("batch-macs:50000", MacsBudget(50_000, "batch")),
        ("ms:12.5", Deadline(12.5)),
        ("stored", POLICIES[0]),
        ("none", None),
    ],
)
def test_policies_on_the_command_line(text: str, policy: Policy | None) -> None:
    assert read_policy(text, POLICIES[0]) == policy


@pytest.mark.parametrize("text", ["", "x", "0.9;0.8", "macs:", "macs:many", "ms:nan", "ms:-1",
                                  "macs:0.5", "margin:2", "macs:inf"])  # fmt: skip
def test_policies_that_are_none(text: str) -> None:
    with pytest.raises((UsageError, PolicyError)):
        read_policy(text, None)
