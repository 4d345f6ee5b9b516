"""Exits along depth: the whole network, with heads after some of its values.

Sources: S2DNAS, section 4 (Naive), BranchyNet, DDI section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from passes.base import EMPTY, EXITS, Pass, PassResult, remove_unused, require_form
from s2d_compiler.attributes import put
from s2d_compiler.errors import PassError
from s2d_compiler.exit_heads import ExitHead
from s2d_compiler.exit_placement import ExitPlacement
from s2d_compiler.program import is_scalar, tensor_value
from s2d_compiler.provenance import Slice
from s2d_compiler.staging import SHARED
from s2d_compiler.thin import place_slices

aten = torch.ops.aten


@dataclass(frozen=True)
class AddDepthExits(Pass):
    """Copy the program whole, say which stage computes what, and give every place its head.

    Stage t computes what its place takes and no earlier one has computed; the last stage is the
    rest, whose exit is the original's output. The output becomes a tuple with one entry per stage.
    """

    name: ClassVar[str] = "add-depth-exits"
    placement: ExitPlacement

    def __repr__(self) -> str:
        return f"AddDepthExits(exits={self.placement.plan.exits})"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, EMPTY)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        work = _Work(graph_module, self.placement)
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        with graph_module.graph.inserting_before(output):
            work.copy_program()
            heads = [work.head(number, head) for number, head in enumerate(self.placement.heads)]
        leaves = self.placement.program.output_leaves
        last = tuple(work.copies[n] if isinstance(n, fx.Node) else n for n in leaves)
        output.args = ((*((head,) for head in heads), last),)
        graph_module.meta["form"] = EXITS
        remove_unused(graph_module.graph)
        return PassResult(graph_module, changed=True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        exits = output.args[0]
        if not isinstance(exits, tuple) or len(exits) != self.placement.stages:
            raise PassError(
                f"{self.name} left {str(exits)[:80]} as output, which must be a tuple of "
                f"{self.placement.stages} exits; give output.args one per stage"
            )


class _Work:
    """The staged graph while it is built."""

    def __init__(self, graph_module: fx.GraphModule, placement: ExitPlacement):
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.placement = placement
        self.program = placement.program
        self.copies: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.stage_of = self._stages()

    def _stages(self) -> dict[fx.Node, int]:
        """The stage of every node: the first whose place it takes to compute, else the last."""
        found: dict[fx.Node, int] = {}
        for stage, head in enumerate(self.placement.heads, start=1):
            stack = [self.program.by_name[head.place.node]]
            while stack:
                node = stack.pop()
                if node not in found:
                    found[node] = stage
                    stack += node.all_input_nodes
        return found

    def copy_program(self) -> None:
        """Put every node of the program into the staged graph."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = iter(inputs)
        for node in self.program.nodes:
            if node.op == "placeholder":
                self.copies[node] = next(given)
            elif node.op != "output":
                self.copies[node] = self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        stage = self.stage_of.get(node, self.placement.stages)
        created = self.graph.node_copy(node, lambda n: self._operand(n, stage))
        created.meta = {k: v for k, v in node.meta.items() if k in ("path", "kind")}
        created.meta |= {"origin": node.name, "stage": stage}
        if node.op in ("call_module", "get_attr"):
            created.target = self._place(node)
        return created

    def _operand(self, node: fx.Node, stage: int) -> fx.Node:
        """What stands for an operand in a stage: a size of the batch is taken from what the stage
        reads anyway, so that the network's input need not be kept for it."""
        earlier = self.placement.heads[stage - 2] if stage > 1 else None
        if earlier is None or not earlier.place.is_cut or not is_scalar(node):
            return self.copies[node]
        if (node, stage) in self.sizes:
            return self.sizes[node, stage]
        place = self.program.by_name[earlier.place.node]
        value, batch = tensor_value(place), earlier.place.batch
        created = self.copies[node]
        if node.target is aten.sym_size.int:
            if value is not None and str(value.shape[batch]) == str(node.meta["val"]):
                arguments = (self.copies[place], batch)
                created = self.graph.call_function(aten.sym_size.int, arguments)
        elif node.op == "call_function" and self.stage_of.get(node) != stage:
            created = self.graph.node_copy(node, lambda n: self._operand(n, stage))
        if created is not self.copies[node]:
            created.meta = {"path": "", "stage": stage}
        self.sizes[node, stage] = created
        return created

    def _place(self, node: fx.Node) -> str:
        """The name of a module or tensor of the program in the staged graph."""
        target, sources = str(node.target), self.program.sources
        if node.op == "get_attr":
            tensor = self.program.attribute(node)
            where = Slice(sources.get(target, target), (None,) * tensor.dim())
            return place_slices(
                self.graph_module,
                f"{SHARED}.{target}",
                {"": (tensor, where)},
                persistent=target in sources,
            )
        module = self.program.module(node)
        slices = {
            key: (tensor, Slice(sources.get(f"{target}.{key}", f"{target}.{key}"),
                                (None,) * tensor.dim()))
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]
        }  # fmt: skip
        return place_slices(self.graph_module, f"{SHARED}.{target}", slices, like=module)

    # -- heads -------------------------------------------------------------------------------------

    def head(self, number: int, head: ExitHead) -> fx.Node:
        """Put a head into the staged graph; returns what its exit returns."""
        source = self.program.by_name[head.place.node]
        value = tensor_value(source)
        device = None if value is None else value.device
        x = self.copies[source]
        positions = list(head.positions)
        *convolutions, (name, linear, _) = head.layers()
        if convolutions and list(head.layer_order) != list(range(len(head.shape))):
            x = self._operator(number, aten.permute.default, x, list(head.layer_order))
        for each, layer, count in convolutions:
            x = self._layer(number, each, layer.to(device), x, count)
            x = self._operator(number, aten.relu.default, x)
        if convolutions:
            positions = [d for d in range(len(head.shape)) if d not in (0, head.layer_channel)]
        if positions:
            x = self._operator(number, aten.mean.dim, x, positions)
        if not convolutions and head.place.channel < head.place.batch:
            x = self._operator(number, aten.transpose.int, x, 0, 1)
        x = self._layer(number, name, linear.to(device), x, 1)
        for node in self.placement.tail:
            operand = node.all_input_nodes[0]
            x = self.graph.node_copy(node, {operand: x}.__getitem__)
            x.meta = {"path": node.meta.get("path", ""), "stage": number + 1}
        return x

    def _operator(self, number: int, target: object, x: fx.Node, *args: object) -> fx.Node:
        created = self.graph.call_function(target, (x, *args))  # type: ignore[arg-type]
        created.meta = {"path": self.placement.head_name, "stage": number + 1}
        return created

    def _layer(
        self, number: int, name: str, layer: nn.Module, x: fx.Node, positions: int
    ) -> fx.Node:
        path = f"{self.placement.head_name}.{name}"
        put(self.graph_module, f"stages.{number}.{path}", layer)
        created = self.graph.call_module(f"stages.{number}.{path}", (x,))
        created.meta = {
            "path": path,
            "kind": type(layer).__name__,
            "stage": number + 1,
            "head": True,
            "head_positions": positions,
        }
        return created
