"""Write files of today's formats: ``python -m tests.formats.make`` in the root of a checkout.

Run it once for each new version of a format, before its release, and commit what it writes. It
never replaces a file: files of released formats are what users have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from s2d_compiler import DynamicModel, Plan, transform
from s2d_compiler.format import VERSION
from s2d_compiler.plan_rules import PLAN_VERSION

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
}


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
    if name == "original":
        return {"image": image}
    return {"image": image, "mask": torch.randn(2, 1, 4, 4, dtype=torch.float64)}


def network(name: str) -> tuple[DynamicModel, dict[str, Tensor]]:
    """A staged network, and an input for it."""
    torch.manual_seed(0)
    model = settled(Attention() if name == "attention" else Convolutions())
    example = inputs(name)
    mask = {key: value for key, value in example.items() if key != "image"}
    return transform(model, PLANS[name], (example["image"],), example_kwargs=mask), example


def outputs(dyn: DynamicModel, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of every exit, by name."""
    mask = {key: value for key, value in example.items() if key != "image"}
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for stage, value in enumerate(dyn(example["image"], **mask), start=1):
            if isinstance(value, dict):
                found |= {f"stage {stage}, {key}": tensor for key, tensor in value.items()}
            else:
                found |= {f"stage {stage}, 0": value[0], f"stage {stage}, 1, 0": value[1][0]}
    return {key: value.contiguous() for key, value in found.items()}


def main() -> None:
    """Write what is not there."""
    for name in PLANS:
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
