"""What every family of operators does to channels, on programs of a few nodes.

A layer's ``rows`` are the atoms of its output channels, its ``columns`` those of its input
channels; two channels with one atom live in one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from s2d_compiler import Plan
from s2d_compiler.analysis.assignment import StageAssignment, assign, family_owners, row_weights
from s2d_compiler.analysis.channels import ChannelAnalysis, analyse_channels, cut_resolutions
from s2d_compiler.analysis.labels import NOBODY, VERSIONED, ZERO, Labels, Ties
from s2d_compiler.errors import PlanError
from s2d_compiler.program import Program
from s2d_compiler.rules import OperatorRule, base, find_rule, register, table
from s2d_compiler.rules.elementwise import ELEMENTWISE
from s2d_compiler.tracing import capture


class Model(nn.Module):
    """Modules under their names, and what ``body`` makes of them and the input."""

    def __init__(self, body: Callable[[Any, Tensor], Any], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(channels: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, **options)


class Analysed:
    """A program and its channel analysis."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.channels: ChannelAnalysis = analyse_channels(program)

    def rows(self, layer: str) -> list[int]:
        return [int(a) for a in self.channels.layers[layer].rows]

    def columns(self, layer: str, site: int = 0) -> list[int]:
        return [int(a) for a in self.channels.layers[layer].columns[site]]

    def labels(self, operator: str) -> Labels:
        """Labels of the only node of an operator."""
        (node,) = (n for n in self.program.nodes if str(n.target).startswith(operator))
        return self.channels.labels[node.name]

    def operators(self, names: tuple[str, ...]) -> list[str]:
        return [str(self.program.by_name[name].target) for name in names]

    @property
    def predictions(self) -> set[str]:
        return {self.channels.layer_of[name] for name in self.channels.predictions}

    def assigned(self, plan: dict[str, Any]) -> StageAssignment:
        return assign(self.program, self.channels, Plan.from_dict(plan))


def analysed(
    body: Callable[[Any, Tensor], Any], shape: tuple[int, ...] = (3, 6, 6), **modules: nn.Module
) -> Analysed:
    return Analysed(capture(Model(body, modules).eval(), (torch.randn(2, *shape),)))


HALF = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
#: A layer behind what is tested, so that it is no prediction layer.
LAST: dict[str, nn.Module] = {"last": nn.Conv2d(8, 5, 1)}


def distinct(atoms: list[int]) -> bool:
    return len(set(atoms)) == len(atoms)


# -- elementwise ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combine",
    [
        torch.add,
        lambda a, b: a.mul_(b),
        torch.maximum,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: F.relu(a).lerp(torch.sigmoid(b), 0.3),
    ],
)
def test_arithmetic_ties_equal_positions(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = analysed(
        lambda m, x: m.last(combine(m.a(x), m.b(x))), a=conv(3, 8), b=conv(3, 8), **LAST
    )
    assert found.rows("a") == found.rows("b") == found.columns("last")
    assert distinct(found.rows("a"))
    assert not found.channels.unknown


def test_halves_of_one_layer_are_tied() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, 1)
        return m.last(a * torch.sigmoid(b))

    found = analysed(body, a=conv(3, 16), **LAST)
    rows = found.rows("a")
    assert rows[:8] == rows[8:] == found.columns("last")
    assert distinct(rows[:8])


def test_a_spatial_gate_belongs_to_stage_one() -> None:
    found = analysed(
        lambda m, x: m.last((y := m.a(x)) * torch.sigmoid(m.gate(y))),
        a=conv(3, 8),
        gate=conv(8, 1),
        **LAST,
    )
    assert found.rows("gate")[0] not in found.rows("a")
    assert distinct(found.rows("a"))
    assert found.columns("last") == found.rows("a")
    (family,) = (f for f in found.channels.families if f.writers == ("gate",))
    assert (family.atoms, family.pinned) == (tuple(found.rows("gate")), 1)
    owners = found.assigned(HALF).owners
    assert owners[found.rows("gate")[0]] == 1


def test_constants_and_inputs_tie_nothing() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        table = torch.arange(8.0).view(1, 8, 1, 1)
        return m.last(m.a(x) * table + m.scale + x[:, :1])

    model = Model(body, {"a": conv(3, 8), **LAST})
    model.scale = nn.Parameter(torch.ones(8, 1, 1))
    found = Analysed(capture(model.eval(), (torch.randn(2, 3, 6, 6),)))
    assert distinct(found.rows("a"))
    assert found.columns("last") == found.rows("a")
    assert found.columns("a") == [NOBODY] * 3
    assert not found.channels.unknown


def test_padded_channels_are_nobodys() -> None:
    """The parameter-free shortcut of CIFAR ResNets."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.last(m.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3)))

    found = analysed(body, a=conv(3, 4), b=conv(4, 8, stride=2), **LAST)
    rows = found.rows("b")
    assert distinct(rows)
    assert rows[1:5] == found.rows("a")
    assert found.labels("aten.pad").reshape(-1).tolist() == [
        ZERO,
        *found.rows("a"),
        *[ZERO] * 3,
    ]


def test_padding_with_another_number_is_nobodys_but_no_zero() -> None:
    found = analysed(
        lambda m, x: m.last(F.pad(m.a(x), (0, 0, 0, 0, 0, 4), value=2.0)), a=conv(3, 4), **LAST
    )
    assert found.columns("last") == [*found.rows("a"), *[NOBODY] * 4]


# -- convolutions and linear layers --------------------------------------------------------


def test_a_dense_layer_ties_nothing() -> None:
    found = analysed(lambda m, x: m.last(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 8), **LAST)
    assert distinct(found.rows("a") + found.rows("b"))
    assert found.columns("b") == found.rows("a")


def test_depthwise_follows_its_input() -> None:
    found = analysed(
        lambda m, x: m.last(m.depth(m.a(x))), a=conv(3, 4), depth=conv(4, 8, groups=4), **LAST
    )
    rows = found.rows("depth")
    assert rows == [a for a in found.rows("a") for _ in range(2)], "channel multiplier 2"


def test_eight_groups_are_cut_between() -> None:
    found = analysed(
        lambda m, x: m.last(m.g(m.a(x))), a=conv(3, 16), g=conv(16, 8, groups=8), **LAST
    )
    rows, columns = found.rows("g"), found.columns("g")
    assert distinct(rows)
    assert columns == [a for a in rows for _ in range(2)]
    assert columns == found.rows("a")


@pytest.mark.parametrize("groups", [2, 4])
def test_fewer_groups_are_cut_inside(groups: int) -> None:
    found = analysed(
        lambda m, x: m.last(m.g(m.a(x))), a=conv(3, 16), g=conv(16, 8, groups=groups), **LAST
    )
    rows = np.reshape(found.rows("g"), (groups, -1))
    columns = np.reshape(found.columns("g"), (groups, -1))
    for by_group in (rows, columns):
        assert (by_group == by_group[0]).all(), "position i of every group"
        assert distinct(by_group[0].tolist())
    assert not set(rows[0]) & set(columns[0])


def test_transposed_convolutions() -> None:
    found = analysed(
        lambda m, x: m.last(m.up(m.a(x))), a=conv(3, 6), up=nn.ConvTranspose2d(6, 8, 2, 2), **LAST
    )
    assert found.columns("up") == found.rows("a")
    assert distinct(found.rows("up"))


def test_a_module_called_twice_unites_its_owners() -> None:
    found = analysed(
        lambda m, x: m.last(m.b(F.relu(m.b(m.a(x))))), a=conv(3, 8), b=conv(8, 8), **LAST
    )
    assert len(found.channels.layers["b"].layer.nodes) == 2
    assert found.columns("b", 0) == found.columns("b", 1) == found.rows("a") == found.rows("b")


def test_a_linear_layer_over_another_axis_is_one_for_all_stages() -> None:
    """Token mixing: (N, channels, tokens)."""
    found = analysed(
        lambda m, x: m.last(m.mix(m.a(x).flatten(2)).unflatten(2, (6, 6))),
        a=conv(3, 8),
        mix=nn.Linear(36, 36),
        **LAST,
    )
    assert "mix" not in found.channels.layers
    assert found.columns("last") == found.rows("a")


# -- data movement -------------------------------------------------------------------------


def test_concatenation_passes_positions_through() -> None:
    found = analysed(
        lambda m, x: m.last(torch.cat([m.a(x), x[:, :1], m.b(x)], 1)),
        a=conv(3, 4),
        b=conv(3, 3),
        **LAST,
    )
    assert found.columns("last") == [*found.rows("a"), NOBODY, *found.rows("b")]


def test_concatenation_of_tokens_ties() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).flatten(2).transpose(1, 2), m.b(x).flatten(2).transpose(1, 2)
        return m.fc(torch.cat([a, b], 1))

    found = analysed(body, a=conv(3, 8), b=conv(3, 8), fc=nn.Linear(8, 5))
    assert found.rows("a") == found.rows("b") == found.columns("fc")


def test_chunk_and_shuffle_permute_positions() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        kept, used = m.a(x).chunk(2, 1)
        y = torch.cat([kept, m.b(used)], 1)
        n, c, h, w = y.shape
        return m.last(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    found = analysed(body, a=conv(3, 8), b=conv(4, 4), **LAST)
    a, b = found.rows("a"), found.rows("b")
    assert found.columns("b") == a[4:]
    assert found.columns("last") == [a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]]


def test_flattening_repeats_channels() -> None:
    found = analysed(
        lambda m, x: m.fc(torch.flatten(F.max_pool2d(m.a(x), 2), 1)),
        a=conv(3, 8),
        fc=nn.Linear(72, 5),
    )
    assert found.columns("fc") == [a for a in found.rows("a") for _ in range(9)]


@pytest.mark.parametrize(
    ("move", "wanted"),
    [
        (lambda y: y.flip(1), [7, 6, 5, 4, 3, 2, 1, 0]),
        (lambda y: y.roll(3, 1), [5, 6, 7, 0, 1, 2, 3, 4]),
        (lambda y: y[:, 2:6], [2, 3, 4, 5]),
        (lambda y: y[:, ::2], [0, 2, 4, 6]),
        (lambda y: y[:, [5, 0, 5]], [5, 0, 5]),
        (lambda y: F.pixel_unshuffle(y, 2), [c for c in range(8) for _ in range(4)]),
        (lambda y: y.repeat(1, 2, 1, 1), [*range(8), *range(8)]),
        (lambda y: F.channel_shuffle(y, 2), [0, 4, 1, 5, 2, 6, 3, 7]),
        (lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2), [*range(8)]),
        (lambda y: F.interpolate(F.avg_pool2d(y, 2), scale_factor=2), [*range(8)]),
    ],
)
def test_movement(move: Callable[[Tensor], Tensor], wanted: list[Any]) -> None:
    out = len(wanted)
    found = analysed(lambda m, x: m.last(move(m.a(x))), a=conv(3, 8), last=nn.Conv2d(out, 5, 1))
    rows = found.rows("a")
    assert found.columns("last") == [rows[i] for i in wanted]
    assert distinct(rows)
    assert not found.channels.unknown


# -- coupled operators and reductions ------------------------------------------------------


def test_pooling_and_means_over_space_keep_channels_apart() -> None:
    found = analysed(lambda m, x: m.fc(m.a(x).mean((2, 3))), a=conv(3, 8), fc=nn.Linear(8, 5))
    assert found.columns("fc") == found.rows("a")
    assert found.channels.coupled == ()


def test_a_mean_over_the_channels_is_versioned() -> None:
    found = analysed(
        lambda m, x: m.last((y := m.a(x)) * torch.sigmoid(y.mean(1, keepdim=True))),
        a=conv(3, 8),
        **LAST,
    )
    assert found.labels("aten.mean").tolist() == [[[[VERSIONED]]]]
    assert found.operators(found.channels.coupled) == ["aten.mean.dim"]
    assert distinct(found.rows("a"))
    assert found.columns("last") == found.rows("a")
    assert not found.channels.unknown


def test_a_sum_over_one_of_two_channel_dimensions_ties() -> None:
    """Split attention."""
    found = analysed(lambda m, x: m.last(m.a(x).unflatten(1, (2, 8)).sum(1)), a=conv(3, 16), **LAST)
    rows = found.rows("a")
    assert rows[:8] == rows[8:] == found.columns("last")
    assert distinct(rows[:8])


def test_softmax_over_channels_is_coupled_and_over_splits_ties() -> None:
    over_channels = analysed(lambda m, x: m.last(m.a(x).softmax(1)), a=conv(3, 8), **LAST)
    assert over_channels.operators(over_channels.channels.coupled) == ["aten.softmax.int"]
    assert distinct(over_channels.rows("a"))
    over_splits = analysed(
        lambda m, x: m.last((y := m.a(x).unflatten(1, (2, 8))).softmax(1)[:, 0] * y[:, 1]),
        a=conv(3, 16),
        **LAST,
    )
    assert over_splits.channels.coupled == ()
    assert over_splits.rows("a")[:8] == over_splits.rows("a")[8:]


def test_group_norm_of_eight_groups_ties_each() -> None:
    found = analysed(
        lambda m, x: m.last(m.norm(m.a(x))),
        a=conv(3, 16),
        norm=nn.GroupNorm(8, 16),
        last=nn.Conv2d(16, 5, 1),
    )
    rows = found.rows("a")
    assert rows[::2] == rows[1::2]
    assert distinct(rows[::2])
    assert found.channels.coupled == ()


def test_group_norm_of_fewer_groups_is_coupled() -> None:
    found = analysed(
        lambda m, x: m.last(m.norm(m.a(x))),
        a=conv(3, 16),
        norm=nn.GroupNorm(4, 16),
        last=nn.Conv2d(16, 5, 1),
    )
    rows = np.reshape(found.rows("a"), (4, 4))
    assert (rows == rows[0]).all(), "position i of every group"
    assert distinct(rows[0].tolist())
    assert len(found.channels.coupled) == 1


def test_layer_norm_is_coupled() -> None:
    found = analysed(
        lambda m, x: m.fc(m.norm(m.a(x).permute(0, 2, 3, 1))),
        a=conv(3, 8),
        norm=nn.LayerNorm(8),
        fc=nn.Linear(8, 5),
    )
    assert len(found.channels.coupled) == 1
    assert distinct(found.rows("a"))
    assert found.columns("fc") == found.rows("a")


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)]
)
def test_norms_per_channel_follow_it(norm: nn.Module) -> None:
    found = analysed(lambda m, x: m.last(m.norm(m.a(x))), a=conv(3, 8), norm=norm, **LAST)
    assert distinct(found.rows("a"))
    assert found.columns("last") == found.rows("a")
    assert not found.channels.unknown


@pytest.mark.parametrize(
    ("unknown", "name"),
    [
        (lambda y: torch.cumsum(y, 1), "aten.cumsum"),
        (lambda y: torch.sort(y, 1)[0], "aten.sort"),
    ],
)
def test_an_unknown_operator_is_versioned_and_named(
    unknown: Callable[[Tensor], Tensor], name: str
) -> None:
    found = analysed(
        lambda m, x: m.b(m.a(x)) + m.last(unknown(m.a(x))), a=conv(3, 8), b=conv(8, 5), **LAST
    )
    assert distinct(found.rows("a")), "no ties"
    assert found.columns("last") == [VERSIONED] * 8
    assert name in [use.operator for use in found.channels.unknown]
    assert all(use.reason for use in found.channels.unknown)


def test_channels_meet_their_version() -> None:
    """Local response norm: the pooling over channels is versioned, its quotient is not."""
    found = analysed(lambda m, x: m.last(F.local_response_norm(m.a(x), 3)), a=conv(3, 8), **LAST)
    assert [use.operator for use in found.channels.unknown] == ["aten.avg_pool3d"]
    assert found.columns("last") == found.rows("a")
    assert distinct(found.rows("a"))


def test_an_unknown_operator_on_the_input_is_nobodys() -> None:
    found = analysed(lambda m, x: m.last(m.a(torch.cumsum(x, 1))), a=conv(3, 8), **LAST)
    assert found.columns("a") == [NOBODY] * 3
    assert found.channels.unknown == ()


# -- prediction layers ---------------------------------------------------------------------


def test_prediction_layers_end_at_the_output() -> None:
    found = analysed(
        lambda m, x: (m.fc((y := F.relu(m.a(x))).mean((2, 3))), torch.sigmoid(m.map(y))),
        a=conv(3, 8),
        fc=nn.Linear(8, 5),
        map=nn.Conv2d(8, 2, 1),
    )
    assert found.predictions == {"fc", "map"}
    assert found.rows("fc") == []


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.b(F.relu(m.a(x))) + m.a(x),  # shares atoms with another layer
        lambda m, x: (m.b(m.a(x)), m.c(m.b(m.a(x)))),  # meets another layer on one path
        lambda m, x: m.depthwise(m.a(x)),  # its rows are the channels that it reads
        lambda m, x: m.b(m.b(m.a(x))),  # meets itself
    ],
)
def test_what_is_no_prediction_layer(body: Callable[[Any, Tensor], Any]) -> None:
    depthwise = conv(8, 8, groups=8)
    found = analysed(body, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5), depthwise=depthwise)
    assert not found.predictions & {"a", "b", "depthwise"}


def test_a_grouped_convolution_at_the_end_is_a_prediction_layer() -> None:
    found = analysed(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 6, groups=2))
    assert found.predictions == {"b"}
    rows = found.rows("a")
    assert rows[:4] == rows[4:]  # both groups keep the same number of inputs


# -- families, cuts, order -----------------------------------------------------------------


def test_families_are_written_and_read_by_the_same_layers() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.last(torch.cat([m.b(y[:, :4]), y[:, 4:]], 1))

    found = analysed(body, a=conv(3, 8), b=conv(4, 4), **LAST)
    a, b = found.rows("a"), found.rows("b")
    families = {f.atoms: (f.writers, f.readers) for f in found.channels.families}
    assert families == {
        tuple(a[:4]): (("a",), ("b",)),
        tuple(a[4:]): (("a",), ("last",)),
        tuple(b): (("b",), ("last",)),
    }


@given(st.integers(1, 70), st.integers(2, 16), st.data())
def test_stages_own_what_the_plan_says(count: int, groups: int, data: st.DataObject) -> None:
    points = data.draw(st.sets(st.integers(1, groups - 1), max_size=4).map(sorted))
    owners = family_owners(count, tuple(points), groups)
    assert len(owners) == count
    assert (np.diff(owners) >= 0).all(), "in order"
    for stage, point in enumerate(points, start=1):
        # The first stage has a channel of every family; a later one may add nothing.
        assert (owners <= stage).sum() == max(1, count * point // groups)
    assert owners.max(initial=1) <= len(points) + 1


def test_a_family_is_cut_in_index_order() -> None:
    found = analysed(lambda m, x: m.last(m.a(x)), a=conv(3, 8), **LAST)
    owners = found.assigned({**HALF, "default": {"split": [3], "concat": "all"}}).owners
    assert [int(owners[a]) for a in found.rows("a")] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_a_family_is_cut_by_its_weights() -> None:
    model = Model(lambda m, x: m.last(m.a(x) + m.b(x)), {"a": conv(3, 4), "b": conv(3, 4)})
    model.last = nn.Conv2d(4, 5, 1)
    with torch.no_grad():
        for layer, sizes in ((model.a, (1.0, -2.0, 1.0, 4.0)), (model.b, (1.0, 3.0, 1.0, 1.0))):
            layer.weight.copy_(torch.tensor(sizes).view(4, 1, 1, 1).expand(4, 3, 3, 3))
            layer.bias.copy_(torch.tensor([1000.0, 0, 0, 0]))  # biases do not count
    found = Analysed(capture(model.eval(), (torch.randn(2, 3, 6, 6),)))
    for split, wanted in ((1, [2, 1, 2, 2]), (2, [2, 1, 2, 1]), (3, [1, 1, 2, 1])):
        plan = {"stages": 2, "groups": 4, "default": {"split": [split], "concat": "all"}}
        owners = found.assigned(plan | {"order": "l1"}).owners
        # Sums are 2, 5, 2, 5: ties go by index.
        assert [int(owners[a]) for a in found.rows("a")] == wanted


@pytest.mark.parametrize("groups", [1, 2])
def test_row_weights_of_transposed_convolutions(groups: int) -> None:
    model = Model(
        lambda m, x: m.last(m.up(m.a(x))),
        {"a": conv(3, 4), "up": nn.ConvTranspose2d(4, 6, 2, groups=groups)},
    )
    model.last = nn.Conv2d(6, 5, 1)
    program = capture(model.eval(), (torch.randn(2, 3, 6, 6),))
    weight = model.up.weight.detach().double().abs()
    wanted = []
    for row in range(6):
        group, inside = divmod(row, 6 // groups)
        rows = slice(group * (4 // groups), (group + 1) * (4 // groups))
        wanted.append(float(weight[rows, inside].sum()))
    assert row_weights(program, "up") == pytest.approx(wanted)


def test_a_stage_that_adds_nothing_anywhere_is_an_error() -> None:
    found = analysed(lambda m, x: m.last(m.a(x)), a=conv(3, 4), last=nn.Conv2d(4, 5, 1))
    plan = {"stages": 3, "groups": 8, "default": {"split": [2, 3], "concat": "all"}}
    with pytest.raises(PlanError, match="stage 2 of 3 owns no channel of any layer"):
        found.assigned(plan)


def test_resolutions_are_named_after_positions() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        t = m.b(F.relu(m.a(x))).flatten(2).transpose(1, 2)
        return m.fc(m.mlp(t).mean(1))

    found = analysed(
        body, a=conv(3, 8), b=conv(8, 8, stride=2), mlp=nn.Linear(8, 8), fc=nn.Linear(8, 5)
    )
    resolutions = {name: layer.resolution for name, layer in found.channels.layers.items()}
    assert resolutions == {"a": "6x6", "b": "6x6", "mlp": "9", "fc": "1"}
    families = {f.writers: f.resolution for f in found.channels.families}
    assert families == {("a",): "6x6", ("b",): "3x3", ("mlp",): "9"}
    assert cut_resolutions(found.channels) == ("6x6", "3x3", "9")


# -- the table -----------------------------------------------------------------------------


class Shout(OperatorRule):
    """A rule of a user's own."""

    family = "shouting"

    def labels(self, context: Any, node: fx.Node) -> Labels:
        return context.labels_of(node.args[0])

    def lower(self, builder: Any, node: fx.Node, where: Any, stage: int) -> fx.Node:
        return builder.emit(node, (builder.read(node.args[0], where, stage),), {}, stage)


@pytest.fixture
def open_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a test enters are gone afterwards."""
    monkeypatch.setattr(base, "_TABLE", table())


@pytest.mark.usefixtures("open_table")
def test_entering_an_operator_twice_is_refused() -> None:
    before = table()
    with pytest.raises(ValueError, match=r"aten\.relu already has the rule 'elementwise'"):
        register(Shout(), ["aten.relu"])
    rule = register(Shout(), ["mine.shout"])
    with pytest.raises(ValueError, match=r"mine\.shout already has the rule 'shouting'"):
        register(Shout(), ["mine.shout"])
    assert table() == before | {"mine.shout": rule}


@pytest.mark.usefixtures("open_table")
def test_a_refused_registration_enters_nothing() -> None:
    before = table()
    with pytest.raises(ValueError, match="already has the rule"):
        register(Shout(), ["mine.new", "aten.relu"])
    assert table() == before


@pytest.mark.usefixtures("open_table")
def test_a_rule_of_ones_own_ends_the_fallback() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.cumsum(m.a(x), 2))

    assert analysed(body, a=conv(3, 8), **LAST).channels.unknown
    register(Shout(), ["aten.cumsum"])
    found = analysed(body, a=conv(3, 8), **LAST)
    assert found.channels.unknown == ()
    assert found.columns("last") == found.rows("a")


def test_the_table_is_a_copy() -> None:
    table().clear()
    assert table()


def test_pointwise_operators_need_no_entry() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert "aten.digamma" not in table()
    assert find_rule(graph.call_function(torch.ops.aten.digamma.default, (x,))) is ELEMENTWISE
    assert find_rule(graph.call_function(torch.ops.aten.cumsum.default, (x, 1))) is None


def test_every_rule_names_its_family() -> None:
    assert all(rule.family for rule in table().values())


# -- ties ----------------------------------------------------------------------------------


def test_ties_are_transitive_and_marks_are_neutral() -> None:
    ties = Ties()
    a, b, c = ties.fresh(3), ties.fresh(3), ties.fresh(3)
    ties.tie(a, b)
    ties.tie(b[:2], c[:2])
    ties.tie(c, np.asarray([NOBODY, VERSIONED, ZERO]))
    assert ties.components().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 3]


def test_ties_broadcast() -> None:
    ties = Ties()
    a = ties.fresh(6).reshape(2, 3)
    ties.tie(a[:1], a)
    assert ties.components().reshape(2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
