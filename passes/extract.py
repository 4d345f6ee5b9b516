"""Extract: one subgraph per stage, handing on only what a later stage needs."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from passes.base import EXITS, STAGES, Pass, PassResult, require_form
from s2d_compiler.attributes import empty_graph_module, find, is_container, is_saved, put, read
from s2d_compiler.provenance import Slice
from s2d_compiler.staging import SHARED

aten = torch.ops.aten


@dataclass(frozen=True)
class ExtractStages(Pass):
    """Cut a staged graph with one output per stage into stage subgraphs.

    The result's graph calls ``stages.0``, ``stages.1``, ...; each is a ``GraphModule`` that
    takes program inputs and features of earlier stages and returns its exit's outputs and
    the features that later stages read. What is nobody's is computed in the first stage that
    needs it. Modules that several stages use are one object.
    """

    name: ClassVar[str] = "extract-stages"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, EXITS)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        work = _Extraction(graph_module)
        return PassResult(work.run(), changed=True)


@dataclass
class _Extraction:
    graph_module: fx.GraphModule
    stage_of: dict[fx.Node, int] = field(default_factory=dict)
    slices: dict[str, list[tuple[str, Slice]]] = field(default_factory=dict)

    def run(self) -> fx.GraphModule:
        graph = self.graph_module.graph
        output = next(node for node in graph.nodes if node.op == "output")
        self.exits: list[tuple[Any, ...]] = list(output.args[0])
        self._place(output)
        self._localise_sizes()
        result = empty_graph_module("DynamicNetwork")
        result.meta["form"] = STAGES
        result.meta["slices"] = {}
        environment = {
            node: result.graph.placeholder(str(node.target))
            for node in graph.nodes
            if node.op == "placeholder"
        }
        predictions: list[fx.Node] = []
        for stage in range(1, len(self.exits) + 1):
            predictions.append(self._call(result, stage, environment))
        result.graph.output(tuple(predictions))
        return result

    def _place(self, output: fx.Node) -> None:
        """Stage of every node: its own, and for what is nobody's the first that needs it."""
        last = len(self.exits)
        for node in reversed(list(self.graph_module.graph.nodes)):
            if node.op in ("placeholder", "output"):
                continue
            users = [self.stage_of[u] for u in node.users if u in self.stage_of]
            users += [t for t, leaves in enumerate(self.exits, start=1) if node in leaves]
            tagged = int(node.meta["stage"])
            self.stage_of[node] = tagged or min(users, default=last)

    def _is_local(self, node: fx.Node) -> bool:
        """Attributes and sizes are made again in every stage that uses them."""
        return (
            node.op == "get_attr" or node.target is aten.sym_size.int or self._is_arithmetic(node)
        )

    def _is_arithmetic(self, node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and not isinstance(node.target, torch._ops.OpOverload)
            and node.target is not operator.getitem
        )

    def _localise_sizes(self) -> None:
        """A batch size belongs to no stage: each one takes it again from a tensor."""
        for node in list(self.graph_module.graph.nodes):
            if node.target is aten.sym_size.int:
                self.stage_of.pop(node, None)

    def _call(
        self, result: fx.GraphModule, stage: int, environment: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        part = _StageGraph(self, stage)
        handed = [
            node
            for node in part.own
            if not self._is_local(node)
            and (
                any(self.stage_of.get(user, 0) > stage for user in self._real_users(node))
                or any(node in leaves for leaves in self.exits[stage:])
            )
        ]
        part.finish(self.exits[stage - 1], handed)
        module = part.graph_module()
        result.add_submodule(f"stages.{stage - 1}", module)
        for key, where in part.slices.items():
            result.meta["slices"][f"stages.{stage - 1}.{key}"] = where
        called = result.graph.call_module(
            f"stages.{stage - 1}", tuple(environment[n] for n in part.inputs)
        )
        prediction = result.graph.call_function(operator.getitem, (called, 0))
        if handed:
            features = result.graph.call_function(operator.getitem, (called, 1))
            for position, node in enumerate(handed):
                environment[node] = result.graph.call_function(
                    operator.getitem, (features, position)
                )
        return prediction

    def slices_of(self, target: str) -> list[tuple[str, Slice]]:
        """Slices of one module or attribute of the staged graph."""
        if not self.slices:
            for key, where in self.graph_module.meta["slices"].items():
                self.slices.setdefault(key, []).append((key, where))
                self.slices.setdefault(key.rpartition(".")[0], []).append((key, where))
        return self.slices.get(target, [])

    def _real_users(self, node: fx.Node) -> list[fx.Node]:
        """Users of a node, through the sizes that are taken again in their stage."""
        found: list[fx.Node] = []
        for user in node.users:
            found += self._real_users(user) if self._is_local(user) else [user]
        return found


class _StageGraph:
    """One stage's graph while it is built."""

    def __init__(self, work: _Extraction, stage: int):
        self.work = work
        self.stage = stage
        self.graph = fx.Graph()
        self.root = empty_graph_module(f"Stage{stage}")
        self.slices: dict[str, Slice] = {}
        self.map: dict[fx.Node, fx.Node] = {}
        self.inputs: list[fx.Node] = []
        self.own = [n for n, s in work.stage_of.items() if s == stage]
        order = {n: i for i, n in enumerate(work.graph_module.graph.nodes)}
        self.own.sort(key=order.__getitem__)
        self.own_set = set(self.own)
        for node in self._needed_inputs(order):
            self.inputs.append(node)
            self.map[node] = self.graph.placeholder(node.name)
            self.map[node].meta = dict(node.meta)
        for node in self.own:
            if not work._is_local(node):
                self._copy(node)

    def _needed_inputs(self, order: dict[fx.Node, int]) -> list[fx.Node]:
        needed: set[fx.Node] = set()

        def visit(node: fx.Node) -> None:
            for operand in node.all_input_nodes:
                if self.work._is_local(operand):
                    visit(operand)
                elif operand not in self.own_set:
                    needed.add(operand)

        for node in self.own:
            if not self.work._is_local(node):
                visit(node)
        for leaf in self.work.exits[self.stage - 1]:
            if isinstance(leaf, fx.Node) and self.work._is_local(leaf):
                visit(leaf)
            elif isinstance(leaf, fx.Node) and leaf not in self.own_set:
                needed.add(leaf)
        return sorted(needed, key=order.__getitem__)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self.map:
            return self.map[node]
        for operand in node.all_input_nodes:
            if operand not in self.map:
                self._copy(operand)
        if node.op in ("get_attr", "call_module"):
            target = self._adopt(str(node.target))
            created = self.graph.create_node(
                node.op, target, fx.map_arg(node.args, self.map.__getitem__), name=node.name
            )
            created.meta = dict(node.meta)
        else:
            created = self.graph.node_copy(node, self.map.__getitem__)
        self.map[node] = created
        return created

    def _adopt(self, target: str) -> str:
        """Take an attribute of the staged graph into this stage; returns its name here."""
        prefix = f"stages.{self.stage - 1}."
        name = target.removeprefix(prefix if target.startswith(prefix) else f"{SHARED}.")
        value = read(self.work.graph_module, target)
        name = _install(self.root, name, value, is_saved(self.work.graph_module, target))
        for key, where in self.work.slices_of(target):
            self.slices[name + key[len(target) :]] = where
        return name

    def finish(self, prediction: tuple[Any, ...], handed: list[fx.Node]) -> None:
        leaves = tuple(self._copy(n) if isinstance(n, fx.Node) else n for n in prediction)
        self.graph.output((leaves, tuple(self.map[n] for n in handed)))

    def graph_module(self) -> fx.GraphModule:
        self.root.graph = self.graph
        self.graph.lint()
        return self.root


def _install(root: nn.Module, name: str, value: Any, saved: bool) -> str:
    """Put a module or tensor under a dotted name, with a suffix if something else is there."""
    candidate, count = name, 1
    while (found := find(root, candidate)) is not None:
        if found is value:
            return candidate
        if is_container(found) and isinstance(value, nn.Module):
            break
        count += 1
        candidate = f"{name}_{count}"
    put(root, candidate, value, saved=saved)
    return candidate
