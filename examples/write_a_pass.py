"""Write a pass of one's own and add it to the pipeline.

A staged network is a torch.fx graph until the very end, and a pass is a small class that
rewrites it. This one makes early exits cheaper on hardware without a fast exponential: it
puts hardswish in place of SiLU, in the stages that it is told to.

Run it: ``python -m examples.write_a_pass``. See ``docs/passes.md`` for what passes may rely on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

import s2d_compiler
from passes.base import Pass, PassResult
from s2d_compiler.errors import PassError

__all__ = ["ReplaceSiLU", "SmallNet", "count_activations", "main"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ReplaceSiLU(Pass):
    """Put hardswish in place of SiLU.

    Args:
        stages: In which stages, from 1.
    """

    name: ClassVar[str] = "replace-silu"
    stages: tuple[int, ...]

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not any("stage" in node.meta for node in graph_module.graph.nodes):
            raise PassError(
                f"{self.name} needs one graph of all stages; add it before extract-stages"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = self._silus(graph_module)
        for node in found:
            with graph_module.graph.inserting_before(node):
                cheap = graph_module.graph.call_function(aten.hardswish.default, node.args)
            # Which stage computes it, which node of the original it stands for: both stay.
            cheap.meta = dict(node.meta)
            node.replace_all_uses_with(cheap)
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, changed=bool(found))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if left := self._silus(graph_module):
            raise PassError(f"{self.name} left {left[0].name!r} in stage {left[0].meta['stage']}")

    def _silus(self, graph_module: fx.GraphModule) -> list[fx.Node]:
        return [
            node
            for node in graph_module.graph.nodes
            if node.target is aten.silu.default and node.meta["stage"] in self.stages
        ]


class SmallNet(nn.Module):
    """Three convolutions with SiLU, the last two around a shortcut."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        )
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.project = nn.Sequential(nn.Conv2d(32, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.act = nn.SiLU(inplace=True)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, classes)."""
        x = self.stem(x)
        x = self.act(x + self.project(self.expand(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def count_activations(dyn: s2d_compiler.DynamicModel) -> list[tuple[int, int]]:
    """SiLU and hardswish nodes of every stage."""
    counts = []
    for stage in dyn.stages:
        assert isinstance(stage, fx.GraphModule)
        targets = [node.target for node in stage.graph.nodes]
        counts.append((targets.count(aten.silu.default), targets.count(aten.hardswish.default)))
    return counts


def main() -> None:
    """Transform a small network with and without the pass, and count."""
    torch.manual_seed(0)
    model = SmallNet()
    images = torch.randn(4, 3, 32, 32)
    plan = s2d_compiler.Plan.from_dict(
        {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
    )
    plain = s2d_compiler.transform(model, plan, (images,))
    changed = s2d_compiler.transform(
        model,
        plan,
        (images,),
        pipeline=lambda steps: steps.insert_after("add-exits", ReplaceSiLU(stages=(1,))),
    )
    for title, dyn in (("before", plain), ("after", changed)):
        for number, (silu, hardswish) in enumerate(count_activations(dyn), start=1):
            print(f"{title:>6}, stage {number}: {silu} SiLU, {hardswish} hardswish")
    with torch.no_grad():
        differences = [
            float((a - b).abs().max()) for a, b in zip(plain(images), changed(images), strict=True)
        ]
    print("largest change of the logits:", ", ".join(f"{d:.3f}" for d in differences))


if __name__ == "__main__":
    main()
