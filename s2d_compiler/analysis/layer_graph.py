"""The graph of weighted layers: which layer's output another one reads."""

from __future__ import annotations

import networkx as nx
from torch import fx

from s2d_compiler.program import Program
from s2d_compiler.rules.layers import is_layer

#: The node that stands for the program's outputs.
OUTPUT = "output"


def layer_graph(program: Program) -> nx.DiGraph[str]:
    """An edge from every call of a weighted layer to the calls that its result reaches
    without passing through another one; results that reach the output have an edge to
    ``OUTPUT``.

    Returns:
        A directed acyclic graph over names of the program's nodes.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_node(OUTPUT)
    reaching: dict[fx.Node, frozenset[str]] = {}
    for node in program.nodes:
        sources = frozenset().union(*(reaching[n] for n in node.all_input_nodes))
        target = OUTPUT if node.op == "output" else node.name
        if node.op == "output" or is_layer(node):
            graph.add_node(target)
            graph.add_edges_from((source, target) for source in sources)
            sources = frozenset((node.name,))
        reaching[node] = sources
    return graph


def last_layers(graph: nx.DiGraph[str]) -> set[str]:
    """Layer calls all of whose paths end at the output without meeting another layer."""
    return {name for name in graph if name != OUTPUT and list(graph.successors(name)) == [OUTPUT]}
