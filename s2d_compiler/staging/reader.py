"""PartReader: what stages see of the static program's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from s2d_compiler.analysis.channels import constant_value
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
from s2d_compiler.staging.emitter import NOBODYS, PART, SHARED, VERSION, Emitter

if TYPE_CHECKING:
    from s2d_compiler.staging.builder import StageBuilder

aten = torch.ops.aten


class PartReader(Emitter):
    """Reads parts of values, lowering what is not there yet with its operator's rule."""

    # -- what the static program says --------------------------------------------------------

    def labels(self, node: fx.Node) -> Labels:
        return self.channels.labels[node.name]

    def owners(self, node: fx.Node) -> Labels:
        return self.assignment.owner_labels[node.name]

    def is_prediction(self, node: fx.Node) -> bool:
        return node.name in self.channels.predictions

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        return constant_value(self.program, node)

    def moved_numbers(
        self, node: fx.Node, sample: Any, compute: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``compute`` says of a node at some size, kept until another is asked for."""
        if self.last_moved is None or self.last_moved[0] != (node, sample):
            self.last_moved = ((node, sample), compute(self, node, sample))
        found: tuple[torch.Tensor, torch.Tensor] = self.last_moved[1]
        return found

    def is_weight_expression(self, node: fx.Node) -> bool:
        """Whether a value depends on parameters alone, so that slices of it can be computed
        from slices of them."""
        if node.name not in self.weight_expressions:
            if node.op == "get_attr":
                result = isinstance(self.program.attribute(node), nn.Parameter)
            else:
                operands = node.all_input_nodes
                rule = self.channels.rules.get(node.name)
                result = (
                    rule is not None
                    and rule.moves_or_maps
                    and bool(operands)
                    and all(self.is_weight_expression(n) for n in operands)
                )
            self.weight_expressions[node.name] = result
        return self.weight_expressions[node.name]

    def positions_of(self, node: fx.Node, kind: str, stage: int) -> Positions:
        """Positions of a value that one source holds, in order."""
        key = (node.name, kind, stage if kind == PART else 0)
        if (found := self.positions.get(key)) is None:
            found = self.positions[key] = self._positions_of(node, kind, stage)
        return found

    def _positions_of(self, node: fx.Node, kind: str, stage: int) -> Positions:
        owners = self.owners(node).reshape(-1)
        if kind == VERSION:
            return np.flatnonzero(owners == VERSIONED)
        if kind == NOBODYS:
            return np.flatnonzero((owners == NOBODY) | (owners == ZERO))
        return np.flatnonzero(owners == stage)

    def own_layout(self, node: fx.Node, stage: int) -> Layout:
        """Layout of a stage's own part."""
        return layout(self.labels(node).shape, self.positions_of(node, PART, stage))

    def _builder(self) -> StageBuilder:
        """This reader as what rules expect; only ``StageBuilder`` is ever made."""
        raise NotImplementedError

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
        return self.channels.rules[node.name].lower(self._builder(), node, where, stage)

    def _weight(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """A parameter or buffer used by itself: whole and shared, or a stage's slice of it."""
        target = str(node.target)
        value = self.program.attribute(node)
        held = self.attribute_name(target)
        if not where.dimensions:
            name = f"{SHARED}.{held}"
            index: tuple[tuple[int, ...] | None, ...] = (None,) * value.dim()
        else:
            assert where.lists is not None
            name = self._module_name(held, stage)
            chosen = dict(zip(where.dimensions, where.lists, strict=True))
            index = tuple(chosen.get(d) for d in range(value.dim()))
        return self.attribute(name, target, value, index, node, stage)

    def scalar(self, node: fx.Node, stage: int) -> fx.Node:
        """A size computed from the batch, as a node of the staged graph."""
        if not is_scalar(node):
            raise PassError(
                f"{place(node)} is a tensor, and scalar() reads numbers only; read it with read() "
                "or full()"
            )

        def operand(n: fx.Node) -> fx.Node:
            return self.scalar(n, stage) if is_scalar(n) else self.any_part(n, stage)

        return self.call(node.target, fx.map_arg(node.args, operand), node, stage)

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
        return self._assemble(node, self.refined(node, where), stage)

    def refined(self, node: fx.Node, where: Layout) -> Layout:
        """The same positions in the value's own frame, all of them along dimensions that
        ``where`` does not tell apart.

        Raises:
            PassError: They cannot be named in it.
        """
        own = self.labels(node).shape
        if where.frame == own:
            return where
        if where.lists is None or any(
            n not in (1, m) for n, m in zip(where.frame, own, strict=True)
        ):
            raise PassError(
                f"{place(node)}: channels lie along {own}, not {where.frame}; read it with a "
                "layout of its own frame"
            )
        chosen = dict(zip(where.dimensions, where.lists, strict=True))
        lists = tuple(chosen.get(d, tuple(range(own[d]))) for d in channel_dimensions(own))
        return layout(own, box_positions(own, lists))

    def read_packed(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """Like ``read``, in packed layout."""
        packed = layout(where.frame, where.array, packed=True)
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
        coords = coordinates(where.frame, where.array)
        mine = tuple(
            np.zeros_like(coords[d + offset]) if frame[d] == 1 else coords[d + offset]
            for d in range(len(shape))
        )
        if not channel_dimensions(frame):
            return self.read(operand, layout(frame, np.zeros(1, dtype=np.int64)), stage)
        flat = np.ravel_multi_index(mine, frame).astype(np.int64)
        if (
            len(channel_dimensions(frame)) == 1
            and channel_dimensions(frame)[0] + offset != where.dimensions[0]
        ):
            return self._moved(operand, frame, flat, where.dimensions[0] - offset, stage)
        return self.read(operand, layout(frame, flat, packed=True), stage)

    def _moved(
        self, operand: fx.Node, frame: Frame, flat: Positions, dimension: int, stage: int
    ) -> fx.Node:
        """A single channel dimension brought to the place where the packed one stands."""
        part = self.read(operand, layout(frame, flat), stage)
        held = channel_dimensions(frame)[0]
        while dimension < 0:  # the place lies before the operand's first dimension
            part = self.call(aten.unsqueeze.default, (part, 0), operand, stage)
            held, dimension = held + 1, dimension + 1
        return self.call(aten.transpose.int, (part, held, dimension), operand, stage)

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
        if not self.positions_of(node, NOBODYS, 0).size:
            raise PassError(
                f"{place(node)}: stage {stage} can read nothing of it, since later stages own all "
                "of it; read it with full(), which has zeros there"
            )
        return self.nobody(node)

    def _assemble(
        self, node: fx.Node, where: Layout, stage: int, *, hide_later: bool = False
    ) -> fx.Node:
        owners = self.owners(node).reshape(-1)
        positions = where.array
        wanted = owners[positions]
        later = wanted > stage
        if later.any() and not hide_later:
            raise PassError(
                f"{place(node)}: stage {stage} would read channels of stage {int(wanted.max())}, "
                "and a stage reads itself and earlier ones only; read it with full()"
            )
        zero = later | (wanted == ZERO)
        if zero.all() and zero.size:
            return self._zeros(node, where, stage)
        owning = wanted[~zero] if zero.any() else wanted
        pieces = self._pieces(node, sorted(set(owning.tolist())), stage)
        held = pieces[0][0] if len(pieces) == 1 else np.concatenate([p for p, _ in pieces])
        if len(pieces) == 1 and np.array_equal(held, positions):
            only = pieces[0][1]
            packed_only = layout(where.frame, positions).is_box and not where.is_box
            return (
                self._to_packed(only, node, layout(where.frame, positions), stage)
                if packed_only
                else only
            )
        if not where.dimensions:
            return pieces[0][1]
        if (joined := self._joined(node, where, pieces, stage)) is not None:
            return joined
        d = where.dimensions[0]
        parts = [self._to_packed(n, node, layout(where.frame, p), stage) for p, n in pieces]
        result = (
            parts[0] if len(parts) == 1 else self.call(aten.cat.default, (parts, d), node, stage)
        )
        index = np.full(owners.size + 1, -1, dtype=np.int64)
        index[held] = np.arange(held.size)
        chosen = np.where(zero, held.size, index[positions])
        if zero.any():
            pads = [0, 0] * (len(where.frame) - d)
            pads[-1] = 1
            result = self.call(aten.constant_pad_nd.default, (result, pads, 0), node, stage)
        if held.size + zero.any() != chosen.size or not np.array_equal(
            chosen, np.arange(chosen.size)
        ):
            result = self.select(result, d, chosen.tolist(), node, stage)
        return self._from_packed(result, node, where, stage)

    def _joined(
        self,
        node: fx.Node,
        where: Layout,
        pieces: list[tuple[Positions, fx.Node]],
        stage: int,
    ) -> fx.Node | None:
        """Pieces side by side along one dimension, where they differ in no other; else None."""
        if where.lists is None or len(where.dimensions) < 2:
            return None
        held = [layout(where.frame, positions).lists for positions, _ in pieces]
        if any(lists is None for lists in held):
            return None
        wanted = where.lists
        for k, d in enumerate(where.dimensions):
            others = [j for j in range(len(wanted)) if j != k]
            if any(lists[j] != wanted[j] for lists in held if lists for j in others):
                continue
            along = [p for lists in held if lists for p in lists[k]]
            place_of = {p: i for i, p in enumerate(along)}
            order = [place_of.get(p, len(along)) for p in wanted[k]]
            parts = [part for _, part in pieces]
            result = parts[0]
            if len(parts) > 1:
                result = self.call(aten.cat.default, (parts, d), node, stage)
            if len(along) in order:
                pads = [0, 0] * (len(where.frame) - d)
                pads[-1] = 1
                result = self.call(aten.constant_pad_nd.default, (result, pads, 0), node, stage)
            if order != list(range(len(along) + (len(along) in order))):
                result = self.select(result, d, order, node, stage)
            return result
        return None

    def _pieces(
        self, node: fx.Node, owners: list[int], stage: int
    ) -> list[tuple[Positions, fx.Node]]:
        """The sources that hold these owners' positions: nobody's, stages in order, version."""
        found: list[tuple[Positions, fx.Node]] = []
        if NOBODY in owners:
            found.append((self.positions_of(node, NOBODYS, 0), self.nobody(node)))
        for owner in sorted(o for o in owners if o >= 1):
            found.append((self.positions_of(node, PART, owner), self._source(node, PART, owner)))
        if VERSIONED in owners:
            if stage < 1:
                raise PassError(
                    f"{place(node)}: what is nobody's would read one stage's version of it; read "
                    "it for a stage, from 1"
                )
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
            if (
                not is_scalar(operand)
                and batch_dimensions(operand)
                and tensor_value(operand) is not None
            ):
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
        everything = layout(
            where.frame, np.arange(int(np.prod(where.frame, dtype=np.int64)), dtype=np.int64)
        )
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
        if (
            held.is_box != where.is_box
            or len(where.dimensions) > 1
            or any(p not in place_of for p in where.positions)
        ):
            raise PassError(
                f"{part.name}: positions {where.positions[:8]} are not in this part alone; read "
                "them with read()"
            )
        return self.select(
            part, where.dimensions[0], [place_of[p] for p in where.positions], part, stage
        )

    def constant_node(self, node: fx.Node) -> fx.Node:
        """A constant operand (an index) as a node of the staged graph."""
        return self.nobody(node)

    def concatenated(
        self, operands: list[fx.Node], dimension: int, node: fx.Node, where: Layout, stage: int
    ) -> fx.Node:
        """Concatenation along a channel dimension at some positions of its result."""
        sizes = [shape_of(n)[dimension] for n in operands]
        starts = np.cumsum([0, *sizes])
        coords = coordinates(where.frame, where.array)
        parts: list[fx.Node] = []
        order: list[Positions] = []
        for operand, start, size in zip(operands, starts, sizes, strict=False):
            inside = np.flatnonzero(
                (coords[dimension] >= start) & (coords[dimension] < start + size)
            )
            if not inside.size:
                continue
            frame = list(where.frame)
            frame[dimension] = size
            shifted = [c[inside] - (start if d == dimension else 0) for d, c in enumerate(coords)]
            flat = np.ravel_multi_index(tuple(shifted), tuple(frame)).astype(np.int64)
            parts.append(self._concatenated_part(operand, tuple(frame), flat, where, stage))
            order.append(inside)
        d = where.dimensions[0] if where.dimensions else dimension
        result = (
            parts[0] if len(parts) == 1 else self.call(aten.cat.default, (parts, d), node, stage)
        )
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
