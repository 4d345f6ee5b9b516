"""Staged graphs: reading parts of values and emitting the nodes of stages.

Passes rewrite one *staged graph*: a torch.fx graph in which a value of the static program is
present as parts, one per stage that owns channels of it. The builder keeps no state of its
own between passes; everything it needs to know stands in the graph:

- ``node.meta["sources"]``: what it stands for, as (static node's name, kind, stage), kind
  being ``"part"``, ``"version"`` or ``"nobody"``;
- ``node.meta["stage"]``: the stage that computes it, 0 for what is nobody's;
- ``graph_module.meta["slices"]``: attribute -> Slice, for modules that are still shapes on
  the meta device.
"""

from torch import fx, nn

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.program import Program
from s2d_compiler.staging.builder import StageBuilder
from s2d_compiler.staging.emitter import NOBODYS, PART, SHARED, VERSION

__all__ = [
    "NOBODYS",
    "PART",
    "SHARED",
    "VERSION",
    "StageBuilder",
    "new_staged_graph",
    "staged_graph_of",
]


def new_staged_graph(assignment: StageAssignment) -> fx.GraphModule:
    """An empty staged graph with the program's inputs."""
    return staged_graph_of(assignment.program)


def staged_graph_of(program: Program) -> fx.GraphModule:
    """Like ``new_staged_graph``, of a program."""
    graph = fx.Graph()
    for node in program.nodes:
        if node.op == "placeholder":
            created = graph.placeholder(node.name)
            created.meta = {
                "stage": 0,
                "origin": node.name,
                "path": "",
                "sources": [(node.name, NOBODYS, 0)],
            }
    graph.output(((),))
    result = fx.GraphModule(nn.Module(), graph, class_name="Staged")
    result.meta["form"] = "empty"
    result.meta["slices"] = {}
    result.meta["indices"] = {}
    return result
