"""Every error that the package can raise says where, what was found, the rule and the remedy.

``tests/errors`` has a table of cases per part of the package; ``sites.py`` there finds every place
that raises. A new ``raise`` without a case fails here.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.errors import (
    cases_calibration,
    cases_capture,
    cases_commands,
    cases_data,
    cases_depth,
    cases_evaluation,
    cases_format,
    cases_graphs,
    cases_optimized,
    cases_passes,
    cases_pickles,
    cases_plan,
    cases_reading,
    cases_runtime,
    cases_training,
    cases_verify,
)
from tests.errors.case import Case
from tests.errors.sites import (
    CLASSES,
    EXPLAINERS,
    Site,
    all_sites,
    raised_names,
    sites_in,
    sites_of,
)

TABLES = (
    cases_calibration,
    cases_plan,
    cases_capture,
    cases_passes,
    cases_format,
    cases_graphs,
    cases_pickles,
    cases_reading,
    cases_runtime,
    cases_commands,
    cases_data,
    cases_evaluation,
    cases_verify,
    cases_depth,
    cases_optimized,
    cases_training,
)
CASES: dict[str, Case] = {
    f"{table.__name__.rpartition('_')[2]}: {name}": case
    for table in TABLES
    for name, case in table.CASES.items()
}


@cache
def outcome(name: str) -> tuple[Case, BaseException | None, Path, set[Site]]:
    """What a case raises, and from which sites."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.chdir(folder)
        try:
            CASES[name].trigger(folder)
        except Exception as error:
            return CASES[name], error, folder, sites_of(error)
        finally:
            os.chdir(before)
    return CASES[name], None, folder, set()


@pytest.mark.parametrize("name", CASES)
def test_a_message_has_its_four_parts(name: str) -> None:
    case, error, folder, sites = outcome(name)
    assert error is not None, "nothing was refused"
    assert type(error) is case.error, repr(error)
    said = str(error)
    for part, text in case.parts(folder).items():
        assert text, part
        assert text in said, f"{part}: {text!r} is not in {said!r}"
    parts = case.parts(folder)
    assert parts["remedy"] not in parts["rule"] + parts["value"]
    assert said.replace(parts["remedy"], "").count(parts["rule"]), "rule and remedy are one"
    assert said == said.strip()
    assert "\n" not in said
    assert len(said) < 900
    assert sites, "it comes from no place that sites.py knows"


def test_places_are_found_in_source() -> None:
    """Each way in which an error is made, and what is none."""
    source = """
def one(): raise PlanError("raised")
def two(): fail("place", "told")
def three(): raise _explain(path, error) from error
def four(): return show(UsageError("handed over"))
def fail(place, problem): raise PlanError(f"{place}: {problem}")
def _explain(path, error): return OutputError("explained")
def five(): raise NoRule("none of the package's")
def six():
    try: pass
    except PlanError: raise
"""
    found = {site.function: site.text for site in sites_in(source, "s2d_compiler/x.py")}
    assert found == {
        "one": "raise PlanError('raised')",
        "two": "fail('place', 'told')",
        "three": "raise _explain(path, error) from error",
        "four": "show(UsageError('handed over'))",
    }


# Raised for the package itself and never shown as they are: how rules decline, control flow,
# what Python's own protocols ask for.
INTERNAL = {
    "AssertionError", "KeyboardInterrupt", "NoPlaceError", "NoRule", "NotImplementedError",
    "NotSliceable", "Terminated", "UnknownIndexError", "UnknownModuleError", "ValueError",
    "OSError", "UnknownError", "_DependentError",
}  # fmt: skip


def test_no_error_is_raised_past_the_hierarchy() -> None:
    assert raised_names() <= CLASSES | EXPLAINERS | INTERNAL


def test_every_place_that_raises_has_a_case() -> None:
    reached = {site for name in CASES for site in outcome(name)[3]}
    missing = sorted(all_sites() - reached)
    if missing:
        pytest.fail("no case for\n" + "\n".join(map(str, missing)), pytrace=False)
