"""Products of tensors and attention: what they tie, and that their stages compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d_compiler import Plan
from s2d_compiler.analysis.labels import VERSIONED
from tests import consequences
from tests.proofs import PLANS, Proved, proved

TOKENS, HEADS, WIDTH = 6, 4, 2
CHANNELS = HEADS * WIDTH
SHAPE = (TOKENS, 3)

Body = Callable[[Any, Tensor], Tensor]


class Tokens(nn.Module):
    """Layers a, b and c of 8 channels each over (N, 6, 3), a body, and two layers behind it."""

    def __init__(self, body: Body, out: int = CHANNELS, **modules: Any) -> None:
        super().__init__()
        self.body = body
        for name in "abc":
            setattr(self, name, nn.Linear(3, CHANNELS))
        for name, module in modules.items():
            setattr(self, name, module)
        self.out, self.fc = nn.Linear(out, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.out(self.body(self, x)).relu().mean(1))


def heads(x: Tensor) -> Tensor:
    """(N, T, C) -> (N, heads, T, C / heads)."""
    return x.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def require_one_atom_a_head(atoms: list[int]) -> None:
    by_head = [set(atoms[h * WIDTH : (h + 1) * WIDTH]) for h in range(HEADS)]
    assert all(len(of_head) == 1 for of_head in by_head)
    assert len(set().union(*by_head)) == HEADS


def require_cut_by_heads(found: Proved) -> None:
    assert not found.unknown
    require_one_atom_a_head(found.rows("a"))
    assert found.rows("a") == found.rows("b") == found.rows("c") == found.columns("out")
    assert not any(family.pinned for family in found.channels.families)
    for dyn in found.results:
        assert all(stage.macs for stage in dyn.cost.stages)
        assert dyn.cost.stages[0].macs < dyn.cost.original_macs


# -- attention by heads ----------------------------------------------------------------------------


def fused(m: Any, x: Tensor) -> Tensor:
    return joined(F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(m.c(x))))


def scaled(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.a(x)), heads(m.b(x)), heads(m.c(x))
    return joined(F.scaled_dot_product_attention(q, k, v, scale=0.3))


def causal(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.a(x)), heads(m.b(x)), heads(m.c(x))
    return joined(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def with_table(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.a(x)), heads(m.b(x)), heads(m.c(x))
    return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=m.table))


def with_mask(m: Any, x: Tensor) -> Tensor:
    """Which keys are seen depends on the input."""
    q, k, v = heads(m.a(x)), heads(m.b(x)), heads(m.c(x))
    seen = (x.sum(2) > -9.0)[:, None, None, :]
    return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def written(m: Any, x: Tensor) -> Tensor:
    weights = (heads(m.a(x)) @ heads(m.b(x)).transpose(-2, -1) + m.table).softmax(-1)
    return joined(weights @ heads(m.c(x)))


def einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (HEADS, WIDTH)) for part in (m.a(x), m.b(x), m.c(x)))
    weights = torch.einsum("nthd, nshd -> nhts", q, k).softmax(-1)
    return torch.einsum("nhts,nshd->nthd", weights, v).flatten(2)


def ellipsis(m: Any, x: Tensor) -> Tensor:
    weights = torch.einsum("...td,...sd->...ts", heads(m.a(x)), heads(m.b(x))).softmax(-1)
    return joined(torch.einsum("...ts,...sd->...td", weights, heads(m.c(x))))


def implicit(m: Any, x: Tensor) -> Tensor:
    """Without an arrow the result's letters are in alphabetical order: queries, keys."""
    weights = torch.einsum("...id,...jd", heads(m.a(x)), heads(m.b(x))).softmax(-1)
    return joined(torch.einsum("...ij,...jk", weights, heads(m.c(x))))


def three_operands(m: Any, x: Tensor) -> Tensor:
    parts = [heads(part) for part in (m.a(x), m.b(x), m.c(x))]
    return joined(torch.einsum("nhtd,nhsd,nhse->nhte", *parts))


def class_token(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([m.first.expand(x.shape[0], -1, -1), x], 1)
    return fused(m, x)[:, :1] + fused(m, x)[:, 1:]


@pytest.mark.parametrize(
    "body",
    [
        fused,
        scaled,
        causal,
        with_table,
        with_mask,
        written,
        einsum,
        ellipsis,
        implicit,
        three_operands,
        class_token,
    ],
)
def test_heads_are_atoms(body: Body) -> None:
    model = Tokens(body, table=table(HEADS, TOKENS, TOKENS), first=table(1, 1, 3))
    require_cut_by_heads(proved(model, SHAPE))


def test_a_table_by_heads_is_sliced_and_one_for_all_is_shared() -> None:
    own = proved(Tokens(with_table, table=table(HEADS, TOKENS, TOKENS)), SHAPE)
    shared = proved(Tokens(with_table, table=table(TOKENS, TOKENS)), SHAPE)
    require_cut_by_heads(shared)

    def held(found: Proved, stage: int) -> int:
        (count,) = {
            p.numel()
            for name, p in found.results[1].stages[stage].named_parameters()
            if found.results[1].provenance[f"stages.{stage}.{name}"].source == "table"
        }
        return count

    assert held(own, 0) == held(own, 1) == HEADS // 2 * TOKENS**2
    assert held(shared, 0) == TOKENS**2


def test_heads_of_a_packed_projection() -> None:
    """q, k and v come out of one layer."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return joined(F.scaled_dot_product_attention(q, k, v)) + m.a(x) * m.b(x) * m.c(x)

    found = proved(Tokens(body, qkv=nn.Linear(3, 3 * CHANNELS)), SHAPE)
    rows = found.rows("qkv")
    require_one_atom_a_head(rows[:CHANNELS])
    assert rows[:CHANNELS] == rows[CHANNELS : 2 * CHANNELS] == rows[2 * CHANNELS :]
    assert not found.unknown


@pytest.mark.parametrize("fused", [True, False])
def test_cross_attention_with_other_widths_and_lengths(fused: bool) -> None:
    """Three queries of the model's own, values wider than keys."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k = heads(m.a(x[:, :3])), heads(m.b(x))
        v = m.wide(x).unflatten(2, (HEADS, 3)).transpose(1, 2)
        if fused:
            return joined(F.scaled_dot_product_attention(q, k, v))
        return joined((q @ k.mT).softmax(-1) @ v)

    found = proved(Tokens(body, 3 * HEADS, wide=nn.Linear(3, 3 * HEADS)), SHAPE)
    assert not found.unknown
    atoms = [atom for atom in found.rows("a")[::WIDTH] for _ in range(3)]
    assert found.rows("wide") == found.columns("out") == atoms


# -- gates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["matmul", "fused", "einsum", "bmm"])
def test_with_one_head_queries_and_keys_belong_to_stage_one(how: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.a(x), m.b(x), m.c(x)
        if how == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if how == "einsum":
            return torch.einsum("nts,nsd->ntd", torch.einsum("ntd,nsd->nts", q, k).softmax(-1), v)
        product = torch.bmm if how == "bmm" else torch.matmul
        return product(product(q, k.transpose(1, 2)).softmax(-1), v)

    found = proved(Tokens(body), SHAPE)
    assert not found.unknown
    (atom,) = set(found.rows("a"))
    assert set(found.rows("b")) == {atom}
    assert len(set(found.rows("c")) - {atom}) == CHANNELS
    assert found.columns("out") == found.rows("c")
    (family,) = (f for f in found.channels.families if atom in f.atoms)
    assert family.pinned == 1
    for dyn in found.results:
        sources = [
            {dyn.provenance[f"stages.{t}.{name}"].source for name, _ in stage.named_parameters()}
            for t, stage in enumerate(dyn.stages)
        ]
        assert {"a.weight", "b.weight", "c.weight"} <= sources[0]
        assert "c.weight" in sources[1]
        assert not sources[1] & {"a.weight", "b.weight"}


@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_keys_and_values_that_all_queries_share_belong_to_stage_one(
    fused: bool, expanded: bool
) -> None:
    """Multi-query attention: one head of keys and values is broadcast against all."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.a(x)), m.key(x).unsqueeze(1), m.value(x).unsqueeze(1)
        if expanded:
            k, v = (t.expand(-1, HEADS, -1, -1) for t in (k, v))
        if fused:
            return joined(F.scaled_dot_product_attention(q, k, v))
        return joined((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    found = proved(Tokens(body, key=nn.Linear(3, WIDTH), value=nn.Linear(3, WIDTH)), SHAPE)
    require_one_atom_a_head(found.rows("a"))
    assert found.columns("out") == found.rows("a")
    assert len(set(found.rows("key"))) == 1
    for shared in ("key", "value"):
        atoms = set(found.rows(shared))
        assert not atoms & set(found.rows("a"))
        (family,) = (f for f in found.channels.families if atoms <= set(f.atoms))
        assert atoms <= set(family.atoms[: family.pinned])


def test_a_map_of_one_channel_pools_all_channels() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("nts,ntc->nsc", m.gate(x).softmax(1), m.a(x)) * m.b(x)[:, :1]

    found = proved(Tokens(body, gate=nn.Linear(3, 1)), SHAPE)
    assert not found.unknown
    assert len(set(found.rows("a"))) == CHANNELS
    assert found.columns("out") == found.rows("a")
    assert found.rows("gate")[0] not in found.rows("a")


def test_products_over_tokens_keep_channels_apart() -> None:
    """Neither factor's channels are summed over, and they stand along one letter."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("ntc,nuc->nuc", m.a(x), m.b(x))
        return y + m.mixing @ m.c(x)

    found = proved(Tokens(body, mixing=torch.randn(TOKENS, TOKENS).double()), SHAPE)
    assert not found.unknown
    rows = found.rows("a")
    assert len(set(rows)) == CHANNELS
    assert rows == found.rows("b") == found.rows("c") == found.columns("out")


# -- all to all ------------------------------------------------------------------------------------


def test_attention_between_the_channels_of_a_head() -> None:
    """Cross-covariance: channels meet all to all within a head, which becomes one atom."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(part).mT for part in (m.a(x), m.b(x), m.c(x)))
        y = ((q @ k.mT * m.heat).softmax(-1) @ v).permute(0, 3, 1, 2)
        return y.flatten(2)

    require_cut_by_heads(proved(Tokens(body, heat=table(HEADS, 1, 1)), SHAPE))


@pytest.mark.parametrize("how", ["matmul", "einsum", "outer"])
def test_all_channels_against_all_others_are_versioned(how: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k = m.a(x), m.b(x)
        if how == "matmul":
            weights = q.mT @ k
        elif how == "einsum":
            weights = torch.einsum("ntc,ntd->ncd", q, k)
        else:
            weights = torch.einsum("nc,nd->ncd", q[:, 0], k[:, 0])
        return m.c(x) @ m.third(weights).softmax(1)

    found = proved(Tokens(body, third=nn.Linear(CHANNELS, CHANNELS)), SHAPE)
    operator = "aten.matmul" if how == "matmul" else "aten.einsum"
    assert found.unknown[operator] == "it would tie every channel to every other"
    for layer in "ab":
        assert len(set(found.rows(layer))) == CHANNELS, "nothing is tied"


# -- what has no rule ------------------------------------------------------------------------------

NO_WEIGHT = "it sums over all channels with a factor that is no weight"


def test_a_sum_over_all_channels_with_a_constant_is_versioned() -> None:
    """A constant matrix is no weight whose columns could be masked."""
    model = Tokens(lambda m, x: m.a(x) @ m.basis * m.b(x) * m.c(x))
    model.register_buffer("basis", torch.randn(CHANNELS, CHANNELS))
    found = proved(model, SHAPE)
    assert found.unknown == {"aten.matmul": NO_WEIGHT}
    (product,) = (n for n in found.program.nodes if str(n.target).startswith("aten.matmul"))
    assert (found.channels.labels[product.name] == VERSIONED).all()
    assert len(set(found.rows("a"))) == CHANNELS


def test_a_sum_over_all_channels_with_a_versioned_value_is_versioned() -> None:
    """Of all stages' channels, none has the product to itself."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return (y @ y.cumsum(2).transpose(1, 2)).softmax(2) @ (m.b(x) * m.c(x))

    found = proved(Tokens(body), SHAPE)
    assert found.unknown["aten.matmul"] == NO_WEIGHT
    assert set(found.unknown) == {"aten.matmul", "aten.cumsum"}
    assert len(set(found.rows("a"))) == CHANNELS
    assert found.columns("out") == found.rows("b") == found.rows("c")


def test_a_diagonal_is_versioned() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        square = torch.einsum("ntc,nsc->ncts", m.a(x), m.b(x))
        return torch.einsum("nctt->ntc", square) + m.c(x)

    found = proved(Tokens(body), SHAPE)
    assert found.unknown == {"aten.einsum": "it takes a diagonal"}
    assert found.rows("a") == found.rows("b")
    assert len(set(found.rows("a"))) == CHANNELS


def test_queries_that_share_keys_by_groups_are_versioned() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q = heads(m.a(x))
        k, v = (part(x).unflatten(2, (2, WIDTH)).transpose(1, 2) for part in (m.key, m.value))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return joined(y) + m.b(x) * m.c(x)

    model = Tokens(body, key=nn.Linear(3, 2 * WIDTH), value=nn.Linear(3, 2 * WIDTH))
    found = proved(model, SHAPE, counted=False)
    (reason,) = found.unknown.values()
    assert reason == "its queries share keys by groups of heads"


# -- layers in other words -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["matmul", "transposed", "mm"])
def test_a_product_with_a_parameter_matrix_is_a_linear_layer(how: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) * m.b(x) * m.c(x)
        if how == "mm":
            return (y.mean(1) @ m.matrix).unsqueeze(1)
        return y @ (m.matrix.t() if how == "transposed" else m.matrix)

    shape = (10, CHANNELS) if how == "transposed" else (CHANNELS, 10)
    found = proved(Tokens(body, 10, matrix=table(*shape)), SHAPE)
    assert not found.unknown
    (name,) = set(found.channels.layers) - {"a", "b", "c", "out", "fc"}
    assert len(set(found.rows(name))) == 10
    assert found.columns(name) == found.rows("a")
    for dyn in found.results:
        held = {n: p for n, p in dyn.named_parameters() if dyn.provenance[n].source == "matrix"}
        assert sum(p.numel() for p in held.values()) < CHANNELS * 10 or dyn is found.results[1]


def test_layers_over_the_width_of_a_head_are_shared() -> None:
    """Where heads carry channels too, what is summed over is tied and the module is one."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(part) for part in (m.a(x), m.b(x), m.c(x)))
        weights = (m.first(m.norm(q)) @ m.rms(k).mT).softmax(-1)
        return joined(weights @ v)

    model = Tokens(
        body, norm=nn.LayerNorm(WIDTH), rms=nn.RMSNorm(WIDTH), first=nn.Linear(WIDTH, WIDTH)
    )
    found = proved(model, SHAPE)
    require_cut_by_heads(found)
    assert "first" not in found.channels.layers
    for dyn in found.results:
        shared = [p for name, p in dyn.named_parameters() if "norm" in name or "rms" in name]
        assert all(p.numel() == WIDTH for p in shared)
        assert len({id(p) for p in shared}) == 3


@pytest.mark.parametrize("norm", [nn.RMSNorm(CHANNELS), nn.RMSNorm(CHANNELS, 1e-3, False)])
def test_rms_norm_is_coupled(norm: nn.Module) -> None:
    found = proved(Tokens(lambda m, x: m.norm(m.a(x) * m.b(x) * m.c(x)), norm=norm), SHAPE)
    assert not found.unknown
    assert len(found.channels.coupled) == 1
    assert len(set(found.rows("a"))) == CHANNELS


def test_a_layer_that_also_mixes_tokens_is_whole_in_stage_one() -> None:
    """A cosine transform of patches: one table along both sides of a square."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(TOKENS, TOKENS))
            self.conv = nn.Conv2d(TOKENS * TOKENS, 8, 1)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x.unfold(2, TOKENS, TOKENS).unfold(3, TOKENS, TOKENS)[:, 0]
            y = F.linear(F.linear(y, self.table).transpose(-1, -2), self.table)
            return self.out(self.conv(y.flatten(3).movedim(3, 1)).mean((2, 3)))

    model = Patches().double().eval()
    x = torch.randn(2, 3, 2 * TOKENS, 2 * TOKENS, dtype=torch.float64)
    found = proved(model, tuple(x.shape[1:]))
    assert len(set(found.rows("table_2"))) == 1
    for plan in PLANS:
        measured = consequences.check_all(model, Plan.from_dict(plan), x)
        held = [p.numel() for n, p in measured.dyn.named_parameters() if "table" in n]
        assert held == [TOKENS * TOKENS]
