"""Forms of networks that only run, and their measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import nn

from s2d_compiler import DynamicModel, load
from s2d_compiler.errors import UsageError
from tests.errors.case import Case
from tests.errors.stored import FOLDER


def of_network(what: Callable[[DynamicModel], Any], *parts: str) -> Case:
    """Something done with a compiled network."""
    return Case(lambda folder: what(load(FOLDER / "dyn-v1-original.pt")), UsageError, *parts)


def without_graphs(dyn: DynamicModel) -> object:
    dyn.stages[0] = nn.Identity()
    return dyn.optimized()


def without_operators(dyn: DynamicModel) -> object:
    with mock.patch("passes.fuse_onednn.is_available", return_value=False):
        return dyn.optimized(backend="onednn")


CASES = {
    "backend": of_network(
        lambda dyn: dyn.optimized(backend="tpu"), "backend", "'tpu'", "there is no", "take one of"
    ),
    "batch": of_network(
        lambda dyn: dyn.optimized(batch=0), "batch", "0", "no number of samples", "give 1 or more"
    ),
    "backend that is not here": of_network(
        without_operators, "backend", "onednn", "no fused oneDNN operators", "take another"
    ),
    "stages": of_network(without_graphs, "stages", "not all graph modules", "optimized", "load"),
    "train": of_network(
        lambda dyn: dyn.optimized().train(), "train", "an optimised network", "only runs", "again"
    ),
    "save": of_network(
        lambda dyn: dyn.optimized().save("x"), "save", "an optimised network", "for this machine",
        "save the one",
    ),
}  # fmt: skip
