"""Which networks the table compares, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from examples.cifar_models import mobilenet_v2, resnet20, resnet56, vgg16_bn

__all__ = ["NETWORKS", "Row", "rows_of"]

Group = Literal["static", "thin", "depth", "staged"]

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg16_bn": vgg16_bn,
    "mobilenet_v2": mobilenet_v2,
}
#: Where the exits of the baselines along depth stand; the papers do not say where theirs do.
_DEPTHS = [1 / 3, 2 / 3]
#: Share of the epochs that ablations have: they are many, and are compared with each other.
ABLATION = 1 / 4


@dataclass(frozen=True, slots=True)
class Row:
    """One network of the table.

    Attributes:
        name: Its key in files.
        text: What it is, for people.
        group: What it is compared as.
        build: The static network, untrained.
        plan: What is made of it; a network of one stage is the static one.
        starts_static: Whether it starts from the static row's weights, else from scratch.
        has_teacher: Whether it learns from the static row's outputs beside the labels.
        recipe: Settings of the recipe that differ from the others'.
        times: How many times as many epochs it has.
        table: Which table it stands in; all rows of one have the same epochs, but for thin
            networks that say so.
    """

    name: str
    text: str
    group: Group
    build: Callable[[], nn.Module]
    plan: Mapping[str, Any]
    starts_static: bool = False
    has_teacher: bool = False
    recipe: Mapping[str, Any] | None = None
    times: float = 1.0
    table: Literal["main", "ablation"] = "main"

    @property
    def needs_static(self) -> bool:
        return self.starts_static or self.has_teacher


def _static_plan() -> dict[str, Any]:
    return {"stages": 1, "groups": 8, "default": {"split": [], "concat": "none"},
            "input_shape": [3, 32, 32]}  # fmt: skip


def _staged(split: list[int], concat: Any, **others: Any) -> dict[str, Any]:
    return {"stages": len(split) + 1, "groups": 8, "default": {"split": split, "concat": concat},
            "input_shape": [3, 32, 32], **others}  # fmt: skip


def _table_4() -> dict[str, Any]:
    """More of the channels in stage 1 where the resolution is small."""
    return {
        **_staged([3, 4], "none"),
        "resolutions": {
            "32x32": {"split": [3, 4], "concat": [[2, 1], [3, 1]]},
            "16x16": {"split": [4, 5], "concat": [[2, 1]]},
            "8x8": {"split": [6, 7], "concat": [[3, 2]]},
        },
    }


def _depth(head: str) -> dict[str, Any]:
    return {"exits": _DEPTHS, "head": head, "input_shape": [3, 32, 32]}


def rows_of(network: str) -> tuple[Row, ...]:
    """The rows of one network's table, in the order in which they are made."""
    build = NETWORKS[network]
    started: Any = {"starts_static": True, "has_teacher": True}
    rows = [
        Row("static", "static", "static", build, _static_plan()),
        Row("static-on", "static, trained on", "static", build, _static_plan(), **started),
        *_thin(network),
        Row("naive", "Naive exits", "depth", build, _depth("linear"), **started),
        Row("branchynet", "BranchyNet exits", "depth", build, _depth("branchynet"), **started),
        Row("s2d-4-1-3", "S2D 4/1/3, full reuse", "staged", build, _staged([4, 5], "all"),
            **started),
        Row("s2d-3-2-3", "S2D 3/2/3, full reuse", "staged", build, _staged([3, 5], "all"),
            **started),
        Row("s2d-table-4", "S2D, plan of S2DNAS's Table 4", "staged", build, _table_4(), **started),
        Row("s2d-original", "S2D 4 of 8, then the original", "staged", build,
            _staged([4], "none", final="original"), **started),
        Row("s2d-original-2-2", "S2D 2/2 of 8, full reuse, then the original", "staged", build,
            _staged([2, 4], [[2, 1]], final="original"), **started),
        Row("s2d-original-3-2", "S2D 3/2 of 8, full reuse, then the original", "staged", build,
            _staged([3, 5], [[2, 1]], final="original"), **started),
        *_ablations(build),
    ]  # fmt: skip
    return tuple(rows)


def _ablations(build: Callable[[], nn.Module]) -> list[Row]:
    """One plan, with one thing changed at a time."""
    plan = _staged([4, 5], "all")
    rows: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("base", "full reuse, index order, from the static weights, distilled", plan, {}),
        ("none", "no reuse", _staged([4, 5], "none"), {}),
        ("partial", "stage 3 reads stage 1", _staged([4, 5], [[3, 1]]), {}),
        ("l1", "L1 order", _staged([4, 5], "all", order="l1"), {}),
        ("labels", "no distillation", plan, {"has_teacher": False}),
        ("scratch", "from scratch", plan, {"starts_static": False}),
        ("bare", "from scratch, no distillation", plan,
         {"starts_static": False, "has_teacher": False}),
        ("equal", "stages weighted alike in the loss", plan,
         {"recipe": {"stage_weights": (1.0, 1.0, 1.0)}}),
    ]  # fmt: skip
    started = {"starts_static": True, "has_teacher": True, "times": ABLATION, "table": "ablation"}
    return [
        Row(f"ablation-{name}", text, "staged", build, plan, **{**started, **others})
        for name, text, plan, others in rows
    ]


def _thin(network: str) -> list[Row]:
    """Static networks that are only thinner: what anybody would take instead."""
    if network != "resnet20":
        return []
    rows = []
    for width in (8, 10, 12):
        for has_teacher in (True, False):
            rows.append(
                Row(
                    f"thin-{width}" + ("" if has_teacher else "-labels"),
                    f"static, {width} of 16 wide" + ("" if has_teacher else ", no distillation"),
                    "thin",
                    _Thin(width),
                    _static_plan(),
                    has_teacher=has_teacher,
                )
            )
    rows.append(
        Row("thin-10-long", "static, 10 of 16 wide, twice the epochs", "thin", _Thin(10),
            _static_plan(), has_teacher=True, times=2)
    )  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True)
class _Thin:
    """Builds a ResNet-20 of another width."""

    width: int

    def __call__(self) -> nn.Module:
        return resnet20(width=self.width)
