"""Random valid plans, as the dictionaries that ``Plan.from_dict`` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.networks import DrawnPick, Pick, SeededPick


def resolutions_of(model: nn.Module, x: Tensor) -> list[str]:
    """``HxW`` of every feature map that one convolution writes and another layer reads.

    Maps of 1x1 are left out, and so is whatever only the last layers read or write: a
    network's prediction layers form no group of their own.
    """
    written: list[str] = []
    read: list[str] = []

    def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read.append("x".join(str(n) for n in inputs[0].shape[2:]))
        written.append("x".join(str(n) for n in output.shape[2:]))

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles = [m.register_forward_hook(note) for m in convolutions]
    with torch.no_grad():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return [r for r in dict.fromkeys(written[:-1]) if r in read[:-1] and r != "1x1"]


def plan_dict(pick: Pick, resolutions: Sequence[str] = ()) -> dict[str, Any]:
    """One random plan; settings by resolution are drawn from those that are given."""
    stages = pick.one([2, 3, 1, 4, 5])
    groups = pick.one([8, 8, 8, 5, 16])
    plan: dict[str, Any] = {"stages": stages, "groups": groups}
    if stages > 1 and pick.one([False, False, False, True]):
        plan["final"] = "original"
    # the untouched network at the end reads nothing from the stages before it
    readers = stages - 1 if "final" in plan else stages
    plan["default"] = {
        "split": _split(pick, stages, groups),
        "concat": _concat(pick, readers),
    }
    special = [r for r in resolutions if pick.one([False, False, True])]
    if special:
        plan["resolutions"] = {r: _setting(pick, stages, groups, readers) for r in special}
    if pick.one([False, True]):
        plan["order"] = pick.one(["l1", "index"])
    return plan


def _setting(pick: Pick, stages: int, groups: int, readers: int) -> dict[str, Any]:
    setting: dict[str, Any] = {}
    what = pick.one(["both", "split", "concat"])
    if what != "concat":
        setting["split"] = _split(pick, stages, groups)
    if what != "split":
        setting["concat"] = _concat(pick, readers)
    return setting


def _split(pick: Pick, stages: int, groups: int) -> list[int]:
    left = list(range(1, groups))
    cuts = []
    for _ in range(stages - 1):
        cuts.append(left.pop(pick.number(0, len(left) - 1)))
    return sorted(cuts)


def _concat(pick: Pick, readers: int) -> Any:
    how = pick.one(["all", "none", "some"])
    if how != "some":
        return how
    pairs = [(late, early) for late in range(2, readers + 1) for early in range(1, late)]
    return [list(pair) for pair in pairs if pick.one([True, False])]


def seeded_plan(seed: int, resolutions: Sequence[str] = ()) -> dict[str, Any]:
    """The plan that ``seed`` stands for."""
    return plan_dict(SeededPick(seed), resolutions)


@st.composite
def plans(
    draw: Callable[[st.SearchStrategy[Any]], Any], resolutions: Sequence[str] = ()
) -> dict[str, Any]:
    """Random valid plans."""
    return plan_dict(DrawnPick(draw), resolutions)
