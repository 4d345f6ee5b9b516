"""docs/tutorial.md: its commands run in their order, and what it quotes is what comes out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tutorial_page import PAGE, Step, run, steps
from s2d_compiler import load
from s2d_compiler.calibration.records import fingerprint

DOCS = PAGE.parent


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, list[str]]]]:
    """The folder after all commands; per command what it printed, and what the page says."""
    folder = tmp_path_factory.mktemp("tutorial")
    try:
        yield folder, {_name(step): [step.output or "", out] for step, out in run(page(), folder)}
    finally:
        sys.modules.pop("mynet", None)


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def _name(step: Step) -> str:
    return " ".join(step.text.split()[:2]).removesuffix(" model.pt")


def test_everything_is_made(ran: tuple[Path, dict[str, list[str]]]) -> None:
    folder, printed = ran
    assert list(printed) == [
        "python train_static.py", "s2d inspect", "s2d-compile", "s2d train", "s2d calibrate",
        "s2d eval", "s2d bench", "s2d report", "python use.py",
    ]  # fmt: skip
    dyn = load(folder / "calibrated.pt")
    assert dyn.settings.policy is not None
    assert dyn.settings.preprocessing is not None
    assert dyn.settings.timings is not None
    assert dyn.settings.calibration is not None
    assert dyn.settings.calibration["network"] == fingerprint(dyn)
    report = (folder / "report.html").read_text()
    assert "The original is right for" in report
    assert "Promised with a probability of 95%" in report
    assert "ms at batch 1" in report


@pytest.mark.parametrize("command", ["s2d inspect", "s2d-compile", "s2d report"])
def test_what_does_not_depend_on_training_is_quoted_exactly(
    ran: tuple[Path, dict[str, list[str]]], command: str
) -> None:
    quoted, printed = (re.sub(r"largest error \S+", "", text) for text in ran[1][command])
    assert printed == quoted, "run python -m docs.tutorial_page --write"


@pytest.mark.parametrize(
    ("command", "pattern", "off"),
    [
        ("s2d train", r"^ \d .* ([\d.]+)% +[\d,]+$", 3.0),
        ("s2d calibrate", r"accuracy ([\d.]+)%", 3.0),
        ("s2d eval", r": ([\d.]+)% right", 3.0),
        ("s2d eval", r"^│ \d .*?│ +([\d.]+)% │ +[\d,]+ │ +\d+% │$", 4.0),
        ("s2d eval", r"\(([\d.]+)% of the original", 8.0),
    ],
)
def test_what_depends_on_training_is_quoted_within_points(
    ran: tuple[Path, dict[str, list[str]]], command: str, pattern: str, off: float
) -> None:
    """Other processors round differently, and training goes its own way from there."""
    quoted, printed = (re.findall(pattern, text, re.MULTILINE) for text in ran[1][command])
    assert quoted
    assert [float(v) for v in printed] == pytest.approx([float(v) for v in quoted], abs=off)


def test_what_depends_on_the_machine_has_the_same_form(
    ran: tuple[Path, dict[str, list[str]]],
) -> None:
    for command in ("s2d bench", "python use.py"):
        quoted, printed = ran[1][command]
        assert len(printed.splitlines()) == len(quoted.splitlines())
    assert "faster" in ran[1]["s2d bench"][1]


def test_the_page_is_whole() -> None:
    """Everything that prints is quoted, and links lead somewhere."""
    assert all(step.name or step.output or "train_static" in step.text for step in steps(page()))
    for link in re.findall(r"\]\(([^)#]+)", page()):
        assert (DOCS / link).exists(), link
    assert "docs/tutorial.md" in (DOCS.parent / "README.md").read_text()
    assert "docs/report.md" in (DOCS.parent / "README.md").read_text()
