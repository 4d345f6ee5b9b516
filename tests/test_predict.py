"""Predictions with early exits: what each sample alone would get, within every budget."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d_compiler import DynamicModel, MacsBudget, Thresholds, load, transform
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.errors import InputShapeError, PlanError, PolicyError, UsageError
from s2d_compiler.runtime import MEASURES, Policy, measure_values
from tests.networks import Drawn, networks, settle
from tests.plans import plans
from tests.slow_predict import Slow, assert_same, evaluate, first_leaf_certainty

PLAN = {"stages": 3, "groups": 8, "default": {"split": [3, 5], "concat": "all"}}


class Classifier(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


def images(count: int, seed: int = 0, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def compiled(classes: int = 5) -> DynamicModel:
    model = settle(Classifier(classes), images(32, 1))
    with torch.no_grad():
        model.head.weight.mul_(4)
    return transform(model, {**PLAN, "input_shape": [3, 6, 6]})


@pytest.fixture(scope="module")
def dyn() -> DynamicModel:
    return compiled()


def between(values: list[float], place: float) -> float:
    """A threshold away from every value, so that rounding decides nothing."""
    ordered = sorted({*values, 0.0, 1.0})
    widest = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(ordered)]
    fitting = [middle for gap, middle in widest if gap > 1e-7] or [0.5]
    return min(max(fitting[int(place * (len(fitting) - 1))], 0.0), 1.0)


def drawn_policy(data: st.DataObject, dyn: DynamicModel, slow: Slow, measure: Any) -> Policy:
    stages = len(dyn.stages)
    values = []
    for stage in range(stages - 1):
        place = data.draw(st.sampled_from([0.5, 0.0, 0.2, 0.8, 1.0]))
        seen = [row[stage] for row in slow.certainty]
        value = between(seen, place)
        if measure == "entropy":
            value = min(value, math.log(2))
        never = -math.inf if measure == "entropy" else math.inf
        values.append(data.draw(st.sampled_from([value, value, value, never])))
    thresholds = Thresholds(tuple(values), measure)
    kind = data.draw(st.sampled_from(["thresholds", "sample", "batch"]))
    if kind == "thresholds":
        return thresholds
    inner = (
        data.draw(st.sampled_from([thresholds, None])) if measure == "confidence" else thresholds
    )
    costs = [stage.cumulative_macs for stage in dyn.cost.stages]
    budget = data.draw(st.integers(max(costs[0], 1), 2 * max(costs[-1], 1)))
    if kind == "batch":
        budget *= max(len(slow.certainty), 1)
    return MacsBudget(budget, kind, inner)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    drawn=networks(),
    seed=st.integers(0, 2**16),
    count=st.sampled_from([5, 1, 2, 9]),
)
def test_a_batch_gives_what_its_samples_alone_would(
    data: st.DataObject, drawn: Drawn, seed: int, count: int
) -> None:
    model = settle(drawn.model, drawn.batch(8, seed), seed)
    try:
        dyn = transform(model, data.draw(plans()), (drawn.batch(2),))
    except PlanError:
        assume(False)
    x = drawn.batch(count, seed + 1)
    output = dyn(x[:1])[0]
    logits = isinstance(output, Tensor)
    measure = data.draw(st.sampled_from(MEASURES)) if logits else first_leaf_certainty
    slow = evaluate(dyn, x, measure)
    policy = drawn_policy(data, dyn, slow, measure)
    assume(cost_allows(policy))
    if isinstance(policy, MacsBudget) and policy.thresholds is None and not logits:
        return
    found = dyn.predict(x, policy)
    event(f"{len(set(found.stage.tolist()))} exits used")
    assert_same(found, slow, policy, 1e-9)


def cost_allows(policy: Policy) -> bool:
    return not isinstance(policy, MacsBudget) or policy.macs > 0


def test_of_no_samples_there_are_no_answers(dyn: DynamicModel) -> None:
    found = dyn.predict(images(0), Thresholds((0.5, 0.5)))
    assert len(found) == 0
    assert found.output.shape == (0, 5)
    assert found.output.dtype == torch.float64
    assert found.macs.tolist() == found.confidence.tolist() == []
    assert [len(p) for p in dyn.anytime(images(0))] == [0, 0, 0]


def test_everybody_and_nobody(dyn: DynamicModel) -> None:
    x = images(4)
    first, _, last = dyn(x)
    torch.testing.assert_close(dyn.predict(x, Thresholds((0.0, 0.0))).output, first)
    torch.testing.assert_close(dyn.predict(x, Thresholds((math.inf, math.inf))).output, last)
    never = Thresholds((-math.inf, -math.inf), "entropy")
    assert dyn.predict(x, never).stage.tolist() == [2] * 4


def test_temperatures_divide_the_logits(dyn: DynamicModel) -> None:
    x = images(6)
    found = dyn.predict(x, Thresholds((0.0, 0.0), temperatures=(2.0, 1.0, 1.0)))
    wanted = (dyn(x)[0] / 2).softmax(1).amax(1)
    torch.testing.assert_close(found.confidence, wanted)


def test_later_stages_do_not_run_when_all_have_left() -> None:
    dyn = compiled()
    dyn.predict(images(2), Thresholds((0.0, 0.0)))  # the first one finds where samples lie
    ran: list[int] = []
    hooks = [
        stage.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, stage in enumerate(dyn.stages)
    ]
    dyn.predict(images(1), Thresholds((0.0, 0.0)))
    dyn.predict(images(3), Thresholds((math.inf, 0.0)))
    next(iter(dyn.anytime(images(2))))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 0, 1, 0]


def test_anytime_gives_every_stage(dyn: DynamicModel) -> None:
    x = images(3)
    found = list(dyn.anytime(x, measure="margin"))
    for number, (predictions, output) in enumerate(zip(found, dyn(x), strict=True)):
        torch.testing.assert_close(predictions.output, output)
        assert predictions.stage.tolist() == [number] * 3
        two = output.softmax(1).topk(2).values
        torch.testing.assert_close(predictions.confidence, two[:, 0] - two[:, 1])


class Named(Classifier):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(x)}


def test_anytime_without_logits_answers_and_says_nothing_of_certainty() -> None:
    dyn = transform(settle(Named(), images(32, 1)), {**PLAN, "input_shape": [3, 6, 6]})
    x = images(3)
    for predictions, output in zip(dyn.anytime(x), dyn(x), strict=True):
        torch.testing.assert_close(predictions.output["logits"], output["logits"])
        assert predictions.confidence.isnan().all()
    with pytest.raises(PolicyError, match="returns a dict"):
        list(dyn.anytime(x, measure="margin"))


def test_single_logits_need_no_column() -> None:
    logits = torch.tensor([-3.0, 0.5, 2.0])
    for name in MEASURES:
        wanted = measure_values(name, torch.stack([logits, torch.zeros(3)], 1))
        torch.testing.assert_close(measure_values(name, logits), wanted)
    assert torch.allclose(measure_values("confidence", logits)[0], torch.tensor(3.0).sigmoid())


def test_what_is_no_number_never_leaves_early_and_is_counted(dyn: DynamicModel) -> None:
    x = images(4)
    x[1, 0, 0, 0] = math.nan
    x[2, 0, 0, 0] = math.inf
    found = dyn.predict(x, Thresholds((0.0, 0.0)))
    assert found.stage.tolist() == [0, 2, 2, 0]
    assert found.nan_confidences == 6
    assert found.confidence.isnan().tolist() == [False, True, True, False]
    alone = dyn.predict(x[1:2], Thresholds((0.0, 0.0), "entropy"))
    assert alone.stage.tolist() == [2]
    assert alone.nan_confidences == 3
    budget = MacsBudget(3 * dyn.cost.stages[0].macs + dyn.cost.stages[1].macs, "batch")
    assert dyn.predict(x[:3], budget).stage.tolist() == [0, 1, 0]


def test_the_original_is_left_with_its_gradients() -> None:
    dyn = compiled()
    found = dyn.predict(images(3).requires_grad_(), Thresholds((0.3, 0.3)))
    assert not found.output.requires_grad
    assert all(p.grad is None for p in dyn.parameters())


def test_outputs_without_a_measure_have_no_confidence_to_count() -> None:
    class Named(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    dyn = transform(settle(Named(), images(8)), {**PLAN, "input_shape": [3, 6, 6]})
    for count in (1, 4):
        found = dyn.predict(images(count), MacsBudget(dyn.cost.stages[1].cumulative_macs))
        assert found.stage.tolist() == [1] * count
        assert found.confidence.isnan().all()
        assert found.nan_confidences == 0
        assert [p.nan_confidences for p in dyn.anytime(images(count))] == [0, 0, 0]


@pytest.mark.parametrize("given", [numpy.zeros((2, 3, 6, 6)), [images(2)], None])
def test_what_is_no_tensor_is_named(dyn: DynamicModel, given: Any) -> None:
    with pytest.raises(InputShapeError, match=rf"got 0, a {type(given).__name__}; each input is"):
        dyn.predict(given, Thresholds((0.5, 0.5)))


def test_the_stored_policy_is_used_and_kept(dyn: DynamicModel, tmp_path: Any) -> None:
    own = compiled()
    own.settings = dataclasses.replace(own.settings, policy=Thresholds((0.4, math.inf), "margin"))
    own.save(tmp_path / "dyn.pt")
    again = load(tmp_path / "dyn.pt")
    assert again.settings == own.settings
    x = images(5)
    assert again.predict(x).stage.tolist() == own.predict(x).stage.tolist()


def test_networks_whose_samples_depend_on_each_other_run_one_by_one() -> None:
    class Mixing(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x)
            out: Tensor = self.head((y - 0.5 * y.mean(0, keepdim=True)).mean((2, 3)))
            return out

    model = settle(Mixing(), images(8))
    dyn = transform(model, {**PLAN, "input_shape": [3, 6, 6]})
    x = images(6, 3)
    slow = evaluate(dyn, x, "confidence")
    middle = sorted(row[0] for row in slow.certainty)
    policy = Thresholds(((middle[2] + middle[3]) / 2, 0.5))
    assert_same(dyn.predict(x, policy), slow, policy, 1e-12)
    with torch.no_grad():
        difference = (dyn(x)[0][:1] - dyn(x[:1])[0]).abs().max()
    assert float(difference) > 1e-3, "they do depend on each other"


class Between(nn.Module):
    """Two layers, and something between them that may look at other samples."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.b(self.between(F.relu(self.a(x))))))
        return out


def mixing(between: Callable[[Tensor], Tensor], seed: int = 0) -> DynamicModel:
    torch.manual_seed(seed)
    model = Between(between).eval()
    return transform(model, DepthPlan(("a", "b")), (torch.randn(2, 6),))


def logarithms(y: Tensor) -> Tensor:
    """NaN for random inputs of this network, numbers for inputs above 0."""
    depth = torch.log(y.sum(1, keepdim=True) - 20)
    return y * (1 + depth - depth.mean(0, keepdim=True))


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.cumsum(0),
        lambda y: y + y[:1],
        lambda y: torch.tril(y @ y.t()) @ y,
        lambda y: y + torch.arange(y.shape[0])[:, None],
        lambda y: y / y.shape[0],
        lambda y: y - y.mean(0, keepdim=True),
        logarithms,
    ],
    ids=["sums so far", "the first", "those before", "place", "count", "mean", "NaN on random"],
)
def test_samples_that_know_of_each_other_in_any_way_run_one_by_one(
    between: Callable[[Tensor], Tensor],
) -> None:
    dyn = mixing(between)
    x = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) * 30 + 20
    alone = [dyn.predict(row, Thresholds((0.6, 0.6))) for row in x.split(1)]
    found = dyn.predict(x, Thresholds((0.6, 0.6)))
    assert not found.output.isnan().any()
    torch.testing.assert_close(found.output, torch.cat([p.output for p in alone]))
    assert found.stage.tolist() == [int(p.stage) for p in alone]
    with torch.no_grad():
        together = dyn(x)[-1]
    assert not torch.allclose(together, torch.cat([dyn(row)[-1] for row in x.split(1)]), 1e-3)


def test_samples_that_know_of_each_other_run_one_by_one_in_half_precision() -> None:
    dyn = mixing(lambda y: y - y.mean(0, keepdim=True)).to(torch.bfloat16)
    x = torch.randn(5, 6).to(torch.bfloat16)
    found = dyn.predict(x, MacsBudget(10**9))
    alone = torch.cat([dyn.predict(row, MacsBudget(10**9)).output for row in x.split(1)])
    assert torch.equal(found.output, alone)
    apart = mixing(lambda y: y * 2).to(torch.bfloat16)
    apart.predict(x, MacsBudget(10**9))
    assert apart.engine._axes is not None


def test_tokens_that_come_first_stay_first_where_samples_run_one_by_one() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x.transpose(0, 1))
            out: Tensor = self.b(F.relu(y - y.mean(1, keepdim=True) / 2))
            return out

    plan = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}
    dyn = transform(Tokens().eval(), plan, (torch.randn(2, 5, 6),))
    x = torch.randn(3, 5, 6)

    def certainty(output: Tensor) -> Tensor:
        return output.abs().sum((0, 2))

    middle = float(certainty(dyn.predict(x, MacsBudget(dyn.cost.stages[0].macs)).output).median())
    policy = Thresholds((middle,), certainty)
    found = dyn.predict(x, policy)
    alone = [dyn.predict(row, policy) for row in x.split(1)]
    assert found.stage.tolist() == [int(p.stage) for p in alone]
    assert set(found.stage.tolist()) == {0, 1}
    torch.testing.assert_close(found.output, torch.cat([p.output for p in alone], 1))


def test_equal_samples_tell_nothing_and_the_next_ones_do() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.table(x).mean(1))
            out: Tensor = self.b(F.relu(y - y.mean(0, keepdim=True)))
            return out

    dyn = transform(Tokens().eval(), DepthPlan(("a",)), (torch.randint(0, 9, (2, 3)),))
    everything = MacsBudget(10**9)
    for x in (torch.zeros(4, 3, dtype=torch.long), torch.randint(0, 9, (4, 3))):
        alone = torch.cat([dyn.predict(row, everything).output for row in x.split(1)])
        torch.testing.assert_close(dyn.predict(x, everything).output, alone)


def test_inputs_of_the_wrong_type_leave_nothing_behind() -> None:
    dyn = mixing(lambda y: y)
    with pytest.raises(RuntimeError, match="dtype"):
        dyn.predict(torch.randn(3, 6).double(), MacsBudget(10**9))
    dyn.predict(torch.randn(3, 6), MacsBudget(10**9))
    assert dyn.engine._axes is not None, "samples run together"


def test_networks_of_one_batch_size_run_whole() -> None:
    class Fixed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 4:
                raise ValueError(x.shape)
            out: Tensor = self.head(self.features(x).mean((2, 3)))
            return out

    model = Fixed()
    model.load_state_dict(settle(Classifier(), images(32, 1)).state_dict())
    dyn = transform(model.double().eval(), PLAN, (images(4),))
    assert dyn.parts.batch == 4
    x = images(4, 2)
    with torch.no_grad():
        outputs = dyn(x)
    first = outputs[0].softmax(1).amax(1)
    order = first.argsort()
    policy = Thresholds((float((first[order[1]] + first[order[2]]) / 2), 0.0))
    found = dyn.predict(x, policy)
    assert sorted(found.stage.tolist()) == [0, 0, 1, 1]
    for row, stage in enumerate(found.stage.tolist()):
        torch.testing.assert_close(found.output[row], outputs[stage][row])
    assert found.macs.tolist() == [dyn.cost.stages[1].cumulative_macs] * 4, "all pay for all"
    with pytest.raises(InputShapeError, match="batches of 4 only"):
        dyn.predict(images(3), policy)


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_budget_below_stage_1_is_refused(dyn: DynamicModel, per: str) -> None:
    least = dyn.cost.stages[0].macs * (3 if per == "batch" else 1)
    assert dyn.predict(images(3), MacsBudget(least, per)).stage.tolist() == [0, 0, 0]
    with pytest.raises(PolicyError, match="below what stage 1 costs"):
        dyn.predict(images(3), MacsBudget(least - 1, per))


def test_training_mode_is_refused() -> None:
    dyn = compiled().train()
    with pytest.raises(UsageError, match=r"dyn\.eval"):
        dyn.predict(images(2), Thresholds((0.5, 0.5)))


def test_predictions_leave_memory_where_it_was(dyn: DynamicModel) -> None:
    torch.manual_seed(0)
    policy = Thresholds((0.6, 0.5))

    def many(count: int) -> None:
        for number in range(count):
            dyn.predict(images(number % 7, number), policy)
            next(iter(dyn.anytime(images(2, number))))

    many(50)
    gc.collect()
    before = sum(type(v) is Tensor for v in gc.get_objects())
    many(200)
    gc.collect()
    assert sum(type(v) is Tensor for v in gc.get_objects()) == before


def test_copies_run_their_own_stages() -> None:
    dyn = compiled()
    dyn.predict(images(2), Thresholds((0.5, 0.5)))
    twin = copy.deepcopy(dyn)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    always = Thresholds((0.0, 0.0))
    assert float(twin.predict(images(2), always).output.abs().max()) == 0
    assert float(dyn.predict(images(2), always).output.abs().max()) > 0
