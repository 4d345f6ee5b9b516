"""Options that several commands share, and what a command returns."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from s2d_compiler.errors import OutputError, UsageError
from s2d_compiler.plan_rules import read_input_shape

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.program import Program


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Reporting:
    """How a command reports.

    Args:
        quiet: Print nothing but errors.
        as_json: Print one JSON document on stdout, also for an error.
        debug: Log every step, and show the traceback of an error.
    """

    quiet: bool = False
    as_json: Annotated[bool, Parameter(name="--json")] = False
    debug: bool = False


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the trained network comes from.

    Args:
        arch: The function that builds the network, for a file that holds a state dict, such as
            torchvision.models:resnet18 or mypackage.net:build.
        arch_kwargs: Its keyword arguments as JSON, such as '{"num_classes": 10}'.
        trust: Let the model's file run any code that it holds; for files of known origin only.
        input_shape: Shape of one input without the batch, such as 3x224x224; goes before the one
            that a plan holds.
        submodule: The part of the network that this is about, such as backbone; the input shape
            and the plan are this part's. Without it, the whole network.
    """

    arch: Annotated[str | None, Parameter(show_default=False)] = None
    arch_kwargs: Annotated[str | None, Parameter(show_default=False)] = None
    trust: bool = False
    input_shape: Annotated[str | None, Parameter(show_default=False)] = None
    submodule: Annotated[str | None, Parameter(show_default=False)] = None

    def as_options(self) -> str:
        """How these options stand on a command line, with a space after each."""
        given = [
            ("--arch", self.arch),
            ("--arch-kwargs", self.arch_kwargs),
            ("--submodule", self.submodule),
        ]
        words = [f"{name} {shlex.quote(value)} " for name, value in given if value is not None]
        return "".join(words) + ("--trust " if self.trust else "")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The input shape as numbers.

        Raises:
            UsageError, PlanError: It is none.
        """
        if self.input_shape is None:
            return None
        if not re.fullmatch("[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", self.input_shape):
            raise UsageError(
                f"--input-shape: {json.dumps(self.input_shape)[:60]} is no shape; write the shape "
                "of one input without the batch, such as 3x224x224"
            )
        return read_input_shape(
            [int(size) for size in self.input_shape.split("x")], "--input-shape"
        )

    def require_shape_of(self, dyn: Path, shapes: Sequence[tuple[int, ...]]) -> None:
        """Require that the input shape, if one is given, is that of a compiled network.

        Raises:
            UsageError: It is another.
        """
        if self.shape is not None and tuple(shapes) != (self.shape,):
            text = " and ".join("x".join(map(str, shape)) for shape in shapes)
            raise UsageError(
                f"--input-shape: {self.input_shape} is not what {dyn} takes, {text}; leave the "
                "option out, or name the network that was compiled for that shape"
            )

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the function that builds the network.

        Raises:
            UsageError: They are no JSON object.
        """
        if self.arch_kwargs is None:
            return {}
        example = """write an object, such as '{"num_classes": 10}'"""
        try:
            value = json.loads(self.arch_kwargs)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--arch-kwargs: not JSON ({error}); {example}") from error
        if not isinstance(value, dict):
            raise UsageError(f"--arch-kwargs: {json.dumps(value)[:60]} is no object; {example}")
        return value

    def read(self, path: Path) -> nn.Module:
        """Read the network, or the part of it that is asked for."""
        from s2d_compiler.reading import read_model
        from s2d_compiler.submodules import part_of

        model = read_model(path, arch=self.arch, arch_kwargs=self.keywords, trust=self.trust)
        return part_of(model, self.submodule)


REPORTING = Reporting()
SOURCE = ModelSource()
CommandLine = Annotated[str, Parameter(parse=False)]


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found.

    Attributes:
        document: What ``--json`` prints.
        text: What is printed otherwise.
    """

    document: Mapping[str, Any]
    text: Sequence[RenderableType]


def require_other_file(output: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse to write over what is read.

    Raises:
        OutputError: The output is one of the inputs.
    """
    for what, path in inputs.items():
        with suppress(OSError, ValueError):
            is_same = os.path.realpath(output) == os.path.realpath(path)  # of none yet, too
            if is_same or os.path.samefile(output, path):
                raise OutputError(f"{output} is {what} itself; name another file to write")


def capture_for(model: nn.Module, input_shape: Sequence[int] | None) -> Program:
    """Capture the network that a command is about."""
    from s2d_compiler.tracing import capture

    return capture(model, None, input_shape)


def document_of(dyn: DynamicModel) -> dict[str, Any]:
    """What ``--json`` prints of a staged network."""
    return {
        "plan": dyn.plan.to_dict(),
        "cost": dyn.cost.to_dict(),
        "report": dyn.report.to_dict(),
        "made_by": dict(dyn.parts.made_by),
        "input_shapes": [list(shape) for shape in dyn.parts.input_shapes],
    }
