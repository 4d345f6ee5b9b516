"""Append the untouched network as the last stage (``"final": "original"``)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from passes.base import STAGES, Pass, PassResult, require_form
from passes.extract import keep_unsaved
from s2d_compiler.program import Program, attribute
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
    result = fx.GraphModule(root, graph, class_name=class_name)
    keep_unsaved(root, result)
    return result, slices


def _copy_attribute(
    program: Program, root: nn.Module, target: str, slices: dict[str, Slice]
) -> None:
    value = attribute(program.graph_module, target)
    *containers, last = target.split(".")
    module = root
    for part in containers:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if last in module._modules or last in module._parameters or last in module._buffers:
        return
    if isinstance(value, nn.Module):
        module.add_module(last, meta_copy(value))
        for key, tensor in [*value.named_parameters(), *value.named_buffers()]:
            name = f"{target}.{key}"
            slices[name] = Slice(program.sources.get(name, name), (None,) * tensor.dim())
        return
    slices[target] = Slice(program.sources.get(target, target), (None,) * value.dim())
    if isinstance(value, nn.Parameter):
        module.register_parameter(
            last, nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        )
    else:
        module.register_buffer(
            last, value.detach().to("meta"), persistent=target in program.sources
        )
