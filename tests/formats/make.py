"""Write files of today's formats: ``python -m tests.formats.make`` in the root of a checkout.

Run it once for each new version of a format, before its release, and commit what it writes. It
never replaces a file: files of released formats are what users have.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from s2d_compiler import Deadline, DynamicModel, Plan, Thresholds, transform
from s2d_compiler.calibration.results import Calibration
from s2d_compiler.data import Preprocessing
from s2d_compiler.format import VERSION
from s2d_compiler.plan_rules import PLAN_VERSION
from s2d_compiler.runtime import RunSettings, StageTimings, Timings

HERE = Path(__file__).parent


class Attention(nn.Module):
    """Patches, layer and RMS norms, attention with a mask, a dict of outputs; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 12, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 4, 12))
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.projection = nn.Linear(12, 12)
        self.last_norm = nn.RMSNorm(12, eps=1e-6)
        self.head = nn.Linear(12, 3)

    def forward(self, image: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        x = x + self.projection(seen.transpose(1, 2).reshape(n, t, 12))
        tokens = F.gelu(self.last_norm(x))
        return {"logits": self.head(tokens.mean(1)), "tokens": tokens}


class Convolutions(nn.Module):
    """Batch and group norm, a gate, a residual sum, a computed weight; a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.groups = nn.GroupNorm(8, 8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.relu(self.norm(self.first(image)))
        y = self.groups(self.second(x))
        y = x + y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        return self.head(y.mean((2, 3))), [F.max_pool2d(y, 2)]


class Classifier(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, stride=2), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.third(self.second(self.first(image)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


PLANS: dict[str, dict[str, Any]] = {
    "attention": {
        "stages": 3,
        "groups": 6,
        "default": {"split": [2, 4], "concat": "all"},
        "layers": {"qkv": {"concat": [[3, 1]]}},
    },
    "original": {
        "stages": 3,
        "groups": 4,
        "default": {"split": [1, 3], "concat": "all"},
        "resolutions": {"4x4": {"split": [2, 3]}},
        "order": "l1",
        "final": "original",
    },
    "depth": {"exits": ["first", "second"], "head": ["linear", "branchynet"], "seed": 3},
}
#: Which of them there are of each version: exits along depth came with the second.
NAMES = {1: ("attention", "original"), 2: ("attention", "original", "depth")}
MODELS = {"attention": Attention, "original": Convolutions, "depth": Classifier}
#: Everything that can be stored about running, with one network.
SETTINGS = RunSettings(
    policy=Deadline(12.5, Thresholds((0.75, math.inf), "margin", (1.5, 1.0, 0.5))),
    preprocessing=Preprocessing(
        channels="rgb", resize=(6, 5), crop=4, mean=(0.5, 0.25), std=(0.5,), dtype="float64"
    ),
    timings=Timings((1, 8), (StageTimings((1.0, 4.0), (1.5, 6.0)),) * 3, {"device": "cpu"}),
    calibration=Calibration(
        target="least cost at an accuracy at most 1% below the last stage",
        measure="margin",
        unit="MACs",
        costs=(100.0, 200.0, 300.0),
        samples=50,
        chosen_on=20,
        measured_on=30,
        exit_rates=(0.5, 0.0, 0.5),
        exit_intervals=((0.25, 0.75), (0.0, 0.125), (0.25, 0.75)),
        stage_accuracies=(0.5, 0.625, 0.75),
        exit_accuracies=(1.0, None, 0.5),
        accuracy=0.75,
        drop=0.0,
        mean_cost=200.0,
        nan_confidences=(0, 0, 1),
        gap=None,
        confidence=0.9,
        bound="a bound",
        p_value=0.0625,
        temperatures=({"temperature": 1.5, "bounded": False, "nll": [0.5, 0.25], "ece": None},) * 3,
        data="images.npz",
        network="0" * 64,
    ).to_dict(),
)


def settled(model: nn.Module) -> nn.Module:
    """Weights and statistics that no output can do without, in the precision of the proof."""
    model.double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.2, 0.8).mul_(torch.randint(0, 2, value.shape).double() * 2 - 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.abs_()
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """What the network is called with."""
    image = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    if name != "attention":
        return {"image": image}
    return {"image": image, "mask": torch.randn(2, 1, 4, 4, dtype=torch.float64)}


def network(name: str) -> tuple[DynamicModel, dict[str, Tensor]]:
    """A staged network, and an input for it."""
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    example = inputs(name)
    mask = {key: value for key, value in example.items() if key != "image"}
    dyn = transform(model, PLANS[name], (example["image"],), example_kwargs=mask)
    if name == "depth":
        dyn.settings = SETTINGS
    return dyn, example


def outputs(dyn: DynamicModel, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of every exit, by name."""
    mask = {key: value for key, value in example.items() if key != "image"}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for stage, value in enumerate(dyn(example["image"], **mask), start=1):
            if isinstance(value, Tensor):
                found[f"stage {stage}, 0"] = value
            elif isinstance(value, dict):
                found |= {f"stage {stage}, {key}": tensor for key, tensor in value.items()}
            else:
                found |= {f"stage {stage}, 0": value[0], f"stage {stage}, 1, 0": value[1][0]}
    return {key: value.contiguous() for key, value in found.items()}


def main() -> None:
    """Write what is not there."""
    for name in NAMES[VERSION]:
        path = HERE / f"dyn-v{VERSION}-{name}.pt"
        if not path.exists():
            dyn, example = network(name)
            dyn.save(path)
            kept = {f"input {key}": value for key, value in example.items()}
            save_file(kept | outputs(dyn, example), path.with_suffix(".safetensors"))
    path = HERE / f"plan-v{PLAN_VERSION}.json"
    if not path.exists():
        Plan.from_dict(PLANS["original"] | {"input_shape": [2, 4, 4]}).save(path)


if __name__ == "__main__":
    main()
