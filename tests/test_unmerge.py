"""The batch is kept apart from what models merge it with, and nothing else is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2d_compiler.program import Program, tensor_value
from s2d_compiler.tracing import capture
from s2d_compiler.unmerge import unmerge_batch
from tests.consequences import attention_as_written
from tests.proofs import Proved, inputs, proved, shaken

TOKENS, HEADS, WIDTH = 5, 4, 2
CHANNELS = HEADS * WIDTH

Body = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Layers a, b and c of 8 channels each, a body, and two layers behind it."""

    def __init__(self, body: Body, **modules: Any) -> None:
        super().__init__()
        self.body = body
        for name in "abc":
            setattr(self, name, nn.Linear(3, CHANNELS))
        for name, module in modules.items():
            setattr(self, name, module)
        self.out, self.fc = nn.Linear(CHANNELS, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.out(self.body(self, x)).relu().mean(1))


def merged(program: Program) -> list[str]:
    """Values, constants aside, of which a dimension holds the batch and something else than
    tokens."""
    found = []
    for node in program.nodes:
        value = tensor_value(node)
        operands = {n.op for n in node.all_input_nodes if tensor_value(n) is not None}
        if "new_zeros" in str(node.target) or operands == {"get_attr"}:
            continue
        for size in value.shape if value is not None else ():
            if not isinstance(size, int):
                (batch,) = size.node.expr.free_symbols
                if size.node.expr / batch not in (1, TOKENS):
                    found.append(f"{node.name}: {tuple(value.shape)}")
    return found


def require_same(program: Program, model: nn.Module, shape: tuple[int, ...]) -> None:
    """The program gives the model's numbers bit for bit, for every batch size.

    Attention is compared as it is written: which fused kernel runs, and how that rounds,
    depends on the rank of its operands.
    """
    assert program.batch is None
    for batch in (1, 2, 7):
        x = inputs(shape, batch)
        with torch.no_grad(), attention_as_written(), sdpa_kernel(SDPBackend.MATH):
            (got,), want = program.graph_module(x), model(x)
        assert torch.equal(got, want), f"batch {batch}"


def unmerged(model: nn.Module, shape: tuple[int, ...]) -> Program:
    """The program of a model, in which no batch dimension holds anything else."""
    program = capture(shaken(model), input_shape=shape)
    assert not merged(program)
    require_same(program, model, shape)
    return program


def require_cut_by_heads(found: Proved, layer: str) -> None:
    rows = found.rows(layer)
    assert not found.unknown
    assert not any(f.pinned for f in found.channels.families if layer in f.writers)
    by_head = [rows[h * WIDTH : (h + 1) * WIDTH] for h in range(HEADS)]
    assert all(len(set(atoms)) == 1 for atoms in by_head)
    assert len(set(rows)) == HEADS


# -- torch's own attention -------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool, need_weights: bool) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) + m.b(x) * m.c(x)
        y = y if batch_first else y.transpose(0, 1)
        y = m.attention(y, y, y, need_weights=need_weights)[0]
        return y if batch_first else y.transpose(0, 1)

    def made() -> Model:
        attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=batch_first)
        return Model(body, attention=attention)

    unmerged(made(), (TOKENS, 3))
    found = proved(made(), (TOKENS, 3))
    assert not found.unknown
    (packed,) = (name for name in found.channels.layers if "in_proj" in name)
    rows = found.rows(packed)
    assert len(set(rows)) == HEADS
    assert rows[:CHANNELS] == rows[CHANNELS : 2 * CHANNELS] == rows[2 * CHANNELS :]


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_as_an_output_of_their_own(average: bool) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) + m.b(x) * m.c(x)
        y, weights = m.attention(y, y, y, average_attn_weights=average)
        return y * (weights if average else weights.mean(1)).amax(2, keepdim=True)

    unmerged(
        Model(body, attention=nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)),
        (TOKENS, 3),
    )


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "keys", "extra rows", "widths"])
def test_multihead_attention_with_what_it_may_take(kind: str) -> None:
    mask = torch.ones(TOKENS, TOKENS).triu(1).bool()
    options: dict[str, Any] = {}
    if kind == "extra rows":
        options = {"add_bias_kv": True, "add_zero_attn": True}
    elif kind == "widths":
        options = {"kdim": 3, "vdim": 5, "bias": False}

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) + m.b(x) * m.c(x)
        if kind == "widths":
            return m.attention(y, x, m.wide(x))[0]
        given: dict[str, Any] = {}
        if kind in ("bool", "causal"):
            given = {"attn_mask": m.mask, "is_causal": kind == "causal"}
        elif kind == "float":
            given = {"attn_mask": m.mask.double() * -3.0}
        elif kind == "keys":
            given = {"key_padding_mask": x.sum(2) > 2.0}
        return m.attention(y, y, y, **given)[0]

    model = Model(
        body,
        attention=nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, **options),
        wide=nn.Linear(3, 5),
    )
    model.register_buffer("mask", mask)
    unmerged(model, (TOKENS, 3))
    assert not proved(model, (TOKENS, 3)).unknown


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_layer(batch_first: bool, norm_first: bool) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) + m.b(x) * m.c(x)
        return m.layer(y) if batch_first else m.layer(y.transpose(0, 1)).transpose(0, 1)

    def made() -> Model:
        layer = nn.TransformerEncoderLayer(
            CHANNELS, HEADS, 12, batch_first=batch_first, norm_first=norm_first
        )
        return Model(body, layer=layer)

    unmerged(made(), (TOKENS, 3))
    assert not proved(made(), (TOKENS, 3)).unknown


def test_a_decoder_layer_looks_at_itself_and_at_another() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x) + m.b(x)
        return m.layer(torch.flip(y, (1,)), m.c(x)[:, 1:], tgt_mask=m.mask)

    model = Model(body, layer=nn.TransformerDecoderLayer(CHANNELS, HEADS, 12, batch_first=True))
    model.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TOKENS).double())
    unmerged(model, (TOKENS, 3))


# -- heads, groups and patches in the batch, as people write them ----------------------------------


def into_batch(x: Tensor) -> Tensor:
    """(N, T, C) -> (N * heads, T, C / heads)."""
    n, t, _ = x.shape
    return x.view(n, t, HEADS, WIDTH).transpose(1, 2).reshape(n * HEADS, t, WIDTH)


def out_of_batch(x: Tensor) -> Tensor:
    _, t, d = x.shape
    return x.view(-1, HEADS, t, d).transpose(1, 2).reshape(-1, t, HEADS * d)


def parts(m: Any, x: Tensor) -> list[Tensor]:
    return [into_batch(part) for part in (m.a(x), m.b(x), m.c(x))]


def by_bmm(m: Any, x: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    return out_of_batch(torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v))


def by_baddbmm(m: Any, x: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    weights = torch.baddbmm(m.table, q, k.transpose(1, 2), alpha=0.5)
    return out_of_batch(weights.softmax(-1) @ v)


def by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    weights = torch.einsum("bid,bjd->bij", q, k).softmax(-1)
    return out_of_batch(torch.einsum("bij,bjd->bid", weights, v))


def by_attention(m: Any, x: Tensor) -> Tensor:
    return out_of_batch(F.scaled_dot_product_attention(*parts(m, x)))


def by_attention_with_a_table(m: Any, x: Tensor) -> Tensor:
    return out_of_batch(F.scaled_dot_product_attention(*parts(m, x), attn_mask=m.table))


def with_padding(m: Any, x: Tensor) -> Tensor:
    """One more key of zeros."""
    q, k, v = parts(m, x)
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return out_of_batch((q @ k.transpose(1, 2)).softmax(-1) @ v)


def with_more_keys(m: Any, x: Tensor) -> Tensor:
    """A key of the model's own, and one of zeros, that know of heads and batch."""
    q, k, v = parts(m, x)
    n = x.shape[0]
    own = m.key.expand(n * HEADS, 1, WIDTH)
    k = torch.cat([k, own, x.new_zeros(n * HEADS, 1, WIDTH)], 1)
    v = torch.cat([v, own, x.new_zeros(n * HEADS, 1, WIDTH)], 1)
    return out_of_batch((q @ k.mT).softmax(-1) @ v)


def with_moved_dimensions(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part.movedim(0, 1) for part in parts(m, x))
    weights = q.movedim(1, 0) @ k.permute(1, 2, 0)
    return out_of_batch(weights.softmax(-1) @ v.swapaxes(0, 1))


def with_norms(m: Any, x: Tensor) -> Tensor:
    """Cosine attention: queries and keys divided by their length in a head."""
    q, k, v = parts(m, x)
    q, k = (F.normalize(part, dim=-1) for part in (q, k))
    return out_of_batch((q @ k.mT * 3).softmax(-1) @ v)


def with_slices(m: Any, x: Tensor) -> Tensor:
    """Keys without the first token, the last query's row taken out."""
    q, k, v = parts(m, x)
    weights = (q @ k[:, 1:].transpose(1, 2)).softmax(-1)
    one = torch.einsum("bj,bjd->bd", weights[:, -1], v[:, 1:]).unsqueeze(1)
    return out_of_batch(weights @ v[:, 1:] + one)


def with_select(m: Any, x: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    return out_of_batch(v * (q.select(1, 0).unsqueeze(1) * k).tanh())


def with_expand(m: Any, x: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    gate = (q[:, :1] * k[:, :1]).sigmoid().expand(-1, x.shape[1], -1)
    return out_of_batch(v * gate)


def with_shared_table(m: Any, x: Tensor) -> Tensor:
    """Every head goes through one matrix."""
    q, k, v = parts(m, x)
    return out_of_batch((q @ k.transpose(1, 2)).softmax(-1) @ (v @ m.matrix))


def with_arithmetic(m: Any, x: Tensor) -> Tensor:
    q, k, v = parts(m, x)
    weights = (q * 0.5 @ k.mT).clamp(-2, 2).masked_fill(m.mask, -1e9).softmax(2)
    return out_of_batch(F.dropout(weights, 0.1, False).contiguous().clone() @ v)


def through_four_dimensions(m: Any, x: Tensor) -> Tensor:
    """A mask by sample is added between two views that take heads out and put them back."""
    q, k, v = parts(m, x)
    t = x.shape[1]
    weights = (q @ k.transpose(1, 2)).view(-1, HEADS, t, t) + x.sum(2)[:, None, None, :]
    return out_of_batch(torch.bmm(weights.view(-1, t, t).softmax(-1), v))


@pytest.mark.parametrize(
    "body",
    [
        by_bmm,
        by_baddbmm,
        by_einsum,
        by_attention,
        by_attention_with_a_table,
        with_padding,
        with_more_keys,
        with_moved_dimensions,
        with_norms,
        with_slices,
        with_select,
        with_expand,
        with_shared_table,
        with_arithmetic,
        through_four_dimensions,
    ],
)
def test_heads_in_the_batch(body: Body) -> None:
    def made() -> Model:
        model = Model(
            body,
            table=nn.Parameter(torch.zeros(TOKENS, TOKENS)),
            matrix=nn.Parameter(torch.zeros(WIDTH, WIDTH)),
            key=nn.Parameter(torch.zeros(1, 1, WIDTH)),
        )
        model.register_buffer("mask", torch.ones(TOKENS, TOKENS).triu(1).bool())
        return model

    unmerged(made(), (TOKENS, 3))
    found = proved(made(), (TOKENS, 3))
    if body not in (with_select, with_expand):
        require_cut_by_heads(found, "a")
    assert not found.unknown


def test_sequence_first_heads_beside_the_batch() -> None:
    """(T, N * heads, d), the way of fairseq and of torch itself."""

    def apart(x: Tensor) -> Tensor:
        return x.reshape(TOKENS, -1, WIDTH).transpose(0, 1)

    def body(m: Any, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        q, k, v = apart(m.a(y)), apart(m.b(y)), apart(m.c(y))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return y.transpose(0, 1).reshape(TOKENS, -1, CHANNELS).transpose(0, 1)

    unmerged(Model(body), (TOKENS, 3))
    require_cut_by_heads(proved(Model(body), (TOKENS, 3)), "a")


class Images(nn.Module):
    """A convolution to 8 channels, a body, and two layers behind it; (N, 3, 4, 4)."""

    def __init__(self, body: Body, **modules: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.stem = nn.Conv2d(3, CHANNELS, 1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.out, self.fc = nn.Conv2d(CHANNELS, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.out(self.body(self, self.stem(x))).relu().mean((2, 3)))


def test_patches_in_the_batch() -> None:
    """Tokens attend to each other within windows of 2 by 2."""

    def body(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        q, k, v = m.qkv(windows).view(-1, 4, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, c)
        y = y.view(-1, h // 2, w // 2, 2, 2, c)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, h, w)

    model = Images(body, qkv=nn.Linear(CHANNELS, 3 * CHANNELS))
    found = proved(model, (3, 4, 4))
    assert not found.unknown
    assert len(set(found.rows("qkv"))) == HEADS
    require_same(found.program, model, (3, 4, 4))


def test_groups_of_channels_in_the_batch() -> None:
    """Every group of channels gates itself by a mean over its own positions (SGE)."""

    def body(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n * 4, c // 4, h, w)
        gate = (y * y.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
        gate = (gate - gate.mean((2, 3), True)) / (gate.std((2, 3), keepdim=True) + 1)
        return (y * gate.sigmoid()).view(n, c, h, w)

    unmerged(Images(body), (3, 4, 4))
    found = proved(Images(body), (3, 4, 4))
    assert not found.unknown
    rows = found.rows("stem")
    assert rows[::2] == rows[1::2]
    assert len(set(rows)) == 4


# -- what needs nothing is left alone --------------------------------------------------------------


def plain(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * m.b(x) + m.c(x)


def split_and_joined(m: Any, x: Tensor) -> Tensor:
    """Views beside the batch."""
    y = m.a(x).unflatten(2, (HEADS, WIDTH)).transpose(1, 2) * m.b(x)[:, None, :, :WIDTH]
    return y.transpose(1, 2).flatten(2) + m.c(x)


def the_other_way_round(m: Any, x: Tensor) -> Tensor:
    """Heads before the batch meet heads behind it."""
    q, k = into_batch(m.a(x)), m.b(x).unflatten(2, (HEADS, WIDTH)).permute(2, 0, 1, 3)
    return out_of_batch(q * k.flatten(0, 1)) + m.c(x)


def joined_the_other_way_round(m: Any, x: Tensor) -> Tensor:
    q, k = into_batch(m.a(x)), m.b(x).unflatten(2, (HEADS, WIDTH)).permute(2, 0, 1, 3)
    return out_of_batch(torch.cat([q, k.flatten(0, 1)], 1)[:, ::2]).flip(1) + m.c(x)


def in_other_parts(m: Any, x: Tensor) -> Tensor:
    """Four parts of two in one factor, two of four in the other."""
    q = m.a(x).unflatten(2, (HEADS, WIDTH)).permute(0, 2, 3, 1).reshape(-1, TOKENS)
    k = m.b(x).unflatten(2, (WIDTH, HEADS)).permute(0, 2, 3, 1).reshape(-1, TOKENS)
    y = (q * k).view(-1, HEADS, WIDTH, TOKENS).permute(0, 3, 1, 2)
    return y.flatten(2) + m.c(x)


def broadcast_both_ways(m: Any, x: Tensor) -> Tensor:
    """A row by head against a table by token."""
    q, v = into_batch(m.a(x)).mean(1, keepdim=True), into_batch(m.c(x))
    return out_of_batch(v * (q + m.rows).tanh() + q) + m.b(x)


@pytest.mark.parametrize(
    "body", [the_other_way_round, joined_the_other_way_round, in_other_parts, broadcast_both_ways]
)
def test_factors_that_do_not_fit_are_not_put_together(body: Body) -> None:
    model = Model(body, rows=nn.Parameter(torch.zeros(1, TOKENS, WIDTH)))
    program = capture(shaken(model), input_shape=(TOKENS, 3))
    require_same(program, model, (TOKENS, 3))
    if body in (in_other_parts, broadcast_both_ways):  # the others mix samples
        proved(model, (TOKENS, 3))
    assert bool(merged(program)) == (body is not broadcast_both_ways)


@pytest.mark.parametrize("body", [plain, split_and_joined])
def test_a_graph_that_merges_nothing_is_untouched(body: Body) -> None:
    program = capture(shaken(Model(body)), input_shape=(TOKENS, 3))
    before = [node.format_node() for node in program.graph_module.graph.nodes]
    assert not unmerge_batch(program.graph_module.graph)
    assert [node.format_node() for node in program.graph_module.graph.nodes] == before


def test_a_merged_dimension_that_is_never_taken_apart_stays() -> None:
    """An output of a row per token is what it is."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).flatten(0, 1).relu())

    model = Rows()
    program = capture(shaken(model), input_shape=(TOKENS, 3))
    require_same(program, model, (TOKENS, 3))
    before = [node.format_node() for node in program.graph_module.graph.nodes]
    assert not unmerge_batch(program.graph_module.graph)
    assert [node.format_node() for node in program.graph_module.graph.nodes] == before
    assert math.prod(program.graph_module(inputs((TOKENS, 3)))[0].shape) == 4 * TOKENS * 5


@pytest.mark.parametrize("between", [torch.cumsum, torch.flip])
def test_an_operator_that_cannot_be_opened_ends_the_chain(between: Any) -> None:
    """What stands between stays as it was, and the numbers with it."""

    def body(m: Any, x: Tensor) -> Tensor:
        dims: Any = 1 if between is torch.cumsum else (1,)
        y = between(into_batch(m.a(x)), dims).relu()
        return out_of_batch(y) + m.b(x) * m.c(x)

    model = Model(body)
    program = capture(shaken(model), input_shape=(TOKENS, 3))
    require_same(program, model, (TOKENS, 3))
    assert any("cumsum" in str(n.target) or "flip" in str(n.target) for n in program.nodes)


def test_a_fixed_batch_has_nothing_to_keep_apart() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q = m.a(x).view(2 * HEADS, -1, WIDTH).tanh()
        return q.view(2, TOKENS, CHANNELS) + m.b(x) * m.c(x)

    model = shaken(Model(body))
    x = inputs((TOKENS, 3), 2)
    program = capture(model, (x,))
    assert program.batch == 2
    assert not unmerge_batch(program.graph_module.graph)
    assert torch.equal(program.graph_module(x)[0], model(x))
