"""What verification says of networks that are not what their plan makes of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d_compiler import DynamicModel, Plan, transform, verify
from s2d_compiler.errors import VerifyError
from s2d_compiler.provenance import Slice
from s2d_compiler.verification.specification import Specification
from tests.errors.case import Case

REMEDY = "compile the model again"
RELATED = "the file is damaged, or was not made from this model"


class Net(nn.Module):
    """A convolution, a norm, a table and a head."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)) * self.scale + self.table
        return self.head(y.relu().mean((2, 3)))  # type: ignore[no-any-return]


@cache
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def compiled(**changes: Any) -> DynamicModel:
    spec = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"},
            "input_shape": [3, 8, 8]}  # fmt: skip
    return transform(model(), Plan.from_dict({**spec, **changes}))


def changed(change: Callable[[DynamicModel], Any], *parts: str, against: Any = model) -> Case:
    """A network that is changed in memory, and verified."""

    def trigger(folder: Path) -> object:
        dyn = compiled()
        found = change(dyn)
        return verify(against(), dyn if found is None else found)

    return Case(trigger, VerifyError, *parts)


def with_parts(**given: Any) -> Callable[[DynamicModel], None]:
    def change(dyn: DynamicModel) -> None:
        dyn.parts = replace(dyn.parts, **given)

    return change


def stage_of(dyn: DynamicModel, number: int = 0) -> Any:
    return dyn.stages[number]


def node_of(dyn: DynamicModel, word: str, number: int = 0) -> Any:
    return next(n for n in stage_of(dyn, number).graph.nodes if word in str(n.target))


def recompiled(dyn: DynamicModel) -> None:
    for stage in dyn.stages:
        stage.recompile()  # type: ignore[operator]


def slices(change: Callable[[dict[str, Slice]], Any]) -> Callable[[DynamicModel], None]:
    def apply(dyn: DynamicModel) -> None:
        provenance = dict(dyn.parts.provenance)
        change(provenance)
        dyn.parts = replace(dyn.parts, provenance=provenance)

    return apply


def hooked(dyn: DynamicModel) -> None:
    stage_of(dyn).register_forward_hook(lambda *_: None)


def overridden(dyn: DynamicModel) -> None:
    stage_of(dyn).get_submodule("conv").forward = lambda x: x


def called_otherwise(dyn: DynamicModel) -> None:
    stage_of(dyn).get_submodule("conv")._call_impl = lambda x: x  # type: ignore[method-assign]


def no_graph(dyn: DynamicModel) -> None:
    dyn.stages[0] = nn.Identity()


def stale(dyn: DynamicModel) -> None:
    node_of(dyn, "relu").target = torch.ops.aten.sigmoid.default


def another_operator(dyn: DynamicModel) -> None:
    stale(dyn)
    recompiled(dyn)


def cannot_be_followed(dyn: DynamicModel) -> None:
    node = node_of(dyn, "head")
    node.args = (node.args[0], node.args[0])
    recompiled(dyn)


def foreign_layer(dyn: DynamicModel) -> None:
    stage_of(dyn).conv = nn.Softplus()


def no_tensor(dyn: DynamicModel) -> None:
    node_of(dyn, "scale").target = "conv"
    recompiled(dyn)


def no_module(dyn: DynamicModel) -> None:
    node_of(dyn, "conv").target = "scale"
    recompiled(dyn)


def plain_bias(dyn: DynamicModel) -> None:
    layer = stage_of(dyn).get_submodule("conv")
    value = layer.bias.detach()
    del layer._parameters["bias"]
    layer.bias = value


def unread(dyn: DynamicModel) -> None:
    first, second = dyn.parts.interfaces
    output = stage_of(dyn).graph.output_node()
    leaves, handed = output.args[0]
    output.args = ((leaves, (*handed, handed[0])),)
    recompiled(dyn)
    dyn.parts = replace(dyn.parts, interfaces=(replace(first, features=len(handed) + 1), second))


def two_outputs(dyn: DynamicModel) -> None:
    output = stage_of(dyn).graph.output_node()
    leaves, handed = output.args[0]
    output.args = (((*leaves, leaves[0]), handed),)
    recompiled(dyn)


def one_batch(dyn: DynamicModel) -> None:
    stage = stage_of(dyn)
    head = node_of(dyn, "head")
    with stage.graph.inserting_before(head):
        cut = stage.graph.call_function(torch.ops.aten.slice.Tensor, (head.args[0], 0, 0, 7))
        head.args = (cut,)
    recompiled(dyn)


def costs(change: Callable[[Any], Any]) -> Callable[[DynamicModel], None]:
    def apply(dyn: DynamicModel) -> None:
        dyn.parts = replace(dyn.parts, cost=change(dyn.cost))

    return apply


def stage_cost(**given: Any) -> Callable[[DynamicModel], None]:
    return costs(
        lambda cost: replace(cost, stages=(replace(cost.stages[0], **given), *cost.stages[1:]))
    )


def layer_cost(dyn: DynamicModel) -> None:
    layers = dyn.cost.stages[0].layers
    stage_cost(layers=(replace(layers[0], macs=layers[0].macs + 1), *layers[1:]))(dyn)


def another_constant(dyn: DynamicModel) -> None:
    with torch.no_grad():
        dict(stage_of(dyn).named_buffers())["table"].add_(1)


def trained(dyn: DynamicModel) -> None:
    with torch.no_grad():
        stage_of(dyn).get_submodule("conv").weight.add_(1)


def moved(dyn: DynamicModel) -> object:
    stage_of(dyn).get_submodule("conv").double()
    return verify(model(), dyn, trained=True)


def diverged(dyn: DynamicModel) -> object:
    with torch.no_grad():
        stage_of(dyn).get_submodule("norm").running_var.fill_(-1)
    return verify(model(), dyn, trained=True)


class Masked(nn.Module):
    """A layer with a computed weight that holds a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.register_buffer("mask", torch.ones(8, 3, 3, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.conv2d(x, self.weight * self.mask)
        return self.head(y.relu().mean((2, 3)))  # type: ignore[no-any-return]


def another_mask(folder: Path) -> object:
    masked = Masked().eval()
    plan = {**compiled().plan.to_dict(), "input_shape": [3, 8, 8]}
    dyn = transform(masked, plan)
    with torch.no_grad():
        next(b for name, b in dyn.named_buffers() if name.endswith("mask")).mul_(2)
    return verify(masked, dyn, trained=True)


COUNT = "stages.0.norm.num_batches_tracked"
"""A tensor of which no output is made."""


def outside(provenance: dict[str, Slice]) -> None:
    provenance[COUNT] = Slice(provenance[COUNT].source, ((9,),))


def from_nowhere(provenance: dict[str, Slice]) -> None:
    provenance[COUNT] = replace(provenance[COUNT], source="nose.count")


def another_shape(dyn: DynamicModel) -> None:
    stage_of(dyn).get_submodule("norm").num_batches_tracked = torch.zeros(2, dtype=torch.int64)


def unexplained(dyn: DynamicModel) -> None:
    """A buffer that is saved and comes from nowhere."""
    stage_of(dyn).register_buffer("extra", torch.zeros(3))


def unfollowed_model(folder: Path) -> object:
    """The analysis goes wrong in the model itself."""
    from unittest import mock

    def fail(self: Any, *_: Any) -> Any:
        raise RuntimeError("no meaning")

    with mock.patch.object(Specification, "_evaluated", fail):
        return verify(model(), compiled())


CASES: dict[str, Case] = {
    "another batch": changed(
        with_parts(batch=3), "the network takes batches of 3", "the model None",
        "takes batches of", "give the model and the example inputs that it was made from",
    ),
    "stages": changed(
        lambda dyn: DynamicModel(list(dyn.stages)[:1], dyn.parts),  # type: ignore[arg-type]
        "the network has 1 stages", "its plan 2", RELATED, REMEDY,
    ),
    "number of owners": changed(
        with_parts(owners=(1, 1)), "the stages of 2 channels", "the model has", RELATED, REMEDY
    ),
    "owners": changed(
        lambda dyn: with_parts(owners=(2, *dyn.parts.owners[1:]))(dyn),
        "a channel of", "is in stage 2", "it was made from other weights, or with another plan",
        REMEDY,
    ),
    "plan": changed(
        with_parts(plan=Plan.from_dict({"stages": 2, "groups": 8, "default":
                                        {"split": [4], "concat": "all"}, "layers":
                                        {"nose": {"split": [2]}}})),
        "the network's plan does not fit the model", "nose", "no layer",
        "give the model that it was made from",
    ),
    "trained": changed(
        trained, "stages.0.conv.weight first", "tensors hold other numbers",
        "what the stages compute with them is what the plan says", "say so (--trained",
    ),
    "constant": changed(
        another_constant, "stage 1, node", "6 numbers", "operator, operands, settings or slice",
        REMEDY,
    ),
    "operator": changed(
        another_operator, "stage 1, node 'relu", "none of", "that the plan gives stage 1", REMEDY
    ),
    "not followed": changed(
        cannot_be_followed, "stage 1, node 'stages_0_head'", "a module takes one tensor",
        "cannot be followed", REMEDY,
    ),
    "layer": changed(
        foreign_layer, "stage 1, node 'stages_0_conv'", "torch.nn.modules.activation.Softplus",
        "have no known meaning", REMEDY,
    ),
    "no tensor": changed(no_tensor, "stage 1: 'conv'", "a Conv2d", "reads as a tensor", REMEDY),
    "no module": changed(no_module, "stage 1: 'scale'", "a Parameter", "as a module", REMEDY),
    "no slice": changed(
        slices(lambda p: p.pop("stages.0.scale")), "stage 1: parameter 'scale'", "is no slice",
        "as all parameters are", REMEDY,
    ),
    "no slice of a layer": changed(
        slices(lambda p: p.pop("stages.0.conv.weight")), "stage 1: parameter 'conv.weight'",
        "is no slice", "as all parameters are", REMEDY,
    ),
    "plain tensor": changed(
        plain_bias, "stage 1: tensor 'conv.bias'", "no slice", "as those of layers are", REMEDY
    ),
    "outputs": changed(two_outputs, "stage 1", "returns 2 outputs", "the model 1", REMEDY),
    "unread": changed(unread, "stage 1", "hands on a value", "that no later stage reads", REMEDY),
    "hook": changed(hooked, "stages.0", "has a hook", "in no graph", "remove it"),
    "forward": changed(
        overridden, "stages.0.conv", "another forward than its class", "which no graph shows",
        "take it away",
    ),
    "call": changed(
        called_otherwise, "stages.0.conv", "another _call_impl than its class", "no graph",
        "take it away",
    ),
    "class": changed(
        lambda dyn: nn.Identity(), "what is verified", "a Identity", "no DynamicModel",
        "verify the one in it",
    ),
    "meta": changed(
        lambda dyn: dyn.to("meta"), "stages.0", "device meta", "hold no numbers",
        "load the network on another device",
    ),
    "diverged": Case(
        lambda folder: diverged(compiled()), VerifyError, "running_var", "holds -1",
        "variances not negative", "go back to an earlier state",
    ),
    "no graph": changed(
        no_graph, "stage 1", "is a Identity", "operators cannot be read", "put its GraphModule back"
    ),
    "stale code": changed(
        stale, "stage 1", "runs other code", "than its graph says", "call recompile()"
    ),
    "one batch": changed(
        one_batch, "stage 1 returns", "for a batch of", "made for batches of another size", REMEDY
    ),
    "another type": Case(
        lambda folder: moved(compiled()), VerifyError,
        "the network", "double", "cannot run on what the model takes", "move it back",
    ),
    "number of costs": changed(
        costs(lambda cost: replace(cost, stages=cost.stages[:1])), "it has 2 stages",
        "the cost of 1", RELATED, REMEDY,
    ),
    "cost": changed(stage_cost(macs=7), "stage 1", "said to cost 7", "it runs", REMEDY),
    "cost of layers": changed(layer_cost, "stage 1", "said to cost", "its layers", REMEDY),
    "cost of the original": changed(
        costs(lambda cost: replace(cost, original_macs=1)), "the original", "said to cost 1 MACs",
        "it runs", REMEDY,
    ),
    "saved tensor": changed(
        unexplained, "stages.0.extra", "is no slice", "as all that are saved are", REMEDY
    ),
    "source": changed(
        slices(from_nowhere), COUNT, "'nose.count'", "which the original does not have", REMEDY
    ),
    "slice outside": changed(
        slices(outside), COUNT, "its slice", "does not lie in 'norm.num_batches_tracked'", REMEDY
    ),
    "shape": changed(another_shape, COUNT, "has shape (2,)", "its slice of", REMEDY),
    "constant of a layer": Case(
        another_mask, VerifyError, "mask", "other numbers", "which training does not change",
        REMEDY,
    ),
    "model": Case(
        unfollowed_model, VerifyError, "'conv'", "no meaning", "cannot be followed",
        "rely on the self-check",
    ),
}  # fmt: skip
