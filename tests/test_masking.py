"""The masked form: one dense run that gives what the staged form's stages give."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from s2d_compiler import DynamicModel, Plan, inspect_model, masked, transform
from s2d_compiler.errors import PlanError, UsageError
from tests import masking
from tests.masking_models import MODELS, TRAINED_APART, TRIED
from tests.networks import BLOCKS, Drawn, DrawnPick, networks, seeded, settle
from tests.plans import plan_dict, seeded_plan

TELLING, TRIES = 1, 8


@settings(max_examples=10)
@given(data=st.data(), drawn=networks(), seed=st.integers(0, 2**16))
def test_equals_the_staged_form(data: st.DataObject, drawn: Drawn, seed: int) -> None:
    x = drawn.batch(8, seed)
    model = settle(drawn.model, x, seed)
    spec = plan_dict(DrawnPick(data.draw))
    try:
        result, net = masking.both_ways(model, spec, x)
    except PlanError:
        event("refused: a stage adds nothing")
        assume(False)
        return
    masking.trained_alike(net, (x,))
    event(f"{result.telling} telling outputs")
    assume(result.telling)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_equals_the_staged_form_in_every_kind_of_block(kind: str) -> None:
    telling = 0
    for seed in range(TRIES):
        drawn = seeded(seed, ["plain", kind] if seed % 2 else [kind, "plain", kind])
        x = drawn.batch(8, seed)
        model = settle(drawn.model, x, seed)
        try:
            result, net = masking.both_ways(model, seeded_plan(seed), x)
        except PlanError:
            continue
        masking.trained_alike(net, (x,))
        telling += result.telling > 0
        if telling == TELLING:
            return
    pytest.fail(f"only {telling} of {TRIES} networks show something")


# -- one form, many plans --------------------------------------------------------------------------

PLANS: list[dict[str, Any]] = [
    {"stages": 3, "groups": 8, "default": {"split": split, "concat": concat}}
    for split, concat in (([4, 6], "all"), ([1, 2], "none"), ([3, 5], [[2, 1], [3, 2]]))
]


def small() -> tuple[nn.Module, Tensor]:
    drawn = seeded(3, ["plain", "computed", "norm_over_channels"])
    x = drawn.batch(6, 3)
    return settle(drawn.model, x), x


class Residual(nn.Module):
    """A ResNet of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.fc(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    return settle(Residual().double(), x), x


def test_follows_other_plans() -> None:
    model, x = small()
    net = masked(model, PLANS[0], (x,))
    parameters = list(net.parameters())
    seen = []
    for spec in (*PLANS[1:], PLANS[0]):
        net.set_plan(spec)
        assert net.plan == Plan.from_dict(spec)
        masking.equal(net, transform(model, spec, (x,)), (x,))
        seen.append(net(x)[0].detach())
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert not torch.allclose(seen[0], seen[1])


def test_extracts_other_plans_and_stays_at_its_own() -> None:
    model, x = small()
    net = masked(model, PLANS[0], (x,))
    before = net(x)
    dyn, made = net.extract(PLANS[1]), transform(model, PLANS[1], (x,))
    assert dict(dyn.provenance) == dict(made.provenance)
    for key, value in made.state_dict().items():
        assert torch.equal(dyn.state_dict()[key], value), key
    assert all(torch.equal(a, b) for a, b in zip(before, net(x), strict=True))


def test_plans_share_one_compilation() -> None:
    model, x = resnet()
    compiled = []

    def count(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    net = masked(model, PLANS[0], (x,))
    run = torch.compile(net, backend=count, fullgraph=True)
    for spec in PLANS:
        net.set_plan(spec)
        with torch.no_grad():
            theirs = transform(model, spec, (x,))(x)
            assert masking.compared(run(x), theirs).error < masking.LARGEST
    assert len(compiled) == 1


def test_a_space_is_as_good_as_a_plan() -> None:
    model, x = small()
    space = inspect_model(model, (x,), stages=2, groups=4)
    net = masked(model, space, (x,))
    assert net.plan == space.starter_plan()
    net.set_plan(space.random_plan(random.Random(1)))
    masking.equal(net, net.extract(), (x,))


def test_weights_order_channels_as_they_were_at_first() -> None:
    model, x = small()
    spec = PLANS[0] | {"order": "l1"}
    net = masked(model, spec, (x,))
    owners = net.extract().parts.owners
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    net.set_plan(spec)
    dyn = net.extract()
    assert dyn.parts.owners == owners != transform(model, spec, (x,)).parts.owners
    masking.equal(net, dyn, (x,))


# -- training --------------------------------------------------------------------------------------


def test_dead_weights_get_no_gradient() -> None:
    model, x = resnet()
    net = masked(model, PLANS[1], (x,)).train()
    masking.loss_of(net(x)).backward()
    layer = net.get_submodule("conv2")
    rows = net.extract().provenance["stages.0.conv2.weight"].index[0]
    assert rows is not None
    dead = torch.ones(16, dtype=torch.bool)
    dead[list(rows)] = False
    gradient = layer.weight.grad
    assert isinstance(gradient, Tensor)
    assert bool((gradient[:, dead][~dead] == 0).all())
    assert bool((gradient[:, ~dead][~dead] != 0).all())
    assert all(p.grad is not None for p in net.parameters())


def test_the_untouched_network_has_its_own_weights() -> None:
    model, x = resnet()
    net = masked(model, PLANS[0] | {"final": "original"}, (x,))
    with torch.no_grad():
        assert torch.equal(net(x)[2], model.eval()(x))
    net.train()
    net(x)[2].sum().backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None}
    assert touched == {n for n, _ in net.named_parameters() if n.startswith("original.")}


def test_names_are_the_original_s() -> None:
    model, x = resnet()
    net = masked(model, PLANS[0], (x,))
    heads = {"fc.weight", "fc.bias"}
    theirs = set(model.state_dict())
    exits = {f"exits.{k}.{name}" for k in range(3) for name in heads}
    assert heads < theirs
    assert set(net.state_dict()) == (theirs - heads) | exits
    other = masked(Residual().double(), PLANS[0], (x,))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x)[1], net(x)[1])


# -- to and from staged networks -------------------------------------------------------------------


def shaken(dyn: DynamicModel) -> DynamicModel:
    with torch.no_grad():
        for parameter in dyn.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return dyn


@pytest.mark.parametrize("final", ["cut", "original"])
def test_takes_and_gives_the_weights_of_a_staged_network(final: str) -> None:
    model, x = small()
    spec = PLANS[0] | {"final": final}
    net = masked(model, spec, (x,))
    dyn = shaken(transform(model, spec, (x,)))
    net.load_dynamic(dyn)
    masking.equal(net, dyn, (x,))
    masking.one_step(net, (x,))
    held = [id(p) for p in dyn.parameters()]
    net.write_to(dyn)
    assert held == [id(p) for p in dyn.parameters()]
    masking.equal(net, dyn, (x,))


def test_staged_networks_of_another_type_keep_it() -> None:
    model, x = small()
    net = masked(model, PLANS[0], (x,))
    dyn = shaken(net.extract()).float()
    net.load_dynamic(dyn)
    assert next(net.parameters()).dtype == torch.float64
    masking.one_step(net, (x,))
    net.write_to(dyn)
    net.eval()
    dyn.eval()
    assert next(dyn.parameters()).dtype == torch.float32
    with torch.no_grad():
        for a, b in zip(net(x), dyn(x.float()), strict=True):
            torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-3)


# -- an ordinary module ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole(how: str) -> None:
    model, x = small()
    net = masked(model, PLANS[0], (x,))
    masking.one_step(net, (x,))
    net.eval()
    twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert set(twin.state_dict()) == set(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net(x), twin(x), strict=True))
    before = net(x)
    masking.one_step(twin, (x,))
    twin.set_plan(PLANS[1])
    assert all(torch.equal(a, b) for a, b in zip(before, net(x), strict=True))
    masking.equal(twin, twin.extract(), (x,))
    twin.load_dynamic(net.extract(PLANS[1]))
    net.set_plan(PLANS[1])
    assert all(torch.equal(a, b) for a, b in zip(net(x), twin.eval()(x), strict=True))


def test_types_and_layouts() -> None:
    model, x = resnet()
    net = masked(model, PLANS[0], (x,))
    exact = [output.float() for output in net(x)]
    net = net.float().to(memory_format=torch.channels_last)
    x = x.float().contiguous(memory_format=torch.channels_last)
    size = max(float(output.abs().max().detach()) for output in exact)
    for output, known in zip(net(x), exact, strict=True):
        torch.testing.assert_close(output, known, rtol=1e-3, atol=1e-3 * size)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(x)
    assert outputs[0].dtype == torch.bfloat16
    masking.loss_of([output.double() for output in outputs]).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    half = net.to(torch.bfloat16).eval()
    for output, known in zip(half(x.to(torch.bfloat16)), exact, strict=True):
        torch.testing.assert_close(output.float(), known, rtol=0.2, atol=0.2 * size)
    dyn = half.extract()
    assert {p.dtype for p in dyn.parameters()} == {torch.bfloat16}


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIED)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, keywords = MODELS[name]()
    net = masked(model, PLANS[2], inputs, example_kwargs=keywords or None)
    result = masking.equal(net, net.extract(), inputs, **keywords)
    assert result.telling >= 3
    if name not in TRAINED_APART:
        masking.trained_alike(net, inputs, **keywords)


def test_a_weight_used_in_two_ways_is_one_tensor() -> None:
    model, inputs, _ = MODELS["ReusedTensors"]()
    net = masked(model, PLANS[2], inputs)
    dyn = net.extract()
    masking.one_step(net, inputs)
    net.write_to(dyn)
    masking.equal(net, dyn, inputs)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match="no longer the same"):
        net.load_dynamic(shaken(dyn))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
