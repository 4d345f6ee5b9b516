"""dyn.pt: damaged and hostile files are refused with a sentence, and run nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler import DynamicModel, load, transform
from s2d_compiler.errors import FormatError

PLAN = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def dyn() -> DynamicModel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    return transform(model, PLAN, (X,))


@pytest.fixture
def path(dyn: DynamicModel, tmp_path: Path) -> Path:
    dyn.save(tmp_path / "dyn.pt")
    return tmp_path / "dyn.pt"


def test_everything_comes_back(dyn: DynamicModel, path: Path) -> None:
    again = load(path)
    assert all(torch.equal(a, b) for a, b in zip(dyn(X), again(X), strict=True))
    assert (again.plan, again.cost, again.report) == (dyn.plan, dyn.cost, dyn.report)
    assert dict(again.provenance) == dict(dyn.provenance)
    assert again.parts.owners == dyn.parts.owners
    for a, b in zip(dyn.stages, again.stages, strict=True):
        assert str(a.graph) == str(b.graph)
    assert list(again.state_dict()) == list(dyn.state_dict())


def call(data: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = data["stages"][0]["graph"]
    return next(row for row in rows if row["op"] == "call_module")


def function(data: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = data["stages"][0]["graph"]
    return next(row for row in rows if row["op"] == "call_function")


def code_in_keyword(data: dict[str, Any]) -> None:
    call(data)["kwargs"] = {"a=open('PWNED','w'),b": 1}


def code_in_target(data: dict[str, Any]) -> None:
    evil = 'training") or open("PWNED","w") or getattr(self,"a'
    modules = data["stages"][0]["modules"]
    modules[evil] = modules[call(data)["target"]]
    call(data)["target"] = evil


def reading_operator(data: dict[str, Any]) -> None:
    function(data)["target"] = "aten.from_file.default"


def foreign_operator(data: dict[str, Any]) -> None:
    function(data)["target"] = "os.system.default"


def writing_operator(data: dict[str, Any]) -> None:
    function(data)["target"] = "aten.relu_.default"


def foreign_class(data: dict[str, Any]) -> None:
    data["modules"][0]["class"] = "Sequential"


def wrong_shape(data: dict[str, Any]) -> None:
    data["modules"][0]["arguments"]["out_channels"] = 9


def missing_module(data: dict[str, Any]) -> None:
    data["stages"][1]["modules"].clear()


def later_node(data: dict[str, Any]) -> None:
    call(data)["args"] = {"tuple": [{"node": "output"}]}


def unknown_feature(data: dict[str, Any]) -> None:
    data["interfaces"][1]["inputs"][0] = ["feature", 0, 99]


def fewer_stages(data: dict[str, Any]) -> None:
    data["stages"].pop()


def newer(data: dict[str, Any]) -> None:
    data["version"] = 99


def endless_number(data: dict[str, Any]) -> None:
    data["batch"] = float("inf")


def no_plan(data: dict[str, Any]) -> None:
    del data["plan"]


CORRUPTIONS: list[Callable[[dict[str, Any]], None]] = [
    code_in_keyword,
    code_in_target,
    reading_operator,
    foreign_operator,
    writing_operator,
    foreign_class,
    wrong_shape,
    missing_module,
    later_node,
    unknown_feature,
    fewer_stages,
    newer,
    endless_number,
    no_plan,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_hostile_contents(
    path: Path, corrupt: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    data = torch.load(path, weights_only=True)
    corrupt(data)
    torch.save(data, path)
    with pytest.raises(FormatError, match=r"dyn\.pt"):
        load(path)
    assert not Path("PWNED").exists()


def test_damaged_files(path: Path) -> None:
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(FormatError, match=r"dyn\.pt"):
            load(path)
    for place in range(len(whole) // 4, len(whole) // 2, len(whole) // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(FormatError, match=r"dyn\.pt"):
            load(path)


def test_other_files(path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load(path.with_name("none.pt"))
    with pytest.raises(FormatError, match="is a directory"):
        load(path.parent)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(FormatError, match="may be a model"):
        load(path)


def test_foreign_modules_are_not_saved(dyn: DynamicModel, path: Path) -> None:
    stage = load(path)
    name = next(n.target for n in stage.stages[0].graph.nodes if n.op == "call_module")
    container, _, last = str(name).rpartition(".")
    setattr(stage.stages[0].get_submodule(container), last, nn.Bilinear(2, 2, 2))
    with pytest.raises(FormatError, match="Bilinear"):
        stage.save(path)
