"""Random valid plans, as the dictionaries that ``Plan.from_dict`` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from tests.networks import DrawnPick, Pick, SeededPick
from tests.reference import VERSIONED, Structure


def resolutions_of(structure: Structure) -> list[str]:
    """``HxW`` of every feature map, larger than 1x1, that a layer reads which is no head."""
    heads = structure.prediction_layers()
    found = [
        resolution
        for path, layer in structure.layers.items()
        for resolution, columns in zip(layer.input_resolutions, layer.columns, strict=True)
        if path not in heads and "x" in resolution and max(columns) > VERSIONED
    ]
    return [r for r in dict.fromkeys(found) if r != "1x1"]


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
