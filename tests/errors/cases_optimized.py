"""Forms of networks that only run, and their measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from s2d_compiler import DynamicModel, load
from s2d_compiler.commands import benchmarking
from s2d_compiler.commands.options import SOURCE
from s2d_compiler.errors import UsageError
from tests.errors.case import Case
from tests.errors.cases_commands import command
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


def of_two_inputs(dyn: DynamicModel) -> object:
    dyn.parts = replace(dyn.parts, input_shapes=((3, 4, 4), (3, 4, 4)))
    return benchmarking._original(Path("model.pt"), SOURCE, dyn, None)


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
    "another type": of_network(
        lambda dyn: dyn.optimized(backend="onednn").half(), "to", "torch.float16 on cpu",
        "packed for oneDNN cannot become", "convert the network that it was made of",
    ),
    "save": of_network(
        lambda dyn: dyn.optimized().save("x"), "save", "an optimised network", "for this machine",
        "save the one",
    ),
    "bench: batch": command(UsageError, "bench dyn.pt --batch 0", "--batch", "0",
        "no number of samples", "give 1 or more"),
    "bench: backend": command(UsageError, "bench dyn.pt --backends tpu", "--backends", "'tpu'",
        "there is no", "take some of eager"),
    "bench: rounds": command(UsageError, "bench dyn.pt --rounds 0", "--rounds", "0",
        "no number of rounds", "give 1"),
    "bench: seconds": command(UsageError, "bench dyn.pt --seconds nan", "--seconds", "nan",
        "no length of a turn", "give 0"),
    "bench: threads": command(UsageError, "bench dyn.pt --threads 0", "--threads", "0",
        "no number of threads", "give 1"),
    "bench: no shares": command(UsageError, "bench dyn.pt --distribution a/b", "--distribution",
        "'a/b'", "are no shares", "write one per stage"),
    "bench: number of shares": command(UsageError, "bench dyn.pt --distribution 100",
        "--distribution", "'100'", "the network 3 stages", "write one per stage"),
    "bench: sum of shares": command(UsageError, "bench dyn.pt --distribution 50/20/20",
        "--distribution", "90", "not to 100", "write the shares in percent"),
    "bench: several inputs": of_network(
        lambda dyn: of_two_inputs(dyn), "--static", "model.pt", "takes 2", "measure it in Python"
    ),
}  # fmt: skip
