"""A plan of exits along depth meets a model: which values its exits read, and with what heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from s2d_compiler.analysis.exit_places import Depth, ExitPlace, NoPlaceError
from s2d_compiler.depth_plan import WIDTH, DepthPlan
from s2d_compiler.exit_heads import ExitHead
from s2d_compiler.memory import explained
from s2d_compiler.plan_rules import fail, show
from s2d_compiler.program import Program, batch_dimensions, is_reserved, shape_of, tensor_value

#: Convolutions of the heads that the preset "ddi" puts at its first, second and later resolutions.
#: DDI, section 4.1: "a gradual increase in the classifiers' complexity".
_DDI_HEADS = ("branchynet", "branchynet-2", "branchynet-3")
#: Keeps the random numbers of one plan's heads apart from those of the next seed's.
_SEEDS_PER_PLAN = 1009


@dataclass(frozen=True)
class ExitPlacement:
    """A program, and the exits that a plan puts into it.

    Attributes:
        program: The captured model.
        plan: The plan, with the exits that its preset chose.
        heads: One per exit, in order.
        tail: What the original does to its logits at the end, as nodes of the program.
    """

    program: Program
    plan: DepthPlan
    heads: tuple[ExitHead, ...]
    tail: tuple[fx.Node, ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.heads) + 1

    @property
    def head_name(self) -> str:
        """Name of a head within its stage: one that the original has not."""
        taken = {str(n.target).split(".")[0] for n in self.program.nodes}
        name = "exit_head"
        while name in taken or is_reserved(name):
            name += "_"
        return name

    def parameters(self) -> dict[str, torch.Tensor]:
        """The heads' tensors by their names in the staged network, as the seed gives them."""
        return {
            f"stages.{number}.{self.head_name}.{name}.{key}": tensor
            for number, head in enumerate(self.heads)
            for name, layer, _ in head.layers()
            for key, tensor in layer.named_parameters()
        }

    def of(self, program: Program) -> ExitPlacement:
        """The same exits in a copy of the program whose weights are of another type."""
        floats = (p.dtype for p in program.graph_module.parameters() if p.is_floating_point())
        dtype = next(floats, None)
        heads = tuple(replace(head, dtype=dtype or head.dtype) for head in self.heads)
        tail = tuple(program.by_name[node.name] for node in self.tail)
        return replace(self, program=program, heads=heads, tail=tail)


@explained("placing the exits", "give a smaller input shape (--input-shape)")
def place_exits(program: Program, plan: DepthPlan, depth: Depth | None = None) -> ExitPlacement:
    """Find the values that a plan's exits read, and what their heads are.

    Args:
        program: The captured model.
        plan: The plan; a preset chooses its exits here.
        depth: The program along its depth, if that is known.

    Raises:
        PlanError: An exit has no place in the model, or the model's output is not one number
            per class.
    """
    depth = depth or Depth(program)
    logits, tail = _logits(program, plan)
    if plan.preset is not None:
        plan = _with_preset(plan, depth)
    places = [_place(plan, depth, number) for number in range(len(plan.exits))]
    _check_order(plan, depth, places)
    heads = []
    for number, (kind, place) in enumerate(zip(plan.heads, places, strict=True)):
        node = program.by_name[place.node]
        value = tensor_value(node)
        assert value is not None
        heads.append(
            ExitHead(
                kind=kind,
                place=place,
                shape=shape_of(node),
                width=plan.width or min(place.channels, WIDTH),
                classes=shape_of(logits)[1],
                dtype=value.dtype,
                seed=plan.seed * _SEEDS_PER_PLAN + number,
            )
        )
    return ExitPlacement(program, plan, tuple(heads), tail)


def _place(plan: DepthPlan, depth: Depth, number: int) -> ExitPlace:
    """The value that one of the plan's exits names."""
    wanted = plan.exits[number]
    try:
        if isinstance(wanted, str):
            return depth.at_path(wanted)
        return depth.at_fraction(wanted)
    except NoPlaceError as error:
        fail(f"{plan.source}: exits[{number}]", f"{show(wanted)}: {error}")


def _check_order(plan: DepthPlan, depth: Depth, places: list[ExitPlace]) -> None:
    """Every exit lies after the one before it, and before the last layer."""
    program = depth.program
    for number, place in enumerate(places):
        here, name = f"{plan.source}: exits[{number}]", show(plan.exits[number])
        if place.macs >= depth.total:
            fail(
                here,
                f"{name} is reached when all of the network's {depth.total:,} MACs have run, so "
                "that leaving there saves nothing; name an earlier place",
            )
        for earlier, other in enumerate(places[:number]):
            shown = f"{show(plan.exits[earlier])} (exits[{earlier}])"
            if other.node == place.node:
                fail(
                    here,
                    f"{name} is the same value as {shown}, {place}; drop one, or name another "
                    "place",
                )
            if program.by_name[place.node] in depth.before(program.by_name[other.node]):
                fail(
                    here,
                    f"{name} ({place.macs / max(depth.total, 1):.0%} of the MACs) is computed "
                    f"before {shown} ({other.macs / max(depth.total, 1):.0%}); write exits in the "
                    "order of depth",
                )


def _with_preset(plan: DepthPlan, depth: Depth) -> DepthPlan:
    """The plan with the exits that its preset chooses."""
    found = depth.quarters()
    if not found:
        fail(
            f"{plan.source}: preset",
            'the model has no resolution with two places for exits, as "ddi" needs; give "exits" '
            "instead",
        )
    exits = tuple(place.macs / depth.total for place, _ in found)
    kinds = tuple(_DDI_HEADS[min(level, len(_DDI_HEADS) - 1)] for _, level in found)
    if plan.exits and plan.exits != exits:
        fail(
            f"{plan.source}: exits",
            f"these are not the exits that the preset gives this model, "
            f"{show([round(e, 3) for e in exits])}; drop one of the two keys",
        )
    return plan.with_exits(exits, plan.head or kinds)


def _logits(program: Program, plan: DepthPlan) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The model's numbers per class, and what it does to them at the end."""
    leaves = program.output_leaves
    node = leaves[0] if len(leaves) == 1 else None
    rule = (
        "exits along depth are for classifiers, which return one tensor of samples by classes; "
        "name a part that does (--submodule), or cut channels instead"
    )
    if not isinstance(node, fx.Node):
        fail(plan.source, f"the model returns {len(leaves)} values; {rule}")
    value = tensor_value(node)
    if value is None or value.dim() != 2 or not value.is_floating_point():
        form = "a number" if value is None else f"a tensor of shape {_text(value)}"
        fail(plan.source, f"the model returns {form}; {rule}")
    if program.batch is None and batch_dimensions(node) != (0,):
        fail(plan.source, f"the model returns a tensor of shape {_text(value)}; {rule}")
    tail: list[fx.Node] = []
    logits: fx.Node = node
    while (operand := _applied_to(logits)) is not None:
        tail.append(logits)
        logits = operand
    return node, tuple(reversed(tail))


def _text(value: torch.Tensor) -> str:
    return f"({', '.join('N' if not isinstance(n, int) else str(n) for n in value.shape)})"


def _applied_to(node: fx.Node) -> fx.Node | None:
    """What an operator without other operands and without weights is applied to, where both are
    of one shape."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    operands = node.all_input_nodes
    if len(operands) != 1 or operands[0].op == "placeholder" or node.kwargs.get("out"):
        return None
    value, operand = tensor_value(node), tensor_value(operands[0])
    if value is None or operand is None or value.dtype != operand.dtype:
        return None
    return operands[0] if tuple(map(str, value.shape)) == tuple(map(str, operand.shape)) else None
