"""Append the untouched network as the last stage (``"final": "original"``)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from passes.base import STAGES, Pass, PassResult, require_form
from s2d_compiler.attributes import empty_like, graph_module, is_taken, put, read
from s2d_compiler.program import Program
from s2d_compiler.provenance import Slice
from s2d_compiler.thin import meta_copy


@dataclass(frozen=True)
class AppendOriginal(Pass):
    """Add one more stage: the original program, run whole from the inputs.

    It reads no features, so that whatever reaches it gets exactly the original's answer.
    """

    name: ClassVar[str] = "append-original"
    program: Program

    def __repr__(self) -> str:
        return "AppendOriginal()"

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_form(graph_module, self.name, STAGES)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        output = next(node for node in graph.nodes if node.op == "output")
        exits = tuple(output.args[0])
        name = f"stages.{len(exits)}"
        stage, slices = whole_stage(self.program, f"Stage{len(exits) + 1}")
        graph_module.add_submodule(name, stage)
        graph_module.meta["slices"].update({f"{name}.{k}": v for k, v in slices.items()})
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_before(output):
            called = graph.call_module(name, tuple(inputs))
            prediction = graph.call_function(operator.getitem, (called, 0))
        output.args = ((*exits, prediction),)
        return PassResult(graph_module, changed=True)


def whole_stage(program: Program, class_name: str) -> tuple[fx.GraphModule, dict[str, Slice]]:
    """The program as one stage, its modules on the meta device."""
    graph = fx.Graph()
    map_: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
    slices: dict[str, Slice] = {}
    for node in program.nodes:
        if node.op == "output":
            break
        map_[node] = graph.node_copy(node, map_.__getitem__)
        map_[node].meta = {k: v for k, v in node.meta.items() if k in ("path", "kind")} | {
            "origin": node.name
        }
        if node.op in ("call_module", "get_attr"):
            _copy_attribute(program, root, str(node.target), slices)
    leaves = tuple(map_[n] if isinstance(n, fx.Node) else n for n in program.output_leaves)
    graph.output((leaves, ()))
    return graph_module(root, graph, class_name), slices


def _copy_attribute(
    program: Program, root: nn.Module, target: str, slices: dict[str, Slice]
) -> None:
    value = read(program.graph_module, target)
    if is_taken(root, target):
        return
    if isinstance(value, nn.Module):
        put(root, target, meta_copy(value))
        for key, tensor in [*value.named_parameters(), *value.named_buffers()]:
            name = f"{target}.{key}"
            slices[name] = Slice(program.sources.get(name, name), (None,) * tensor.dim())
        return
    slices[target] = Slice(program.sources.get(target, target), (None,) * value.dim())
    put(root, target, empty_like(value, tuple(value.shape)), saved=target in program.sources)
