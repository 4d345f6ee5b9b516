"""From a model to a graph, inputs of compiled networks, parts of models, the self-check."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler import DynamicModel, checking, transform
from s2d_compiler.errors import CaptureError, CheckError, InputShapeError, S2DError, UsageError
from s2d_compiler.submodules import part_of
from s2d_compiler.tracing import capture
from tests.errors.case import Case
from tests.test_checking import made

PLAN = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}
X = torch.zeros(2, 3, 8, 8)


class Body(nn.Module):
    """A convolution, and whatever a case does after it."""

    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.conv(x))


def of_body(body: Callable[[Tensor], Any], *parts: str) -> Case:
    return Case(lambda folder: capture(Body(body), (X,)), CaptureError, *parts)


def by_value(x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 0 else x


def of_a_size_by_value(x: Tensor) -> Tensor:
    return x[:, (x - x[:, :, :1, :1])[0, :, 2, 2] != 0].sum(1)


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x


def through_strides(x: Tensor) -> Tensor:
    x.as_strided((2, 8), (144, 36)).add_(1)
    return x


def into_a_piece_of_the_batch(x: Tensor) -> Tensor:
    x.flatten(0, 1).chunk(2)[0].mul_(2)
    return x


def along_the_diagonal(x: Tensor) -> Tensor:
    return x.mean((0, 1)).fill_diagonal_(0)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return self.head((self.conv(x) + y).mean((2, 3)))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).reshape(2, 8, 36).mean(2))


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module: nn.Module = torch.jit.trace(nn.ReLU(), X)
        return module


def compiled(model: Callable[[], nn.Module], **keywords: Any) -> DynamicModel:
    return transform(model(), PLAN, (X,), **keywords)


def call(error: type[S2DError], trigger: Callable[[], object], *parts: str) -> Case:
    return Case(lambda folder: trigger(), error, *parts)


def changed(change: Callable[[DynamicModel], object]) -> Callable[[Path], object]:
    """Check a network in which something was changed."""
    from tests.odd_models import Ghost

    def trigger(folder: Path) -> object:
        dyn, assignment = made(Ghost)
        dyn = copy.deepcopy(dyn)
        with torch.no_grad():
            change(dyn)
        return checking.check(dyn, assignment)

    return trigger


def change_weight(dyn: DynamicModel) -> None:
    next(dyn.stages[1].parameters()).add_(1)


def change_graph(dyn: DynamicModel) -> None:
    nodes = dyn.stages[0].graph.nodes  # type: ignore[union-attr]
    node = next(n for n in nodes if n.op == "call_function")
    node.target = torch.ops.aten.neg.default


def wrong_outputs(folder: Path) -> object:
    from unittest import mock

    from tests.odd_models import Ghost

    right = checking.masked_outputs

    def wrong(*args: Any) -> list[tuple[Any, ...]]:
        return [(3 * leaves[0] + 1, *leaves[1:]) for leaves in right(*args)]

    with mock.patch.object(checking, "masked_outputs", wrong):
        return checking.check(*made(Ghost))


CASES = {
    "no module": call(
        CaptureError,
        lambda: capture(torch.relu, (X,)),  # type: ignore[arg-type]
        "the model",
        "is a builtin_function_or_method",
        "not a torch.nn.Module",
        "pass the module itself",
    ),
    "TorchScript": call(
        CaptureError,
        lambda: capture(scripted(), (X,)),
        "the model",
        "is a TorchScript module",
        "which torch.export does not read",
        "pass the Python model that it was scripted from",
    ),
    "by value": of_body(
        by_value,
        "cases_capture.py",
        "torch.export cannot capture Body",
        "Values of tensors must not decide what runs",
        "remove that from the model's forward, or transform the part without it",
    ),
    "size by value": of_body(
        of_a_size_by_value,
        "the size of index",
        "0 for one, 4 for another",
        "Values of tensors must not decide what runs",
        "multiply by the mask instead of selecting with it",
    ),
    "autocast": of_body(
        under_autocast,
        "inside itself",
        "cpu, torch.bfloat16",
        "which a captured graph cannot keep",
        "Take the autocast region out of the model's forward",
    ),
    "write through strides": of_body(
        through_strides,
        "add_",
        "writes in place through",
        "this compiler cannot follow such a write",
        "Write to a copy instead",
    ),
    "write into a piece": of_body(
        into_a_piece_of_the_batch,
        "mul_",
        "writes in place into a piece of",
        "this compiler cannot follow such a write",
        "Write to a copy instead",
    ),
    "write without a form": of_body(
        along_the_diagonal,
        "fill_diagonal_",
        "writes into its operand",
        "has no form that does not",
        "Compute its result with other operators in the model's source, such as torch.where",
    ),
    "no convolution": call(
        InputShapeError,
        lambda: capture(nn.Linear(3, 3)),
        "the model",
        "has no convolution",
        "that tells its input shape",
        'give example_inputs, or "input_shape" in the plan, such as [3, 224, 224]',
    ),
    "example is a tensor": call(
        InputShapeError,
        lambda: capture(classifier(), X),
        "example_inputs",
        "is a tensor",
        "a model may have several inputs",
        "give a tuple, (x,)",
    ),
    "example is a number": call(
        InputShapeError,
        lambda: capture(classifier(), (5,)),
        "an example input",
        "is a int",
        "inputs must be tensors, or tuples, lists and dicts of tensors",
        "Leave it out where it has a default",
    ),
    "wrong channels": call(
        InputShapeError,
        lambda: capture(classifier(), input_shape=(5, 8, 8)),
        "Sequential",
        "5x8x8",
        "does not run on an input of shape",
        "If it was made for another shape, give that",
    ),
    "two batches": call(
        InputShapeError,
        lambda: capture(TwoInputs(), (X,), example_kwargs={"y": torch.zeros(3, 8, 6, 6)}),
        "example inputs",
        "have 2 and 3 in dimension 0",
        "which is the batch of all",
        "give them one batch size",
    ),
    "too few inputs": call(
        InputShapeError,
        lambda: capture(TwoInputs(), (X,)),
        "TwoInputs.forward",
        "missing a required",
        "does not take 1 input(s) like these",
        "Give an example of all its inputs",
    ),
    "wrong rank": call(
        InputShapeError,
        lambda: capture(classifier(), input_shape=(8, 8)),
        "the input shape",
        "8x8 has 2 dimensions",
        "the model's first convolution takes 3",
        "such as 3x224x224; give that many",
    ),
    # calling a compiled network
    "structure": call(
        InputShapeError,
        lambda: compiled(TwoInputs, example_kwargs={"y": torch.zeros(2, 8, 6, 6)})(X),
        "the inputs",
        "(*)",
        "the network was compiled for (*, y=*)",
        "call it as the example inputs were given",
    ),
    "keyword": call(
        InputShapeError,
        lambda: compiled(classifier)(input=X),
        "the network",
        "got input",
        "was compiled without keyword inputs",
        "hand them in by position, or compile with example_kwargs",
    ),
    "number of inputs": call(
        InputShapeError,
        lambda: compiled(classifier)(X, X),
        "the network",
        "got 2",
        "takes 1 input(s)",
        "hand in those that it was compiled with",
    ),
    "shape of an input": call(
        InputShapeError,
        lambda: compiled(classifier)(X[..., :7]),
        "input of shape",
        "(2, 3, 8, 7)",
        "the network was compiled for (N, 3, 8, 8)",
        "resize the input, or compile again",
    ),
    "batch": call(
        InputShapeError,
        lambda: compiled(FixedBatch)(torch.zeros(3, 3, 8, 8)),
        "batch of",
        "3",
        "the original fixes its batch size",
        "takes batches of 2 only; hand in that many",
    ),
    "no stage": call(
        UsageError,
        lambda: compiled(classifier).at_stage(0),
        "at_stage",
        "0",
        "is no stage",
        "the network has stages 1 to 2, give one of these",
    ),
    # parts of models
    "no submodule": call(
        UsageError,
        lambda: part_of(classifier(), "backbone"),
        "submodule 'backbone'",
        "'backbone'",
        "Sequential has no such submodule",
        "it has 0, 1, 2, 3",
    ),
    "container": call(
        UsageError,
        lambda: part_of(nn.ModuleDict({"parts": nn.ModuleList([nn.ReLU()])}), "parts"),
        "submodule 'parts'",
        "it is a ModuleList",
        "which holds weights but computes nothing by itself",
        "name a module with a forward method",
    ),
    # the self-check
    "changed weight": Case(
        changed(change_weight),
        CheckError,
        "stages.1.",
        "is not the slice of",
        "that its provenance says",
        "please report the model and the plan",
    ),
    "changed graph": Case(
        changed(change_graph),
        CheckError,
        "stage 1",
        "is built differently the second time",
        "both graphs must be equal",
        "please report the model and the plan",
    ),
    "wrong outputs": Case(
        wrong_outputs,
        CheckError,
        "stage 1",
        "of the output's spread",
        "(limit 1e-09): the result is not what the plan says",
        "please report the model and the plan",
    ),
}
