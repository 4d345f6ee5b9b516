"""Program: a captured static model, the input of every analysis and pass."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.attributes import read

#: Batch size that stands in for the symbolic one wherever a concrete shape is needed.
SAMPLE_BATCH = 2


def _one_node() -> fx.Graph:
    graph = fx.Graph()
    graph.output(())
    return graph


@dataclass(frozen=True)
class Layer:
    """One weighted layer: all call sites of one weight.

    Attributes:
        name: Module path of the first call site; how plans and reports name it.
        weight: State-dict key of the weight in the original.
        nodes: Names of the call sites in the program, in order.
    """

    name: str
    weight: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Dropped:
    """What evaluation-mode capture leaves out of a model.

    Attributes:
        modules: Paths of submodules that ran but left no operator (stochastic depth,
            which is the identity in evaluation mode).
        unused: Paths of submodules whose weights no output depends on (auxiliary heads).
    """

    modules: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A static model as one torch.fx graph of ATen operators and raised layers.

    Weighted operators are ``call_module`` nodes of ``torch.nn`` modules under the module
    path they had in the original; everything else is a ``call_function`` node of an ATen
    operator without side effects. Parameters and buffers are the original's own objects,
    never copies, and no pass writes to them.

    Attributes:
        graph_module: The graph. ``node.meta["val"]`` holds a fake tensor with the shape
            (the batch dimension symbolic), ``node.meta["path"]`` the original module path.
        sources: Attribute of the graph module -> key in the original's state dict, for
            every parameter and buffer of the original.
        batch: None when the batch size is free, else the only one the model accepts.
        input_shapes: Shape of each input without the batch dimension.
        examples: The inputs that it was captured with.
        dropped: What capture left out.
        output_spec: pytree of the original's output; None for a single tensor.
        notes: Sentences about capture that the user should read.
        input_spec: pytree of ``(positional, keyword)`` inputs; None where all are positional
            tensors.
        buffers: Keys in the original's state dict that are buffers; a layer whose weight is
            one holds it as a parameter that needs no gradient.
    """

    graph_module: fx.GraphModule
    sources: Mapping[str, str]
    batch: int | None
    input_shapes: tuple[tuple[int, ...], ...]
    examples: tuple[torch.Tensor, ...] = ()
    dropped: Dropped = field(default_factory=Dropped)
    output_spec: Any = None
    notes: tuple[str, ...] = ()
    input_spec: Any = None
    buffers: frozenset[str] = frozenset()

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph_module.graph.nodes)

    @cached_property
    def by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.nodes}

    @property
    def output(self) -> fx.Node:
        return next(node for node in reversed(list(self.nodes)) if node.op == "output")

    @property
    def output_leaves(self) -> tuple[Any, ...]:
        """The flat outputs: nodes, and what the model returns besides tensors."""
        leaves = self.output.args[0]
        assert isinstance(leaves, list | tuple)
        return tuple(leaves)

    def module(self, node: fx.Node) -> Any:
        """The raised module that a ``call_module`` node calls."""
        assert node.op == "call_module"
        return read(self.graph_module, str(node.target))

    def attribute(self, node: fx.Node) -> torch.Tensor:
        """The tensor that a ``get_attr`` node reads."""
        assert node.op == "get_attr"
        value = read(self.graph_module, str(node.target))
        assert isinstance(value, torch.Tensor)
        return value


#: Names that ``fx.GraphModule`` uses itself.
_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), _one_node()))) - {"0"}


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_SIZE = torch.ops.aten.sym_size.int


def is_plain_name(path: str) -> bool:
    """Whether every part of a dotted name can stand in generated source as it is."""
    return bool(re.fullmatch(r"\w+(\.\w+)*", path, re.ASCII)) and not any(
        keyword.iskeyword(part) for part in path.split(".")
    )


_TAKEN = frozenset(dir(nn.Module()))


def is_reserved(path: str) -> bool:
    """Whether a graph module, or a module inside it, uses a part of a path itself."""
    first, *inside = path.split(".")
    return first in _RESERVED or not _TAKEN.isdisjoint(inside)


def safe_name(path: str) -> str:
    """A module path that a graph module can hold: some names are its own, and generated source
    takes letters, digits and underscores alone."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) or "_" for part in path.split(".")]
    parts = [f"{part}_" if keyword.iskeyword(part) else part for part in parts]
    if parts[0] in _RESERVED:
        parts[0] += "_"
    return ".".join(parts)


def concrete(size: Any, batch: int = SAMPLE_BATCH) -> int:
    """A size with the symbolic batch replaced by a number."""
    return size if isinstance(size, int) else _sampled(size.node.expr, batch)


@lru_cache(maxsize=4096)
def _sampled(expression: Any, batch: int) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def is_symbolic(size: Any) -> bool:
    """Whether a size depends on the batch."""
    return not isinstance(size, int)


def tensor_value(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node with one tensor result, else None."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor at the sample batch; ``()`` for anything else."""
    value = tensor_value(node)
    if value is None:
        return ()
    cached = node.meta.get("sample_shape")
    if cached is None or cached[0] is not value:
        cached = node.meta["sample_shape"] = (value, tuple(concrete(n) for n in value.shape))
    shape: tuple[int, ...] = cached[1]
    return shape


def batch_dimensions(node: fx.Node) -> tuple[int, ...]:
    """Dimensions of a node's tensor whose size depends on the batch."""
    value = tensor_value(node)
    if value is None:
        return ()
    return tuple(d for d, size in enumerate(value.shape) if is_symbolic(size))


def is_scalar(node: fx.Node) -> bool:
    """Whether a node computes a number from sizes alone, not a tensor."""
    return isinstance(node.meta.get("val"), _NUMBERS) and not is_read_number(node)


def is_read_number(node: fx.Node) -> bool:
    """Whether a node computes a number from what a tensor holds."""
    if "read_number" not in node.meta:
        node.meta["read_number"] = isinstance(node.meta.get("val"), _NUMBERS) and any(
            is_read_number(n) or (tensor_value(n) is not None and node.target is not _SIZE)
            for n in node.all_input_nodes
        )
    return bool(node.meta["read_number"])


def path_of(node: fx.Node) -> str:
    """Module path of a node in the original, ``""`` at the top."""
    return str(node.meta.get("path", ""))


def place(node: fx.Node) -> str:
    """A node as messages name it: operator and original module path."""
    path = path_of(node)
    name = operator_name(node)
    return f"{name} in {path!r}" if path else f"{name} (node {node.name!r})"


def operator_name(node: fx.Node) -> str:
    """``aten.relu.default`` for operators, the class name for raised modules."""
    if node.op == "call_module":
        kind = node.meta.get("kind")
        return str(kind) if kind else str(node.target)
    if node.op == "call_function":
        target = node.target
        return (
            str(target)
            if isinstance(target, torch._ops.OpOverload)
            else str(getattr(target, "__name__", target))
        )
    return f"{node.op} {node.target}"
