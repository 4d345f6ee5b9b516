"""Files of every released format are still read, and still compute what they did.

``tests/formats`` holds one file of each version with what it computed when it was written
(``make.py`` there wrote them). They are never written again: a change that cannot read them
raises the version and keeps a reader of the old one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from s2d_compiler import Plan, load
from s2d_compiler.calibration.results import Calibration
from s2d_compiler.errors import FormatError, PlanError
from s2d_compiler.format import VERSION, from_data, to_data
from s2d_compiler.plan import Setting
from s2d_compiler.plan_rules import PLAN_VERSION
from s2d_compiler.plans import plan_from_dict
from s2d_compiler.runtime import RunSettings
from tests.formats.make import NAMES, PLANS, SETTINGS, network, outputs

FOLDER = Path(__file__).parent / "formats"
DYN_FILES = sorted(FOLDER.glob("dyn-v*.pt"))


def test_every_version_has_its_files() -> None:
    assert {path.name for path in DYN_FILES} == {
        f"dyn-v{version}-{name}.pt" for version in range(1, VERSION + 1) for name in NAMES[version]
    }
    assert {path.name for path in FOLDER.glob("plan-v*.json")} == {
        f"plan-v{version}.json" for version in range(1, PLAN_VERSION + 1)
    }


@pytest.mark.parametrize("path", DYN_FILES, ids=lambda path: path.stem)
def test_networks_compute_what_they_did(path: Path) -> None:
    recorded = load_file(path.with_suffix(".safetensors"))
    example = {k.removeprefix("input "): v for k, v in recorded.items() if k.startswith("input ")}
    wanted = {k: v for k, v in recorded.items() if not k.startswith("input ")}
    dyn = load(path)
    found = outputs(dyn, example)
    assert found.keys() == wanted.keys()
    assert len(found) == len(dyn.stages) * (1 if path.stem.endswith("depth") else 2)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-11, atol=1e-11, msg=key)
        assert float(wanted[key].std()) > 0.01, "an output that is constant shows nothing"


@pytest.mark.parametrize("path", DYN_FILES, ids=lambda path: path.stem)
def test_what_is_said_about_networks_is_read(path: Path) -> None:
    dyn = load(path)
    name = path.stem.rpartition("-")[2]
    assert dyn.plan == plan_from_dict(PLANS[name])
    assert dyn.settings == (SETTINGS if name == "depth" else RunSettings())
    if dyn.settings.calibration is not None:
        assert Calibration.from_dict(dyn.settings.calibration).to_dict() == SETTINGS.calibration
    assert any(i[0] == "feature" for face in dyn.parts.interfaces for i in face.inputs)
    assert len(dyn.cost.stages) == len(dyn.stages) == 3
    assert all(stage.macs > 0 for stage in dyn.cost.stages)
    new = {key for key in dyn.state_dict() if ".exit_head." in key}
    assert set(dyn.provenance) == set(dyn.state_dict()) - new
    assert bool(new) == (name == "depth")
    assert str(dyn.report)
    assert dyn.parts.made_by["s2d_compiler"]


def form(data: Any) -> Any:
    """Data with every tensor, number and text left out: keys and kinds of values."""
    if isinstance(data, dict):
        if not all(isinstance(key, str) and key.isidentifier() for key in data):
            return ("by name", {form(value) for value in data.values()})
        return tuple((key, form(value)) for key, value in sorted(data.items()))
    if isinstance(data, list | tuple):
        return (type(data).__name__, frozenset(form(item) for item in data))
    return type(data).__name__


def forms(data: dict[str, Any]) -> dict[str, Any]:
    """The form of each part of a file; of what the compiler decides, only the rows' keys."""
    modules, graphs = data["modules"], [stage["graph"] for stage in data["stages"]]
    return {
        "file": sorted(data),
        "stages": {tuple(stage) for stage in data["stages"]},
        "nodes": {key for graph in graphs for row in graph for key in row},
        "modules": {tuple(row) for row in modules},
        "held": {tuple(held) for row in modules for held in row["tensors"].values()},
        "classes": {row["class"]: tuple(row["arguments"]) for row in modules},
        "attributes": {tuple(h) for s in data["stages"] for h in s["attributes"].values()},
        "tensors": {tuple(row) for row in data["tensors"]},
        "provenance": tuple(data["provenance"]),
        "cost": sorted(data["cost"]),
        "report": sorted(data["report"]),
        "interfaces": {form(row) for row in data["interfaces"]},
        "settings": form(data["settings"]),
        "specs": (form(data["input_spec"]), form(data["output_spec"])),
    }


@pytest.mark.parametrize("name", NAMES[VERSION])
def test_what_is_written_has_the_form_of_its_version(name: str) -> None:
    """Who changes what is written raises the version, and older readers say so."""
    committed = forms(torch.load(FOLDER / f"dyn-v{VERSION}-{name}.pt", weights_only=True))
    written = forms(to_data(network(name)[0]))
    classes = written["classes"].keys() & committed["classes"].keys()
    assert classes
    for each in (written, committed):  # which modules there are is the compiler's affair
        each["classes"] = {key: each["classes"][key] for key in classes}
    assert written == committed


def test_plans_mean_what_they_did() -> None:
    assert Plan.load(FOLDER / "plan-v1.json") == Plan(
        3,
        4,
        Setting((1, 3), "all"),
        {"4x4": Setting((2, 3))},
        order="l1",
        input_shape=(2, 4, 4),
        final="original",
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("plan-v*.json")), ids=lambda path: path.stem)
def test_plans_without_a_version_are_of_the_first(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    (tmp_path / "spec.json").write_text(text.replace('  "version": 1,\n', ""))
    assert '"version": 1' in text
    assert Plan.load(tmp_path / "spec.json") == Plan.load(path)
    assert Plan.load(path).to_json() == text


# Refusals


def test_newer_networks_are_refused(tmp_path: Path) -> None:
    data = torch.load(DYN_FILES[0], weights_only=True)
    data = {"format": data["format"], "version": VERSION + 1, "all else": "is other"}
    torch.save(data, tmp_path / "dyn.pt")
    with pytest.raises(FormatError) as caught:
        load(tmp_path / "dyn.pt")
    assert str(caught.value) == (
        f"{tmp_path / 'dyn.pt'}: its format has version {VERSION + 1}, and this package reads "
        f"versions up to {VERSION}; upgrade s2d-compiler."
    )


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_networks_without_a_version_are_damaged(version: Any) -> None:
    data = torch.load(DYN_FILES[0], weights_only=True) | {"version": version}
    with pytest.raises(FormatError) as caught:
        from_data(data, "dyn.pt")
    assert str(caught.value) == (
        f"dyn.pt: its format has version {version!r}, which is none (versions count from 1); the "
        "file is damaged, compile the model again."
    )


def test_newer_plans_are_refused_before_what_is_new_in_them() -> None:
    newer = PLANS["original"] | {"version": PLAN_VERSION + 1, "new": 1, "stages": {}}
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(newer, "spec.json")
    assert str(caught.value) == (
        f"spec.json: version: {PLAN_VERSION + 1} is newer than this package, which reads plans up "
        f"to version {PLAN_VERSION}; upgrade s2d-compiler"
    )


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_plans_of_no_version_are_refused(version: Any) -> None:
    with pytest.raises(PlanError, match=re.escape("is no version, which count from 1; write 1")):
        Plan.from_dict(PLANS["original"] | {"version": version})


def test_the_name_of_a_schema_is_text() -> None:
    Plan.from_dict(PLANS["original"] | {"$schema": "plan.schema.json"})
    with pytest.raises(PlanError, match=r"^plan: \$schema: 5 is no text; name the schema's file"):
        Plan.from_dict(PLANS["original"] | {"$schema": 5})
