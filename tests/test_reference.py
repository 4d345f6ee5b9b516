"""The reference proves the compiler; these tests prove the reference.

First against numbers worked out by hand, then by breaking a correctly cut network in one
way at a time: each break must be seen, and by the check that is there for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import assignment, consequences
from tests.networks import BLOCKS, Attention, ComputedConv, Drawn, seeded, settle
from tests.reference import (
    MaskedFormError,
    NoRuleError,
    Structure,
    masked_outputs,
    parameters_and_buffers,
    read_assignment,
)

Rows = Sequence[int] | None


@dataclass(frozen=True)
class Entry:
    """A stand-in for the compiler's ``Slice``."""

    source: str
    index: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class HandPlan:
    """A stand-in for a plan with one setting for everything."""

    stages: int = 2
    groups: int = 8
    split: tuple[int, ...] = (4,)
    concat: frozenset[tuple[int, int]] = frozenset({(2, 1)})
    order: str = "index"
    final: str = "cut"

    def split_for(self, _resolution: str, _layers: Iterable[str]) -> tuple[int, ...]:
        return self.split

    def reads(self, _resolution: str, _layer: str) -> frozenset[tuple[int, int]]:
        return self.concat


def given(slices: dict[str, tuple[Rows, ...]], stages: int, final: str = "cut") -> Any:
    """Something with only a plan and a provenance, of weights; keys as ``0.conv.weight``."""
    provenance = {
        f"stages.{key}": Entry(
            key.split(".", 1)[1], tuple(None if i is None else tuple(i) for i in index)
        )
        for key, index in slices.items()
    }
    return SimpleNamespace(provenance=provenance, plan=HandPlan(stages=stages, final=final))


def image(channels: int = 3, size: int = 6, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)


def agree(got: Sequence[Any], *wanted: Tensor) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------
# By hand


class Tower(nn.Module):
    """conv -> something -> 1x1 conv, features out."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 4, out: int = 4) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, width, 3, padding=1)
        self.two = nn.Conv2d(width, out, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.between(self.one(x)))
        return torch.cat([y, y], 1)[:, : y.shape[1]] + 0 * y  # shares no meaning, only atoms


def tower(between: Callable[[Tensor], Tensor], *, reuse: bool) -> tuple[Tower, Tensor, Any]:
    x = image()
    model = Tower(between)
    settle(model, x)
    second = [0, 1, 2, 3] if reuse else [2, 3]
    full = None, None
    dyn = given(
        {
            "0.one.weight": ([0, 1], None, *full),
            "1.one.weight": ([2, 3], None, *full),
            "0.two.weight": ([0, 1], [0, 1], *full),
            "1.two.weight": ([2, 3], second, *full),
        },
        2,
    )
    return model, x, dyn


def mixed(model: Tower, y: Tensor, rows: slice, columns: slice) -> Tensor:
    """Some rows of the 1x1 convolution, reading some columns."""
    weight = model.two.weight[rows, columns]
    return F.conv2d(y[:, columns], weight, model.two.bias[rows])  # type: ignore[index]


FIRST, SECOND, BOTH = slice(0, 2), slice(2, 4), slice(0, 4)


def with_zeros(y: Tensor) -> Tensor:
    return torch.cat([y, torch.zeros_like(y)], 1)


@pytest.mark.parametrize("reuse", [False, True])
def test_reference_cuts_two_convolutions(reuse: bool) -> None:
    model, x, dyn = tower(F.relu, reuse=reuse)
    y = model.one(x).relu()
    one = mixed(model, y, FIRST, FIRST)
    two = mixed(model, y, SECOND, BOTH if reuse else SECOND)
    agree(masked_outputs(model, dyn, x), with_zeros(one), torch.cat([one, two], 1))


def test_reference_gives_every_stage_its_version_of_a_reduction() -> None:
    def gate(y: Tensor) -> Tensor:
        return y * y.mean(1, keepdim=True).sigmoid()

    model, x, dyn = tower(gate, reuse=True)
    y = model.one(x)
    early, late = y[:, FIRST], y[:, SECOND]
    y = torch.cat(
        [
            early * early.mean(1, keepdim=True).sigmoid(),
            late * late.mean(1, keepdim=True).sigmoid(),
        ],
        1,
    )
    one, two = mixed(model, y, FIRST, FIRST), mixed(model, y, SECOND, BOTH)
    agree(masked_outputs(model, dyn, x), with_zeros(one), torch.cat([one, two], 1))


def test_reference_softens_every_stage_by_itself() -> None:
    model, x, dyn = tower(lambda y: y.softmax(1), reuse=True)
    y = model.one(x)
    y = torch.cat([y[:, FIRST].softmax(1), y[:, SECOND].softmax(1)], 1)
    one, two = mixed(model, y, FIRST, FIRST), mixed(model, y, SECOND, BOTH)
    agree(masked_outputs(model, dyn, x), with_zeros(one), torch.cat([one, two], 1))


def test_reference_runs_an_unknown_operator_once_per_stage() -> None:
    model, x, dyn = tower(lambda y: torch.cumsum(y.flip(1), 1), reuse=True)
    with pytest.raises(NoRuleError, match="flip"):
        masked_outputs(model, dyn, x)
    model, x, dyn = tower(lambda y: torch.sort(y, 1)[0], reuse=True)
    dyn.provenance["stages.0.two.weight"] = Entry("two.weight", ((0, 1), None, None, None))
    y = model.one(x)
    dead = with_zeros(y[:, FIRST]).sort(1)[0]
    one = mixed(model, dead, FIRST, BOTH)
    two = mixed(model, y.sort(1)[0], SECOND, BOTH)
    agree(masked_outputs(model, dyn, x), with_zeros(one), torch.cat([one, two], 1))


def test_reference_lets_a_version_meet_the_channels_of_its_stage() -> None:
    model, x, dyn = tower(lambda y: y + torch.cumsum(y, 1), reuse=True)
    y = model.one(x)
    y = y + torch.cat([with_zeros(y[:, FIRST]).cumsum(1)[:, FIRST], y.cumsum(1)[:, SECOND]], 1)
    one, two = mixed(model, y, FIRST, FIRST), mixed(model, y, SECOND, BOTH)
    agree(masked_outputs(model, dyn, x), with_zeros(one), torch.cat([one, two], 1))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gate = nn.Conv2d(4, 1, 1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * self.gate(y).sigmoid()
        y = self.norm(F.pad(y, (0, 0, 0, 0, 1, 1)))
        y = F.adaptive_max_pool2d(y.relu_(), 2)
        out: Tensor = self.fc(torch.flatten(y, 1))
        return out


def classifier(final: str = "cut") -> tuple[Classifier, Tensor, Any]:
    x = image()
    model = Classifier()
    settle(model, x)
    full = None, None
    # padded channel 0, channels 0..3 of the convolution, padded channel 5; four pixels each
    early = [*range(4), *range(4, 12), *range(20, 24)]
    slices: dict[str, tuple[Rows, ...]] = {
        "0.conv.weight": ([0, 1], None, *full),
        "0.gate.weight": ([0], [0, 1], *full),
        "0.fc.weight": (None, early),
        "1.conv.weight": ([2, 3], None, *full),
        "1.fc.weight": (None, None),
    }
    if final == "original":
        slices |= {f"1.{k}": (None,) * v.dim() for k, v in parameters_and_buffers(model).items()}
    return model, x, given(slices, 2, final)


def test_reference_knows_nobodys_channels_gates_and_heads() -> None:
    model, x, dyn = classifier()
    y = model.conv(x)
    gate = F.conv2d(y[:, FIRST], model.gate.weight[:, FIRST], model.gate.bias).sigmoid()
    y = model.norm(F.pad(y * gate, (0, 0, 0, 0, 1, 1))).relu()
    y = F.adaptive_max_pool2d(y, 2)
    outputs = []
    for seen in ([0, 1, 2, 5], [0, 1, 2, 3, 4, 5]):
        weight = model.fc.weight.view(5, 6, 4)[:, seen].flatten(1)
        outputs.append(F.linear(y[:, seen].flatten(1), weight, model.fc.bias))
    agree(masked_outputs(model, dyn, x), *outputs)
    structure = Structure(model, x)
    assert structure.prediction_layers() == ["fc"]
    assert read_assignment(structure, dyn).heads == ["fc"]
    assert structure.gates == set(structure.layers["gate"].rows)


def test_reference_ends_with_the_original_where_the_plan_says_so() -> None:
    model, x, dyn = classifier("original")
    cut = masked_outputs(model, classifier()[2], x)
    agree(masked_outputs(model, dyn, x), cut[0], model(x))


class Grouped(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 1)
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        out: Tensor = self.two(y) + y
        return out


@pytest.mark.parametrize(
    ("groups", "rows", "columns"),
    [
        (8, range(8), None),  # between groups: the first four
        (2, [*range(4), *range(8, 12)], range(4)),  # inside: the first half of both
        (16, range(8), None),
    ],
)
def test_reference_cuts_grouped_convolutions(
    groups: int, rows: Sequence[int], columns: Any
) -> None:
    x = image()
    model = settle(Grouped(groups), x)
    assert isinstance(model, Grouped)
    rest = [r for r in range(16) if r not in rows]
    others = None if columns is None else [c for c in range(8) if c not in columns]
    dyn = given(
        {
            "0.one.weight": (rows, None, None, None),
            "1.one.weight": (rest, None, None, None),
            "0.two.weight": (rows, columns, None, None),
            "1.two.weight": (rest, others, None, None),
        },
        2,
    )
    y = model.one(x)
    kept = len(rows) * groups // 16 if columns is None else groups
    part = y[:, list(rows)]
    weight = model.two.weight[list(rows)]
    weight = weight if columns is None else weight[:, list(columns)]
    out = F.conv2d(part, weight, model.two.bias[list(rows)], padding=1, groups=kept) + part  # type: ignore[index]
    wanted = torch.zeros_like(y)
    wanted[:, list(rows)] = out
    got = masked_outputs(model, dyn, x)
    agree(got[:1], wanted)
    structure = Structure(model, x)
    plan: Any = HandPlan(concat=frozenset())
    owners = assignment.expected_owners(structure, plan)
    assert (owners[structure.layers["two"].rows] == 1).nonzero().flatten().tolist() == list(rows)
    found = read_assignment(structure, dyn)
    assert not list(assignment._ties(structure, found))
    planned = assignment.planned_assignment(structure, plan)
    assert not list(assignment._alive(structure, plan, found, planned))
    assert not list(assignment._cuts(structure, found, planned))


def test_reference_norms_every_stage_by_itself() -> None:
    def layer(y: Tensor) -> Tensor:
        return F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2)

    def rms(y: Tensor) -> Tensor:
        return F.rms_norm(y.permute(0, 2, 3, 1), y.shape[1:2], eps=1e-5).permute(0, 3, 1, 2)

    for norm in (layer, rms, lambda y: F.group_norm(y, 1)):
        model, x, dyn = tower(norm, reuse=True)
        y = model.one(x)
        y = torch.cat([norm(y[:, FIRST]), norm(y[:, SECOND])], 1)
        one, two = mixed(model, y, FIRST, FIRST), mixed(model, y, SECOND, BOTH)
        agree(masked_outputs(model, dyn, x), with_zeros(one), torch.cat([one, two], 1))


def test_reference_cuts_inside_the_groups_of_a_norm() -> None:
    x = image()
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)), x)
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]
    dyn = given(
        {f"{i}.0.weight": (rows, None, None, None) for i, rows in enumerate([first, second])}, 2
    )
    got = masked_outputs(model, dyn, x)
    scale, shift = model[1].weight, model[1].bias  # type: ignore[index]
    for rows in (first, second):
        wanted = F.group_norm(model[0](x)[:, rows], 2, scale[rows], shift[rows])  # type: ignore[index]
        torch.testing.assert_close(got[1][:, rows], wanted)
    assert not got[0][:, second].any()
    found = read_assignment(Structure(model, x), dyn)
    assert not list(assignment._ties(Structure(model, x), found))
    dyn = given({"0.0.weight": (range(4), None, None, None)}, 2)
    dyn.provenance["stages.1.0.weight"] = Entry("0.weight", (tuple(range(4, 8)), None, None, None))
    broken = list(assignment._ties(Structure(model, x), read_assignment(Structure(model, x), dyn)))
    assert broken == ["native_group_norm normalises inside groups: 4 pairs of tied positions in "
                      "different stages"]  # fmt: skip


class Tokens(nn.Module):
    """Six pixels as tokens behind a class token, and attention between them."""

    def __init__(self, heads: int, how: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 1)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = Attention(8, heads, 7, how)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.first.expand(len(y), -1, -1), y], 1)
        out: Tensor = self.attention(y)
        return torch.stack([out, out], 1).mean(1)


HOW = ["fused", "plain", "table", "einsum", "module", "module batch first"]


@pytest.mark.parametrize("how", HOW)
def test_reference_cuts_attention_by_heads(how: str) -> None:
    x = image()[..., :2, :3]
    model = settle(Tokens(4, how), x)
    assert isinstance(model, Tokens)
    whole = "attention.whole" if how.startswith("module") else "attention"
    last = "out_proj" if how.startswith("module") else "proj"
    packed = f"{whole}.in_proj_weight" if how.startswith("module") else "attention.qkv.weight"
    halves = [list(range(4)), list(range(4, 8))]
    slices: dict[str, tuple[Rows, ...]] = {}
    for i, half in enumerate(halves):
        slices[f"{i}.embed.weight"] = (half, None, None, None)
        slices[f"{i}.{packed}"] = ([r + 8 * k for k in range(3) for r in half], half)
        slices[f"{i}.{whole}.{last}.weight"] = (half, half)
    dyn = given(slices, 2)
    structure = Structure(model, x)
    found = read_assignment(structure, dyn)
    assert not list(assignment._ties(structure, found))
    got = masked_outputs(model, dyn, x, structure)

    named = dict(model.named_parameters())
    tokens = model.embed(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.first.expand(len(x), -1, -1), tokens], 1)
    scale = 0.3 if how in ("plain", "table", "einsum") else 0.5**0.5
    for half in halves:
        rows = [r + 8 * k for k in range(3) for r in half]
        qkv = tokens[..., half] @ named[packed][rows][:, half].t()
        bias = named.get(packed.replace("weight", "bias"))
        qkv = qkv if bias is None else qkv + bias[rows]
        parts = []
        for head in range(2):
            q, k, v = (qkv[..., 4 * j + 2 * head : 4 * j + 2 * head + 2] for j in range(3))
            scores = q @ k.transpose(1, 2) * scale
            if how == "table":
                scores = scores + model.attention.position()[half[0] // 2 + head]
            parts.append(scores.softmax(-1) @ v)
        weight = named[f"{whole}.{last}.weight"][half][:, half]
        wanted = torch.cat(parts, -1) @ weight.t() + named[f"{whole}.{last}.bias"][half]
        torch.testing.assert_close(got[1][..., half], wanted)
    torch.testing.assert_close(got[0][..., :4], got[1][..., :4])
    assert not got[0][..., 4:].any()

    # a head of which each stage has one half
    torn: dict[str, tuple[Rows, ...]] = slices | {
        f"0.{packed}": ([*range(7), 8, *range(9, 13)], halves[0]),
        f"1.{packed}": ([7, *range(13, 24)], halves[1]),
    }
    report = list(assignment._ties(structure, read_assignment(structure, given(torn, 2))))
    assert any("tied positions in different stages" in line for line in report)


@pytest.mark.parametrize("how", HOW)
def test_reference_pins_the_queries_of_a_single_head(how: str) -> None:
    x = image()[..., :2, :3]
    structure = Structure(settle(Tokens(1, how), x), x)
    rows = structure.layers[list(structure.layers)[1]].rows
    atoms = {structure.ties.find(row) for row in rows[:16]}
    assert len(atoms) == 1
    assert atoms == {structure.ties.find(gate) for gate in structure.gates}
    assert len({structure.ties.find(row) for row in rows[16:]} - atoms) == 8


def test_reference_ties_the_halves_of_a_norm_to_nothing_but_tokens_to_each_other() -> None:
    class TwoEmbeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            y = torch.cat([self.one(tokens), self.two(tokens)], 1)
            out: Tensor = F.relu(self.out(y))
            return out

    structure = Structure(settle(TwoEmbeddings(), image()), image())
    one, two, out = (structure.layers[n].rows for n in ("one", "two", "out"))
    find = structure.ties.find
    assert [find(i) for i in one] == [find(i) for i in two]
    assert len({find(i) for i in (*one, *out)}) == 8


def test_reference_lets_token_mixing_pass() -> None:
    x = image(size=2)
    model = settle(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(4, 5), nn.Linear(5, 2)), x
    )
    structure = Structure(model, x)
    assert list(structure.layers) == ["0"]
    slices: dict[str, tuple[Rows, ...]] = {
        "0.0.weight": ([0, 1], None, None, None),
        "1.0.weight": ([2, 3], None, None, None),
    }
    wanted = model(x)
    first = wanted.clone()
    first[:, 2:] = 0
    agree(masked_outputs(model, given(slices, 2), x, structure), first, wanted)


@pytest.mark.parametrize("how", ["standardised", "batch norm", "normed", "scaled", "bias"])
def test_reference_computes_weights_from_what_a_stage_has(how: str) -> None:
    x = image(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), ComputedConv(4, 4, 3, how))
    settle(model, x)
    conv = model[1]
    assert isinstance(conv, ComputedConv)
    halves = [[0, 1], [2, 3]]
    slices: dict[str, tuple[Rows, ...]] = {}
    for i, half in enumerate(halves):
        slices[f"{i}.0.weight"] = (half, None, None, None)
        slices[f"{i}.1.weight"] = (half, half, None, None)
        slices[f"{i}.1.gain"] = (half, None, None, None)
    dyn = given(slices, 2)
    structure = Structure(model, x)
    got = masked_outputs(model, dyn, x, structure)
    y = model[0](x)
    for half in halves:
        part = ComputedConv(2, 2, 3, how).double()
        with torch.no_grad():
            part.weight.copy_(conv.weight[half][:, half])
            part.gain.copy_(conv.gain[half])
            part.bias.copy_(conv.bias[half])  # type: ignore[index, union-attr]
            if how == "bias":  # by hand: its first half is another one in a slice
                part.how = "scaled"
                part.gain.fill_(1)
                part.bias.mul_(torch.tensor([float(r >= 2) for r in half]))  # type: ignore[union-attr]
            wanted = part(y[:, half])
        torch.testing.assert_close(got[1][:, half], wanted)
    assert not got[0][:, 2:].any()


@pytest.mark.parametrize("how", ["standardised", "batch norm", "normed", "scaled", "bias"])
def test_plans_say_which_elements_computed_weights_are_made_of(how: str) -> None:
    x = image(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), ComputedConv(4, 4, 3, how), nn.Conv2d(4, 3, 1))
    settle(model, x)
    full = None, None
    slices: dict[str, tuple[Rows, ...]] = {
        "0.0.weight": ([0, 1], None, *full),
        "1.0.weight": ([2, 3], None, *full),
        "0.1.weight": ([0, 1], [0, 1], *full),
        "1.1.weight": ([2, 3], [2, 3], *full),
        "0.1.gain": ([0, 1], None, *full),
        "1.1.gain": ([2, 3], None, *full),
        "0.2.weight": (None, [0, 1], *full),
        "1.2.weight": (None, None, *full),
    }
    structure = Structure(model, x)
    plan: Any = HandPlan(concat=frozenset())
    planned = assignment.planned_assignment(structure, plan)
    dyn = given(slices, 2)
    assert planned == read_assignment(structure, dyn)
    if how not in ("scaled", "bias"):
        dyn.provenance["stages.1.1.gain"] = Entry("1.gain", ((3,), None, None, None))
        with pytest.raises(AssertionError):
            assert planned == read_assignment(structure, dyn)


def test_reference_refuses_what_it_does_not_know() -> None:
    model, x, dyn = tower(lambda y: y.flip(1), reuse=True)
    with pytest.raises(NoRuleError, match="flip"):
        masked_outputs(model, dyn, x)
    dyn.provenance["stages.0.one.weight"] = Entry("three.weight", (None, None, None, None))
    model.between = F.relu
    with pytest.raises(MaskedFormError, match=r"three\.weight"):
        masked_outputs(model, dyn, x)


@pytest.mark.parametrize("seed", range(60))
def test_reference_with_one_stage_is_the_original(seed: int) -> None:
    drawn = seeded(seed)
    x = drawn.batch()
    model = settle(drawn.model, x, seed)
    whole = {f"0.{k}": (None,) * v.dim() for k, v in parameters_and_buffers(model).items()}
    (got,) = masked_outputs(model, given(whole, 1), x)
    with torch.no_grad():
        wanted = model(x)
    assert consequences.relative_error(got, wanted) <= 1e-12
    assert not consequences.is_vacuous(wanted)


def test_seeds_draw_every_kind_of_block_and_settle_randomises_everything() -> None:
    drawn = [seeded(seed) for seed in range(120)]
    assert {kind for d in drawn for kind in d.kinds} == set(BLOCKS)
    some = Drawn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (3, 6, 6), ())
    model = settle(some.model, some.batch())
    for tensor in model.state_dict().values():
        assert tensor.dim() == 0 or tensor.unique().numel() == tensor.numel()
    out = model(some.batch())
    scale, shift = model[1].weight, model[1].bias  # type: ignore[index]
    torch.testing.assert_close(out.mean((0, 2, 3)), shift)
    torch.testing.assert_close(out.std((0, 2, 3)), scale, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------
# Broken on purpose


class Small(nn.Module):
    """One residual block and a classifier; small enough to be cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = (self.conv(y) + y).relu()
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


class Stage(nn.Module):
    """One stage of ``Small``: reads the image and what earlier stages handed on."""

    def __init__(self, own: int, read: int, seen: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, own, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(own)
        self.conv = nn.Conv2d(read, own, 3, padding=1)
        self.fc = nn.Linear(seen, 5)


class FirstStage(Stage):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(self.stem(x)).relu()
        z = (self.conv(y) + y).relu().mean((2, 3))
        return self.fc(z), y, z


class LaterStage(Stage):
    def forward(self, x: Tensor, before: Tensor, pooled: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        read = torch.cat([before, y], 1) if self.conv.in_channels > y.shape[1] else y
        z = (self.conv(read) + y).relu().mean((2, 3))
        z = torch.cat([pooled, z], 1) if self.fc.in_features > z.shape[1] else z
        out: Tensor = self.fc(z)
        return out


class HandCut(nn.Module):
    """``Small`` in two stages, cut by hand where the arguments say."""

    def __init__(
        self,
        original: Small,
        *,
        owned: tuple[Sequence[int], Sequence[int]] = ((0, 1), (2, 3)),
        conv_owned: tuple[Sequence[int], Sequence[int]] | None = None,
        reuse: bool = True,
        whole_head: bool = True,
    ) -> None:
        super().__init__()
        first, second = owned
        conv_first, conv_second = conv_owned or owned
        read = [*first, *second] if reuse else list(second)
        seen = [*conv_first, *conv_second] if whole_head else list(conv_second)
        stages = [
            FirstStage(len(first), len(first), len(conv_first)),
            LaterStage(len(second), len(read), len(seen)),
        ]
        self.stages = nn.ModuleList(stages).double()
        self.plan: Any = HandPlan()
        self.provenance: dict[str, Entry] = {}
        self.leak: Callable[[HandCut, Tensor], Tensor] | None = None
        for number, (rows, columns, inputs, heads) in enumerate(
            [(first, conv_first, first, conv_first), (second, conv_second, read, seen)]
        ):
            self._say(number, "stem.weight", rows, None, None, None)
            for name in ("weight", "bias", "running_mean", "running_var"):
                self._say(number, f"norm.{name}", rows)
            self._say(number, "norm.num_batches_tracked")
            self._say(number, "conv.weight", columns, inputs, None, None)
            self._say(number, "conv.bias", columns)
            self._say(number, "fc.weight", None, heads)
            self._say(number, "fc.bias", None)
        self.fill(original)
        self.cost = SimpleNamespace(stages=[], original_macs=0, original_parameters=0)
        self.price(original)

    def _say(self, stage: int, source: str, *index: Sequence[int] | None) -> None:
        taken = tuple(None if i is None else tuple(i) for i in index)
        self.provenance[f"stages.{stage}.{source}"] = Entry(source, taken)

    def fill(self, original: nn.Module) -> None:
        sources = parameters_and_buffers(original)
        for key, tensor in self.state_dict().items():
            entry = self.provenance[key]
            wanted = sources[entry.source].detach()
            for dim, taken in enumerate(entry.index):
                if taken is not None:
                    wanted = wanted.index_select(dim, torch.tensor(taken))
            tensor.copy_(wanted)

    def price(self, original: Small, size: int = 6) -> None:
        total, pixels = 0, size * size
        for stage in self.stages:
            stem, conv, fc = stage.stem.weight, stage.conv.weight, stage.fc.weight
            macs = (stem.numel() + conv.numel()) * pixels + fc.numel()  # type: ignore[operator, union-attr]
            total += macs
            self.cost.stages.append(SimpleNamespace(macs=macs, cumulative_macs=total))
        self.cost.original_macs = (4 * 3 * 9 + 4 * 4 * 9) * pixels + 20
        self.cost.original_parameters = sum(p.numel() for p in original.parameters())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one, y, z = self.stages[0](x)
        if self.leak is not None:
            one = one + self.leak(self, y)
        return one, self.stages[1](x, y, z)


def small() -> tuple[Small, Tensor]:
    x = image()
    model = Small()
    settle(model, x)
    return model, x


def found(model: nn.Module, dyn: HandCut, x: Tensor) -> str:
    measured = consequences.Measured([], [], dyn)
    return "\n".join(consequences.check_dyn(model, dyn, x, measured))


def error(model: nn.Module, dyn: HandCut, x: Tensor) -> str:
    """How far stage 2 is from what the plan says, as messages print it."""
    structure = Structure(model, x)
    planned = assignment.planned_assignment(structure, dyn.plan)
    wanted = masked_outputs(model, dyn, x, structure, planned)[1]
    with torch.no_grad():
        return f"{consequences.relative_error(dyn(x)[1], wanted):.1e}"


def test_a_network_cut_by_hand_has_every_consequence() -> None:
    model, x = small()
    assert found(model, HandCut(model), x) == ""
    without = HandCut(model, reuse=False)
    without.plan = HandPlan(concat=frozenset())
    assert found(model, without, x) == ""


def _state(dyn: HandCut, key: str) -> Tensor:
    return dyn.state_dict()[key]


def perturb(dyn: HandCut) -> None:
    _state(dyn, "stages.1.conv.weight")[1, 2, 0, 0] += 1e-7


def swap_rows(dyn: HandCut) -> None:
    weight = _state(dyn, "stages.0.stem.weight")
    weight.copy_(weight.flip(0))


def swap_head_columns(dyn: HandCut) -> None:
    weight = _state(dyn, "stages.1.fc.weight")
    weight.copy_(weight.flip(1))


def drop_head_bias(dyn: HandCut) -> None:
    _state(dyn, "stages.0.fc.bias").zero_()


def change_statistics(dyn: HandCut) -> None:
    _state(dyn, "stages.1.norm.running_var")[0] *= 1 + 1e-6


def silence_reuse(dyn: HandCut) -> None:
    _state(dyn, "stages.1.conv.weight")[:, :2] = 0


def leave_out_a_scale(dyn: HandCut) -> None:
    _state(dyn, "stages.0.norm.weight").fill_(1)


@pytest.mark.parametrize(
    "breaks",
    [
        perturb,
        swap_rows,
        swap_head_columns,
        drop_head_bias,
        change_statistics,
        silence_reuse,
        leave_out_a_scale,
    ],
)
def test_wrong_numbers_are_seen_by_values_and_by_the_masked_form(
    breaks: Callable[[HandCut], None],
) -> None:
    model, x = small()
    dyn = HandCut(model)
    breaks(dyn)
    measured = consequences.Measured([], [], dyn)
    structure = Structure(model, x)
    by_form = list(consequences.masked_equivalence(model, dyn, x, structure, measured))
    assert any("differs from the masked form" in line for line in by_form)
    assert any("at its index" in line for line in assignment._values(model, dyn))


@pytest.mark.parametrize(
    "key", ["stages.0.stem.weight", "stages.1.conv.bias", "stages.1.norm.bias"]
)
def test_a_shifted_index_is_seen(key: str) -> None:
    model, x = small()
    dyn = HandCut(model)
    entry = dyn.provenance[key]
    assert entry.index[0] is not None
    shifted = tuple((i + 1) % 4 for i in entry.index[0])
    dyn.provenance[key] = Entry(entry.source, (shifted, *entry.index[1:]))
    assert f"{key} is not {entry.source} at its index" in found(model, dyn, x)


def test_a_missing_and_a_superfluous_provenance_are_seen() -> None:
    model, x = small()
    dyn = HandCut(model)
    dyn.provenance["stages.0.more.weight"] = dyn.provenance["stages.0.stem.weight"]
    del dyn.provenance["stages.1.norm.bias"]
    report = found(model, dyn, x)
    assert "stages.1.norm.bias has no provenance" in report
    assert "provenance of stages.0.more.weight, which is not in the state dict" in report


def test_a_dropped_reuse_is_seen_though_it_is_a_masked_form() -> None:
    model, x = small()
    dyn = HandCut(model, reuse=False)
    assert found(model, dyn, x).split("\n") == [
        "conv, stage 2: 4 weights are stored, 8 are alive",
        f"stage 2 differs from what the plan says by {error(model, dyn, x)} of the spread",
    ]


def test_an_unplanned_reuse_is_seen() -> None:
    model, x = small()
    dyn = HandCut(model)
    dyn.plan = HandPlan(concat=frozenset())
    assert found(model, dyn, x).split("\n") == [
        "conv, stage 2: 8 weights are stored, 4 are alive",
        f"stage 2 differs from what the plan says by {error(model, dyn, x)} of the spread",
    ]


def test_a_head_that_reads_too_little_is_seen() -> None:
    model, x = small()
    dyn = HandCut(model, whole_head=False)
    assert found(model, dyn, x).split("\n") == [
        "fc, stage 2: 10 weights are stored, 20 are alive",
        f"stage 2 differs from what the plan says by {error(model, dyn, x)} of the spread",
    ]


def test_broken_ties_are_seen() -> None:
    model, x = small()
    dyn = HandCut(model, conv_owned=((0, 2), (1, 3)))
    assert "add: 2 pairs of tied positions in different stages" in found(model, dyn, x)


@pytest.mark.parametrize("owned", [((2, 3), (0, 1)), ((0,), (1, 2, 3)), ((1, 0), (3, 2))])
def test_a_cut_elsewhere_than_planned_is_seen(
    owned: tuple[Sequence[int], Sequence[int]],
) -> None:
    model, x = small()
    report = found(model, HandCut(model, owned=owned), x)
    if sorted(owned[0]) == [0, 1]:
        assert report == ""  # how a stage orders its own channels is its own business
    else:
        assert "family written by stem, conv and read by conv, fc at 6x6: stages" in report


def test_the_order_of_a_plan_is_seen() -> None:
    model, x = small()
    weights = model.stem.weight.abs().sum((1, 2, 3)) + model.conv.weight.abs().sum((1, 2, 3))
    ranked: list[int] = weights.argsort(descending=True).tolist()
    dyn = HandCut(model, owned=(sorted(ranked[:2]), sorted(ranked[2:])))
    dyn.plan = HandPlan(order="l1")
    assert found(model, dyn, x) == ""
    dyn = HandCut(model, owned=(sorted(ranked[2:]), sorted(ranked[:2])))
    dyn.plan = HandPlan(order="l1")
    assert "where the plan says" in found(model, dyn, x)


def test_a_weight_stored_twice_and_one_not_stored_are_seen() -> None:
    model, x = small()
    dyn = HandCut(model)
    dyn.stages[1].extra = nn.Parameter(model.conv.bias.detach()[:1].clone())  # type: ignore[index]
    dyn.provenance["stages.1.extra"] = Entry("conv.bias", ((0,),))
    assert "conv.bias: 1 elements are stored twice" in found(model, dyn, x)
    report = found(model, HandCut(model, owned=((0, 1), (2,))), x)
    assert "stage 2 differs from what the plan says" in report


@pytest.mark.parametrize(
    "leak",
    [
        lambda dyn, _: dyn.stages[1].fc.bias * 1e-3,
        lambda dyn, _: dyn.stages[1].fc.bias * 0,
        lambda dyn, _: dyn.stages[1].norm.running_var.sum() * 0,
        lambda dyn, _: dyn.stages[1].stem.weight.abs().sum().clamp(0, 0) * 0,
    ],
)
def test_a_leak_from_a_later_stage_is_seen(leak: Callable[[HandCut, Tensor], Tensor]) -> None:
    model, x = small()
    dyn = HandCut(model)
    dyn.leak = leak
    report = found(model, dyn, x)
    assert "stage 1's output depends on weights of stages > 1 (not_a_number)" in report
    assert list(consequences.causality(HandCut(model), x)) == []


def test_wrong_costs_are_seen() -> None:
    model, x = small()
    dyn = HandCut(model)
    dyn.cost.stages[1].cumulative_macs += 1
    dyn.cost.original_macs -= 1
    report = found(model, dyn, x)
    assert "stage 2 costs" in report
    assert "the original costs" in report


def test_work_outside_the_table_is_seen() -> None:
    model, x = small()
    dyn = HandCut(model)
    dyn.leak = lambda cut, y: 0 * cut.stages[0].fc(y.mean((2, 3)))
    with pytest.raises(AssertionError, match="outside the stages"):
        found(model, dyn, x)


def test_a_changed_original_is_seen() -> None:
    model, _ = small()
    before = consequences.fingerprint(model)
    assert consequences.fingerprint(model) == before
    model.train()
    assert consequences.fingerprint(model) != before
    model.eval()
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1
    assert consequences.fingerprint(model) != before


def test_a_vacuous_output_is_no_result() -> None:
    model, x = small()
    with torch.no_grad():
        model.fc.weight.mul_(1e-9)
    dyn = HandCut(model)
    measured = consequences.Measured([], [], dyn)
    structure = Structure(model, x)
    assert not list(consequences.masked_equivalence(model, dyn, x, structure, measured))
    assert measured.vacuous == [1, 2]
