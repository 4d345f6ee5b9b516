"""What is installed is what is in the checkout."""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_checkout_is_shipped() -> None:
    folders = {
        module.parent for top in ("s2d_compiler", "passes") for module in (ROOT / top).rglob("*.py")
    }
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_every_file_beside_the_code_is_shipped() -> None:
    """A wheel holds, beside modules, only what package-data names."""
    for top, shipped in PROJECT["tool"]["setuptools"]["package-data"].items():
        beside = {
            path.relative_to(ROOT / top).as_posix()
            for path in (ROOT / top).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert beside == set(shipped)
    data = PROJECT["tool"]["setuptools"]["package-data"]["s2d_compiler"]
    assert {"plan.schema.json", "depth-plan.schema.json"} <= set(data)


def test_both_packages_say_that_they_are_typed() -> None:
    assert (ROOT / "s2d_compiler" / "py.typed").exists()
    assert (ROOT / "passes" / "py.typed").exists()


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = PROJECT["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {requirement.split(">")[0] for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert names <= tested
