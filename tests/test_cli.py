"""The commands: what they print and write, every error that users meet, and exit statuses."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import s2d_compiler
from s2d_compiler import cli
from s2d_compiler.errors import CheckError
from s2d_compiler.output import atomic_write
from s2d_compiler.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
PLAN = {
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "input_shape": [3, 8, 8],
}

SOURCE = """
import torch
from torch import nn


def build(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:
            return x
        return -x
"""


def build(width: int = 8) -> nn.Sequential:
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    model: nn.Sequential = scope["build"](width)
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a network in it, and a plan."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(build().eval(), "model.pt")
    Path("spec.json").write_text(json.dumps(PLAN))
    Path("netsource.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "netsource", raising=False)
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compile_(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``s2d-compile``; returns status, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.compile_main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def s2d(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``s2d``; returns status, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def plan_file(changes: Mapping[str, Any]) -> None:
    Path("spec.json").write_text(json.dumps({**PLAN, **changes}))


BASIC = ("model.pt", "--splits", "spec.json", "-o", "dyn.pt")


# --------------------------------------------------------------------------------------
# Compiling


def test_compile_writes_what_transform_makes_and_says_what_to_do(compile_: Run):
    status, out, err = compile_(*BASIC)
    assert (status, err) == (0, "")
    for part in ("cumulative MACs", "cut", "checked in float64: largest error", "written: dyn.pt"):
        assert part in out
    assert "The exits are untrained" in out
    assert "s2d train dyn.pt" in out
    assert "\x1b" not in out
    dyn = s2d_compiler.load("dyn.pt")
    model = torch.load("model.pt", weights_only=False)
    again = s2d_compiler.transform(model, PLAN)
    x = torch.randn(2, 3, 8, 8)
    assert [torch.equal(a, b) for a, b in zip(dyn(x), again(x), strict=True)] == [True] * 3
    assert "".join(str(dyn.cost).split()) in "".join(out.split())


def test_compile_records_its_origin(compile_: Run):
    assert compile_(*BASIC, "--seed", "3")[0] == 0
    made_by = s2d_compiler.load("dyn.pt").parts.made_by
    assert made_by["command"] == "s2d-compile model.pt --splits spec.json -o dyn.pt --seed 3"
    assert re.fullmatch("[0-9a-f]{64}", made_by["model"]["sha256"])
    assert made_by["seed"] == 3
    assert made_by["checked"] is True
    assert made_by["torch"] == str(torch.__version__)


def test_the_same_command_writes_the_same_bytes(compile_: Run):
    assert compile_(*BASIC)[0] == 0
    first = Path("dyn.pt").read_bytes()
    assert compile_(*BASIC)[0] == 0
    assert Path("dyn.pt").read_bytes() == first


def test_s2d_compile_is_the_same_command(s2d: Run):
    assert s2d("compile", *BASIC)[0] == 0
    command = s2d_compiler.load("dyn.pt").parts.made_by["command"]
    assert command == "s2d compile model.pt --splits spec.json -o dyn.pt"


def test_json_is_one_document_and_quiet_is_silent(compile_: Run):
    status, out, _ = compile_(*BASIC, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["output"] == "dyn.pt"
    assert Plan.from_dict(document["plan"]) == Plan.from_dict(PLAN)
    assert len(document["cost"]["stages"]) == len(document["proof"]["errors"]) == 3
    assert compile_(*BASIC, "--quiet") == (0, "", "")


def test_quiet_hides_warnings_and_the_default_shows_them(compile_: Run):
    plan = {key: value for key, value in PLAN.items() if key != "input_shape"}
    Path("spec.json").write_text(json.dumps(plan))
    assert compile_(*BASIC, "--quiet", "--no-check")[2] == ""
    status, out, err = compile_(*BASIC, "--no-check")
    assert status == 0
    assert err == "warning: input shape not given: assuming 3x224x224\n"
    assert "not checked (--no-check)" in out
    assert s2d_compiler.load("dyn.pt").parts.made_by["checked"] is False


def test_input_shape_goes_before_the_plans(compile_: Run):
    assert compile_(*BASIC, "--input-shape", "3x12x12")[0] == 0
    dyn = s2d_compiler.load("dyn.pt")
    assert dyn.plan.input_shape == (3, 12, 12)
    assert dyn(torch.zeros(1, 3, 12, 12))[0].shape == (1, 4)


def test_a_state_dict_is_compiled_with_arch(compile_: Run):
    torch.save(build(24).state_dict(), "weights.pt")
    status, _, err = compile_(
        "weights.pt", *BASIC[1:], "--arch", "netsource:build", "--arch-kwargs", '{"width": 24}'
    )
    assert (status, err) == (0, "")


def test_passes_are_printed_beside_the_result(compile_: Run):
    status, out, err = compile_(*BASIC, "--print-passes", "--json")
    assert status == 0
    json.loads(out)
    headings = re.findall("^== after (.*)$", err, flags=re.MULTILINE)
    assert headings[0] == "split-channels"
    assert len(headings) > 3
    assert "-- stages.2" in err


def test_the_advice_fits_the_plan(compile_: Run):
    plan_file({"final": "original"})
    assert "all stages but the last, which is the original itself" in compile_(*BASIC)[1]
    plan_file({"stages": 1, "default": {"split": [], "concat": "none"}})
    assert "nothing to train" in compile_(*BASIC)[1]


def test_exits_along_depth_are_compiled_shown_and_verified(s2d: Run, compile_: Run):
    Path("spec.json").write_text('{"exits": ["2"], "head": "branchynet", "input_shape": [3, 8, 8]}')
    status, out, err = compile_(*BASIC)
    assert (status, err) == (0, "")
    for part in ("2: after aten.relu.default in 2", "branchynet head", "checked in float64",
                 "all stages but the last, which is the original itself"):  # fmt: skip
        assert part in out
    assert "after 2: branchynet" in s2d("show", "dyn.pt", "--report")[1]
    document = json.loads(s2d("show", "dyn.pt", "--json")[1])
    assert document["report"]["exits"][0]["path"] == "2"
    assert s2d("verify", "model.pt", "dyn.pt")[0] == 0
    dyn, x = s2d_compiler.load("dyn.pt"), torch.randn(2, 3, 8, 8)
    assert torch.equal(dyn(x)[-1], torch.load("model.pt", weights_only=False)(x))
    assert compile_(*BASIC, "--input-shape", "3x12x12")[0] == 0
    assert json.loads(s2d("show", "dyn.pt", "--json")[1])["input_shapes"] == [[3, 12, 12]]


# --------------------------------------------------------------------------------------
# Inspecting and showing


def test_inspect_writes_a_plan_that_compiles(s2d: Run, compile_: Run):
    status, out, err = s2d(
        "inspect", "model.pt", "--input-shape", "3x8x8", "--write-plan", "new.json"
    )
    assert (status, err) == (0, "")
    for part in ("8x8", "4x4", "exit heads from: 7", "plans: 168 settings", "s2d-compile model.pt"):
        assert part in out
    assert Plan.load("new.json").input_shape == (3, 8, 8)
    assert compile_("model.pt", "--splits", "new.json", "-o", "dyn.pt")[0] == 0


OWN_CODE = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.utils import _pytree as pytree


@torch.library.custom_op("clitest::half", mutates_args=(), tags=(torch.Tag.pointwise,))
def half(x: torch.Tensor) -> torch.Tensor:
    return x / 2


half.register_fake(torch.empty_like)


@dataclass
class Answer:
    logits: torch.Tensor


pytree.register_dataclass(Answer)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return Answer(self.fc(half(self.conv(x)).mean((2, 3))))
"""


def test_a_file_with_operators_and_classes_of_ones_own_says_how_to_read_it(s2d: Run, compile_: Run):
    Path("ownnet.py").write_text(OWN_CODE)
    torch.save(
        {
            "conv.weight": torch.randn(8, 3, 3, 3),
            "conv.bias": torch.zeros(8),
            "fc.weight": torch.randn(4, 8),
            "fc.bias": torch.zeros(4),
        },
        "model.pt",
    )
    status, out, err = compile_(*BASIC, "--arch", "ownnet:Net")
    assert (status, err) == (0, "")
    assert 'load(path, operators=["clitest::half"], types=[ownnet.Answer])' in out
    assert s2d("show", "dyn.pt", "--graph", "3")[0] == 0
    answer = sys.modules["ownnet"].Answer
    dyn = s2d_compiler.load("dyn.pt", operators=["clitest::half"], types=[answer])
    assert {type(output) for output in dyn(torch.zeros(1, 3, 8, 8))} == {answer}


def test_a_submodule_is_inspected_and_compiled_alone(s2d: Run, compile_: Run):
    torch.save(nn.ModuleDict({"backbone": build(), "head": nn.Linear(4, 2)}), "model.pt")
    options = ("--submodule", "backbone", "--input-shape", "3x8x8")
    out = s2d("inspect", "model.pt", *options, "--write-plan", "new.json")[1]
    assert "--submodule backbone --splits new.json" in out
    words = ("--splits", "new.json", "-o", "dyn.pt")
    status, out, err = compile_("model.pt", "--submodule", "backbone", *words)
    assert (status, err) == (0, "")
    assert 'model.backbone = load("dyn.pt").at_stage(' in out
    assert s2d_compiler.load("dyn.pt").parts.made_by["submodule"] == "backbone"
    assert "submodule: backbone" in s2d("show", "dyn.pt")[1]
    status, _, err = compile_("model.pt", "--submodule", "bakbone", *words)
    assert status == 2
    assert "did you mean backbone?" in err


def test_inspect_does_not_lose_an_edited_plan(s2d: Run):
    words = ("inspect", "model.pt", "--input-shape", "3x8x8", "--write-plan", "spec.json")
    before = Path("spec.json").read_text()
    status, out, err = s2d(*words)
    assert (status, out) == (2, "")
    assert "spec.json exists" in err
    assert "--force" in err
    assert Path("spec.json").read_text() == before
    assert s2d(*words, "--force", "--stages", "2", "--groups", "4")[0] == 0
    assert Plan.load("spec.json").default.split == (2,)


def test_inspect_lists_layers_and_prints_json(s2d: Run):
    words = ("inspect", "model.pt", "--input-shape", "3x8x8")
    out = s2d(*words, "--layers")[1]
    assert "split by" in out
    assert out.count("Conv2d") == 2
    document = json.loads(s2d(*words, "--json")[1])
    assert document["size"] == 168**2
    assert [row["name"] for row in document["layers"]] == ["0", "3", "7"]


def test_inspect_lists_places_for_exits_along_depth(s2d: Run):
    words = ("inspect", "model.pt", "--input-shape", "3x8x8", "--places")
    assert "aten.relu.default" in s2d(*words)[1]
    document = json.loads(s2d(*words, "--json")[1])
    assert [(place["path"], place["resolution"]) for place in document["places"]] == [
        ("2", "8x8"), ("4", "4x4")
    ]  # fmt: skip


def test_show_tells_plan_origin_layers_graph_and_report(s2d: Run, compile_: Run):
    assert compile_(*BASIC)[0] == 0
    out = s2d("show", "dyn.pt")[1]
    for part in ("cumulative MACs", "split [4, 6], concat all", "sha256", "s2d-compile model.pt"):
        assert part in out
    assert "call_module" not in out
    out = s2d("show", "dyn.pt", "--layers", "--graph", "2", "--report")[1]
    for part in ("BatchNorm2d", "graph():", "exit heads from"):
        assert part in out
    document = json.loads(s2d("show", "dyn.pt", "--json", "--graph", "1")[1])
    assert Plan.from_dict(document["plan"]).stages == 3
    assert "placeholder" in document["graph"]


def test_tables_are_whole_in_a_narrow_place(s2d: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "20")
    out = s2d("inspect", "model.pt", "--input-shape", "3x8x8", "--layers")[1]
    assert "split, concat" in out
    assert "prediction" in out
    assert "…" not in out


# --------------------------------------------------------------------------------------
# Errors


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """One or two sentences on stderr, nothing else, and nothing left behind."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    left = {path.name for path in Path().iterdir()} - {"__pycache__"}
    assert left <= {"model.pt", "spec.json", "netsource.py", "other.pt"}


def test_malformed_json_is_shown_with_its_line(compile_: Run):
    Path("spec.json").write_text('{\n  "stages": 3,\n  "groups": oops\n}')
    refused(compile_(*BASIC), "spec.json: line 3, column", "not JSON")


PLANS: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"stagse": 3}, ('unknown key "stagse"', 'did you mean "stages"')),
    "unknown key inside": ({"default": {"spilt": []}}, ("default", 'unknown key "spilt"')),
    "missing key inside": ({"default": {"split": [4, 6]}}, ("default", '"concat" is missing')),
    "wrong type": ({"stages": "three"}, ("stages", '"three" is no whole number')),
    "wrong type inside": ({"default": {"split": 4, "concat": "all"}}, ("split", "4 is no list")),
    "cut points out of order": (
        {"default": {"split": [6, 4], "concat": "all"}},
        ("default.split", "4 follows 6"),
    ),
    "cut point out of range": (
        {"default": {"split": [4, 9], "concat": "all"}},
        ("default.split", "9 is not below groups (8)"),
    ),
    "pair out of order": (
        {"default": {"split": [4, 6], "concat": [[1, 2]]}},
        ("default.concat", "[1, 2] is no pair [later, earlier]"),
    ),
    "pair out of range": (
        {"default": {"split": [4, 6], "concat": [[4, 1]]}},
        ("default.concat", "[4, 1] names stage 4, but there are 3 stages"),
    ),
    "resolution that the model does not have": (
        {"resolutions": {"16x16": {"split": [4, 6]}}},
        ("resolutions.16x16", "no such resolution; it has 8x8, 4x4"),
    ),
    "layer that the model does not have": (
        {"layers": {"conv1": {"split": [4, 6]}}},
        ('layers["conv1"]', "matches no layer"),
    ),
    "stage with nothing": (
        {"stages": 5, "groups": 64, "default": {"split": [1, 2, 3, 4], "concat": "none"}},
        ("stage 2 of 5 owns no channel of any layer", "fewer stages"),
    ),
    "wrong input shape": ({"input_shape": [1, 8, 8]}, ("input of shape 1x8x8", "input_shape")),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_does_not_do_is_refused(compile_: Run, name: str):
    changes, parts = PLANS[name]
    plan_file(changes)
    refused(compile_(*BASIC), *parts)


def test_a_missing_key_is_refused(compile_: Run):
    Path("spec.json").write_text(json.dumps({"stages": 3, "default": PLAN["default"]}))
    refused(compile_(*BASIC), "spec.json: groups: missing")


def test_a_missing_plan_is_refused(compile_: Run):
    refused(compile_("model.pt", "--splits", "none.json", "-o", "dyn.pt"), "none.json", "no such")


@pytest.mark.parametrize("shape", ["3x0x8", "3x8x", "x", "3,8,8", "-3x8x8", "3x999999999x999999"])
def test_an_input_shape_that_is_none_is_refused(compile_: Run, shape: str):
    refused(compile_(*BASIC, f"--input-shape={shape}"), "--input-shape: ")


def test_a_wrong_input_shape_is_refused(compile_: Run, s2d: Run):
    refused(compile_(*BASIC, "--input-shape", "4x8x8"), "shape 4x8x8", "--input-shape")
    refused(s2d("inspect", "model.pt", "--input-shape", "4x8x8"), "shape 4x8x8")


def test_a_model_that_cannot_be_captured_is_refused_with_its_line(compile_: Run, folder: Path):
    line = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "x.sum() > 0" in text)
    sys.path.insert(0, str(folder))
    import netsource

    torch.save(netsource.Branching().state_dict(), "other.pt")
    refused(
        compile_("other.pt", *BASIC[1:], "--arch", "netsource:Branching"),
        "cannot capture Branching",
        f"netsource.py:{line} (if x.sum() > 0:)",
    )


def test_files_that_are_no_models_are_refused(compile_: Run, s2d: Run):
    for words in (("spec.json", *BASIC[1:]), ("missing.pt", *BASIC[1:]), (".", *BASIC[1:])):
        refused(compile_(*words), f"{words[0]}: ")
        refused(s2d("inspect", words[0]), f"{words[0]}: ")


def test_a_state_dict_without_arch_is_refused(compile_: Run):
    torch.save(build().state_dict(), "other.pt")
    refused(compile_("other.pt", *BASIC[1:]), "state dict", "--arch")


@pytest.mark.parametrize("text", ["[1]", "{", "3", "nothing"])
def test_arch_keywords_that_are_no_object_are_refused(compile_: Run, text: str):
    refused(compile_(*BASIC, "--arch", "netsource:build", "--arch-kwargs", text), "--arch-kwargs")


def test_files_that_are_no_compiled_networks_are_refused(s2d: Run):
    for name in ("spec.json", "missing.pt", "model.pt", "."):
        refused(s2d("show", name), name)


def test_a_graph_of_no_stage_is_refused(s2d: Run, compile_: Run):
    assert compile_(*BASIC)[0] == 0
    Path("dyn.pt").rename("other.pt")
    for number in ("0", "4", "-1"):
        refused(s2d("show", "other.pt", "--graph", number), f"{number} is no stage", "1 to 3")


def test_output_paths_that_cannot_be_written_are_refused_before_the_work(
    compile_: Run, s2d: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("s2d_compiler.reading.read_model", None)
    refused(compile_(*BASIC[:-1], "nowhere/dyn.pt"), "nowhere", "does not exist")
    refused(compile_(*BASIC[:-1], "."), "is a folder")
    refused(compile_(*BASIC[:-1], "model.pt"), "model.pt is the model itself")
    refused(compile_(*BASIC[:-1], "spec.json"), "spec.json is the plan itself")
    words = ("inspect", "model.pt", "--write-plan")
    refused(s2d(*words, "nowhere/spec.json"), "does not exist")
    refused(s2d(*words, "model.pt", "--force"), "model.pt is the model itself")


def test_bad_plans_are_refused_before_the_model_is_read(
    compile_: Run, s2d: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("s2d_compiler.reading.read_model", None)
    plan_file({"stages": 9})
    refused(compile_(*BASIC), "spec.json: groups: 8 is fewer than stages (9)")
    refused(s2d("inspect", "model.pt", "--stages", "9"), "--groups: 8 is fewer than stages (9)")


def test_a_failed_check_writes_nothing(compile_: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise CheckError("stage 1 differs")

    monkeypatch.setattr("s2d_compiler.checking.check", fail)
    refused(compile_(*BASIC), "stage 1 differs")
    Path("dyn.pt").write_text("earlier")
    assert compile_(*BASIC)[0] == 2
    assert Path("dyn.pt").read_text() == "earlier"
    assert compile_(*BASIC, "--no-check")[0] == 0


def test_a_failed_write_leaves_nothing(compile_: Run, monkeypatch: pytest.MonkeyPatch):
    def full(path: Any, write: Callable[[Any], object]) -> None:
        def fail(file: Any) -> None:
            write(file)
            raise OSError(28, "No space left on device")

        atomic_write(path, fail)

    monkeypatch.setattr("s2d_compiler.format.atomic_write", full)
    refused(compile_(*BASIC), "dyn.pt cannot be written", "disk is full")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "MODEL"),
        (("model.pt", "--splits", "spec.json"), "--output"),
        ((*BASIC, "--bogus"), "--bogus"),
        ((*BASIC, "--seed", "x"), "--seed"),
        ((*BASIC, "--seed", "-1"), "--seed"),
        ((*BASIC, "more"), "more"),
        ((*BASIC, "--arch"), "--arch"),
    ],
)
def test_wrong_usage_is_one_line(compile_: Run, words: tuple[str, ...], part: str):
    refused(compile_(*words), part, "s2d-compile --help")


def test_an_unknown_command_is_one_line(s2d: Run):
    refused(s2d("optimize"), '"optimize"', "compile, inspect, train, calibrate, show")


def test_errors_are_json_documents_on_demand(compile_: Run):
    for words, kind in (
        (("model.pt", "--json"), "UsageError"),
        (("missing.pt", *BASIC[1:], "--json"), "ModelFileError"),
    ):
        status, out, err = compile_(*words)
        error = json.loads(out)["error"]
        assert status == 2
        assert error["type"] == kind
        assert err == f"s2d-compile: {error['message']}\n"


def test_debug_shows_the_traceback_of_an_error(compile_: Run):
    status, _, err = compile_("missing.pt", *BASIC[1:], "--debug")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("s2d-compile: missing.pt: ")


def test_debug_logs_the_passes(compile_: Run):
    assert "debug: split-channels: changed" in compile_(*BASIC, "--debug")[2]
    assert not logging.getLogger("s2d_compiler").handlers


def test_a_defect_is_called_one(compile_: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        error = RuntimeError("[bold]no such node\nsecond line")
        error.add_note("while running SplitChannels()")
        raise error

    monkeypatch.setattr("s2d_compiler.compiler.compile_program", fail)
    status, out, err = compile_(*BASIC)
    assert (status, out) == (1, "")
    assert err == (
        "s2d-compile: RuntimeError: [bold]no such node (while running SplitChannels()). This is a "
        "defect of s2d-compiler; run it again with --debug and report what it prints.\n"
    )
    assert "Traceback" in compile_(*BASIC, "--debug")[2]
    assert not Path("dyn.pt").exists()


def test_an_interrupt_is_quick_and_clean(compile_: Run, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2d_compiler.tracing.capture", interrupt)
    assert compile_(*BASIC) == (130, "", "s2d-compile: interrupted\n")
    assert not Path("dyn.pt").exists()


# --------------------------------------------------------------------------------------
# As processes

WORDS = "import sys; from s2d_compiler.cli import {0}; sys.exit({0}())"


def process(entry: str, *words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", WORDS.format(entry), *words],
        stdout=options.get("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        env=environment | options.get("env", {}),
        timeout=120,
        check=False,
    )


def test_from_model_to_shown_result_as_processes(folder: Path):
    done = process("compile_main", *BASIC)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = process("main", "show", "dyn.pt", env={"PYTHONIOENCODING": "ascii"})
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"cumulative MACs" in shown.stdout
    shown.stdout.decode("ascii")


def test_a_reader_that_stops_gets_no_complaint(folder: Path):
    read, write = os.pipe()
    os.close(read)
    done = process("main", "inspect", "model.pt", "--input-shape", "3x8x8", stdout=write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    os.close(write)


@pytest.mark.parametrize(("entry", "part"), [("compile_main", "--splits"), ("main", "inspect")])
def test_help_and_version(entry: str, part: str, capsys: pytest.CaptureFixture[str]):
    run = getattr(cli, entry)
    assert run(["--help"]) == 0
    assert part in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"s2d-compiler {s2d_compiler.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_printed_is_an_error(folder: Path):
    with open("/dev/full", "wb") as full:
        done = process("main", "inspect", "model.pt", "--input-shape", "3x8x8", stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        b"s2d: the output cannot be printed (No space left on device); send it elsewhere, or to a "
        b"file with room\n"
    )
