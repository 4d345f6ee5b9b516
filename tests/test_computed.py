"""Computed weights: cut through their expression, stored and read back, hostile files refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from s2d_compiler import DynamicModel, Plan, load, transform
from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.checking import check
from s2d_compiler.compiler import compile_program
from s2d_compiler.computed import ComputedLayer, bias_of, weight_of, weight_shape
from s2d_compiler.errors import FormatError, PlanError
from s2d_compiler.program import Program
from s2d_compiler.thin_expression import NotSliceable, slice_expression, why_not_sliceable
from s2d_compiler.tracing import capture
from tests.proofs import HALVES, PLANS, Proved, inputs, proved, shaken

SHAPE = (3, 4, 4)

Weight = Callable[[Any], Tensor]


class Model(nn.Module):
    """A stem of 16 channels, a layer whose weight is computed, and two layers behind it."""

    def __init__(self, weight: Weight, *, linear: bool = False, groups: int = 1, **extra: Any):
        super().__init__()
        self.weight_by, self.linear, self.groups = weight, linear, groups
        self.stem = nn.Conv2d(3, 16, 1)
        shape = (16, 16) if linear else (16, 16 // groups, 3, 3)
        self.w, self.b = nn.Parameter(torch.randn(shape) * 0.2), nn.Parameter(torch.zeros(16))
        for name, module in extra.items():
            setattr(self, name, module)
        self.out, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.stem(x).tanh(), self.weight_by(self)
        weight, bias = weight if isinstance(weight, tuple) else (weight, self.b)
        if self.linear:
            x = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        else:
            x = F.conv2d(x, weight, bias, padding=1, groups=self.groups)
        return self.fc(self.out(x).relu().mean((2, 3)))


def computed(program: Program) -> list[ComputedLayer]:
    return [m for m in program.graph_module.modules() if isinstance(m, ComputedLayer)]


def require_cut(model: nn.Module, *, counted: bool = True) -> Proved:
    """Show that a computed layer is cut: no fallback, and fewer weights in stage 1."""
    found = proved(model, SHAPE, counted=counted)
    assert not found.unknown
    assert computed(found.program), "it is an ordinary layer"
    for module in computed(found.program):
        assert not why_not_sliceable(module)
    for dyn in found.results:
        assert dyn.cost.stages[0].macs < dyn.cost.original_macs / 2
    return found


# -- standardised convolutions ---------------------------------------------------------------------


def by_hand(m: Any) -> Tensor:
    mean = m.w.mean((1, 2, 3), keepdim=True)
    return (m.w - mean) / (m.w.std((1, 2, 3), keepdim=True) + 1e-5)


def by_batch_norm(m: Any) -> Tensor:
    flat = m.w.reshape(1, 16, -1)
    return F.batch_norm(flat, None, None, m.gain.view(-1), None, True, 0.0, 1e-5).reshape_as(m.w)


def by_variance_and_mean(m: Any) -> Tensor:
    var, mean = torch.var_mean(m.w, dim=(1, 2, 3), keepdim=True, unbiased=False)
    return m.gain * (m.w - mean) * torch.rsqrt(var + 1e-6)


def by_rows(m: Any) -> Tensor:
    """Without keepdim, on the flattened kernel."""
    flat = m.w.flatten(1)
    flat = flat - flat.mean(1).unsqueeze(1)
    return (flat / flat.square().sum(1).sqrt()[:, None]).view_as(m.w)


@pytest.mark.parametrize("groups", [1, 2, 8, 16])
@pytest.mark.parametrize("weight", [by_hand, by_batch_norm, by_variance_and_mean, by_rows])
def test_standardised_convolutions(weight: Weight, groups: int) -> None:
    gain = nn.Parameter(torch.ones(16, 1, 1, 1))
    found = require_cut(Model(weight, groups=groups, gain=gain))
    (module,) = computed(found.program)
    assert module.groups == groups
    assert weight_shape(module) == (16, 16 // groups, 3, 3)
    for dyn in found.results:
        thin = [m for m in dyn.modules() if isinstance(m, ComputedLayer)]
        assert sum(m.out_channels for m in thin) == 16
        if groups == 1:  # a mean is taken over what a stage reads
            assert thin[0].in_channels < 16
            torch.testing.assert_close(
                weight_of(thin[0]).mean((1, 2, 3)).abs().max(), torch.zeros(()).double()
            )


def test_the_statistics_of_a_row_are_those_of_what_is_alive() -> None:
    """A stage's rows are standardised by the columns that it reads, not by the original's."""
    found = require_cut(Model(by_hand))
    (first, *_) = [m for m in found.results[0].stages[0].modules() if isinstance(m, ComputedLayer)]
    original = weight_of(computed(found.program)[0])
    alive = weight_of(first)
    assert alive.shape[1] < 16
    spread = alive.std((1, 2, 3))
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-4, atol=0)
    kept = original[: alive.shape[0], : alive.shape[1]]
    assert (kept.std((1, 2, 3)) - 1).abs().max() > 1e-2


# -- other expressions -----------------------------------------------------------------------------


def quantised(m: Any) -> Tensor:
    """Rounded to 15 steps of each row's largest weight."""
    scale = m.w.abs().amax((1, 2, 3), keepdim=True) / 7
    return (m.w / scale).round() * scale


def soft_kernel(m: Any) -> Tensor:
    """A softmax over the positions of every kernel."""
    return m.w.flatten(2).softmax(-1).view_as(m.w)


def masked(m: Any) -> Tensor:
    """A kernel that sees nothing to the right."""
    return m.w * m.seen


def pruned(m: Any) -> Tensor:
    """What is small is zero, and half of what is not is kept twice."""
    return torch.where(torch.logical_and(m.w.abs() > 0.05, m.chosen), 2 * m.w, m.w * (m.w > 0.02))


def signs(m: Any) -> Tensor:
    return m.w.sign() * m.w.abs().mean((1, 2, 3), keepdim=True)


def centred_by_column(m: Any) -> Tensor:
    """The statistics of an input channel, over its outputs."""
    return m.w - m.w.mean((0, 2, 3), keepdim=True)


def transposed(m: Any) -> Tensor:
    return m.w.transpose(0, 1) * 2


def turned(m: Any) -> Tensor:
    return m.w.flip(2, 3).permute(1, 0, 3, 2)


def concatenated(m: Any) -> tuple[Tensor, Tensor]:
    """Two parts of rows."""
    return torch.cat([m.w[:4] * 2, m.w[4:]]), torch.cat([m.b[:4], -m.b[4:]])


def concatenated_columns(m: Any) -> Tensor:
    return torch.cat([m.w[:, 8:], m.w[:, :8] * m.gain], 1)


def sliced(m: Any) -> Tensor:
    return m.large[2:18, ::2]


def repeated(m: Any) -> Tensor:
    """Every row stands there twice."""
    return m.w[:8].repeat(2, 1, 1, 1) * m.gain


@pytest.mark.parametrize(
    "weight",
    [
        quantised,
        soft_kernel,
        masked,
        pruned,
        signs,
        centred_by_column,
        transposed,
        turned,
        concatenated,
        concatenated_columns,
        sliced,
        repeated,
    ],
)
def test_expressions_of_a_convolution(weight: Weight) -> None:
    model = Model(
        weight,
        gain=nn.Parameter(torch.ones(16, 1, 1, 1)),
        large=nn.Parameter(torch.randn(20, 32, 3, 3) * 0.2),
    )
    model.register_buffer("seen", (torch.arange(3) < 2).double().view(1, 1, 1, 3))
    model.register_buffer("chosen", torch.arange(16).view(16, 1, 1, 1) % 3 > 0)
    require_cut(model)


def normed_rows(m: Any) -> Tensor:
    return m.w / m.w.norm(dim=1, keepdim=True)


def normed_rows_without_keepdim(m: Any) -> Tensor:
    return (m.w.t() / torch.linalg.vector_norm(m.w, dim=1)).t()


def normalised(m: Any) -> Tensor:
    return F.normalize(m.w, dim=1)


def low_rank_update(m: Any) -> Tensor:
    return m.w + m.up @ m.down


@pytest.mark.parametrize("weight", [normed_rows, normed_rows_without_keepdim, normalised])
def test_rows_of_length_one(weight: Weight) -> None:
    """Every stage's rows have length one over what the stage reads."""
    found = require_cut(Model(weight, linear=True))
    for dyn in found.results:
        for stage in dyn.stages:
            (module,) = (m for m in stage.modules() if isinstance(m, ComputedLayer))
            length = weight_of(module).norm(dim=1)
            torch.testing.assert_close(length, torch.ones_like(length))


def test_a_product_in_an_expression_is_versioned_whole() -> None:
    """A low-rank update mixes what no slice of its parameters gives."""
    model = Model(
        low_rank_update,
        linear=True,
        up=nn.Parameter(torch.randn(16, 4)),
        down=nn.Parameter(torch.randn(4, 16)),
    )
    found = proved(model, SHAPE, counted=False)
    assert set(found.unknown) == {"Linear"}
    assert "matmul is in the way" in found.unknown["Linear"]


# -- weight norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("style", ["parametrization", "hook"])
def test_weight_norm(style: str, linear: bool) -> None:
    layer = nn.Linear(16, 16) if linear else nn.Conv2d(16, 16, 3, padding=1)
    if style == "parametrization":
        layer = parametrizations.weight_norm(layer)
    else:
        with pytest.warns(FutureWarning, match="weight_norm"):
            layer = nn.utils.weight_norm(layer)

    def weight(m: Any) -> tuple[Tensor, Tensor]:
        if style == "hook":  # the hook runs when the layer does
            g, v = m.layer.weight_g, m.layer.weight_v
            return torch._weight_norm(v, g, 0), m.layer.bias
        return m.layer.weight, m.layer.bias

    found = require_cut(Model(weight, linear=linear, layer=layer))
    (module,) = computed(found.program)
    assert len([t for t in module.tensors().values() if t.dim() > 1]) == 2
    for dyn in found.results:
        sources = {where.source for where in dyn.provenance.values()}
        pair = ("weight_g", "weight_v") if style == "hook" else ("original0", "original1")
        assert all(any(s.endswith(name) for s in sources) for name in pair)


@pytest.mark.parametrize("style", ["parametrization", "hook"])
def test_weight_norm_as_a_module(style: str) -> None:
    conv: Any = nn.Conv2d(16, 16, 3, padding=1)
    if style == "parametrization":
        conv = parametrizations.weight_norm(conv)
    else:
        with pytest.warns(FutureWarning, match="weight_norm"):
            conv = nn.utils.weight_norm(conv)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), conv, nn.ReLU(), nn.Conv2d(16, 8, 1))
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    require_cut(model)


# -- biases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "zeros",
    [
        lambda m: torch.zeros_like(m.v, requires_grad=False),
        lambda m: m.v.new_zeros(8),
        lambda m: torch.full_like(m.q, 0.25),
        lambda m: torch.zeros(8, dtype=torch.float64),
        lambda m: m.none,
    ],
)
def test_a_bias_from_parts(zeros: Weight) -> None:
    """Queries and values have a bias, keys have none."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.qkv = nn.Linear(3, 8), nn.Linear(8, 24, bias=False)
            self.q, self.v = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer("none", torch.zeros(8), persistent=False)
            self.out, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.cat((self.q, zeros(self), self.v))
            qkv = F.linear(self.stem(x).tanh(), self.qkv.weight, bias)
            q, k, v = qkv.unflatten(2, (3, 4, 2)).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.fc(self.out(y).relu().mean(1))

    found = proved(Packed(), (5, 3))
    assert not found.unknown
    (module,) = computed(found.program)
    assert module.expression.bias is not None
    rows = found.rows("qkv")
    assert len(set(rows)) == 4
    assert rows[:8] == rows[8:16] == rows[16:]
    dyn = found.results[1]
    held = {where.source: where for where in dyn.provenance.values()}
    assert {"q", "v", "qkv.weight"} <= set(held)
    assert len(held["q"].index[0] or range(8)) == 4


def test_a_slice_of_a_bias_is_switched_off_in_place() -> None:
    def weight(m: Any) -> tuple[Tensor, Tensor]:
        bias = m.b.clone()
        bias[4:8].zero_()
        return m.w, bias

    found = require_cut(Model(weight))
    for dyn in found.results:
        biases = [bias_of(m) for m in dyn.modules() if isinstance(m, ComputedLayer)]
        zeros = sum(int((bias == 0).sum()) for bias in biases if bias is not None)
        assert zeros == 4


# -- absence, exits, orders ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["index", "l1"])
def test_orders(order: str) -> None:
    """Rows are ordered by the weights that the layer applies."""
    model = shaken(Model(lambda m: m.w * m.gain, gain=nn.Parameter(torch.ones(16, 1, 1, 1))))
    with torch.no_grad():
        model.gain.copy_(torch.arange(1.0, 17.0).view(16, 1, 1, 1))
    program = capture(model, input_shape=SHAPE)
    channels = analyse_channels(program)
    plan = Plan.from_dict(HALVES | {"order": order})
    assignment = assign(program, channels, plan)
    dyn = compile_program(program, plan, assignment=assignment)
    assert max(check(dyn, assignment).errors) < 1e-9
    (name,) = (n for n, m in program.graph_module.named_modules() if isinstance(m, ComputedLayer))
    owners = assignment.owner_of(channels.layers[name].rows).tolist()
    weights = weight_of(computed(program)[0]).detach().abs().sum((1, 2, 3))
    first = sorted(range(16), key=lambda r: -float(weights[r]) if order == "l1" else r)[:8]
    assert [r for r in range(16) if owners[r] == 1] == sorted(first)


def test_a_prediction_layer_with_a_computed_weight() -> None:
    """Every stage has one of its own, normed over the channels up to that stage."""

    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
            self.classes = nn.Parameter(torch.randn(5, 16))

        def forward(self, x: Tensor) -> Tensor:
            y = F.normalize(self.b(self.a(x).relu()).mean((2, 3)), dim=1)
            return F.linear(y, F.normalize(self.classes, dim=1))

    found = proved(Cosine(), SHAPE)
    assert not found.unknown
    assert len(found.channels.predictions) == 1
    for dyn in found.results:
        heads = [m for m in dyn.modules() if isinstance(m, ComputedLayer)]
        assert [m.out_channels for m in heads] == [5] * dyn.plan.stages
        assert [m.in_channels for m in heads] == sorted({m.in_channels for m in heads})
        assert heads[-1].in_channels == 16
        for head in heads:
            length = weight_of(head).norm(dim=1)
            torch.testing.assert_close(length, torch.ones_like(length))


def test_one_computed_layer_with_two_call_sites() -> None:
    """Its inputs and outputs are tied, as those of any module that is called twice."""

    class Normed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, F.normalize(self.weight, dim=(1, 2, 3)), self.bias, padding=1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), Normed(8, 8, 3)
            self.out, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.conv(self.stem(x)).tanh())
            return self.fc(self.out(x).mean((2, 3)))

    found = proved(Twice(), SHAPE)
    assert not found.unknown
    assert len(computed(found.program)) == 1
    assert found.rows("conv") == found.rows("stem") == found.columns("out")
    assert len(found.channels.layers["conv"].layer.nodes) == 2


# -- what cannot be cut ----------------------------------------------------------------------------


def spectral() -> nn.Module:
    torch.manual_seed(0)
    return parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))


def test_spectral_norm_is_versioned_and_named() -> None:
    """A norm over the whole matrix belongs to no rows."""
    model = Model(lambda m: (m.layer.weight, m.layer.bias), layer=spectral())
    found = proved(model, SHAPE, counted=False)
    (reason,) = found.unknown.values()
    assert set(found.unknown) == {"Conv2d"}
    assert "its weight is computed from others in a way that cannot be cut" in reason
    report = found.results[0].report
    assert [use.operator for use in report.unknown] == ["Conv2d"]


def test_a_network_of_spectral_norm_alone_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)))
    with pytest.raises(PlanError, match="cannot be cut"):
        transform(model.double(), HALVES, (inputs(SHAPE),))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (lambda m: m.w @ m.w.t(), "matmul is in the way"),
        (lambda m: m.w.cumsum(0), "cumsum is in the way"),
        (lambda m: m.w + m.w.t(), "leads to several rows by different ways"),
        (lambda m: m.up * m.down, "it is an outer product"),
        (lambda m: m.w * (m.w[:1] > 0), "leads to several rows by different ways"),
    ],
)
def test_why_an_expression_is_not_cut(weight: Weight, reason: str) -> None:
    model = Model(
        weight,
        linear=True,
        up=nn.Parameter(torch.ones(16, 1)),
        down=nn.Parameter(torch.ones(1, 16)),
    )
    (module,) = computed(capture(shaken(model), input_shape=SHAPE))
    assert reason in why_not_sliceable(module)
    with pytest.raises(NotSliceable):
        slice_expression(module, range(0, 16, 2), range(0, 16, 2))
    found = proved(model, SHAPE, counted=False)
    assert set(found.unknown) == {"Linear"}


def test_a_random_weight_is_no_expression() -> None:
    """What is drawn anew in every call follows from no parameter."""
    model = shaken(Model(lambda m: F.dropout(m.w, 0.5, training=True)))
    assert not computed(capture(model, input_shape=SHAPE))


# -- slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [masked, soft_kernel, transposed, turned, concatenated, sliced])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [([3], [5]), ([0, 1, 2], list(range(16))), ([9, 2, 15], [1, 0]), ([4, 11], [12, 3, 8])],
)
def test_a_slice_of_an_expression_gives_a_slice_of_the_weight(
    weight: Weight, rows: list[int], columns: list[int]
) -> None:
    """True wherever no operator looks along what is cut."""
    model = shaken(Model(weight, large=nn.Parameter(torch.randn(20, 32, 3, 3))))
    model.register_buffer("seen", (torch.arange(3) < 2).double().view(1, 1, 1, 3))
    (module,) = computed(capture(model, input_shape=SHAPE))
    thin = slice_expression(module, rows, columns)
    tensors = module.tensors()
    kept = {
        key: tensors[key][torch.meshgrid(*map(torch.tensor, where), indexing="ij")]
        for key, where in thin.index.items()
    }
    values = thin.expression.values(kept | thin.constants)
    whole = weight_of(module)
    assert torch.equal(values[thin.expression.weight], whole[rows][:, columns])
    bias = bias_of(module)
    assert bias is not None
    assert thin.expression.bias is not None
    assert torch.equal(values[thin.expression.bias], bias[rows])
    assert sum(t.numel() for t in kept.values()) < sum(t.numel() for t in tensors.values())


# -- copies and files ------------------------------------------------------------------------------


def made() -> DynamicModel:
    torch.manual_seed(0)
    gain = nn.Parameter(torch.ones(16, 1, 1, 1))
    model = shaken(Model(by_variance_and_mean, gain=gain))
    return transform(model, PLANS[0], (inputs(SHAPE),))


def test_a_deep_copy_is_independent() -> None:
    dyn, x = made(), inputs(SHAPE)
    again = copy.deepcopy(dyn)
    before = dyn(x)
    assert all(torch.equal(a, b) for a, b in zip(before, again(x), strict=True))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(-1.5)
    assert all(torch.equal(a, b) for a, b in zip(before, dyn(x), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, again(x), strict=True))


def test_gradients_reach_what_the_weight_is_computed_from() -> None:
    dyn = made()
    sum(out.square().sum() for out in dyn(inputs(SHAPE))).backward()
    sources = {dyn.provenance[n].source for n, p in dyn.named_parameters() if p.grad is not None}
    assert {"w", "gain", "b"} <= sources
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in dyn.parameters())


@pytest.mark.parametrize(
    "weight", [by_hand, by_batch_norm, soft_kernel, turned, concatenated, sliced, masked]
)
def test_files(weight: Weight, tmp_path: Path) -> None:
    """What is loaded computes the same numbers, bit for bit, and is saved alike again."""
    gain = nn.Parameter(torch.ones(16, 1, 1, 1))
    large = nn.Parameter(torch.randn(20, 32, 3, 3))
    model = Model(weight, gain=gain, large=large)
    model.register_buffer("seen", (torch.arange(3) < 2).double().view(1, 1, 1, 3))
    dyn, x = transform(shaken(model), PLANS[0] | {"order": "l1"}, (inputs(SHAPE),)), inputs(SHAPE)
    dyn.save(tmp_path / "dyn.pt")
    again = load(tmp_path / "dyn.pt")
    assert all(torch.equal(a, b) for a, b in zip(dyn(x), again(x), strict=True))
    assert list(again.state_dict()) == list(dyn.state_dict())
    assert dict(again.provenance) == dict(dyn.provenance)
    assert [str(m) for m in again.modules()] == [str(m) for m in dyn.modules()]
    assert any(isinstance(m, ComputedLayer) for m in again.modules())
    again.save(tmp_path / "again.pt")
    third = load(tmp_path / "again.pt")
    assert all(torch.equal(a, b) for a, b in zip(dyn(x), third(x), strict=True))


def _row(data: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in data["modules"] if row["class"] == "ComputedLayer")


def reading_operator(row: dict[str, Any]) -> None:
    row["arguments"]["steps"][0]["target"] = "aten.from_file.default"


def foreign_operator(row: dict[str, Any]) -> None:
    row["arguments"]["steps"][0]["target"] = "os.system.default"


def writing_operator(row: dict[str, Any]) -> None:
    row["arguments"]["steps"][-1]["target"] = "aten.mul_.Tensor"


def code_in_keyword(row: dict[str, Any]) -> None:
    row["arguments"]["steps"][0]["kwargs"] = {"a=open('PWNED','w'),b": 1}


def code_in_name(row: dict[str, Any]) -> None:
    row["tensors"]["w=open('PWNED','w')"] = row["tensors"].pop("w")


def taken_by_the_module(row: dict[str, Any]) -> None:
    row["tensors"]["forward"] = row["tensors"].pop("w")


def taken_by_the_layer(row: dict[str, Any]) -> None:
    row["tensors"]["expression"] = row["tensors"]["gain"]


def taken_by_another_property(row: dict[str, Any]) -> None:
    row["tensors"]["out_channels"] = row["tensors"]["gain"]


def taken_by_a_tensor(row: dict[str, Any]) -> None:
    row["arguments"]["steps"][0]["name"] = "w"


def one_name_twice(row: dict[str, Any]) -> None:
    steps = row["arguments"]["steps"]
    steps[1]["name"] = steps[0]["name"]


def later_value(row: dict[str, Any]) -> None:
    steps = row["arguments"]["steps"]
    steps[0], steps[-1] = steps[-1], steps[0]


def no_such_value(row: dict[str, Any]) -> None:
    row["arguments"]["weight"] = "nothing"


def wrong_weight(row: dict[str, Any]) -> None:
    row["arguments"]["weight"] = "gain"


def wrong_bias(row: dict[str, Any]) -> None:
    row["arguments"]["bias"] = "w"


def wrong_settings(row: dict[str, Any]) -> None:
    row["arguments"]["layer"]["arguments"]["out_channels"] += 1


def wrong_layer(row: dict[str, Any]) -> None:
    row["arguments"]["layer"] = {"class": "ReLU", "arguments": {}}


def nested_layer(row: dict[str, Any]) -> None:
    row["arguments"]["layer"] = {"class": "ComputedLayer", "arguments": row["arguments"]}


def no_steps(row: dict[str, Any]) -> None:
    row["arguments"]["steps"] = None


def more_arguments(row: dict[str, Any]) -> None:
    row["arguments"]["hook"] = "print"


def wrong_arguments(row: dict[str, Any]) -> None:
    row["arguments"]["steps"][0]["args"] = "w"


def missing_tensor(row: dict[str, Any]) -> None:
    row["tensors"].pop("w")


def endless(row: dict[str, Any]) -> None:
    """A repeat that would fill the memory."""
    step = row["arguments"]["steps"][0]
    step["target"] = "aten.repeat.default"
    step["args"] = {"tuple": [step["args"]["tuple"][0], {"list": [1 << 40] * 4}]}
    step["kwargs"] = {}


HOSTILE: list[Callable[[dict[str, Any]], None]] = [
    reading_operator,
    foreign_operator,
    writing_operator,
    code_in_keyword,
    code_in_name,
    taken_by_the_module,
    taken_by_the_layer,
    taken_by_another_property,
    taken_by_a_tensor,
    one_name_twice,
    later_value,
    no_such_value,
    wrong_weight,
    wrong_bias,
    wrong_settings,
    wrong_layer,
    nested_layer,
    no_steps,
    more_arguments,
    wrong_arguments,
    missing_tensor,
    endless,
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("computed") / "dyn.pt"
    made().save(path)
    return path


@pytest.mark.parametrize("corrupt", HOSTILE)
def test_hostile_rows(
    stored: Path,
    tmp_path: Path,
    corrupt: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = torch.load(stored, weights_only=True)
    corrupt(_row(data))
    torch.save(data, tmp_path / "dyn.pt")
    with pytest.raises(FormatError, match=r"dyn\.pt"):
        load(tmp_path / "dyn.pt")
    assert not Path("PWNED").exists()
