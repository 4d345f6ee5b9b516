"""The optimised form: rewritten graphs as text, equal numbers, the original untouched."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes import fuse_onednn
from passes.base import Pass
from passes.fold_norms import FoldNorms
from passes.remove_identities import RemoveIdentities
from passes.sum_parts import ShareConcatenations, SumParts
from s2d_compiler import DynamicModel, Thresholds, transform
from s2d_compiler.errors import S2DError, UsageError
from s2d_compiler.optimizing import OptimizedModel, backends, optimize, optimize_static, pipeline
from s2d_compiler.optimizing.shapes import record_shapes
from s2d_compiler.tracing import capture
from tests.networks import seeded, settle
from tests.plans import seeded_plan

Golden = Callable[[str, str], None]

TWO = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}
THREE = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}}


class Small(nn.Module):
    """Norms, a residual addition, dropout, two layers that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, bias=False)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.short(x))
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture(scope="module")
def small() -> DynamicModel:
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return transform(settle(Small(), x), {**TWO, "input_shape": [3, 6, 6]})


def x_of(shape: Sequence[int], seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recorded(dyn: DynamicModel, dtype: torch.dtype = torch.float64) -> list[fx.GraphModule]:
    stages = copy.deepcopy([s for s in dyn.stages if isinstance(s, fx.GraphModule)])
    for stage in stages:
        for node in stage.graph.nodes:
            node.meta.clear()
    shapes = dyn.parts.input_shapes
    inputs = [torch.zeros((1, *shape), dtype=dtype) for shape in shapes]
    assert record_shapes(stages, [i.inputs for i in dyn.parts.interfaces], inputs)
    return stages


def difference(found: Any, expected: Any) -> float:
    """The largest error of a leaf relative to its size."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    errors = [
        float(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).detach())
        for a, b in pairs
        if b.numel()
    ]
    return max(errors, default=0.0)


STEPS: dict[str, tuple[Pass, ...]] = {
    "identities": (RemoveIdentities(),),
    "concatenations": (RemoveIdentities(), ShareConcatenations()),
    "norms": (RemoveIdentities(), ShareConcatenations(), FoldNorms()),
    "sums": (RemoveIdentities(), ShareConcatenations(), FoldNorms(), SumParts()),
}


@pytest.mark.parametrize("step", STEPS)
def test_graph_after_each_pass(step: str, small: DynamicModel, golden: Golden) -> None:
    stage = recorded(small)[1]
    for each in STEPS[step]:
        stage = each.run(stage).graph_module
    golden(f"optimized-{step}", text_of(stage))


@pytest.mark.skipif(backends.why_not("onednn") is not None, reason="no fused oneDNN operators")
def test_graph_after_fusing(small: DynamicModel, golden: Golden) -> None:
    staged = copy.deepcopy(small).float()
    stages = recorded(staged, torch.float32)
    wiring = [i.inputs for i in staged.parts.interfaces]
    inputs = [torch.zeros(1, 3, 6, 6)]
    rewritten = pipeline.rewrite(stages, wiring, inputs, "onednn", "sum", 1)
    golden("optimized-onednn", text_of(rewritten[1]))


def text_of(stage: fx.GraphModule) -> str:
    return "".join(f"{node.format_node()}\n" for node in stage.graph.nodes)


@pytest.mark.parametrize("reads", ["sum", "concatenate"])
def test_numbers_in_float64(reads: str, small: DynamicModel) -> None:
    x = x_of((4, 3, 6, 6))
    fast = small.optimized(backend="eager", reads=reads)
    assert difference(fast(x), small(x)) < 1e-12
    names = {str(n.target) for s in fast.stages for n in s.graph.nodes}  # type: ignore[union-attr]
    assert ("aten.cat.default" in names) == (reads == "concatenate")
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout) for m in fast.modules())


@pytest.mark.parametrize("seed", range(int(os.environ.get("S2D_OPTIMIZED_NETWORKS", "10"))))
def test_any_network(seed: int) -> None:
    drawn = seeded(seed)
    x = drawn.batch(4)
    model = settle(drawn.model, x)
    plan = {**seeded_plan(seed), "input_shape": list(drawn.input_shape)}
    try:
        dyn = transform(model, plan)
    except S2DError:
        pytest.skip("the plan does not fit")
    before = {k: v.clone() for k, v in dyn.state_dict().items()}
    with torch.no_grad():
        expected = dyn(x)
        fast = dyn.optimized(backend="eager", reads="sum")
        assert difference(fast(x), expected) < 1e-11
        single = copy.deepcopy(dyn).float()
        found = single.optimized(reads="sum" if seed % 2 else "auto", batch=16)(x.float())
    worst = difference(single(x.float()), expected)
    assert difference(found, expected) < 1e-5 + 3 * worst
    after = dyn.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_images_in_any_format_and_early_exits(small: DynamicModel) -> None:
    x = x_of((5, 3, 6, 6))
    fast = small.optimized()
    assert isinstance(fast, OptimizedModel)
    for policy in (Thresholds((0.0,)), Thresholds((1.0,)), Thresholds((0.3,))):
        slow = small.predict(x, policy)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            quick = fast.predict(given, policy)
            assert torch.equal(slow.stage, quick.stage)
            assert difference(quick.output, slow.output) < 1e-12
    assert [difference(a.output, b) for a, b in zip(fast.anytime(x), small(x), strict=True)] < [
        1e-12
    ] * 2
    assert not fast(x.requires_grad_())[0].requires_grad


def test_settings_go_with_it(small: DynamicModel) -> None:
    dyn = copy.deepcopy(small)
    dyn.settings = replace(dyn.settings, policy=Thresholds((0.0,)))
    fast, x = dyn.optimized(), x_of((2, 3, 6, 6))
    assert fast.settings == dyn.settings
    assert fast.predict(x).stage.tolist() == [0, 0]


def test_copies(small: DynamicModel) -> None:
    x = x_of((2, 3, 6, 6))
    for dyn, given in ((small, x), (copy.deepcopy(small).float(), x.float())):
        fast = dyn.optimized()
        copied = copy.deepcopy(fast)
        assert difference(copied(given), fast(given)) == 0
        assert copied.settings == fast.settings


def test_training_the_network_does_not_change_its_optimised_form(small: DynamicModel) -> None:
    dyn = copy.deepcopy(small)
    fast, x = dyn.optimized(), x_of((2, 3, 6, 6))
    before = fast(x)
    with torch.no_grad():
        for parameter in dyn.parameters():
            parameter.add_(1)
    assert difference(fast(x), before) == 0
    assert difference(dyn(x), before) > 1e-3


def test_refusals(small: DynamicModel) -> None:
    for options in ({"backend": "tpu"}, {"reads": "x"}, {"memory_format": "x"}, {"batch": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            small.optimized(**options)  # type: ignore[arg-type]
    fast = small.optimized()
    with pytest.raises(UsageError, match="only runs"):
        fast.train()
    with pytest.raises(UsageError, match="save the one"):
        fast.save("x.pt")
    with pytest.raises(UsageError, match="graph modules"):
        optimize(fast if fast.backend == "inductor" else _with_other_stages(small))


def _with_other_stages(dyn: DynamicModel) -> DynamicModel:
    changed = copy.deepcopy(dyn)
    changed.stages[0] = nn.Identity()
    return changed


def test_without_the_operators_eager_runs(
    small: DynamicModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("passes.fuse_onednn.is_available", lambda: False)
    assert small.optimized().backend == "eager"
    with pytest.raises(UsageError, match="no fused oneDNN"):
        small.optimized(backend="onednn")


def test_without_a_compiler(small: DynamicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++" in str(backends.available_backends()["inductor"])
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        small.optimized(backend="inductor")


@pytest.mark.parametrize("backend", ["eager", "onednn"])
def test_static_form(backend: str) -> None:
    model = settle(Small(), x_of((8, 3, 6, 6))).float()
    program = capture(model, None, (3, 6, 6))
    x = x_of((3, 3, 6, 6)).float()
    fast = optimize_static(program, backend=backend, batch=3)
    with torch.no_grad():
        assert difference(pytree.tree_leaves(fast(x)), [model(x)]) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())


def test_at_most_two_compilations(monkeypatch: pytest.MonkeyPatch, small: DynamicModel) -> None:
    """The dispatch alone; the compiler itself takes minutes."""
    made: list[fx.GraphModule] = []
    monkeypatch.setattr(backends, "frozen", lambda stage: made.append(stage) or stage)
    monkeypatch.setattr(pipeline, "why_not", lambda *arguments: None)
    fast = small.optimized(backend="inductor")
    for size in (5, 1, 40, 7, 16, 3, 1, 900):
        x = x_of((size, 3, 6, 6), seed=size)
        assert difference(fast(x), small(x)) < 1e-12
    assert len(made) == 4


def test_a_stage_that_would_be_compiled_again_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, small: DynamicModel
) -> None:
    class FailOnRecompileLimitHit(Exception):
        pass

    made: list[int] = []

    def frozen(stage: fx.GraphModule) -> Any:
        def run(*inputs: Tensor) -> Any:
            made.append(len(inputs[0]))
            if len(inputs[0]) != 3:
                raise FailOnRecompileLimitHit
            return stage(*inputs)

        return run

    monkeypatch.setattr(backends, "frozen", frozen)
    monkeypatch.setattr(pipeline, "why_not", lambda *arguments: None)
    fast = small.optimized(backend="inductor")
    for size in (3, 4, 3, 5):
        x = x_of((size, 3, 6, 6))
        assert difference(fast(x), small(x)) < 1e-12
    assert made == [3, 3, 4, 4]


@pytest.mark.skipif(
    not os.environ.get("S2D_INDUCTOR"), reason="compiles for a minute; set S2D_INDUCTOR=1"
)
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_thousand_batch_sizes(small: DynamicModel) -> None:
    from torch._dynamo.utils import counters

    single = copy.deepcopy(small).float()
    fast = single.optimized(backend="inductor")
    before = counters["stats"]["unique_graphs"]
    for size in (7, 1, 500, *range(1, 1001)):
        x = x_of((size, 3, 6, 6), seed=size).float()
        assert difference(fast(x), single(x)) < 1e-5
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 2 * len(fast.stages)
    mixed = fast.predict(x, Thresholds((0.4,)))
    assert difference(mixed.output, single.predict(x, Thresholds((0.4,))).output) < 1e-5
    assert counters["stats"]["unique_graphs"] - before <= 2 * len(fast.stages)


class TwoNorms(nn.Module):
    """A linear layer of tokens with a norm, which takes the tokens' places for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.fc(x)).mean(1))


def test_a_norm_over_tokens_is_not_folded() -> None:
    x = x_of((8, 4, 4))
    model = settle(TwoNorms(), x)
    program = capture(model, (x,))
    fast = optimize_static(program, inputs=[x])
    assert any(isinstance(m, nn.BatchNorm1d) for m in fast.modules())
    assert difference(pytree.tree_leaves(fast(x)), [model(x)]) < 1e-12


@pytest.mark.skipif(not fuse_onednn.is_available(), reason="this torch has no such operators")
def test_what_has_no_batch_is_not_added_as_if_it_had_one() -> None:
    class Placed(Small):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(1, 8, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv1(x) + self.places)
            x = self.conv2(x) + (self.places + self.places.flip(1))
            return self.fc(x.mean((2, 3)))

    dyn = transform(Placed().eval(), {**TWO, "input_shape": [3, 6, 6]})
    for examples in (None, [torch.zeros(1, 3, 6, 6)]):
        fast = dyn.optimized(backend="onednn", examples=examples)
        for count in (1, 3):
            x = x_of((count, 3, 6, 6)).float()
            with torch.no_grad():
                torch.testing.assert_close(fast(x), dyn(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not fuse_onednn.is_available(), reason="this torch has no such operators")
def test_the_optimised_form_can_be_copied(small: DynamicModel) -> None:
    fast = copy.deepcopy(small).float().optimized(backend="onednn")
    x = x_of((3, 3, 6, 6)).float()
    for other in (copy.deepcopy(fast), copy.deepcopy([fast])[0], fast.to("cpu")):
        assert torch.equal(other(x)[-1], fast(x)[-1])
        assert other.predict(x, Thresholds((0.5,))).stage.shape == (3,)
