"""Channel analysis: atoms, families, prediction layers.

An atom is the smallest set of channel positions that must live in one stage. A family is
the set of atoms that the same weighted layers write and the same weighted layers read; order
and cut act within a family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from s2d_compiler.analysis.labels import NOBODY, VERSIONED, Labels, Ties, has_atoms, uniform
from s2d_compiler.analysis.layer_graph import last_layers, layer_graph
from s2d_compiler.analysis.resolutions import as_pixels, position_count, resolution
from s2d_compiler.computed import weight_macs, weight_shape
from s2d_compiler.memory import explained
from s2d_compiler.program import Layer, Program, is_read_number, is_scalar, path_of, shape_of
from s2d_compiler.rules import UNKNOWN, NoRule, OperatorRule, find_rule, rule_key
from s2d_compiler.rules.elementwise import ELEMENTWISE
from s2d_compiler.rules.layers import CONVOLUTION_CLASSES, is_cut_between, is_layer


@dataclass(frozen=True, slots=True)
class UnknownUse:
    """A node that fell back to one value per stage.

    Attributes:
        node: Its name in the program.
        operator: Operator or module class.
        path: Module path in the original.
        reason: Why there is no rule for it.
        macs: MACs per sample of one run at full size.
    """

    node: str
    operator: str
    path: str
    reason: str
    macs: int


@dataclass(frozen=True, slots=True)
class Family:
    """Atoms that the same layers write and the same layers read.

    Attributes:
        atoms: Atom numbers in index order: pinned ones first, then by position in the first
            writer's output.
        writers: Names of the layers that write them, in program order.
        readers: Names of the layers that read them, in program order.
        resolution: The largest resolution among the writers' outputs.
        pinned: How many of the atoms belong to stage 1 whatever the plan says.
    """

    atoms: tuple[int, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    resolution: str
    pinned: int = 0


@dataclass(frozen=True)
class LayerChannels:
    """One weighted layer in terms of atoms.

    Attributes:
        layer: The layer and its call sites.
        rows: Atom of every output channel; empty for prediction layers.
        columns: Per call site, atom or mark of every input channel.
        resolution: Resolution of the input tensor (first call site).
    """

    layer: Layer
    rows: Labels
    columns: tuple[Labels, ...]
    resolution: str


@dataclass(frozen=True)
class ChannelAnalysis:
    """What the analysis found; see the module's docstring.

    Attributes:
        labels: Node name -> label array in atoms.
        rules: Node name -> the rule that was applied.
        layers: Layer name -> its channels, in program order.
        families: In program order of their first writers.
        predictions: Names of the nodes that are prediction layers.
        heads: Names of nodes downstream of a prediction layer, itself included.
        coupled: Names of coupled nodes that mix atoms.
        unknown: Nodes without a rule.
        refused: Layers without a rule that no channel reaches: computed once, whole.
        atom_count: Number of atoms.
    """

    labels: Mapping[str, Labels]
    rules: Mapping[str, OperatorRule]
    layers: Mapping[str, LayerChannels]
    families: tuple[Family, ...]
    predictions: frozenset[str]
    heads: frozenset[str]
    coupled: tuple[str, ...]
    unknown: tuple[UnknownUse, ...]
    refused: tuple[UnknownUse, ...]
    atom_count: int
    layer_of: Mapping[str, str] = field(default_factory=dict)


@dataclass
class ChannelContext:
    """What rules read and write while labels are propagated."""

    program: Program
    predictions: frozenset[str] = frozenset()
    ties: Ties = field(default_factory=Ties)
    known: dict[str, Labels] = field(default_factory=dict)
    pins: list[Labels] = field(default_factory=list)
    coupled: list[str] = field(default_factory=list)
    refused: list[UnknownUse] = field(default_factory=list)
    rows: dict[str, Labels] = field(default_factory=dict)
    columns: dict[str, list[Labels]] = field(default_factory=dict)
    call_sites: dict[str, list[str]] = field(default_factory=dict)

    def labels_of(self, node: fx.Node) -> Labels:
        return self.known[node.name]

    def pin(self, labels: Labels, gated: Labels) -> None:
        """Say that atoms belong to stage 1 unless what they gate, position by position, turns
        out to be they themselves."""
        mine, other = labels[labels >= 0], gated[labels >= 0]
        self.pins.append(np.unique(np.stack([mine, other], axis=1), axis=0))

    def couple(self, node: fx.Node) -> None:
        self.coupled.append(node.name)

    def is_prediction(self, node: fx.Node) -> bool:
        return node.name in self.predictions

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        return constant_value(self.program, node)

    def weight_key(self, node: fx.Node) -> str:
        return self.program.sources.get(f"{node.target}.weight", f"{node.target}.weight")

    def write_layer(self, node: fx.Node, count: int) -> Labels:
        """Labels of a layer's output channels: new at its first call site."""
        key = self.weight_key(node)
        if key in self.rows and len(self.rows[key]) != count:
            raise NoRule("another layer uses its weight the other way round")
        if key not in self.rows:
            self.rows[key] = self.ties.fresh(count)
        return self.rows[key]

    def read_layer(self, node: fx.Node, columns: Labels) -> None:
        """Record a call site; the inputs of all call sites of a weight are tied."""
        key = self.weight_key(node)
        seen = self.columns.setdefault(key, [])
        if any(len(other) != len(columns) for other in seen):
            raise NoRule("another layer uses its weight the other way round")
        for other in seen:
            self.ties.tie(other, columns)
        seen.append(columns)
        self.call_sites.setdefault(key, []).append(node.name)

    def keep_whole(self, node: fx.Node) -> None:
        """At this call site a layer is used whole: where another one cuts it, it is one atom of
        stage 1, so that its weight is held once."""
        key = self.weight_key(node)
        if key in self.rows:
            rows = self.rows[key]
            self.ties.tie(rows[:1], rows)
            self.pins.append(np.stack([rows[:1], np.full(1, -1)], axis=1))


def constant_value(program: Program, node: fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on buffers and constants alone, on the CPU."""
    if node.op == "get_attr":
        value = program.attribute(node)
        return None if isinstance(value, torch.nn.Parameter) else value.detach().cpu()
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    values = {n: None if is_scalar(n) else constant_value(program, n) for n in node.all_input_nodes}
    if not values or any(v is None for v in values.values()):
        return None
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = {
        k: v for k, v in fx.map_arg(dict(node.kwargs), values.__getitem__).items() if k != "device"
    }
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


@explained("following the model's channels", "give a smaller input shape (--input-shape)")
def analyse_channels(program: Program) -> ChannelAnalysis:
    """Propagate labels through the program and group atoms into families."""
    trial = _propagate(program, frozenset())
    predictions = _predictions(program, trial)
    context, rules, unknown = _propagate(program, predictions) if predictions else trial
    return _conclude(program, context, rules, unknown, predictions)


_Trial = tuple[ChannelContext, dict[str, OperatorRule], list[UnknownUse]]


def _propagate(program: Program, predictions: frozenset[str]) -> _Trial:
    context = ChannelContext(program, predictions)
    rules: dict[str, OperatorRule] = {}
    unknown: list[UnknownUse] = []
    for node in program.nodes:
        if node.op == "output" or is_scalar(node):
            continue
        if node.op in ("placeholder", "get_attr"):
            context.known[node.name] = uniform(len(shape_of(node)), NOBODY)
            continue
        rule, reason = find_rule(node), "the operator has no rule"
        if rule is not None and rule is not ELEMENTWISE and _takes_read_number(node):
            rule, reason = None, "a number that it takes is read from a tensor"
        if rule is not None:
            try:
                context.known[node.name] = rule.labels(context, node)
                rules[node.name] = rule
                continue
            except NoRule as refusal:
                reason = str(refusal)
        rules[node.name] = UNKNOWN
        context.known[node.name] = UNKNOWN.labels(context, node)
        macs = layer_macs(program, node) if is_layer(node) else UNKNOWN.macs(node)
        use = UnknownUse(node.name, rule_key(node), path_of(node), reason, macs)
        if (context.known[node.name] == VERSIONED).any():
            unknown.append(use)
        elif is_layer(node):
            context.refused.append(use)
    sites = {name for names in context.call_sites.values() for name in names}
    for node in program.nodes:
        if is_layer(node) and node.name not in sites:
            context.keep_whole(node)
    return context, rules, unknown


def _takes_read_number(node: fx.Node) -> bool:
    return any(is_read_number(operand) for operand in node.all_input_nodes)


def layer_macs(program: Program, node: fx.Node) -> int:
    """MACs per sample of a whole layer at one call site."""
    module = program.module(node)
    return math.prod(weight_shape(module)) * layer_positions(node) + weight_macs(module)


def layer_positions(node: fx.Node) -> int:
    """Positions per sample at which a layer applies its weight once."""
    kind = str(node.meta.get("kind"))
    if kind.startswith("ConvTranspose"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return position_count(source, 1)
    return position_count(node, 1 if kind in CONVOLUTION_CLASSES else -1)


def _predictions(program: Program, trial: _Trial) -> frozenset[str]:
    """Layers all of whose paths end at the output without meeting another, and which share
    no atom with another layer."""
    context = trial[0]
    ends = last_layers(layer_graph(program))
    atoms = context.ties.components()
    writers = np.zeros(context.ties.count + 1, dtype=np.int64)
    readers = np.zeros_like(writers)
    for rows in context.rows.values():
        writers[np.unique(atoms[rows])] += 1
    for many in context.columns.values():
        read = np.concatenate(many)
        readers[np.unique(atoms[read[read >= 0]])] += 1
    found: set[str] = set()
    for key, sites in context.call_sites.items():
        nodes = [program.by_name[name] for name in sites]
        if key not in context.rows or not all(n.name in ends for n in nodes):
            continue
        if any(is_cut_between(program.module(n)) for n in nodes):
            continue
        own = np.unique(atoms[context.rows[key]])
        if (writers[own] == 1).all() and not readers[own].any():
            found.update(sites)
    return frozenset(found)


def _conclude(
    program: Program,
    context: ChannelContext,
    rules: dict[str, OperatorRule],
    unknown: list[UnknownUse],
    predictions: frozenset[str],
) -> ChannelAnalysis:
    atoms = context.ties.components()

    def resolve(labels: Labels) -> Labels:
        return np.where(labels >= 0, atoms[np.maximum(labels, 0)], labels) if len(atoms) else labels

    layers: dict[str, LayerChannels] = {}
    layer_of: dict[str, str] = {}
    for key, sites in context.call_sites.items():
        first = program.by_name[sites[0]]
        source = first.args[0]
        assert isinstance(source, fx.Node)
        name = str(first.target)
        channel = 1 if first.meta["kind"] in CONVOLUTION_CLASSES else -1
        layers[name] = LayerChannels(
            layer=Layer(name, key, tuple(sites)),
            rows=resolve(context.rows[key]) if key in context.rows else np.zeros(0, dtype=np.int64),
            columns=tuple(resolve(c) for c in context.columns[key]),
            resolution=resolution(source, channel),
        )
        layer_of.update(dict.fromkeys(sites, name))
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *context.pins])
    pinned = resolve(pairs)
    pins = np.unique(pinned[(pairs[:, 1] < 0) | (pinned[:, 0] != pinned[:, 1]), 0])
    return ChannelAnalysis(
        labels={name: resolve(labels) for name, labels in context.known.items()},
        rules=rules,
        layers=layers,
        families=_families(
            program,
            layers,
            predictions,
            set(pins.tolist()),
            int(atoms.max()) + 1 if len(atoms) else 0,
        ),
        predictions=predictions,
        heads=_downstream(program, predictions),
        coupled=tuple(dict.fromkeys(context.coupled)),
        unknown=tuple(unknown),
        refused=tuple(context.refused),
        atom_count=int(atoms.max()) + 1 if len(atoms) else 0,
        layer_of=layer_of,
    )


def _downstream(program: Program, predictions: frozenset[str]) -> frozenset[str]:
    reached: set[str] = set(predictions)
    for node in program.nodes:
        if any(operand.name in reached for operand in node.all_input_nodes):
            reached.add(node.name)
    return frozenset(reached)


def _families(
    program: Program,
    layers: Mapping[str, LayerChannels],
    predictions: frozenset[str],
    pins: set[int],
    atom_count: int,
) -> tuple[Family, ...]:
    """Partition the atoms by who writes and who reads them."""
    family = np.zeros(atom_count, dtype=np.int64)
    count = 1
    for channels in layers.values():
        for touched in (channels.rows, *channels.columns):
            inside = np.zeros(atom_count, dtype=np.bool_)
            inside[touched[touched >= 0]] = True
            olds, fresh = np.unique(family[inside], return_inverse=True)
            family[inside] = count + fresh
            count += len(olds)
    rank = np.full(atom_count, np.iinfo(np.int64).max)
    writers: dict[int, list[str]] = {}
    readers: dict[int, list[str]] = {}
    first: dict[int, str] = {}
    for name, channels in layers.items():
        written, index = np.unique(channels.rows, return_index=True)
        for f in np.unique(family[written]).tolist():
            writers.setdefault(f, []).append(name)
            if f not in first:
                first[f] = name
                mine = family[written] == f
                rank[written[mine]] = index[mine]
        read = np.unique(np.concatenate([c[c >= 0] for c in channels.columns]))
        for f in np.unique(family[read]).tolist():
            readers.setdefault(f, []).append(name)
    result: list[Family] = []
    for f in writers:
        found = np.flatnonzero(family == f).tolist()
        atoms = sorted(found, key=lambda a: (a not in pins, int(rank[a]), a))
        result.append(
            Family(
                atoms=tuple(atoms),
                writers=tuple(writers[f]),
                readers=tuple(readers.get(f, [])),
                resolution=_largest(program, [layers[w] for w in writers[f]]),
                pinned=sum(a in pins for a in atoms),
            )
        )
    return tuple(result)


def _largest(program: Program, writers: list[LayerChannels]) -> str:
    best, name = -1, "1"
    for writer in writers:
        for site in writer.layer.nodes:
            node = program.by_name[site]
            channel = 1 if node.meta["kind"] in CONVOLUTION_CLASSES else -1
            count = position_count(node, channel)
            if count > best:
                best, name = count, resolution(node, channel)
    return name


def cut_resolutions(analysis: ChannelAnalysis) -> tuple[str, ...]:
    """Resolutions that a plan may set, largest first."""
    names = {family.resolution for family in analysis.families}
    for channels in analysis.layers.values():
        is_head = set(channels.layer.nodes) <= analysis.predictions
        if not is_head and any(has_atoms(c) for c in channels.columns):
            names.add(channels.resolution)
    return tuple(sorted(names, key=lambda n: (-as_pixels(n), n)))
