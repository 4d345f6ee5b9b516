"""Pipelines as values, passes of one's own in ``transform``, and the page about them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import s2d_compiler
from examples.write_a_pass import ReplaceSiLU, SmallNet, count_activations, main
from passes.base import Pass, PassResult, Pipeline
from passes.extract import ExtractStages
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.compiler import Between, default_pipeline
from s2d_compiler.errors import PassError
from s2d_compiler.tracing import capture

ROOT = Path(__file__).parents[1]
ONE = {"stages": 1, "groups": 1, "default": {"split": [], "concat": "all"}}
THREE = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}}
TWO = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}


@dataclass(frozen=True, slots=True)
class Edit(Pass):
    """Does what it is told."""

    name: ClassVar[str] = "edit"
    edit: Callable[[fx.GraphModule], None]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.edit(graph_module)
        return PassResult(graph_module, changed=True)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def transformed(
    plan: dict[str, object],
    *passes: Pass,
    after: str = "add-exits",
    between: Between | None = None,
) -> s2d_compiler.DynamicModel:
    """A small network with some passes added, its weights always the same."""
    torch.manual_seed(0)
    return s2d_compiler.transform(
        SmallNet(),
        plan,
        (images(),),
        pipeline=lambda steps: steps.insert_after(after, *passes),
        between=between,
    )


# -- pipelines -----------------------------------------------------------------------------


def test_pipelines_are_values() -> None:
    first, second, third = (Edit(lambda graph_module: None) for _ in range(3))
    extract = ExtractStages()
    pipeline = Pipeline((extract,))
    longer = pipeline.insert_after("extract-stages", first, second)
    longer = longer.insert_before("extract-stages", third)
    assert pipeline.passes == (extract,)
    assert longer.passes == (third, extract, first, second)
    assert longer.index("extract-stages") == 1


def test_names_that_no_pass_has_are_refused_with_those_that_there_are() -> None:
    pipeline = Pipeline((ExtractStages(),))
    for method in (pipeline.insert_after, pipeline.insert_before):
        with pytest.raises(
            PassError, match="no pass is named 'extract'; the pipeline has extract-st"
        ):
            method("extract", ExtractStages())


def test_between_sees_every_pass_in_order_with_its_graph() -> None:
    seen: list[tuple[str, int]] = []
    transformed(
        {**THREE, "final": "original"},
        Edit(lambda graph_module: None),
        between=lambda step, graph: seen.append((step.name, len(graph.graph.nodes))),
    )
    assert [name for name, _ in seen] == [
        "split-channels",
        "concat-features",
        "add-exits",
        "edit",
        "extract-stages",
        "append-original",
        "count-cost",
    ]
    counts = dict(seen)
    assert counts["add-exits"] == counts["edit"] > counts["split-channels"]


@pytest.mark.parametrize("module", ["passes", "passes.base", "passes.split"])
def test_passes_can_be_imported_first(module: str) -> None:
    """As in a file with a pass of one's own, whose imports are sorted."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]


# -- passes of one's own -------------------------------------------------------------------


def test_a_rewrite_between_exits_and_extraction() -> None:
    plain = transformed(TWO)
    changed = transformed(TWO, ReplaceSiLU(stages=(1,)))
    assert count_activations(plain) == [(3, 0), (3, 0)]
    assert count_activations(changed) == [(0, 3), (3, 0)]
    assert changed.cost == plain.cost
    assert changed.provenance == plain.provenance
    for key, value in changed.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
    with torch.no_grad():
        for a, b in zip(plain(images()), changed(images()), strict=True):
            assert not torch.equal(a, b)


def test_a_rewrite_computes_what_the_rewritten_model_computes() -> None:
    dyn = transformed(ONE, ReplaceSiLU(stages=(1,)))
    torch.manual_seed(0)
    model = SmallNet().eval()
    model.stem[2] = model.expand[2] = model.act = nn.Hardswish()
    with torch.no_grad():
        torch.testing.assert_close(dyn(images())[0], model(images()))


def test_nothing_to_rewrite_is_no_change() -> None:
    nothing = ReplaceSiLU(stages=(7,))
    assert count_activations(transformed(TWO, nothing)) == [(3, 0), (3, 0)]


def test_a_pass_at_the_wrong_place_is_refused() -> None:
    with pytest.raises(PassError, match="add it before extract-stages") as caught:
        transformed(TWO, ReplaceSiLU(stages=(1,)), after="extract-stages")
    assert caught.value.__notes__ == ["while running ReplaceSiLU(stages=(1,))"]


def test_a_pass_may_add_modules_with_tensors_of_their_own() -> None:
    def scale_heads(graph_module: fx.GraphModule) -> None:
        """A learned temperature behind every head."""
        for node in [n for n in graph_module.graph.nodes if n.meta.get("head")]:
            name = f"stages.{node.meta['stage'] - 1}.temperature"
            graph_module.add_submodule(name, nn.PReLU(init=0.5))
            with graph_module.graph.inserting_after(node):
                scaled = graph_module.graph.call_module(name, (node,))
            scaled.meta = {"stage": node.meta["stage"], "origin": node.meta["origin"], "path": ""}
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user, s=scaled: user is not s)

    plain, scaled = transformed(TWO), transformed(TWO, Edit(scale_heads))
    added = {"stages.0.temperature.weight", "stages.1.temperature.weight"}
    assert set(scaled.state_dict()) - set(plain.state_dict()) == added
    assert not added & set(scaled.provenance)
    assert scaled.cost.stages[0].parameters == plain.cost.stages[0].parameters + 1
    with torch.no_grad():
        for a, b in zip(plain(images()), scaled(images()), strict=True):
            torch.testing.assert_close(nn.functional.prelu(a, torch.tensor([0.5])), b)


def test_what_a_pass_made_is_saved_and_loaded(tmp_path: Path) -> None:
    dyn = transformed(TWO, ReplaceSiLU(stages=(1, 2)))
    dyn.save(tmp_path / "dyn.pt")
    loaded = s2d_compiler.load(tmp_path / "dyn.pt")
    assert count_activations(loaded) == [(0, 3), (0, 3)]
    with torch.no_grad():
        for a, b in zip(dyn(images()), loaded(images()), strict=True):
            assert torch.equal(a, b)


# -- the page and the example --------------------------------------------------------------


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "before, stage 1: 3 SiLU, 0 hardswish",
        "before, stage 2: 3 SiLU, 0 hardswish",
        " after, stage 1: 0 SiLU, 3 hardswish",
        " after, stage 2: 3 SiLU, 0 hardswish",
    ]
    assert lines[4].startswith("largest change of the logits: 0.")


def test_code_of_the_page_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "passes.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look names up
    for block in blocks:
        exec(compile(block, "docs/passes.md", "exec"), vars(module))
    out = capsys.readouterr().out
    assert "--- concat-features" in out
    assert "2 %stages_1_head" in out
    assert count_activations(module.dyn) == [(0, 0), (0, 0)]


def test_page_names_every_pass_and_every_key() -> None:
    page = (ROOT / "docs" / "passes.md").read_text()
    graphs: list[fx.GraphModule] = []
    named: list[str] = []

    def collect(step: Pass, graph_module: fx.GraphModule) -> None:
        named.append(step.name)
        graphs.append(graph_module)

    transformed({**TWO, "final": "original"}, between=collect)
    for name in named:
        assert f"| `{name}` |" in page
    for graph_module in graphs:
        owners = [m for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
        keys = {key for m in owners for node in m.graph.nodes for key in node.meta}
        keys |= set(graph_module.meta)
        for key in keys - {"positions"}:
            assert f'`meta["{key}"]`' in page, key


def test_default_pipeline_appends_the_original_only_if_asked() -> None:
    names = [step.name for step in default_pipeline(_assignment("cut")).passes]
    assert "append-original" not in names
    names = [step.name for step in default_pipeline(_assignment("original")).passes]
    assert names[-2:] == ["append-original", "count-cost"]


def _assignment(final: str) -> StageAssignment:
    program = capture(SmallNet(), (images(),))
    plan = s2d_compiler.Plan.from_dict({**TWO, "final": final})
    return assign(program, analyse_channels(program), plan)
