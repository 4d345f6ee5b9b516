"""The cost pass against published figures and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from examples import cifar_models
from s2d_compiler import Plan, transform
from s2d_compiler.analysis.cost import static_macs
from s2d_compiler.tracing import capture

#: S2DNAS, Table 1, in millions of MACs; padded shortcuts have no 1x1 convolutions.
ORACLES = [
    ("resnet20", {"shortcut": "projection"}, 40.8),
    ("resnet56", {"shortcut": "projection"}, 125.7),
    ("resnet110", {"shortcut": "projection"}, 253.1),
    ("resnet20", {"shortcut": "padded"}, 40.6),
    ("resnet56", {"shortcut": "padded"}, 125.5),
    ("resnet110", {"shortcut": "padded"}, 252.9),
    ("vgg16_bn", {}, 313.2),
    ("mobilenet_v2", {}, 88.0),
]


@pytest.mark.parametrize(("name", "options", "millions"), ORACLES)
def test_published_figures(name: str, options: dict[str, str], millions: float) -> None:
    program = capture(getattr(cifar_models, name)(**options), input_shape=(3, 32, 32))
    macs = sum(static_macs(program, n) for n in program.nodes if n.op.startswith("call"))
    assert round(macs / 1e6, 1) == millions


def test_cumulative_macs_are_what_runs() -> None:
    torch.manual_seed(0)
    model = cifar_models.resnet20()
    plan = Plan.from_dict(
        {"stages": 3, "groups": 8, "default": {"split": [3, 5], "concat": [[3, 1]]}}
    )
    x = torch.randn(1, 3, 32, 32)
    dyn = transform(model, plan, example_inputs=(x,))
    features: list[tuple[torch.Tensor, ...]] = []
    total = 0
    for stage, interface, cost in zip(
        dyn.stages, dyn.parts.interfaces, dyn.cost.stages, strict=True
    ):
        inputs = [x if w[0] == "input" else features[w[1]][w[2]] for w in interface.inputs]
        with FlopCounterMode(display=False) as counter:
            _, handed = stage(*inputs)
        features.append(handed)
        total += counter.get_total_flops() // 2
        assert (cost.macs, cost.cumulative_macs) == (counter.get_total_flops() // 2, total)
        assert cost.macs == sum(row.macs for row in cost.layers)
    held = {id(p): p.numel() for p in dyn.parameters()}
    assert sum(s.parameters for s in dyn.cost.stages) == sum(held.values())


def test_one_stage_costs_what_the_original_costs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    plan = {"stages": 1, "groups": 8, "default": {"split": [], "concat": "none"}}
    dyn = transform(model, plan, example_inputs=(torch.zeros(2, 3, 8, 8),))
    assert dyn.cost.stages[0].macs == dyn.cost.original_macs == 36 * 8 * 27 + 8 * 36 * 5
    assert dyn.cost.stages[0].parameters == dyn.cost.original_parameters
    assert f"{dyn.cost.original_macs:,}" in str(dyn.cost)


class Table(nn.Module):
    """A layer whose input is a table with no batch: it runs once per call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.mlp = nn.Linear(2, 16)
        self.head = nn.Linear(16, 5)
        self.register_buffer("table", torch.randn(6, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.mlp(self.table).permute(2, 0, 1)
        return self.head(torch.relu(self.conv(x) + shift).mean((2, 3)))


def test_a_layer_without_a_batch_counts_all_its_positions() -> None:
    plan = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "none"}}
    dyn = transform(Table(), plan, (torch.randn(2, 3, 6, 8),))
    macs = {row.layer: row.macs for row in dyn.report.layers}
    assert macs == {"conv": 48 * 27 * 16, "mlp": 48 * 2 * 16, "head": 16 * 5}
