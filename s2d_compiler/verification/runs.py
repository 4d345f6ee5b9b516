"""What a staged network is when it runs: nothing but its graphs, for batches of any size, at the
cost that it says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import VerifyError, first_line
from s2d_compiler.program import SAMPLE_BATCH, Program
from s2d_compiler.verification.words import DAMAGED

#: Larger than any batch that a graph could have been cut to by mistake, and like no other size.
_MANY = 10_007
_NOT_FAKED = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
    NotImplementedError,
)  # fmt: skip
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)

#: What two functions that do the same have in common; code objects also differ by what ran.
_CODE = ("co_code", "co_consts", "co_names", "co_varnames", "co_argcount", "co_freevars")

Shapes = list[tuple[tuple[int, ...], torch.dtype] | None]


# -- code ------------------------------------------------------------------------------------------


def require_nothing_hidden(dyn: DynamicModel) -> None:
    """Require that what runs is what the graphs say.

    Raises:
        VerifyError: There are hooks, other code than the graphs', or stages of another class.
    """
    if type(dyn) is not DynamicModel:
        raise VerifyError(
            f"what is verified is a {type(dyn).__name__}, no DynamicModel; verify the one in it, "
            "or load the file first."
        )
    for name, module in dyn.named_modules():
        place = name or "the network"
        if module._forward_hooks or module._forward_pre_hooks:
            raise VerifyError(
                f"{place} has a hook, which runs and is in no graph; remove it, or verify the "
                "network as it was saved."
            )
        for key in vars(module):
            if callable(getattr(type(module), key, None)):
                raise VerifyError(
                    f"{place} has another {key} than its class, which no graph shows; take it away."
                )
    for name, tensor in [*dyn.named_parameters(), *dyn.named_buffers()]:
        if tensor.is_meta:
            raise VerifyError(
                f"{name} is on the device meta, where tensors hold no numbers; load the network on "
                "another device."
            )
    for number, stage in enumerate(dyn.stages, start=1):
        if not isinstance(stage, fx.GraphModule):
            raise VerifyError(
                f"stage {number} is a {type(stage).__name__}, whose operators cannot be read; put "
                "its GraphModule back."
            )
        if not _runs_its_graph(stage):
            raise VerifyError(
                f"stage {number} runs other code than its graph says; call recompile() after "
                "changing a graph."
            )


def _runs_its_graph(stage: fx.GraphModule) -> bool:
    """Whether a stage's code is what its graph compiles to; nothing is run."""
    written = stage.graph.python_code("self")
    compiled = compile(written.src, "graph", "exec")
    forward: Any = type(stage).forward
    code: CodeType | None = getattr(forward, "__code__", None)
    functions = (c for c in compiled.co_consts if isinstance(c, CodeType))
    return (
        code is not None
        and any(all(getattr(code, key) == getattr(c, key) for key in _CODE) for c in functions)
        and all(forward.__globals__.get(n) is value for n, value in written.globals.items())
    )


# -- shapes ----------------------------------------------------------------------------------------


def compare_shapes(dyn: DynamicModel, program: Program) -> None:
    """Require that exits have the shapes and types of the model's output, for a large batch, too.

    Raises:
        VerifyError: One has another; a graph may be made for the batch of an example.
    """
    batch = program.batch or _MANY
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = tuple(
                torch.empty(
                    (batch, *x.shape[1:]) if x.dim() else (), dtype=x.dtype, device=x.device
                )
                for x in program.examples
            )
            want, found = _exits(program, dyn, inputs)
    except _NOT_FAKED:
        batch = program.batch or SAMPLE_BATCH + 1
        want, found = _exits(program, dyn, samples(program, batch))
    for number, mine in enumerate(found, start=1):
        if mine != want:
            raise VerifyError(
                f"stage {number} returns {_text(mine)} for a batch of {batch}, the model "
                f"{_text(want)}; its graph is made for batches of another size, or its tensors "
                f"are of another type; {DAMAGED}"
            )


def _exits(
    program: Program, dyn: DynamicModel, inputs: tuple[torch.Tensor, ...]
) -> tuple[Shapes, list[Shapes]]:
    with torch.no_grad():
        try:
            want = _shapes(program.graph_module(*inputs))
        except _FAILURES as error:
            raise NotImplementedError from error
        with _must_run():
            return want, [_shapes(output) for output in dyn.exits_of(inputs)]


def _shapes(output: Any) -> Shapes:
    return [(tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else None
            for v in pytree.tree_leaves(output)]  # fmt: skip


def _text(shapes: Shapes) -> str:
    return ", ".join("a number" if s is None else f"{s[0]} of {s[1]}" for s in shapes)


@contextlib.contextmanager
def _must_run() -> Iterator[None]:
    try:
        yield
    except (*_NOT_FAKED, VerifyError):
        raise
    except _FAILURES as error:
        raise VerifyError(
            f"the network cannot run on what the model takes: {first_line(error)}; move it back to "
            f"the model's type and device if it was moved, otherwise {DAMAGED}"
        ) from error


# -- costs -----------------------------------------------------------------------------------------


def compare_costs(dyn: DynamicModel, program: Program, original: int) -> None:
    """Count what runs.

    Raises:
        VerifyError: The network says that it costs something else.
    """
    batch = program.batch or 1
    if len(dyn.cost.stages) != len(dyn.stages):
        raise VerifyError(
            f"it has {len(dyn.stages)} stages, and says the cost of {len(dyn.cost.stages)}; "
            f"{DAMAGED}"
        )
    counted, total = _counted(dyn, samples(program, batch)), 0
    for number, (macs, stage) in enumerate(zip(counted, dyn.cost.stages, strict=True), start=1):
        total += macs // batch
        if (stage.macs, stage.cumulative_macs) != (macs // batch, total):
            raise VerifyError(
                f"stage {number} is said to cost {stage.macs:,} MACs ({stage.cumulative_macs:,} "
                f"with the earlier ones); it runs {macs // batch:,} ({total:,}); "
                f"{DAMAGED}"
            )
        rows = sum(row.macs for row in stage.layers)
        if rows != stage.macs:
            raise VerifyError(
                f"stage {number} is said to cost {stage.macs:,} MACs, its layers {rows:,} in all; "
                f"{DAMAGED}"
            )
    if dyn.cost.original_macs != original:
        raise VerifyError(
            f"the original is said to cost {dyn.cost.original_macs:,} MACs; it runs {original:,}; "
            f"{DAMAGED}"
        )


def cost_of_original(program: Program) -> int:
    """MACs of the original for one sample."""
    batch = program.batch or 1
    with _counting() as counter:
        program.graph_module(*samples(program, batch))
    return int(counter.get_total_flops()) // 2 // batch


def samples(program: Program, batch: int) -> tuple[torch.Tensor, ...]:
    """Inputs of a batch."""
    return tuple(
        x[:1].expand(batch, *x.shape[1:]).clone() if x.dim() else x for x in program.examples
    )


@contextlib.contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """torch's counter, which sees attention only where it is written out with gradients."""
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


def _counted(dyn: DynamicModel, inputs: tuple[torch.Tensor, ...]) -> list[int]:
    """MACs of every stage in one run."""
    found: list[int] = []
    with _must_run(), _counting() as counter:
        for _ in dyn.exits_of(inputs):
            found.append(int(counter.get_total_flops()) // 2 - sum(found))
    return found
