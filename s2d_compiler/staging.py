"""StageBuilder: reads and emits the nodes of stages.

Passes rewrite one *staged graph*: a torch.fx graph in which a value of the static program is
present as parts, one per stage that owns channels of it. The builder keeps no state of its
own between passes; everything it needs to know stands in the graph:

- ``node.meta["source"]``: (static node's name, kind, stage), kind being ``"part"``,
  ``"version"`` or ``"nobody"``;
- ``node.meta["stage"]``: the stage that computes it, 0 for what is nobody's;
- ``graph_module.meta["slices"]``: attribute -> Slice, for modules that are still shapes on
  the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from s2d_compiler.analysis.assignment import StageAssignment
from s2d_compiler.analysis.channels import constant_value, layer_positions
from s2d_compiler.analysis.labels import NOBODY, VERSIONED, ZERO, Labels
from s2d_compiler.errors import PassError
from s2d_compiler.layout import (
    Frame,
    Layout,
    Positions,
    box_positions,
    channel_dimensions,
    coordinates,
    layout,
    packing,
)
from s2d_compiler.program import batch_dimensions, is_scalar, place, shape_of, tensor_value
from s2d_compiler.provenance import Slice
from s2d_compiler.thin import head_module, place_slices, thin_layer_module, thin_per_channel_module

aten = torch.ops.aten

#: Views hold for the static program's memory layout only.
_VIEWS: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
PART, VERSION, NOBODYS = "part", "version", "nobody"
SHARED = "shared"


class StageBuilder:
    """Emits nodes of a staged graph.

    Args:
        graph_module: The staged graph; see ``new_staged_graph``.
        assignment: Owners and reads.
        reuse: Whether dense layers read what the plan's concat settings let them.
    """

    def __init__(self, graph_module: fx.GraphModule, assignment: StageAssignment, *, reuse: bool = False):
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.assignment = assignment
        self.program = assignment.program
        self.channels = assignment.channels
        self.reuse = reuse
        self.slices: dict[str, Slice] = graph_module.meta["slices"]
        self.sources: dict[tuple[str, str, int], fx.Node] = {}
        self.expressions: dict[Any, fx.Node] = {}
        self.weight_expressions: dict[str, bool] = {}
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

    # -- what the static program says --------------------------------------------------------

    def labels(self, node: fx.Node) -> Labels:
        return self.channels.labels[node.name]

    def owners(self, node: fx.Node) -> Labels:
        return self.assignment.owner_labels[node.name]

    def is_prediction(self, node: fx.Node) -> bool:
        return node.name in self.channels.predictions

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        return constant_value(self.program, node)

    def is_weight_expression(self, node: fx.Node) -> bool:
        """Whether a value depends on parameters alone, so that slices of it can be computed
        from slices of them."""
        if node.name not in self.weight_expressions:
            if node.op == "get_attr":
                result = isinstance(self.program.attribute(node), nn.Parameter)
            else:
                operands = node.all_input_nodes
                result = (
                    node.op == "call_function"
                    and bool(operands)
                    and all(self.is_weight_expression(n) for n in operands)
                )
            self.weight_expressions[node.name] = result
        return self.weight_expressions[node.name]

    def positions_of(self, node: fx.Node, kind: str, stage: int) -> Positions:
        """Positions of a value that one source holds, in order."""
        owners = self.owners(node).reshape(-1)
        if kind == VERSION:
            return np.flatnonzero(owners == VERSIONED)
        if kind == NOBODYS:
            return np.flatnonzero((owners == NOBODY) | (owners == ZERO))
        return np.flatnonzero(owners == stage)

    def own_layout(self, node: fx.Node, stage: int) -> Layout:
        """Layout of a stage's own part."""
        return layout(self.labels(node).shape, self.positions_of(node, PART, stage))

    # -- parts of values ------------------------------------------------------------------------

    def part(self, node: fx.Node, stage: int) -> fx.Node | None:
        """The channels of a value that ``stage`` owns; None if it owns none."""
        if not self.positions_of(node, PART, stage).size:
            return None
        return self._source(node, PART, stage)

    def version(self, node: fx.Node, stage: int) -> fx.Node:
        """The versioned positions of a value as ``stage`` computes them."""
        return self._source(node, VERSION, stage)

    def nobody(self, node: fx.Node) -> fx.Node:
        """The positions of a value that belong to no stage, computed once."""
        return self._source(node, NOBODYS, 0)

    def _source(self, node: fx.Node, kind: str, stage: int) -> fx.Node:
        key = (node.name, kind, stage)
        if key not in self.sources:
            where = layout(self.labels(node).shape, self.positions_of(node, kind, stage))
            built = self._lower(node, where, stage)
            self.sources[key] = built
            built.meta.setdefault("sources", [])
            built.meta["sources"] = [*built.meta["sources"], key]
        return self.sources[key]

    def _lower(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        if node.op == "get_attr":
            return self._weight(node, where, stage)
        return self.channels.rules[node.name].lower(self, node, where, stage)

    def _weight(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """A parameter or buffer used by itself: whole and shared, or a stage's slice of it."""
        target = str(node.target)
        value = self.program.attribute(node)
        if not where.dimensions:
            name = f"{SHARED}.{target}"
            index: tuple[tuple[int, ...] | None, ...] = (None,) * value.dim()
        else:
            assert where.lists is not None
            name = self._module_name(target, stage)
            chosen = dict(zip(where.dimensions, where.lists, strict=True))
            index = tuple(chosen.get(d) for d in range(value.dim()))
        return self.attribute(name, target, value, index, node, stage)

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
            self.graph_module, name, {"": (value, Slice(source or target, index))}, persistent=source is not None
        )
        key = ("get_attr", name)
        if key in self.expressions:
            return self.expressions[key]
        created = self.graph.get_attr(name)
        return self._finish(created, like, stage)

    # -- reading ----------------------------------------------------------------------------------

    def read(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Some positions of a value, as ``stage`` sees them.

        Raises:
            PassError: A position belongs to a later stage.
        """
        own = self.labels(node).shape
        finer = [d for d in where.dimensions if own[d] == 1]
        if finer:
            return self._read_finer(node, where, stage, finer)
        if where.frame != own:
            raise PassError(f"{place(node)}: channels lie along {own}, not {where.frame}")
        return self._assemble(node, where, stage)

    def read_packed(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Like ``read``, in packed layout."""
        packed = layout(where.frame, np.asarray(where.positions, dtype=np.int64), packed=True)
        return self.read(node, packed, stage)

    def _read_finer(self, node: fx.Node, where: Layout, stage: int, finer: list[int]) -> fx.Node:
        """Read along dimensions in which the value carries no channels of its own."""
        own = self.labels(node).shape
        if self.is_weight_expression(node) and where.is_box:
            return self._lower(node, where, stage)
        if where.lists is None:
            return self._pack(self.full(node, stage), node, where, stage)
        lists = dict(zip(where.dimensions, where.lists, strict=True))
        inner = tuple(lists.get(d, (0,)) for d in channel_dimensions(own))
        result = self.read(node, layout(own, box_positions(own, inner)), stage)
        for d in finer:
            if lists[d] != tuple(range(where.frame[d])):
                result = self.select(result, d, list(lists[d]), node, stage)
        return result

    def aligned(
        self, operand: fx.Node, node: fx.Node, where: Layout, stage: int, *, broadcast: bool = True
    ) -> fx.Node:
        """An operand of an elementwise node at the positions ``where`` of its result, in a
        layout that broadcasts against the result's."""
        shape, rank = shape_of(operand), len(where.frame)
        if tensor_value(operand) is None:
            return self.full(operand, stage)
        offset = rank - len(shape)
        frame = tuple(1 if shape[d] == 1 else where.frame[d + offset] for d in range(len(shape)))
        if where.lists is not None:
            chosen = dict(zip(where.dimensions, where.lists, strict=True))
            lists = tuple(chosen[d + offset] for d in channel_dimensions(frame))
            return self.read(operand, layout(frame, box_positions(frame, lists)), stage)
        coords = coordinates(where.frame, np.asarray(where.positions, dtype=np.int64))
        mine = tuple(np.zeros_like(coords[d + offset]) if frame[d] == 1 else coords[d + offset] for d in range(len(shape)))
        if not channel_dimensions(frame):
            return self.read(operand, layout(frame, np.zeros(1, dtype=np.int64)), stage)
        flat = np.ravel_multi_index(mine, frame).astype(np.int64)
        if len(channel_dimensions(frame)) == 1 and channel_dimensions(frame)[0] + offset != where.dimensions[0]:
            return self._moved(operand, frame, flat, where.dimensions[0] - offset, stage)
        return self.read(operand, layout(frame, flat, packed=True), stage)

    def _moved(self, operand: fx.Node, frame: Frame, flat: Positions, dimension: int, stage: int) -> fx.Node:
        """A single channel dimension brought to the place where the packed one stands."""
        part = self.read(operand, layout(frame, flat), stage)
        return self.call(aten.transpose.int, (part, channel_dimensions(frame)[0], dimension), operand, stage)

    def full(self, node: fx.Node, stage: int) -> fx.Node:
        """A value at full size as ``stage`` sees it: zero where later stages own."""
        frame = self.labels(node).shape
        everything = np.arange(int(np.prod(frame, dtype=np.int64)), dtype=np.int64)
        return self._assemble(node, layout(frame, everything), stage, hide_later=True)

    def any_part(self, node: fx.Node, stage: int) -> fx.Node:
        """Some tensor of a value, for its type, device and sizes without channels."""
        owners = np.unique(self.owners(node))
        for owner in owners[(owners >= 1) & (owners <= max(stage, 1))].tolist():
            return self._source(node, PART, int(owner))
        if VERSIONED in owners:
            return self.version(node, max(stage, 1))
        return self.nobody(node)

    def _assemble(self, node: fx.Node, where: Layout, stage: int, *, hide_later: bool = False) -> fx.Node:
        owners = self.owners(node).reshape(-1)
        positions = np.asarray(where.positions, dtype=np.int64)
        wanted = owners[positions]
        later = wanted > stage
        if later.any() and not hide_later:
            raise PassError(
                f"{place(node)}: stage {stage} would read channels of stage {int(wanted.max())}"
            )
        zero = later | (wanted == ZERO)
        if zero.all() and zero.size:
            return self._zeros(node, where, stage)
        pieces = self._pieces(node, np.unique(wanted[~zero]).tolist(), stage)
        held = np.concatenate([p for p, _ in pieces])
        if len(pieces) == 1 and np.array_equal(held, positions):
            only = pieces[0][1]
            packed_only = layout(where.frame, positions).is_box and not where.is_box
            return self._to_packed(only, node, layout(where.frame, positions), stage) if packed_only else only
        if not where.dimensions:
            return pieces[0][1]
        d = where.dimensions[0]
        parts = [self._to_packed(n, node, layout(where.frame, p), stage) for p, n in pieces]
        result = parts[0] if len(parts) == 1 else self.call(aten.cat.default, (parts, d), node, stage)
        index = np.full(owners.size + 1, -1, dtype=np.int64)
        index[held] = np.arange(held.size)
        chosen = np.where(zero, held.size, index[positions])
        if zero.any():
            pads = [0, 0] * (len(where.frame) - d)
            pads[-1] = 1
            result = self.call(aten.constant_pad_nd.default, (result, pads, 0), node, stage)
        if held.size + zero.any() != chosen.size or not np.array_equal(chosen, np.arange(chosen.size)):
            result = self.select(result, d, chosen.tolist(), node, stage)
        return self._from_packed(result, node, where, stage)

    def _pieces(self, node: fx.Node, owners: list[int], stage: int) -> list[tuple[Positions, fx.Node]]:
        """The sources that hold these owners' positions: nobody's, stages in order, version."""
        found: list[tuple[Positions, fx.Node]] = []
        if NOBODY in owners:
            found.append((self.positions_of(node, NOBODYS, 0), self.nobody(node)))
        for owner in sorted(o for o in owners if o >= 1):
            found.append((self.positions_of(node, PART, owner), self._source(node, PART, owner)))
        if VERSIONED in owners:
            if stage < 1:
                raise PassError(f"{place(node)}: what is nobody's would read one stage's version")
            found.append((self.positions_of(node, VERSION, stage), self.version(node, stage)))
        return found

    def _zeros(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Zeros of the shape of these positions, made from whatever the operands offer."""
        reference, symbolic = self._reference(node, stage)
        sizes: list[Any] = list(where.shape(shape_of(node)))
        for d in batch_dimensions(node):
            sizes[d] = self.call(aten.sym_size.int, (reference, symbolic), node, stage)
        return self.call(aten.new_zeros.default, (reference, sizes), node, stage)

    def _reference(self, node: fx.Node, stage: int) -> tuple[fx.Node, int]:
        for operand in node.all_input_nodes:
            if not is_scalar(operand) and batch_dimensions(operand) and tensor_value(operand) is not None:
                try:
                    return self.any_part(operand, stage), batch_dimensions(operand)[0]
                except PassError:
                    continue
        placeholder = next(n for n in self.graph.nodes if n.op == "placeholder")
        return placeholder, 0

    # -- layouts ----------------------------------------------------------------------------------

    def _to_packed(self, part: fx.Node, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        if not where.is_box or len(where.dimensions) < 2:
            return part
        shape = where.shape(shape_of(node))
        order, _, final = packing(shape, where.dimensions)
        if order != list(range(len(shape))):
            part = self.call(aten.permute.default, (part, order), node, stage)
        sizes = [-1 if d in batch_dimensions(node) else n for d, n in enumerate(final)]
        return self.call(aten.reshape.default, (part, sizes), node, stage)

    def _from_packed(self, part: fx.Node, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        if not where.is_box or len(where.dimensions) < 2:
            return part
        shape = where.shape(shape_of(node))
        order, _, _ = packing(shape, where.dimensions)
        batch = batch_dimensions(node)
        sizes = [-1 if d in batch else shape[d] for d in order]
        part = self.call(aten.reshape.default, (part, sizes), node, stage)
        if order == list(range(len(shape))):
            return part
        inverse = [order.index(d) for d in range(len(shape))]
        return self.call(aten.permute.default, (part, inverse), node, stage)

    def _pack(self, whole: fx.Node, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Positions of a full-size tensor, in packed layout."""
        everything = layout(where.frame, np.arange(int(np.prod(where.frame, dtype=np.int64)), dtype=np.int64))
        packed = self._to_packed(whole, node, everything, stage)
        return self.select(packed, where.dimensions[0], list(where.positions), node, stage)

    def cut(self, whole: fx.Node, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Positions of a full-size tensor, in the layout ``where`` asks for."""
        if where.lists is not None:
            for d, chosen in zip(where.dimensions, where.lists, strict=True):
                if chosen != tuple(range(where.frame[d])):
                    whole = self.select(whole, d, list(chosen), node, stage)
            return whole
        return self._pack(whole, node, where, stage)

    def choose(self, part: fx.Node, held: Layout, where: Layout, stage: int) -> fx.Node:
        """Some positions of a part that holds others as well."""
        if held == where:
            return part
        place_of = {p: i for i, p in enumerate(held.positions)}
        if held.is_box != where.is_box or len(where.dimensions) > 1 or any(p not in place_of for p in where.positions):
            raise PassError(f"positions {where.positions[:8]} are not in one part")
        return self.select(part, where.dimensions[0], [place_of[p] for p in where.positions], part, stage)

    def select(self, source: fx.Node, dimension: int, index: list[int], like: fx.Node, stage: int) -> fx.Node:
        """Pick positions along one dimension: a slice where they are evenly spaced."""
        step = index[1] - index[0] if len(index) > 1 else 1
        if step > 0 and index == list(range(index[0], index[0] + step * len(index), step)):
            stop = index[-1] + 1
            args = (source, dimension, index[0], stop) if step == 1 else (source, dimension, index[0], stop, step)
            return self.call(aten.slice.Tensor, args, like, stage)
        return self.call(aten.index_select.default, (source, dimension, self._index(index, like)), like, stage)

    def _index(self, index: list[int], like: fx.Node) -> fx.Node:
        indices: dict[tuple[int, ...], str] = self.graph_module.meta["indices"]
        key = tuple(index)
        if key not in indices:
            indices[key] = f"_indices.i{len(indices)}"
            _container(self.graph_module, "_indices").register_buffer(
                indices[key].rpartition(".")[2], torch.tensor(index, dtype=torch.long), persistent=False
            )
        return self.get_attr(indices[key], like)

    def get_attr(self, name: str, like: fx.Node) -> fx.Node:
        key = ("get_attr", name)
        if key not in self.expressions:
            return self._finish(self.graph.get_attr(name), like, 0)
        return self.expressions[key]

    def constant_node(self, node: fx.Node) -> fx.Node:
        """A constant operand (an index) as a node of the staged graph."""
        return self.nobody(node)

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

    def concatenated(
        self, operands: list[fx.Node], dimension: int, node: fx.Node, where: Layout, stage: int
    ) -> fx.Node:
        """Concatenation along a channel dimension at some positions of its result."""
        sizes = [shape_of(n)[dimension] for n in operands]
        starts = np.cumsum([0, *sizes])
        coords = coordinates(where.frame, np.asarray(where.positions, dtype=np.int64))
        parts: list[fx.Node] = []
        order: list[Positions] = []
        for operand, start, size in zip(operands, starts, sizes, strict=False):
            inside = np.flatnonzero((coords[dimension] >= start) & (coords[dimension] < start + size))
            if not inside.size:
                continue
            frame = list(where.frame)
            frame[dimension] = size
            shifted = [c[inside] - (start if d == dimension else 0) for d, c in enumerate(coords)]
            flat = np.ravel_multi_index(tuple(shifted), tuple(frame)).astype(np.int64)
            parts.append(self._concatenated_part(operand, tuple(frame), flat, where, stage))
            order.append(inside)
        d = where.dimensions[0] if where.dimensions else dimension
        result = parts[0] if len(parts) == 1 else self.call(aten.cat.default, (parts, d), node, stage)
        held = np.concatenate(order)
        if not np.array_equal(held, np.arange(held.size)):
            result = self.select(result, d, np.argsort(held).tolist(), node, stage)
        return self._from_packed(result, node, where, stage)

    def _concatenated_part(
        self, operand: fx.Node, frame: Frame, flat: Positions, where: Layout, stage: int
    ) -> fx.Node:
        part = layout(frame, flat, packed=True)
        if not part.dimensions or part.dimensions[0] == where.dimensions[0]:
            return self.read(operand, part, stage)
        return self._moved(operand, frame, flat, where.dimensions[0], stage)

    # -- emitting ---------------------------------------------------------------------------------

    def emit(self, node: fx.Node, args: Any, kwargs: dict[str, Any], stage: int) -> fx.Node:
        """The static node's operator, applied to staged operands."""
        if node.op == "call_module":
            return self._weightless(node, args, stage)
        return self.call(_VIEWS.get(node.target, node.target), tuple(args), node, stage, kwargs)

    def call(
        self, target: Any, args: tuple[Any, ...], like: fx.Node, stage: int, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """An operator call; an equal one that exists is used again."""
        key = _key("call_function", target, args, kwargs or {})
        found = self.expressions.get(key) if key is not None else None
        if found is not None:
            found.meta["stage"] = min(found.meta["stage"], stage)
            if self.before is not None and self.before < found:
                self.before.prepend(found)
            return found
        created = self.graph.call_function(target, args, kwargs or {})
        return self._finish(created, like, stage)

    def _weightless(self, node: fx.Node, args: Any, stage: int) -> fx.Node:
        """A module without weights (dropout), one per stage that uses it."""
        module = self.program.module(node)
        name = self._module_name(str(node.target), stage)
        if not _has(self.graph_module, name):
            copied = type(module).__new__(type(module))
            copied.__dict__ = {**module.__dict__}
            self.graph_module.add_submodule(name, copied)
        return self._finish(self.graph.call_module(name, tuple(args)), node, stage)

    def _module_name(self, path: str, stage: int) -> str:
        return f"{SHARED}.{path}" if stage < 1 else f"stages.{stage - 1}.{path}"

    def whole_module(self, node: fx.Node, args: Any, stage: int) -> fx.Node:
        """A weighted module at full size: one for all stages, or one per head."""
        path = str(node.target)
        name = f"stages.{stage - 1}.{path}" if node.name in self.channels.heads and stage else f"{SHARED}.{path}"
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
            return self.expressions[key]
        created = self._finish(self.graph.call_module(name, tuple(args)), node, stage)
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

    def scalar(self, node: fx.Node, stage: int) -> fx.Node:
        """A size computed from the batch, as a node of the staged graph."""
        if not is_scalar(node):
            raise PassError(f"{place(node)} is not a number")

        def operand(n: fx.Node) -> fx.Node:
            return self.scalar(n, stage) if is_scalar(n) else self.any_part(n, stage)

        return self.call(node.target, fx.map_arg(node.args, operand), node, stage)

    # -- layers -----------------------------------------------------------------------------------

    def thin_layer(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """A stage's slice of a weighted layer, reading what the assignment lets it read."""
        rows = np.asarray(where.positions, dtype=np.int64)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        module = self.program.module(node)
        columns, inputs, groups = self._layer_inputs(node, rows, stage)
        name, slices, build = thin_layer_module(self.program, node, rows, columns, groups)
        name = place_slices(self.graph_module, self._module_name(name, stage), slices, like=build)
        channel = 1 if module.weight.dim() > 2 else len(shape_of(source)) - 1
        part = self._columns(source, channel, inputs, stage)
        created = self._layer_call(name, (part,), node, stage)
        created.meta["layer"] = node.name
        return created

    def _layer_inputs(
        self, node: fx.Node, rows: Positions, stage: int
    ) -> tuple[Positions | None, Positions, int]:
        """Columns of the weight, input channels to read for them, groups of the thin layer."""
        from s2d_compiler.rules.layers import is_cut_between

        module = self.program.module(node)
        groups = int(getattr(module, "groups", 1))
        name = self.channels.layer_of[node.name]
        if groups == 1:
            alive = np.flatnonzero(self.assignment.columns_alive(name, stage, reuse=self.reuse))
            order = self._reading_order(node, alive, stage)
            return order, order, 1
        per_in, per_out = module.in_channels // groups, module.out_channels // groups
        if is_cut_between(module):
            chosen = np.unique(rows // per_out)
            inputs = (chosen[:, None] * per_in + np.arange(per_in)[None, :]).reshape(-1)
            return None, inputs, len(chosen)
        alive = self.assignment.columns_alive(name, stage, reuse=self.reuse).reshape(groups, per_in)
        inside = np.flatnonzero(alive.any(axis=0))
        inputs = (np.arange(groups)[:, None] * per_in + inside[None, :]).reshape(-1)
        return inside, inputs, groups

    def _reading_order(self, node: fx.Node, columns: Positions, stage: int) -> Positions:
        """Columns in the order in which the operand's sources hold them, so that reading them
        is one concatenation and no gather. The first call site decides for all."""
        first = self.program.by_name[self.channels.layers[self.channels.layer_of[node.name]].layer.nodes[0]]
        source = first.args[0]
        assert isinstance(source, fx.Node)
        owner = self.assignment.owner_of(self.channels.layers[self.channels.layer_of[node.name]].columns[0])
        rank = np.where(owner[columns] == VERSIONED, self.assignment.stages + 1, np.maximum(owner[columns], 0))
        return columns[np.argsort(rank, kind="stable")]

    def _columns(self, source: fx.Node, channel: int, columns: Positions, stage: int) -> fx.Node:
        """Input channels of a layer; zero where this call site has a later stage's."""
        shape = shape_of(source)
        frame = tuple(n if d == channel else 1 for d, n in enumerate(shape))
        where = layout(frame, columns)
        own = self.labels(source).shape
        if own[channel] == 1:
            owner = int(self.owners(source).reshape(-1)[0])
            if owner > stage:
                return self._zeros(source, where, stage)
            return self.read(source, where, stage)
        return self._assemble(source, where, stage, hide_later=True)

    def is_cut_between_groups(self, node: fx.Node) -> bool:
        """Whether a layer is a grouped convolution whose groups live in stages of their own."""
        from s2d_compiler.rules.layers import is_cut_between

        module = self.program.module(node)
        return int(getattr(module, "groups", 1)) > 1 and is_cut_between(module)

    def replace_source(self, old: fx.Node, new: fx.Node) -> None:
        """Let one node stand for what another one stood for."""
        for source in old.meta.get("sources", ()):
            self.sources[source] = new
            new.meta["sources"] = [*new.meta.get("sources", ()), source]

    def head(self, node: fx.Node, stage: int) -> fx.Node:
        """A stage's own prediction layer, reading every stage up to it."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        module = self.program.module(node)
        channel = 1 if module.weight.dim() > 2 else len(shape_of(source)) - 1
        columns = self.channels.layers[self.channels.layer_of[node.name]].columns[0]
        owner = self.assignment.owner_of(columns)
        readable = np.flatnonzero(owner <= stage)
        order = self._reading_order(node, readable, stage)
        name, slices, build = head_module(self.program, node, order)
        name = place_slices(self.graph_module, f"stages.{stage - 1}.{name}", slices, like=build)
        part = self._columns(source, channel, order, stage)
        created = self._layer_call(name, (part,), node, stage)
        created.meta["head"] = True
        return created

    def thin_per_channel(
        self, node: fx.Node, source: fx.Node, where: Layout, stage: int, groups: int | None = None
    ) -> fx.Node:
        """A stage's slice of a module with one weight per channel."""
        if not where.dimensions:
            return self.whole_module(node, (source,), stage)
        positions = np.asarray(where.positions, dtype=np.int64)
        name, slices, build = thin_per_channel_module(self.program, node, positions, groups)
        is_version = bool((self.owners(node).reshape(-1)[positions] == VERSIONED).any())
        owner = 0 if is_version and node.name not in self.channels.heads else stage
        name = place_slices(self.graph_module, self._module_name(name, owner), slices, like=build)
        return self._layer_call(name, (source,), node, stage)


def _container(root: nn.Module, name: str) -> nn.Module:
    module = root
    for part in name.split("."):
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module


def _has(root: nn.Module, name: str) -> bool:
    value: Any = root
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def _expression_key(node: fx.Node) -> Any:
    if node.op == "get_attr":
        return ("get_attr", str(node.target))
    if node.op not in ("call_function", "call_module") or "stage" not in node.meta:
        return None
    return _key(node.op, node.target, node.args, node.kwargs)


def _key(op: str, target: Any, args: Any, kwargs: Any) -> Any:
    """A hashable key of a call, None for what must not be shared."""
    if op == "call_function" and isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags:
            return None

    def freeze(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return (type(value).__name__[:1], *map(freeze, value))
        if isinstance(value, dict):
            return tuple((k, freeze(v)) for k, v in sorted(value.items()))
        return (type(value), value)

    return (op, target, freeze(args), freeze(kwargs))


def new_staged_graph(assignment: StageAssignment) -> fx.GraphModule:
    """An empty staged graph with the program's inputs."""
    graph = fx.Graph()
    for node in assignment.program.nodes:
        if node.op == "placeholder":
            created = graph.placeholder(node.name)
            created.meta = {"stage": 0, "origin": node.name, "path": "", "sources": [(node.name, NOBODYS, 0)]}
    graph.output(((),))
    result = fx.GraphModule(nn.Module(), graph, class_name="Staged")
    result.meta["slices"] = {}
    result.meta["indices"] = {}
    return result
