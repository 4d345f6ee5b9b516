"""Emitter: creates nodes of a staged graph, an equal one only once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.channels import layer_positions
from s2d_compiler.attributes import find, put
from s2d_compiler.layout import Positions
from s2d_compiler.provenance import Slice
from s2d_compiler.thin import meta_copy, place_slices

aten = torch.ops.aten

#: Views hold for the static program's memory layout only.
VIEWS: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
PART, VERSION, NOBODYS = "part", "version", "nobody"
SHARED = "shared"


class Emitter:
    """Creates nodes of a staged graph.

    Args:
        graph_module: The staged graph; see ``new_staged_graph``.
        assignment: Owners and reads.
        reuse: Whether dense layers read what the plan's concat settings let them.
    """

    def __init__(
        self, graph_module: fx.GraphModule, assignment: StageAssignment, *, reuse: bool = False
    ):
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.assignment = assignment
        self.program = assignment.program
        self.channels = assignment.channels
        self.reuse = reuse
        self.slices: dict[str, Slice] = graph_module.meta["slices"]
        self.sources: dict[tuple[str, str, int], fx.Node] = {}
        self.expressions: dict[Any, fx.Node] = {}
        self.positions: dict[tuple[str, str, int], Positions] = {}
        self.weight_expressions: dict[str, bool] = {}
        self.last_moved: tuple[Any, Any] | None = None
        self.before: fx.Node | None = None
        for node in self.graph.nodes:
            self._remember(node)

    def _remember(self, node: fx.Node) -> None:
        for source in node.meta.get("sources", ()):
            self.sources[source] = node
        if (key := _expression_key(node)) is not None:
            self.expressions.setdefault(key, node)

    @contextlib.contextmanager
    def inserting_before(self, node: fx.Node) -> Iterator[None]:
        """Emit before a node of the staged graph."""
        self.before = node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self.before = None

    # -- operators and modules --------------------------------------------------------------------

    def emit(self, node: fx.Node, args: Any, kwargs: dict[str, Any], stage: int) -> fx.Node:
        """The static node's operator, applied to staged operands."""
        if node.op == "call_module":
            return self._weightless(node, args, stage)
        return self.call(VIEWS.get(node.target, node.target), tuple(args), node, stage, kwargs)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        stage: int,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """An operator call; an equal one that exists is used again."""
        key = _key("call_function", target, args, kwargs or {})
        found = self.expressions.get(key) if key is not None else None
        if found is not None:
            return self._used_again(found, stage)
        created = self.graph.call_function(target, args, kwargs or {})
        return self._finish(created, like, stage)

    def _used_again(self, found: fx.Node, stage: int) -> fx.Node:
        """An existing node for one more reader, which may be earlier in the graph."""
        found.meta["stage"] = min(found.meta["stage"], stage)
        if self.before is not None and self.before < found:
            self.before.prepend(found)
        return found

    def _weightless(self, node: fx.Node, args: Any, stage: int) -> fx.Node:
        """A module without weights (dropout), one per stage that uses it."""
        module = self.program.module(node)
        name = self._module_name(str(node.target), stage)
        if find(self.graph_module, name) is None:
            self.graph_module.add_submodule(name, meta_copy(module))
        return self._finish(self._module_call(name, args), node, stage)

    def _module_call(self, name: str, args: Any) -> fx.Node:
        """A call of a module; whether it exists is for the verifier to say, of all at once."""
        return self.graph.create_node("call_module", name, tuple(args))

    def _module_name(self, path: str, stage: int) -> str:
        return f"{SHARED}.{path}" if stage < 1 else f"stages.{stage - 1}.{path}"

    def whole_module(self, node: fx.Node, args: Any, stage: int) -> fx.Node:
        """A weighted module at full size: one for all stages, or one per head."""
        path = str(node.target)
        name = (
            f"stages.{stage - 1}.{path}"
            if node.name in self.channels.heads and stage
            else f"{SHARED}.{path}"
        )
        module = self.program.module(node)
        slices = {
            key: (tensor, self._whole_slice(path, key, tensor))
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        name = place_slices(self.graph_module, name, slices, like=module)
        return self._layer_call(name, args, node, stage)

    def _whole_slice(self, path: str, key: str, tensor: torch.Tensor) -> Slice:
        source = self.program.sources.get(f"{path}.{key}", f"{path}.{key}")
        return Slice(source, (None,) * tensor.dim())

    def _layer_call(self, name: str, args: Any, node: fx.Node, stage: int) -> fx.Node:
        key = _key("call_module", name, tuple(args), {})
        if key is not None and key in self.expressions:
            return self._used_again(self.expressions[key], stage)
        created = self._finish(self._module_call(name, args), node, stage)
        created.meta["kind"] = node.meta.get("kind")
        if node.name in self.channels.layer_of or node.meta.get("kind") in ("Linear", "Conv2d"):
            created.meta["positions"] = layer_positions(node)
        return created

    def _finish(self, created: fx.Node, like: fx.Node, stage: int) -> fx.Node:
        created.meta["stage"] = stage
        created.meta["origin"] = like.meta.get("origin", like.name)
        created.meta["path"] = like.meta.get("path", "")
        if (key := _expression_key(created)) is not None:
            self.expressions[key] = created
        return created

    # -- attributes -------------------------------------------------------------------------------

    def attribute_name(self, target: str) -> str:
        """Where a tensor used by itself is kept: apart from modules that hold it as well."""
        inside = [target[:i] for i, character in enumerate(target) if character == "."]
        modules = {str(n.target) for n in self.program.nodes if n.op == "call_module"}
        return f"_tensors.{target.replace('.', '_')}" if modules & set(inside) else target

    def attribute(
        self,
        name: str,
        target: str,
        value: torch.Tensor,
        index: tuple[tuple[int, ...] | None, ...],
        like: fx.Node,
        stage: int,
    ) -> fx.Node:
        """A tensor attribute of the staged graph that holds a slice of an original tensor."""
        source = self.program.sources.get(target)
        name = place_slices(
            self.graph_module,
            name,
            {"": (value, Slice(source or target, index))},
            persistent=source is not None,
        )
        key = ("get_attr", name)
        if key in self.expressions:
            return self._used_again(self.expressions[key], stage)
        created = self.graph.get_attr(name)
        return self._finish(created, like, stage)

    def _index(self, index: list[int], like: fx.Node) -> fx.Node:
        indices: dict[tuple[int, ...], str] = self.graph_module.meta["indices"]
        key = tuple(index)
        if key not in indices:
            indices[key] = f"_indices.i{len(indices)}"
            values = torch.tensor(index, dtype=torch.long)
            put(self.graph_module, indices[key], values, saved=False)
        return self.get_attr(indices[key], like)

    def get_attr(self, name: str, like: fx.Node) -> fx.Node:
        key = ("get_attr", name)
        if key not in self.expressions:
            return self._finish(self.graph.get_attr(name), like, 0)
        return self._used_again(self.expressions[key], 0)

    # -- small rewrites ---------------------------------------------------------------------------

    def select(
        self, source: fx.Node, dimension: int, index: list[int], like: fx.Node, stage: int
    ) -> fx.Node:
        """Pick positions along one dimension: a slice where they are evenly spaced."""
        step = index[1] - index[0] if len(index) > 1 else 1
        if step > 0 and index == list(range(index[0], index[0] + step * len(index), step)):
            stop = index[-1] + 1
            args = (
                (source, dimension, index[0], stop)
                if step == 1
                else (source, dimension, index[0], stop, step)
            )
            return self.call(aten.slice.Tensor, args, like, stage)
        return self.call(
            aten.index_select.default, (source, dimension, self._index(index, like)), like, stage
        )

    def reshape(
        self,
        part: fx.Node,
        held: tuple[int, ...] | None,
        target: tuple[int, ...],
        symbolic: Iterable[int],
        like: fx.Node,
        stage: int,
    ) -> fx.Node:
        """Reshape a part; nothing at all if it has the shape already."""
        if held == target:
            return part
        free = set(symbolic)
        sizes = [-1 if d in free else n for d, n in enumerate(target)]
        return self.call(aten.reshape.default, (part, sizes), like, stage)

    def replace_source(self, old: fx.Node, new: fx.Node) -> None:
        """Let one node stand for what another one stood for."""
        for source in old.meta.get("sources", ()):
            self.sources[source] = new
            new.meta["sources"] = [*new.meta.get("sources", ()), source]


def _expression_key(node: fx.Node) -> Any:
    if node.op == "get_attr":
        return ("get_attr", str(node.target))
    if node.op not in ("call_function", "call_module") or "stage" not in node.meta:
        return None
    return _key(node.op, node.target, node.args, node.kwargs)


def _key(op: str, target: Any, args: Any, kwargs: Any) -> Any:
    """A hashable key of a call, None for what must not be shared."""
    if isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    ):
        return None

    # one flat tuple: nested ones are so many that collecting garbage takes longer than this
    parts: list[Any] = [op, target]

    def add(value: Any) -> None:
        if isinstance(value, list | tuple):
            parts.extend((type(value).__name__[:1], len(value)))
            for item in value:
                add(item)
        elif isinstance(value, dict):
            parts.extend(("d", len(value)))
            for key, item in sorted(value.items()):
                parts.append(key)
                add(item)
        else:
            parts.extend((type(value), value))

    add(args)
    add(kwargs)
    return tuple(parts)
