"""What runs the stages of an optimised network."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.optimizing.model import running_copy

log = logging.getLogger(__name__)

#: ``eager``: torch's operators. ``onednn``: eager, with fused convolutions and linear layers of
#: packed weights (CPU, float32). ``inductor``: torch's compiler with frozen weights.
BACKENDS = ("eager", "onednn", "inductor")

#: Batches of fewer and of more are compiled apart: torch chooses convolution kernels by it.
_LARGE = 16
#: A stage is compiled for so many classes of batch sizes, and runs uncompiled for others.
_MOST_COMPILED = 2


def available_backends(device: str = "cpu") -> dict[str, str | None]:
    """Per backend why it cannot be had on this machine, None where it can."""
    return {name: why_not(name, device) for name in BACKENDS}


def why_not(backend: str, device: str = "cpu") -> str | None:
    """Why a backend cannot be had on this machine, None where it can."""
    if backend == "onednn":
        from passes.fuse_onednn import is_available

        if device != "cpu":
            return f"oneDNN runs on the CPU, the network is on {device}"
        return None if is_available() else "this torch has no fused oneDNN operators"
    if backend == "inductor" and device == "cpu" and cpp_compiler() is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    return None


def cpp_compiler() -> str | None:
    """The C++ compiler that torch's compiler would use, None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++")


def frozen(stage: fx.GraphModule) -> Any:
    """A graph compiled once with its weights as constants; another compilation is an error."""
    known = inspect.signature(torch.compile).parameters
    settings: dict[str, Any] = {"recompile_limit": 1} if "recompile_limit" in known else {}
    settings |= {"dynamic": False, "fullgraph": True, "options": {"freezing": True}}
    return torch.compile(stage, **settings)


class CompiledStage(nn.Module):
    """A stage compiled at most twice, whatever batch sizes come.

    Batches of one sample, of fewer than 16 and of more are three classes; the first two classes
    that come are compiled, each once for all its sizes, and the third one runs uncompiled.

    Args:
        stage: The stage.
        dynamic: Per placeholder, the dimensions that follow the batch.
        batch_of: Placeholder and dimension to read the batch size off.
    """

    def __init__(self, stage: fx.GraphModule, dynamic: Sequence[Sequence[int]]):
        super().__init__()
        self.stage = stage
        self.dynamic = dynamic
        self.axis = next(((k, d) for k, dims in enumerate(dynamic) for d in dims), None)
        self.compiled: dict[str, Any] = {}

    def forward(self, *inputs: Any) -> Any:
        size = 1 if self.axis is None else inputs[self.axis[0]].shape[self.axis[1]]
        kind = "one" if size == 1 else "many" if size >= _LARGE else "few"
        run = self.compiled.get(kind)
        if run is None:
            if len(self.compiled) >= _MOST_COMPILED:
                return self.stage(*inputs)
            run = self.compiled[kind] = frozen(running_copy(self.stage))
        if kind == "one":
            return run(*inputs)
        for value, dimensions in zip(inputs, self.dynamic, strict=True):
            for dimension in dimensions:
                torch._dynamo.maybe_mark_dynamic(value, dimension)
        try:
            return run(*inputs)
        except Exception as error:
            if type(error).__name__ != "FailOnRecompileLimitHit":
                raise
            self.compiled[kind] = self.stage  # the graph holds for one size only, after all
            return self.stage(*inputs)
