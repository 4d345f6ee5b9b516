"""docs/operators.md: its code runs as printed, and files cannot choose operators."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d_compiler import DynamicModel, load, transform
from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.checking import check
from s2d_compiler.cli import main
from s2d_compiler.compiler import compile_program
from s2d_compiler.errors import CheckError, FormatError
from s2d_compiler.format import Allowed, from_data, load_to_show, permissions, to_data
from s2d_compiler.rules import base

PAGE = Path(__file__).parent.parent / "docs" / "operators.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the page's code defines, run in a folder of its own; the table is put back."""
    folder = tmp_path_factory.mktemp("page")
    names: dict[str, Any] = {"__name__": "operators_page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(base, "_TABLE", dict(base._TABLE))
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
        names["file"] = folder / "dyn.pt"
        yield names


def test_the_page_shows_what_its_code_does(page: dict[str, Any]) -> None:
    text = str(page["without"].report)
    printed = re.search(r"ends with\n\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert printed is not None
    assert printed[1].strip() in text
    dyn = page["dyn"]
    assert isinstance(dyn, DynamicModel)
    assert len(page["outputs"]) == 3
    shares = [model.cost.stages[0].macs for model in (page["without"], dyn)]
    assert shares[1] <= shares[0]


def test_the_rule_lets_every_stage_pool_its_own_channels(page: dict[str, Any]) -> None:
    def pooled(dyn: DynamicModel) -> list[int]:
        sizes: list[int] = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                if func is torch.ops.mylib.soft_pool.default:
                    sizes.append(args[0].shape[1])
                return func(*args, **(kwargs or {}))

        with Sizes(), torch.no_grad():
            dyn(torch.randn(1, 3, 32, 32))
        return sizes

    assert sorted(pooled(page["dyn"])) == [4, 4, 8, 8, 8, 16]
    assert sorted(pooled(page["without"])) == [16, 16, 16, 32, 32, 32]


def test_a_wrong_rule_is_found_by_the_check(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(page["SoftPool"]):  # type: ignore[misc]
        def lower(self, builder: Any, node: Any, where: Any, stage: int) -> Any:
            source = builder.read(node.args[0], where, stage)
            return builder.call(torch.ops.aten.avg_pool2d.default, (source, [2, 2]), node, stage)

    monkeypatch.setattr(base, "_TABLE", {**base._TABLE, "mylib.soft_pool": Wrong()})
    program, plan = page["program"], page["assignment"].plan
    assignment = assign(program, analyse_channels(program), plan)
    dyn = compile_program(program, plan, assignment=assignment)
    with pytest.raises(CheckError, match="differs from the masked form"):
        check(dyn, assignment)


def test_an_operator_tagged_pointwise_needs_no_rule(tmp_path: Path) -> None:
    @torch.library.custom_op("mylib::cube", mutates_args=(), tags=(torch.Tag.pointwise,))
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cube.register_fake(torch.empty_like)

    class Cubed(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self
            return second(cube(first(x)).mean((2, 3)))  # type: ignore[no-any-return]

    plan = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
    model = Cubed(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4))
    dyn = transform(model, plan, (torch.zeros(2, 3, 8, 8),))
    assert not dyn.report.unknown
    dyn.save(tmp_path / "dyn.pt")
    x = torch.randn(2, 3, 8, 8)
    for a, b in zip(dyn(x), load(tmp_path / "dyn.pt", operators=["mylib::cube"])(x), strict=True):
        assert torch.equal(a, b)


# -- operators in files ---------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [[], ["mylib::other"], ["other::soft_pool"]])
def test_an_operator_that_is_not_allowed_by_name_is_refused(
    page: dict[str, Any], allowed: list[str]
) -> None:
    with pytest.raises(FormatError, match=r'operators=\["mylib::soft_pool"\]'):
        load(page["file"], operators=allowed)


@pytest.mark.parametrize("allowed", ["mylib::soft_pool", ["soft_pool"], ["mylib.soft_pool"], [3]])
def test_a_name_that_is_no_operators_is_refused(page: dict[str, Any], allowed: Any) -> None:
    with pytest.raises(FormatError, match="write namespace::operator"):
        load(page["file"], operators=allowed)


def test_what_a_file_needs_is_known_before_it_is_read(page: dict[str, Any]) -> None:
    assert permissions(page["dyn"]) == (("mylib::soft_pool",), ())


def renamed(page: dict[str, Any], name: str) -> dict[str, Any]:
    data = to_data(load(page["file"], operators=["mylib::soft_pool"]))
    for stage in data["stages"]:
        for row in stage["graph"]:
            if row["target"] == "mylib.soft_pool.default":
                row["target"] = name
    return data


def read(data: dict[str, Any], *operators: str) -> DynamicModel:
    return from_data(data, "crafted", Allowed(operators))


def test_an_allowed_operator_must_exist_and_be_pure(page: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="import the module that defines it first"):
        read(renamed(page, "nowhere.soft_pool.default"), "nowhere::soft_pool")

    @torch.library.custom_op("mylib::writes", mutates_args=("x",))
    def writes(x: torch.Tensor) -> None:
        x.zero_()

    with pytest.raises(FormatError, match="not pure"):
        read(renamed(page, "mylib.writes.default"), "mylib::writes")
    for name in ("mylib.soft_pool", "os.system.default", "torch.load.x", "a b.c.d", "_.x.y"):
        with pytest.raises(FormatError, match="crafted"):
            read(renamed(page, name), "mylib::soft_pool")


@pytest.mark.parametrize("name", ["os.system.default", "torch.load.x", "mylib.gone.default"])
def test_a_file_that_is_only_looked_at_cannot_run_what_it_names(
    page: dict[str, Any], name: str, tmp_path: Path
) -> None:
    torch.save(renamed(page, name), tmp_path / "dyn.pt")
    shown = load_to_show(tmp_path / "dyn.pt")
    assert shown.cost == page["dyn"].cost
    with pytest.raises(FormatError, match="was not allowed"):
        shown(torch.randn(2, 3, 32, 32))


def test_show_needs_no_permission(page: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(page["file"]), "--graph", "1", "--report"]) == 0
    assert "mylib_soft_pool_default" in capsys.readouterr().out
