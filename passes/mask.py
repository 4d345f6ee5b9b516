"""Mask: the whole network, each weight with a mask, an exit per stage.

Sources: S2DNAS, section 3.2; ENAS4D, "Training the Once-for-all Network".
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn

from passes.base import EMPTY, Pass, PassResult, remove_unused, require_form
from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.labels import Labels, has_atoms, is_versioned
from s2d_compiler.attributes import find, is_taken, put
from s2d_compiler.computed import ComputedLayer, weight_shape
from s2d_compiler.errors import PassError
from s2d_compiler.masking.coupled import StageNorm, stage_reduction, stage_softmax
from s2d_compiler.masking.layers import MaskedComputedLayer, MaskedLayer
from s2d_compiler.masking.masks import (
    Later,
    LayerMask,
    Mask,
    Membership,
    NotFirst,
    Own,
    OwnFirst,
)
from s2d_compiler.masking.transfer import ALL, ORIGINAL
from s2d_compiler.program import is_scalar, tensor_value
from s2d_compiler.rules.base import OperatorRule
from s2d_compiler.rules.channelwise import Reduction, Softmax
from s2d_compiler.rules.layers import is_cut_between, is_layer
from s2d_compiler.rules.unknown import UNKNOWN
from s2d_compiler.staging.emitter import VIEWS
from s2d_compiler.thin import meta_copy

aten = torch.ops.aten

MASKED = "masked"


@dataclass(frozen=True)
class MaskChannels(Pass):
    """Copy the program with masks on what it reads, so that one run gives all stages' outputs.

    A value with channels is one tensor, in which every position holds what the stage that owns
    it computes. A weight's rows read what their stage reads. Coupled operators work on every
    stage's channels apart. Versioned values, prediction layers and what follows them exist once
    per stage. With ``"final": "original"`` the untouched program follows, with its own weights.

    Masks are buffers of shapes that no plan changes, zero until the plan is filled in:
    ``meta["masks"]`` says what each is, ``meta["weights"]`` where the original's tensors are.
    """

    name: ClassVar[str] = "mask-channels"
    assignment: StageAssignment

    def __repr__(self) -> str:
        return f"MaskChannels(stages={self.assignment.stages})"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, EMPTY)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        work = _Masking(graph_module, self.assignment)
        with graph_module.graph.inserting_before(output):
            output.args = (work.run(),)
        remove_unused(graph_module.graph)
        graph_module.meta |= {"form": MASKED, "masks": work.masks, "weights": work.names}
        return PassResult(graph_module, changed=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        exits = output.args[0]
        if not isinstance(exits, tuple) or len(exits) != self.assignment.stages:
            raise PassError(
                f"{self.name} left {str(exits)[:80]} as output, which must be a tuple of "
                f"{self.assignment.stages} exits; give output.args one per stage"
            )


#: A value that all stages share, or one per stage.
Held = fx.Node | tuple[fx.Node, ...]


@dataclass
class _Masking:
    """The masked graph while it is built."""

    graph_module: fx.GraphModule
    assignment: StageAssignment
    masks: dict[str, Mask] = field(default_factory=dict)
    names: dict[tuple[int, str], str] = field(default_factory=dict)
    values: dict[fx.Node, Held] = field(default_factory=dict)
    known: dict[Any, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.assignment.program
        self.channels = self.assignment.channels
        self.graph = self.graph_module.graph
        self.stages = range(1, self.assignment.thin_stages + 1)
        self.tensors: dict[tuple[int, str], torch.Tensor] = {}
        self.called = {str(n.target) for n in self.program.nodes if n.op == "call_module"}
        taken = {str(n.target).partition(".")[0] for n in self.program.nodes}
        self.prefix = {
            name: name + "_" * sum(t.rstrip("_") == name for t in taken)
            for name in ("exits", "original", "masks", "tensors")
        }
        families = self.channels.families
        always = [family.atoms[: max(family.pinned, len(family.atoms) == 1)] for family in families]
        self.always_first = [atom for atoms in always for atom in atoms]
        self.inputs = [n for n in self.graph.nodes if n.op == "placeholder"]

    def run(self) -> tuple[tuple[Any, ...], ...]:
        given = iter(self.inputs)
        for node in self.program.nodes:
            if node.op == "placeholder":
                self.values[node] = next(given)
            elif node.op != "output":
                self.values[node] = self.masked(node)
        leaves = self.program.output_leaves
        exits = [
            tuple(self.seen(n, stage) if isinstance(n, fx.Node) else n for n in leaves)
            for stage in self.stages
        ]
        if self.assignment.plan.final == "original":
            exits.append(self.original())
        return tuple(exits)

    # -- values -----------------------------------------------------------------------------------

    def labels(self, node: fx.Node) -> Labels:
        return self.channels.labels[node.name]

    def of(self, node: fx.Node, stage: int) -> fx.Node:
        """A value as a stage has it, channels of later stages included."""
        held = self.values[node]
        return held[stage - 1] if isinstance(held, tuple) else held

    def seen(self, node: fx.Node, stage: int) -> fx.Node:
        """A value as a stage sees it: zero where later stages own."""
        value = self.of(node, stage)
        if is_scalar(node) or tensor_value(node) is None or not has_atoms(self.labels(node)):
            return value
        if stage == self.assignment.stages:
            return value
        later = self.mask(Later(self.labels(node), stage), ("later", node.name, stage))
        return self.emit(aten.masked_fill.Scalar, (value, later, 0), node)

    def is_versioned(self, node: fx.Node) -> bool:
        return any(isinstance(self.values[n], tuple) for n in node.all_input_nodes)

    def masked(self, node: fx.Node) -> Held:
        """The node's value, or values."""
        if node.op == "get_attr":
            return self.attribute(str(node.target), ALL, node)
        if is_scalar(node):
            copied = self.graph.node_copy(node, lambda n: self.of(n, 1))
            copied.meta = _meta(node)
            return copied
        rule, name = self.channels.rules[node.name], node.name
        if name in self.channels.predictions:
            return tuple(self.layer(node, k, k) for k in self.stages)
        if name in self.channels.coupled:
            return self.coupled(node, rule)
        if rule is UNKNOWN and is_versioned(self.labels(node)):
            return tuple(self.apply(node, self.seen, k) for k in self.stages)
        if is_layer(node) and name in self.channels.layer_of:
            return self.repeated(node, lambda k: self.layer(node, k))
        return self.repeated(node, lambda k: self.apply(node, self.of, k))

    def repeated(self, node: fx.Node, compute: Callable[[int], fx.Node]) -> Held:
        """Once where all stages have the same operands, else once per stage."""
        labels = self.labels(node)
        own = is_versioned(labels) or has_atoms(labels)
        if not own or not (self.is_versioned(node) or node.name in self.channels.heads):
            return compute(1)
        if np.isin(labels, self.always_first).all():
            return compute(1)
        found = tuple(compute(k) for k in self.stages)
        if not has_atoms(labels):
            return found
        if not is_versioned(labels):
            return self.chosen(node, found, found[0])
        return tuple(self.chosen(node, found, version) for version in found)

    def chosen(self, node: fx.Node, found: tuple[fx.Node, ...], result: fx.Node) -> fx.Node:
        """At every position what its owner computes, of several versions of a value."""
        for stage, version in zip(self.stages, found, strict=True):
            if version is not result:
                own = self.mask(Own(self.labels(node), stage), ("own", node.name, stage))
                result = self.emit(aten.where.self, (own, version, result), node)
        return result

    def apply(self, node: fx.Node, read: Callable[[fx.Node, int], fx.Node], stage: int) -> fx.Node:
        """The node's own operator."""

        def operand(n: fx.Node) -> fx.Node:
            return self.of(n, stage) if is_scalar(n) else read(n, stage)

        args = fx.map_arg(node.args, operand)
        kwargs = fx.map_arg(dict(node.kwargs), operand)
        if node.op == "call_module":
            whose = stage if node.name in self.channels.heads else ALL
            return self.call(self.module(node, whose, lambda module: module), args, node)
        return self.emit(VIEWS.get(node.target, node.target), args, node, kwargs)

    # -- layers -----------------------------------------------------------------------------------

    def layer(self, node: fx.Node, stage: int, head: int | None = None) -> fx.Node:
        """A weighted layer, called with its mask."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        what = self.layer_mask(node, head)
        whose = ALL if head is None else head

        def build(module: nn.Module) -> nn.Module:
            if isinstance(module, ComputedLayer):
                return MaskedComputedLayer(module, what)
            return MaskedLayer(module)

        args = [self.of(source, stage)]
        if self.is_masked(node):
            args.append(self.mask(what, (what.layer, head, what.columns.tobytes())))
        return self.call(self.module(node, whose, build), tuple(args), node)

    def is_masked(self, node: fx.Node) -> bool:
        """Whether any plan kills a weight of a layer."""
        layer = self.channels.layers[self.channels.layer_of[node.name]]
        cut_between = is_cut_between(self.program.module(node))
        return not cut_between and any(has_atoms(columns) for columns in layer.columns)

    def layer_mask(self, node: fx.Node, head: int | None) -> LayerMask:
        name = self.channels.layer_of[node.name]
        layer, module = self.channels.layers[name], self.program.module(node)
        shape, groups = weight_shape(module), int(getattr(module, "groups", 1))
        transposed = bool(getattr(module, "transposed", False))
        return LayerMask(
            layer=name,
            columns=layer.columns[layer.layer.nodes.index(node.name)],
            outputs=shape[1] * groups if transposed else shape[0],
            groups=groups,
            transposed=transposed,
            rank=len(shape),
            stage=head,
        )

    # -- coupled operators ------------------------------------------------------------------------

    def coupled(self, node: fx.Node, rule: OperatorRule) -> Held:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        labels, value = self.labels(source), self.of(source, 1)
        own = [
            self.mask(Own(labels, k), ("own", source.name, k))
            for k in range(1, self.assignment.thin_stages + 1)
        ]
        if isinstance(rule, Softmax):
            args = (node.target, value, own, *node.args[1:])
            return self.emit(stage_softmax, args, node, dict(node.kwargs))
        if isinstance(rule, Reduction):
            later = self.mask(Later(labels, 1), ("later", source.name, 1))
            args = (node.target, value, own, later, *node.args[1:])
            found = self.emit(stage_reduction, args, node, dict(node.kwargs))
            return tuple(self.emit(operator.getitem, (found, k - 1), node) for k in self.stages)
        if is_layer(node):
            return self.along_channels(node, labels, value)
        if isinstance(groups := getattr(self.program.module(node), "num_groups", 1), int):
            labels = labels.reshape(groups, -1).max(axis=0)
        member = self.mask(Membership(labels), ("member", node.name))
        return self.call(self.module(node, ALL, _stage_norm), (value, member), node)

    def along_channels(self, node: fx.Node, labels: Labels, value: fx.Node) -> fx.Node:
        """A convolution that moves along channels: every stage's brought together before it."""
        dimension = int(np.argmax(labels.shape))
        name = self.module(node, ALL, lambda module: module)
        found = []
        for k in self.stages:
            order = self.mask(OwnFirst(labels, k), ("order", node.name, k))
            back = self.mask(OwnFirst(labels, k, inverse=True), ("back", node.name, k))
            others = self.mask(NotFirst(labels, k, labels.ndim, dimension), ("not", node.name, k))
            part = self.emit(aten.index_select.default, (value, dimension, order), node)
            part = self.emit(aten.masked_fill.Scalar, (part, others, 0), node)
            part = self.call(name, (part,), node)
            found.append(self.emit(aten.index_select.default, (part, dimension, back), node))
        return self.chosen(node, tuple(found), found[0])

    # -- the untouched network --------------------------------------------------------------------

    def original(self) -> tuple[Any, ...]:
        """The program's own outputs, by its own weights."""
        copies: dict[fx.Node, fx.Node] = {}
        given = iter(self.inputs)
        for node in self.program.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "get_attr":
                copies[node] = self.attribute(str(node.target), ORIGINAL, node)
            elif node.op == "call_module":
                name = self.module(node, ORIGINAL, lambda module: module)
                copies[node] = self.call(name, fx.map_arg(node.args, copies.__getitem__), node)
            elif node.op != "output":
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
                copies[node].target = VIEWS.get(node.target, node.target)
                copies[node].meta = _meta(node)
        return tuple(copies[n] if isinstance(n, fx.Node) else n for n in self.program.output_leaves)

    # -- nodes, modules and tensors ---------------------------------------------------------------

    def emit(
        self, target: Any, args: Any, like: fx.Node, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        created = self.graph.call_function(target, tuple(args), kwargs or {})
        created.meta = _meta(like)
        return created

    def call(self, name: str, args: Any, like: fx.Node) -> fx.Node:
        created = self.graph.create_node("call_module", name, tuple(args))
        created.meta = _meta(like)
        return created

    def mask(self, what: Mask, key: Any) -> fx.Node:
        """A buffer that a plan fills."""
        if key not in self.known:
            name = f"{self.prefix['masks']}.m{len(self.masks)}"
            array = what.array(self.assignment)
            kind = torch.from_numpy(np.ascontiguousarray(array))
            if isinstance(what, LayerMask | Membership):
                kind = kind.to(self.weight_type())
            put(self.graph_module, name, torch.zeros_like(kind), saved=False)
            self.masks[name] = what
            self.known[key] = self.graph.get_attr(name)
            self.known[key].meta = {"stage": 0}
            # before all that may read it
            self.inputs[-1].append(self.known[key])
        return self.known[key]

    def weight_type(self) -> torch.dtype:
        """The floating type of the weights."""
        for parameter in self.program.graph_module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    def place(self, target: str, whose: int) -> str:
        if whose == ALL:
            return target
        if whose == ORIGINAL:
            return f"{self.prefix['original']}.{target}"
        return f"{self.prefix['exits']}.{whose - 1}.{target}"

    def module(self, node: fx.Node, whose: int, build: Callable[[nn.Module], nn.Module]) -> str:
        """A module of the program with tensors of its own; its name."""
        target = str(node.target)
        name = self.place(target, whose)
        if not is_taken(self.graph_module, name):
            module = self.program.module(node)
            copied = meta_copy(module)
            for held in (copied._parameters, copied._buffers):
                for key, shape in held.items():
                    if shape is not None and shape.is_meta:
                        held[key] = self.tensor(f"{target}.{key}", whose, f"{name}.{key}")
            put(self.graph_module, name, build(copied))
        return name

    def tensor(self, target: str, whose: int, name: str) -> Any:
        """A copy of one of the program's tensors, the same one for the same tensor."""
        source = self.program.sources.get(target, target)
        if (whose, source) not in self.tensors:
            original = find(self.program.graph_module, target)
            copied = original.detach().clone()
            if isinstance(original, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=original.requires_grad)
            self.tensors[whose, source] = copied
            self.names[whose, source] = name
        return self.tensors[whose, source]

    def attribute(self, target: str, whose: int, like: fx.Node) -> fx.Node:
        """A tensor used by itself, kept apart from modules that hold it as well."""
        inside = {target[:i] for i, character in enumerate(target) if character == "."}
        held = f"{self.prefix['tensors']}.{target.replace('.', '_')}"
        name = self.place(held if inside & self.called else target, whose)
        if find(self.graph_module, name) is None:
            tensor = self.tensor(target, whose, name)
            put(self.graph_module, name, tensor, saved=target in self.program.sources)
        created = self.graph.get_attr(name)
        created.meta = _meta(like)
        return created


def _stage_norm(module: Any) -> nn.Module:
    return StageNorm(module)


def _meta(node: fx.Node) -> dict[str, Any]:
    return {"stage": 0, "path": node.meta.get("path", ""), "origin": node.name}
