"""Where along a program's depth exits can stand.

A *cut* is a value through which everything later flows: what later operators need is that value
alone, or values that are joined in it (a concatenation). Block outputs are cuts, values inside
blocks are not. Fractions of depth and presets go to cuts; a module path may name any value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from s2d_compiler.analysis.channels import ChannelAnalysis, analyse_channels
from s2d_compiler.analysis.cost import static_macs
from s2d_compiler.analysis.labels import NOBODY
from s2d_compiler.analysis.resolutions import as_pixels, resolution
from s2d_compiler.program import (
    SAMPLE_BATCH,
    Program,
    batch_dimensions,
    is_scalar,
    operator_name,
    path_of,
    place,
    shape_of,
    tensor_value,
)
from s2d_compiler.rules.layers import CONVOLUTION_CLASSES, is_layer

_JOINS = (torch.ops.aten.cat.default,)
_CHANNELS_FIRST = ("BatchNorm", "InstanceNorm", "GroupNorm", "PReLU")
_CHANNELS_LAST = ("Linear", "LayerNorm", "RMSNorm")
#: How far from a fraction the nearest cut may lie before a value inside a block is taken.
_NEAR = 0.1
#: A value this many times as large as the cut before it, and as one of so many cuts after it, is
#: inside a block.
_WIDE, _SOON = 3, 3


class NoPlaceError(Exception):
    """Something is no place for an exit; the message says what it is, and what to do."""


@dataclass(frozen=True, slots=True)
class ExitPlace:
    """A value after which an exit can stand.

    Attributes:
        node: Its name in the program.
        operator: What computes it.
        path: Module path in the original.
        batch: Dimension of the samples.
        channel: Dimension of the channels.
        channels: Number of channels.
        resolution: Positions per sample and channel.
        macs: MACs per sample of all that it takes to compute it.
        is_cut: Whether everything later flows through it.
    """

    node: str
    operator: str
    path: str
    batch: int
    channel: int
    channels: int
    resolution: str
    macs: int
    is_cut: bool

    @property
    def size(self) -> int:
        """How many numbers it is per sample."""
        return self.channels * as_pixels(self.resolution)

    def __str__(self) -> str:
        at = f"{self.operator} in {self.path}" if self.path else f"{self.operator} ({self.node})"
        return f"{at}, {self.channels} channels at {self.resolution}"


@dataclass(frozen=True)
class Depth:
    """A program along its depth.

    Args:
        program: The captured model.
        channels: Its channels; computed where they are not given.
    """

    program: Program
    given_channels: ChannelAnalysis | None = None

    @cached_property
    def channels(self) -> ChannelAnalysis:
        """Which dimension of every value carries channels."""
        return self.given_channels or analyse_channels(self.program)

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of every node."""
        return {node: k for k, node in enumerate(self.program.nodes)}

    @cached_property
    def macs_of(self) -> dict[fx.Node, int]:
        """MACs per sample of every node."""
        return {
            n: static_macs(self.program, n)
            for n in self.program.nodes
            if n.op in ("call_module", "call_function")
        }

    @property
    def total(self) -> int:
        """MACs per sample of the program."""
        return sum(self.macs_of.values())

    @cached_property
    def on_the_way(self) -> frozenset[fx.Node]:
        """Values that the inputs decide and that decide the outputs."""
        after: set[fx.Node] = set()
        for node in self.program.nodes:
            if is_scalar(node) or node.op == "output":
                continue
            if node.op == "placeholder" or any(n in after for n in node.all_input_nodes):
                after.add(node)
        return frozenset(after & self.before(self.program.output))

    @staticmethod
    def before(node: fx.Node) -> set[fx.Node]:
        """Everything that it takes to compute a node, itself included."""
        found, stack = {node}, [node]
        while stack:
            for operand in stack.pop().all_input_nodes:
                if operand not in found:
                    found.add(operand)
                    stack.append(operand)
        return found

    def cost(self, node: fx.Node) -> int:
        """MACs per sample of all that it takes to compute a node."""
        return sum(self.macs_of.get(n, 0) for n in self.before(node))

    # -- cuts --------------------------------------------------------------------------------------

    @cached_property
    def cuts(self) -> tuple[ExitPlace, ...]:
        """Places that are cuts, in order, one for each share of the MACs: what follows a layer
        without MACs of its own (norms, activations, pooling) belongs to its place, up to where
        positions are lost. Values that a block widens for a moment, as inverted residuals do,
        are left out: heads that read them would cost much."""
        best: dict[int, tuple[tuple[int, bool], fx.Node]] = {}
        total = self.total
        for node, macs in self._cut_nodes.items():
            if len(shape_of(node)) < 2:
                continue
            rank = len(shape_of(node)), as_pixels(resolution(node, self._channel(node))) > 1
            is_last = macs not in best or rank >= best[macs][0]
            if 0 < macs < total and is_last and self._is_refused(node) is None:
                best[macs] = (rank, node)
        places = [self.place(node, is_cut=True) for _, node in best.values()]
        kept: list[ExitPlace] = []
        for number, each in enumerate(places):
            after = places[number + 1 : number + 1 + _SOON]
            is_wide = kept and each.size >= _WIDE * kept[-1].size
            if not is_wide or all(_WIDE * later.size > each.size for later in after):
                kept.append(each)
        return tuple(kept)

    @cached_property
    def _cut_nodes(self) -> dict[fx.Node, int]:
        """Cuts, with the MACs that have run by then."""
        return dict(self._found_cuts())

    def _found_cuts(self) -> Iterator[tuple[fx.Node, int]]:
        way = self.on_the_way
        users = {n: sum(u in way or u.op == "output" for u in n.users) for n in way}
        alive: dict[fx.Node, int] = {}
        macs = 0
        for node in self.program.nodes:
            macs += self.macs_of.get(node, 0)
            if node not in way:
                continue
            for operand in node.all_input_nodes:
                if operand in alive:
                    alive[operand] -= 1
                    if not alive[operand]:
                        del alive[operand]
            alive[node] = users[node]
            if node.op == "placeholder":
                continue
            others = alive.keys() - {node}
            if not others or (node.target in _JOINS and others <= set(node.all_input_nodes)):
                yield node, macs

    @cached_property
    def insides(self) -> tuple[ExitPlace, ...]:
        """Places that are no cuts, in order: values of one channel dimension with the positions
        of a feature map, none of them inside an attention."""
        attentions = self._attentions
        found = []
        for node in self.program.nodes:
            if node not in self.on_the_way or node.op not in ("call_module", "call_function"):
                continue
            if self._is_refused(node) or any(_lies_in(node, path) for path in attentions):
                continue
            labels = self.channels.labels.get(node.name)
            if labels is None or sum(size > 1 for size in labels.shape) != 1:
                continue
            if as_pixels(resolution(node, self._channel(node))) > 1:
                found.append(self.place(node, is_cut=False))
        return tuple(found)

    @cached_property
    def _attentions(self) -> frozenset[str]:
        """Paths of modules that multiply values with each other."""
        return frozenset(
            path_of(node)
            for node in self.on_the_way
            if node.op == "call_function"
            and self.macs_of.get(node)
            and sum(n in self.on_the_way for n in node.all_input_nodes) > 1
        ) - {""}

    def _joins(self, place: ExitPlace) -> bool:
        """Whether values come together there, as at the end of blocks."""
        operands = self.program.by_name[place.node].all_input_nodes
        return sum(n in self.on_the_way for n in operands) > 1

    # -- one place ---------------------------------------------------------------------------------

    def _is_refused(self, node: fx.Node) -> str | None:
        """Why an exit cannot stand after a node, if it cannot."""
        value = tensor_value(node)
        if value is None:
            return "its value is no single tensor; name a module inside it"
        if not value.is_floating_point():
            return f"its value holds {value.dtype} numbers, and a head reads floating-point ones"
        if node not in self.on_the_way:
            return "its value does not depend on the input, or no output depends on it"
        if value.dim() < 2:
            return f"its value has {value.dim()} dimension(s), and a head reads samples by channels"
        if self._batch(node) is None:
            return (
                f"its value of shape {tuple(value.shape)} has no dimension of one entry per "
                "sample, as inside windows of attention; name the block around it"
            )
        return None

    def _batch(self, node: fx.Node) -> int | None:
        """The dimension of the samples."""
        shape = shape_of(node)
        if self.program.batch is not None:
            return 0 if shape[0] == self.program.batch else None
        dims = batch_dimensions(node)
        return dims[0] if len(dims) == 1 and shape[dims[0]] == SAMPLE_BATCH else None

    def place(self, node: fx.Node, *, is_cut: bool | None = None) -> ExitPlace:
        """A node as a place.

        Raises:
            NoPlaceError: An exit cannot stand there.
        """
        reason = self._is_refused(node)
        if reason is not None:
            raise NoPlaceError(f"{place(node)}: {reason}")
        if is_cut is None:
            is_cut = node in self._cut_nodes
        batch, channel = self._batch(node), self._channel(node)
        assert batch is not None
        return ExitPlace(
            node=node.name,
            operator=operator_name(node),
            path=path_of(node),
            batch=batch,
            channel=channel,
            channels=shape_of(node)[channel],
            resolution=resolution(node, channel),
            macs=self.cost(node),
            is_cut=is_cut,
        )

    def _channel(self, node: fx.Node) -> int:
        """The dimension of the channels: the one along which atoms differ, else the one that the
        layers around say, else by the number of dimensions."""
        rank = len(shape_of(node))
        labels = self.channels.labels.get(node.name)
        batch = self._batch(node)
        if labels is not None and (labels != NOBODY).any():
            wide = [d for d, size in enumerate(labels.shape) if size > 1 and d != batch]
            if len(wide) == 1:
                return wide[0]
        near = [node, *node.users, *node.all_input_nodes]
        for other in near:
            if len(shape_of(other)) != rank or other.op != "call_module":
                continue
            kind = str(other.meta.get("kind"))
            if kind in CONVOLUTION_CLASSES or kind.startswith(_CHANNELS_FIRST):
                return 1
            if kind.startswith(_CHANNELS_LAST) or is_layer(other):
                return rank - 1
        found = 1 if rank >= 4 else rank - 1
        return found if found != batch else 0

    # -- module paths and fractions ----------------------------------------------------------------

    @cached_property
    def _by_path(self) -> Mapping[str, list[fx.Node]]:
        """Nodes by the paths of the modules that they lie in."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.program.nodes:
            if node.op not in ("call_module", "call_function") or is_scalar(node):
                continue
            parts = path_of(node).split(".") if path_of(node) else []
            for count in range(1, len(parts) + 1):
                found.setdefault(".".join(parts[:count]), []).append(node)
        return found

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of modules that compute something."""
        return tuple(self._by_path)

    def at_path(self, path: str) -> ExitPlace:
        """The value that a module returns, of its last call.

        Raises:
            NoPlaceError: There is no such module, or it returns no single tensor.
        """
        if path not in self._by_path:
            raise NoPlaceError(self._unknown(path))
        nodes = self._last_call(path)
        inside = set(nodes)
        handed = [n for n in nodes if any(u not in inside for u in n.users)]
        varying = [n for n in handed if n in self.on_the_way]
        if len(varying) > 1:
            raise NoPlaceError(
                f"this module returns {len(varying)} values, and an exit stands after one; name a "
                "module inside it, or the one that follows"
            )
        if not varying:
            raise NoPlaceError(
                "what this module computes does not depend on the input, or no output depends on "
                "it; name a module on the way from the input to the output"
            )
        return self.place(varying[0])

    def _last_call(self, path: str) -> list[fx.Node]:
        """The nodes of the last call of a module: those without others in between."""
        members = set(self._by_path[path])
        found: list[fx.Node] = []
        for node in reversed(list(self.program.nodes)):
            if node in members:
                found.append(node)
            elif found and node in self.on_the_way:
                break
        return found[::-1]

    def _unknown(self, path: str) -> str:
        if path in (*self.program.dropped.modules, *self.program.dropped.unused):
            return (
                "this module left no operator in the captured network (it does nothing in "
                "evaluation mode, or its result is not used); name the one before it"
            )
        known = self.paths
        near = difflib.get_close_matches(path[:100], known, n=3, cutoff=0.5)
        if not near:
            near = [p for p in known if "." not in p][:5]
            return f"the model has no such module, or it computes nothing; it has {_list(near)}"
        return f"the model has no such module, or it computes nothing; near it are {_list(near)}"

    def at_fraction(self, fraction: float) -> ExitPlace:
        """The place nearest to a share of the MACs: a cut, or a value inside a block where no cut
        is near.

        Raises:
            NoPlaceError: There is none.
        """
        goal, far = fraction * self.total, _NEAR * self.total
        found = _nearest(self.cuts, goal)
        if found is None or abs(found.macs - goal) > far:
            inside = [p for p in self.insides if 0 < p.macs < self.total]
            for others in (list(filter(self._joins, inside)), inside):
                other = _nearest(others, goal)
                if other and (found is None or abs(other.macs - goal) < abs(found.macs - goal)):
                    found = other
                if found is not None and abs(found.macs - goal) <= far:
                    break
        if found is None:
            raise NoPlaceError(
                "the model has no value that an exit could read; name a module path instead"
            )
        return found

    def quarters(self) -> tuple[tuple[ExitPlace, int], ...]:
        """Places at a quarter and three quarters of every resolution that has two or more, each
        with the number of its resolution, from 0. Depth within a resolution is the share of the
        MACs between its first layer and its last place. The last place of all is left out: only
        the original's own head follows it.

        Source: DDI, section 3.2 and figure 4: of eight layers of one resolution, the second and
        the sixth.
        """
        starts, levels = self._starts(), self._levels()
        groups: dict[str, list[ExitPlace]] = {}
        for each in self.cuts:
            level = levels[self._cut_nodes[self.program.by_name[each.node]]]
            if as_pixels(level) > 1 and each.macs > starts.get(level, 0):
                groups.setdefault(level, []).append(each)
        found: list[tuple[ExitPlace, int]] = []
        for number, (name, group) in enumerate((n, g) for n, g in groups.items() if len(g) > 1):
            start, end = starts.get(name, 0), group[-1].macs
            goals = (start + share * (end - start) for share in (0.25, 0.75))
            rest = [p for p in group if p is not self.cuts[-1]]
            chosen = {p.node: p for goal in goals if (p := _nearest(rest, goal)) is not None}
            found += [(place, number) for place in chosen.values()]
        return tuple(sorted(found, key=lambda item: item[0].macs))

    def _levels(self) -> dict[int, str]:
        """By MACs that have run, the resolution of the cut there, before any pooling."""
        found: dict[int, str] = {}
        for node, macs in self._cut_nodes.items():
            if len(shape_of(node)) < 2:
                continue
            mine = resolution(node, self._channel(node))
            if macs not in found or as_pixels(mine) > as_pixels(found[macs]):
                found[macs] = mine
        return found

    def _starts(self) -> dict[str, int]:
        """MACs that have run before the first layer of every resolution."""
        found: dict[str, int] = {}
        macs = 0
        for node in self.program.nodes:
            if is_layer(node):
                channel = 1 if node.meta["kind"] in CONVOLUTION_CLASSES else -1
                found.setdefault(resolution(node, channel), macs)
            macs += self.macs_of.get(node, 0)
        return found


def _lies_in(node: fx.Node, path: str) -> bool:
    return path_of(node) == path or path_of(node).startswith(f"{path}.")


def _nearest(places: Sequence[ExitPlace], goal: float) -> ExitPlace | None:
    """The nearest place, of two the later one."""
    return min(places, key=lambda p: (abs(p.macs - goal), -p.macs), default=None)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
