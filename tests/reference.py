"""The masked form of a network, evaluated the slow and obvious way.

This is the other half of the proof: it takes the *original* eager model, and the
answer to "which weight went to which stage" that a transformed network gives in its
``provenance``, and works out what every stage must output. It shares no code with the
compiler: the program comes from ``torch.fx.symbolic_trace`` instead of ``torch.export``,
the rules are written per eager operator, and nothing is ever sliced. All stages > i are
zeroed in a full-size network instead.

Two phases:

1. ``Structure``: one evaluation at batch 1 that carries, beside every tensor, a tensor of
   the same shape with the *id* of the channel position behind each element. Data movement
   moves ids by running the very same operator on them.
2. ``masked_outputs``: run i = 1..s of the whole program at full size. Positions owned by a
   stage before i keep the value that stage gave them, later ones are zero, the rest is
   computed with the weights that are alive for stage i.

An operator that is in none of the tables below is an error: a reference does not guess.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

NOBODY = 0
"""Id and owner of a position that no stage owns: image channels, padding, parameters."""
VERSIONED = 1
"""Id of a value of which every stage has its own version."""
VERSION_OWNER = -1
"""What ``VERSIONED`` becomes in an owner tensor; stages are 1..s there."""


class NoRuleError(NotImplementedError):
    """The reference does not know the operator, or docs/semantics.md does not say what it means."""


class MaskedFormError(AssertionError):
    """What the provenance says cannot be evaluated: it breaks a rule of the masked form."""


class SliceLike(Protocol):
    """The part of the compiler's ``Slice`` that the reference reads."""

    @property
    def source(self) -> str: ...
    @property
    def index(self) -> tuple[tuple[int, ...] | None, ...]: ...


class DynamicLike(Protocol):
    """The part of the compiler's ``DynamicModel`` that the reference reads."""

    @property
    def provenance(self) -> Mapping[str, SliceLike]: ...
    @property
    def plan(self) -> Any: ...


# --------------------------------------------------------------------------------------
# What operators do to positions, by eager name

ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.PReLU,
    nn.Dropout,
    nn.Dropout2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
)
MOVING_MODULES: tuple[type[nn.Module], ...] = (
    nn.Flatten,
    nn.Identity,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
POOLING_MODULES: tuple[type[nn.Module], ...] = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
)
WEIGHTED_MODULES: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)

ELEMENTWISE_FUNCTIONS: frozenset[Any] = frozenset(
    {
        F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.softplus,
        F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.dropout,
        F.local_response_norm,  # its division is elementwise, its denominator versioned
        torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.neg, torch.clamp,
        torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.sqrt,
        torch.maximum, torch.minimum, torch.where, torch.square,
        operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
        operator.pow, operator.iadd, operator.isub, operator.imul,
    }
)  # fmt: skip
ELEMENTWISE_METHODS: frozenset[str] = frozenset(
    (
        "relu relu_ sigmoid sigmoid_ tanh tanh_ add add_ sub sub_ mul mul_ div div_ clamp clamp_ "
        "exp abs neg pow sqrt square maximum minimum float double"
    ).split()
)
MOVING_FUNCTIONS: frozenset[Any] = frozenset(
    {
        torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.flatten,
        torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
        torch.narrow, torch.select, torch.index_select, torch.unbind, torch.roll,
        F.channel_shuffle, F.pixel_shuffle, F.pixel_unshuffle,
        operator.getitem, getattr,
    }
)  # fmt: skip
MOVING_METHODS: frozenset[str] = frozenset(
    (
        "chunk split flatten reshape view permute transpose squeeze unsqueeze narrow select expand "
        "index_select unbind contiguous clone detach unflatten size dim expand_as view_as"
    ).split()
)
POOLING_FUNCTIONS: frozenset[Any] = frozenset(
    {
        F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
        F.interpolate, F.lp_pool2d,
    }
)  # fmt: skip
REDUCTION_FUNCTIONS: frozenset[Any] = frozenset(
    {torch.mean, torch.sum, torch.amax, torch.amin, torch.max, torch.min}
)
REDUCTION_METHODS: frozenset[str] = frozenset(["mean", "sum", "amax", "amin", "max", "min"])
SOFTMAX_FUNCTIONS: frozenset[Any] = frozenset(
    {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax}
)
UNKNOWN_FUNCTIONS: frozenset[Any] = frozenset(
    {torch.cumsum, torch.cumprod, torch.sort, torch.cummax, torch.logcumsumexp, torch.kthvalue}
)
UNKNOWN_METHODS: frozenset[str] = frozenset(["cumsum", "cumprod", "sort", "cummax", "logcumsumexp"])
PADDING_MODULES: tuple[type[nn.Module], ...] = (nn.ZeroPad2d, nn.ConstantPad2d)


# --------------------------------------------------------------------------------------
# Phase 1: ids


@dataclass
class Layer:
    """A convolution or linear layer and the positions around it, over all its call sites."""

    path: str
    module: nn.Conv2d | nn.Linear
    rows: list[int]
    nodes: list[fx.Node] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    """Per call site, the id of every input channel."""
    input_resolutions: list[str] = field(default_factory=list)
    output_resolutions: list[str] = field(default_factory=list)

    @property
    def groups(self) -> int:
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1


class Ties:
    """A disjoint set over ids, which also remembers the ties one by one."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.pairs: set[tuple[int, int, str]] = set()

    def find(self, item: int) -> int:
        root = item
        while self.parent.get(root, root) != root:
            root = self.parent[root]
        while self.parent.get(item, item) != root:
            self.parent[item], item = root, self.parent.get(item, item)
        return root

    def tie(self, items: Iterable[int], why: str) -> None:
        real = [item for item in items if item > VERSIONED]
        for first, second in pairwise(real):
            if first == second:
                continue
            self.pairs.add((first, second, why))
            low, high = sorted((self.find(first), self.find(second)))
            self.parent[high] = low


class Structure:
    """The traced program with the ids of every value, at batch 1.

    Attributes:
        traced: the eager model as ``torch.fx.symbolic_trace`` sees it.
        ids: per node, the tree of id tensors (non-tensors stand for themselves).
        layers: per module path, in program order.
        ties: which ids must live in one stage.
        gates: ids of size-1 operands that were broadcast against channels.
        coupled: nodes that reduce over all channel-carrying dimensions.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        self.traced = fx.symbolic_trace(model)
        self.ids: dict[fx.Node, Any] = {}
        self.layers: dict[str, Layer] = {}
        self.ties = Ties()
        self.gates: set[int] = set()
        self.coupled: set[fx.Node] = set()
        self._next_id = VERSIONED + 1
        self._path_of: dict[int, str] = {}
        self._sites: dict[int, Tensor] = {}
        self._predictions: list[str] | None = None
        self.memo: dict[str, Any] = {}  # what callers worked out about this structure
        self._run(x[:1])

    # -- walking

    def _run(self, x: Tensor) -> None:
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.traced.graph.nodes:
                value = evaluate(self.model, node, values, x)
                ids = self._ids_of(node, value, x)
                store(self.model, node, values, value)
                store(self.model, node, self.ids, ids)
                check_shapes(node, value, ids)

    def _ids_of(self, node: fx.Node, value: Any, x: Tensor) -> Any:
        if node.op == "placeholder":
            return torch.zeros(x.shape, dtype=torch.int64)
        if node.op == "get_attr":
            return torch.zeros(value.shape, dtype=torch.int64)
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: self.ids[n])
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.ids[n])
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not tensors or not any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0]):
            return value
        if is_weighted(self.model, node):
            return self._layer(node, tensors[0], value)
        kind = kind_of(self.model, node)
        if kind == "elementwise":
            if node.op == "call_module":
                self._tie_call_sites(node, tensors[0])
            return self._combine(node, tensors)
        if kind == "moving":
            return evaluate_with(self.model, node, args, kwargs)
        if kind == "padding":
            return self._pad(node, args, kwargs)
        if kind == "pooling":
            return self._pool(node, tensors[0], value)
        if kind == "reduction":
            return self._reduce(node, tensors[0], value)
        if kind == "softmax":
            return tensors[0]
        if kind == "unknown":
            code = VERSIONED if any(bool(t.any()) for t in tensors) else NOBODY
            return tree_map(
                lambda leaf: (
                    torch.full(leaf.shape, code, dtype=torch.int64)
                    if isinstance(leaf, Tensor)
                    else leaf
                ),
                value,
            )
        raise NoRuleError(f"{node.format_node()}: no rule for {target_of(self.model, node)}")

    # -- one rule per kind

    def _fresh(self, count: int) -> list[int]:
        first = self._next_id
        self._next_id += count
        return list(range(first, self._next_id))

    def _layer(self, node: fx.Node, ids: Tensor, value: Tensor) -> Tensor:
        module = self.model.get_submodule(str(node.target))
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        path = self._path_of.setdefault(id(module), str(node.target))
        if path not in self.layers:
            self.layers[path] = Layer(path, module, self._fresh(module.weight.shape[0]))
        layer = self.layers[path]
        if isinstance(module, nn.Conv2d):
            columns = constant_along(ids, (2, 3), node)[0].flatten().tolist()
            layer.input_resolutions.append(resolution(ids))
            layer.output_resolutions.append(resolution(value))
        else:
            columns = constant_along(ids, range(ids.dim() - 1), node).flatten().tolist()
            layer.input_resolutions.append(str(ids[..., 0].numel()))
            layer.output_resolutions.append(str(value[..., 0].numel()))
        for earlier in layer.columns:
            for pair in zip(earlier, columns, strict=True):
                self.ties.tie(pair, f"call sites of {path}")
        layer.nodes.append(node)
        layer.columns.append(columns)
        self._tie_groups(layer, columns)
        rows = torch.tensor(layer.rows)
        if isinstance(module, nn.Conv2d):
            return rows[None, :, None, None].expand(value.shape).clone()
        return rows.expand(value.shape).clone()

    def _tied_along(self, ids: Tensor, d: int, why: str) -> Tensor:
        first = ids.narrow(d, 0, 1)
        both = (first > VERSIONED) & (ids > VERSIONED) & (first != ids)
        if both.any():
            pairs = torch.stack([first.expand(ids.shape)[both], ids[both]], 1).unique(dim=0)
            for pair in pairs.tolist():
                self.ties.tie(pair, why)
        return ids.amax(d, keepdim=True)

    def _tie_groups(self, layer: Layer, columns: list[int]) -> None:
        groups = layer.groups
        if groups == 1:
            return
        wide, tall = len(columns) // groups, len(layer.rows) // groups
        if groups >= 8 or groups == len(columns):
            for g in range(groups):
                members = columns[g * wide : (g + 1) * wide] + layer.rows[g * tall : (g + 1) * tall]
                self.ties.tie(members, f"group {g} of {layer.path}")
            return
        for i in range(wide):
            self.ties.tie(columns[i::wide], f"input {i} of every group of {layer.path}")
        for i in range(tall):
            self.ties.tie(layer.rows[i::tall], f"output {i} of every group of {layer.path}")

    def _tie_call_sites(self, node: fx.Node, ids: Tensor) -> None:
        """A batch norm that is called twice has one slice per stage for both calls."""
        module = self.model.get_submodule(str(node.target))
        if not any(p.numel() > 1 for p in module.parameters(recurse=False)):
            return
        columns = constant_along(ids, [d for d in range(ids.dim()) if d != 1], node).flatten()
        if id(module) in self._sites:
            for pair in zip(self._sites[id(module)].tolist(), columns.tolist(), strict=True):
                self.ties.tie(pair, f"call sites of {node.target}")
        self._sites[id(module)] = columns

    def _combine(self, node: fx.Node, operands: Sequence[Tensor]) -> Tensor:
        shape = torch.broadcast_shapes(*(t.shape for t in operands))
        aligned = [t[(None,) * (len(shape) - t.dim())] for t in operands]
        result = torch.zeros(shape, dtype=torch.int64)
        for t in aligned:
            if self._is_gate(t, aligned, shape):
                self.gates.update(i for i in t.unique().tolist() if i > VERSIONED)
                continue
            t = t.expand(shape)
            both = (t > VERSIONED) & (result > VERSIONED) & (t != result)
            if both.any():
                pairs = torch.stack([t[both], result[both]], 1).unique(dim=0)
                for pair in pairs.tolist():
                    self.ties.tie(pair, str(node))
            # a real position beats a version, a version beats nobody
            result = torch.where(result > VERSIONED, result, torch.maximum(result, t))
        return result

    def _is_gate(self, t: Tensor, others: Sequence[Tensor], shape: Sequence[int]) -> bool:
        """Whether ``t`` is a value of one channel that is broadcast against channels."""
        if not t.any() or carried(t):
            return False
        for d in range(1, len(shape)):
            if t.shape[d] != 1 or shape[d] == 1:
                continue
            for other in others:
                wide = other is not t and other.shape[d] > 1
                if wide and (d in carried(other) or (d == 1 and (other == VERSIONED).any())):
                    return True
                if wide and d == 1 and not other.any():
                    raise NoRuleError("nobody's channels times a value of one channel")
        return False

    def _pad(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor:
        """Padded channels are nobody's; padded rows belong to the channel they extend."""
        ids = first_tensor((args, kwargs))
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            amounts, mode = list(module.padding), "constant"  # type: ignore[arg-type]
        else:
            amounts = list(kwargs["pad"] if "pad" in kwargs else args[1])
            mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        for k in range(len(amounts) // 2):
            d = ids.dim() - 1 - k
            low, high = amounts[2 * k], amounts[2 * k + 1]
            if low == high == 0:
                continue
            size = ids.shape[d]
            wanted = torch.arange(-low, size + high)
            padded = ids.index_select(d, wanted.clamp(0, size - 1))
            if d == 1 or d in carried(ids):
                if mode != "constant":
                    raise NoRuleError(f"{node}: channels padded by {mode}")
                inside = (wanted >= 0) & (wanted < size)
                form = [-1 if e == d else 1 for e in range(ids.dim())]
                padded = torch.where(inside.view(form), padded, NOBODY)
            ids = padded
        return ids

    def _pool(self, node: fx.Node, ids: Tensor, value: Any) -> Any:
        kept = constant_along(ids, (2, 3), node)
        return tree_map(lambda leaf: kept.expand(leaf.shape).clone(), value)

    def _reduce(self, node: fx.Node, ids: Tensor, value: Any) -> Any:
        dims, keepdim = reduction_of(node, ids.dim())
        mixed = carried(ids) & set(dims)
        if 1 in dims and (ids == VERSIONED).any():
            mixed.add(1)
        if mixed and not carried(ids) - set(dims):
            self.coupled.add(node)
            code = torch.full([1] * ids.dim(), VERSIONED)
            reduced = code.expand([1 if d in dims else n for d, n in enumerate(ids.shape)])
        else:
            reduced = ids
            for d in dims:
                reduced = self._tied_along(reduced, d, f"{node} reduces one of several axes")
        if not keepdim:
            for d in sorted(dims, reverse=True):
                reduced = reduced.squeeze(d)
        return tree_map(lambda leaf: reduced.expand(leaf.shape).clone(), value)

    # -- questions

    def prediction_layers(self) -> list[str]:
        """Layers whose paths all end at the output without meeting another layer, and
        which share no atom with another one (docs/semantics.md)."""
        if self._predictions is None:
            last = [layer for layer in self.layers.values() if self._ends(layer)]
            self._predictions = [layer.path for layer in last if not self._shares(layer)]
        return self._predictions

    def _ends(self, layer: Layer) -> bool:
        """Whether the output is reached from ``layer``, and no other layer is."""
        reached, pending = set(layer.nodes), list(layer.nodes)
        while pending:
            for user in pending.pop().users:
                if is_weighted(self.model, user):
                    return False
                if user not in reached:
                    reached.add(user)
                    pending.append(user)
        return any(node.op == "output" for node in reached)

    def behind_heads(self) -> set[int]:
        """Ids (Python's) of all tensors of the prediction layers and of what follows them."""
        found: set[int] = set()
        reached = [n for path in self.prediction_layers() for n in self.layers[path].nodes]
        for node in self.traced.graph.nodes:
            if any(source in reached for source in node.all_input_nodes):
                reached.append(node)
        for node in reached:
            if node.op == "call_module":
                module = self.model.get_submodule(str(node.target))
                found.update(id(t) for t in (*module.parameters(), *module.buffers()))
            for source in node.all_input_nodes:
                if source.op == "get_attr" and all(user in reached for user in source.users):
                    found.add(id(evaluate(self.model, source, {}, torch.empty(0))))
        return found

    def _shares(self, layer: Layer) -> bool:
        own = {self.ties.find(row) for row in layer.rows}
        others = [row for other in self.layers.values() if other is not layer for row in other.rows]
        read = [c for other in self.layers.values() for call in other.columns for c in call]
        return any(self.ties.find(item) in own for item in (*others, *read) if item > VERSIONED)


def carried(ids: Tensor) -> set[int]:
    """The dimensions (but the batch) along which positions differ."""
    wide = [d for d in range(1, ids.dim()) if ids.shape[d] > 1]
    return {d for d in wide if bool((ids != ids.narrow(d, 0, 1)).any())}


def constant_along(ids: Tensor, dims: Iterable[int], node: fx.Node) -> Tensor:
    """``ids`` with ``dims`` reduced to size 1, which must not lose anything."""
    kept = ids
    for d in dims:
        kept = kept.narrow(d, 0, 1)
    if not torch.equal(kept.expand(ids.shape), ids):
        raise NoRuleError(f"{node.format_node()}: positions differ along other dimensions")
    return kept


def resolution(t: Tensor) -> str:
    return "x".join(str(n) for n in t.shape[2:])


def first_tensor(tree: Any) -> Tensor:
    leaf: Tensor = next(leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
    return leaf


def reduction_of(node: fx.Node, rank: int) -> tuple[list[int], bool]:
    """Dimensions (non-negative) and ``keepdim`` of a reduction node."""
    names = ("dim", "keepdim")
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    if "dim" not in given:
        raise NoRuleError(f"{node.format_node()}: reduces over everything")
    dim = given["dim"]
    dims = [dim] if isinstance(dim, int) else list(dim)  # type: ignore[call-overload]
    return [d % rank for d in dims], bool(given.get("keepdim", False))


# --------------------------------------------------------------------------------------
# Evaluation of single nodes


def target_of(model: nn.Module, node: fx.Node) -> Any:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target)))
    return node.target


def is_weighted(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        model.get_submodule(str(node.target)), WEIGHTED_MODULES
    )


def kind_of(model: nn.Module, node: fx.Node) -> str:
    """Which of the tables above has the operator."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Softmax):
            return "softmax"
        tables: list[tuple[tuple[type[nn.Module], ...], str]] = [
            (ELEMENTWISE_MODULES, "elementwise"),
            (MOVING_MODULES, "moving"),
            (POOLING_MODULES, "pooling"),
            (PADDING_MODULES, "padding"),
        ]
        return next((kind for table, kind in tables if isinstance(module, table)), "none")
    if node.target is F.pad:
        return "padding"
    if getattr(node.target, "__name__", "") == "stochastic_depth":
        return "elementwise"  # torchvision's; it does nothing in eval mode
    if node.target in (torch.max, torch.min) and isinstance((*node.args, None)[1], fx.Node):
        return "elementwise"
    functions: list[tuple[frozenset[Any], str]] = [
        (ELEMENTWISE_FUNCTIONS | ELEMENTWISE_METHODS, "elementwise"),
        (MOVING_FUNCTIONS | MOVING_METHODS, "moving"),
        (POOLING_FUNCTIONS, "pooling"),
        (REDUCTION_FUNCTIONS | REDUCTION_METHODS, "reduction"),
        (SOFTMAX_FUNCTIONS | {"softmax", "log_softmax"}, "softmax"),
        (UNKNOWN_FUNCTIONS | UNKNOWN_METHODS, "unknown"),
    ]
    return next((kind for table, kind in functions if node.target in table), "none")


def is_in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return bool(node.kwargs.get("inplace", False)) or node.target in (
        operator.iadd,
        operator.isub,
        operator.imul,
    )


def evaluate(model: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any], x: Tensor) -> Any:
    """The value of ``node`` given those in ``env``, which are left as they are."""
    if node.op == "placeholder":
        return x
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(model.get_submodule(owner), name)
    if node.op == "output":
        return fx.map_arg(node.args[0], lambda n: env[n])
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
    if is_in_place(model, node) and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])
    return evaluate_with(model, node, args, kwargs)


def evaluate_with(model: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def store(model: nn.Module, node: fx.Node, env: dict[fx.Node, Any], value: Any) -> None:
    """Keep a value; an in-place operator changes what its operand's name stands for too."""
    env[node] = value
    if node.op not in ("placeholder", "get_attr", "output") and is_in_place(model, node):
        operand = node.args[0]
        while isinstance(operand, fx.Node) and isinstance(env[operand], Tensor):
            env[operand] = value
            if operand.op in ("placeholder", "get_attr") or not is_in_place(model, operand):
                break
            operand = operand.args[0]


def check_shapes(node: fx.Node, value: Any, ids: Any) -> None:
    values, _ = tree_flatten(value)
    names, _ = tree_flatten(ids)
    for v, i in zip(values, names, strict=True):
        if isinstance(v, Tensor) and v.shape != i.shape:
            raise NoRuleError(f"{node.format_node()}: ids {i.shape} for a value {v.shape}")


# --------------------------------------------------------------------------------------
# Phase 2: owners from provenance, then one run per stage


def parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Everything that provenance may name, tied names included."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def stage_of_key(key: str) -> int:
    """The stage, from 1, of a provenance key such as ``stages.0.conv1.weight``."""
    head, number, _ = key.split(".", 2)
    if head != "stages":
        raise MaskedFormError(f"{key}: not a parameter of a stage")
    return int(number) + 1


def thin_stages(dyn: DynamicLike) -> int:
    """How many stages are made of slices; the last is not if it is the original."""
    stages = int(dyn.plan.stages)
    return stages - 1 if dyn.plan.final == "original" else stages


def positions(index: tuple[int, ...] | None, size: int) -> list[int]:
    return list(range(size)) if index is None else list(index)


@dataclass(eq=False)
class Assignment:
    """What provenance says about the weighted layers.

    Attributes:
        stages: number of thin stages.
        masks: per layer path and stage from 1, a boolean (rows, columns) of what is stored.
        heads: paths whose rows several stages have.
        owner: per id, its stage; ``VERSION_OWNER`` for rows of heads, ``stages + 1`` for rows
            that no stage has: they count as dead.
    """

    stages: int
    masks: dict[str, list[Tensor]]
    heads: list[str]
    owner: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Assignment) or self.masks.keys() != other.masks.keys():
            return False
        same = torch.equal(self.owner, other.owner) and set(self.heads) == set(other.heads)
        return same and all(
            torch.equal(one, two)
            for path, masks in self.masks.items()
            for one, two in zip(masks, other.masks[path], strict=True)
        )


def read_assignment(structure: Structure, dyn: DynamicLike) -> Assignment:
    """Turn provenance into owners and masks; a row that is in several stages makes a head."""
    stages = thin_stages(dyn)
    tensors = parameters_and_buffers(structure.model)
    by_weight: dict[int, list[tuple[int, SliceLike]]] = {}
    for key, entry in dyn.provenance.items():
        stage = stage_of_key(key)
        if entry.source not in tensors:
            raise MaskedFormError(f"{key}: the original has no {entry.source}")
        if stage <= stages:
            by_weight.setdefault(id(tensors[entry.source]), []).append((stage, entry))
    masks: dict[str, list[Tensor]] = {}
    heads: list[str] = []
    owner = torch.full((structure._next_id,), stages + 1, dtype=torch.int64)
    owner[NOBODY], owner[VERSIONED] = 0, VERSION_OWNER
    for path, layer in structure.layers.items():
        shape = layer.module.weight.shape
        per_stage = [torch.zeros(shape[:2], dtype=torch.bool) for _ in range(stages)]
        for stage, entry in by_weight.get(id(layer.module.weight), []):
            whole = zip(entry.index[2:], shape[2:], strict=False)
            if len(entry.index) != len(shape) or any(
                index not in (None, tuple(range(size))) for index, size in whole
            ):
                raise MaskedFormError(f"{path}: index {entry.index} for a weight {tuple(shape)}")
            rows = torch.tensor(positions(entry.index[0], shape[0]), dtype=torch.int64)
            columns = torch.tensor(positions(entry.index[1], shape[1]), dtype=torch.int64)
            per_stage[stage - 1][rows[:, None], columns] = True
        masks[path] = per_stage
        held = torch.stack([m.any(1) for m in per_stage]) if per_stage else torch.zeros(0, shape[0])
        if bool((held.sum(0) > 1).any()):
            heads.append(path)
            owner[layer.rows] = VERSION_OWNER
            continue
        for stage in range(1, stages + 1):
            owner[torch.tensor(layer.rows)[held[stage - 1]]] = stage
    return Assignment(stages, masks, heads, owner)


def masked_outputs(
    model: nn.Module,
    dyn: DynamicLike,
    x: Tensor,
    structure: Structure | None = None,
    assignment: Assignment | None = None,
) -> list[Any]:
    """What every stage of ``dyn`` must output for ``x``, from the original and provenance.

    Args:
        model: the original, in eval mode.
        dyn: the transformed network; only ``provenance`` and ``plan`` are read.
        x: (N, C, H, W).
        structure: of the model, if at hand.
        assignment: instead of the one that provenance tells.

    Returns:
        One output per stage, of the original's structure.
    """
    structure = structure or Structure(model, x)
    assignment = assignment or read_assignment(structure, dyn)
    runner = _Runner(structure, assignment, x)
    outputs = []
    with torch.no_grad():
        for stage in range(1, assignment.stages + 1):
            outputs.append(runner.run(stage))
        if dyn.plan.final == "original":
            outputs.append(model(x))
    return outputs


class _Runner:
    def __init__(self, structure: Structure, assignment: Assignment, x: Tensor) -> None:
        self.structure = structure
        self.assignment = assignment
        self.x = x
        self.previous: dict[fx.Node, Any] = {}

    def run(self, stage: int) -> Any:
        """Evaluate the whole program for one stage; stages come in order."""
        env: dict[fx.Node, Any] = {}
        result: Any = None
        model = self.structure.model
        for node in self.structure.traced.graph.nodes:
            value = self._value(node, env, stage)
            if node.op == "output":
                result = value
                continue
            ids = self.structure.ids[node]
            store(model, node, env, self._kept(value, ids, self.previous.get(node), stage))
        self.previous = env
        return result

    def _owners(self, ids: Tensor) -> Tensor:
        return self.assignment.owner[ids]

    def _kept(self, value: Any, ids: Any, previous: Any, stage: int) -> Any:
        """Earlier stages' positions keep their values; later stages' are dead."""
        if isinstance(value, (tuple, list)):
            befores = previous if previous is not None else [None] * len(value)
            triples = zip(value, ids, befores, strict=True)
            return tuple(self._kept(*triple, stage) for triple in triples)
        if not isinstance(value, Tensor) or not isinstance(ids, Tensor):
            return value
        owner = self._owners(ids)
        earlier = (owner >= 1) & (owner < stage)
        if stage > 1 and bool(earlier.any()):
            value = torch.where(earlier, previous, value)
        if bool((owner > stage).any()):
            value = torch.where(owner > stage, torch.zeros((), dtype=value.dtype), value)
        return value

    def _value(self, node: fx.Node, env: dict[fx.Node, Any], stage: int) -> Any:
        model = self.structure.model
        if is_weighted(model, node):
            return self._layer(node, env, stage)
        if node in self.structure.coupled:
            return self._coupled(node, env, stage)
        if node.op not in ("placeholder", "get_attr", "output"):
            operand = node.args[0] if node.args else None
            ids = self.structure.ids.get(operand) if isinstance(operand, fx.Node) else None
            if isinstance(ids, Tensor) and kind_of(model, node) == "softmax":
                return self._softmax(node, env, stage)
        return evaluate(model, node, env, self.x)

    def _layer(self, node: fx.Node, env: dict[fx.Node, Any], stage: int) -> Tensor:
        """The layer at full size with the weights that this stage stores, the rest zero."""
        module = self.structure.model.get_submodule(str(node.target))
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        path = self.structure._path_of[id(module)]
        mask = self.assignment.masks[path][stage - 1]
        mask = mask.view(*mask.shape, *[1] * (module.weight.dim() - 2))
        weight = torch.where(mask, module.weight, torch.zeros((), dtype=module.weight.dtype))
        (operand,) = fx.map_arg(node.args, lambda n: env[n])
        out: Tensor = torch.func.functional_call(module, {"weight": weight}, (operand,))
        return out

    def _coupled(self, node: fx.Node, env: dict[fx.Node, Any], stage: int) -> Any:
        """A reduction over channels: the stage's own channels, by their own count."""
        operand: Tensor = env[node.args[0]]  # type: ignore[index]
        ids: Tensor = self.structure.ids[node.args[0]]  # type: ignore[index]
        owner = self._owners(ids)
        if not bool((owner > 0).any()):
            return evaluate(self.structure.model, node, env, self.x)
        if bool((owner <= 0).any()):
            raise NoRuleError(f"{node.format_node()}: owned and other channels in one reduction")
        own = owner == stage
        if not bool(own.any()):
            return self.previous[node]
        dims, keepdim = reduction_of(node, operand.dim())
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in ("sum", "mean"):
            total = torch.where(own, operand, 0.0).sum(dims, keepdim=keepdim)
            count = own.to(operand.dtype).sum(dims, keepdim=keepdim)
            return total / count if name == "mean" else total
        low = name in ("amin", "min")
        filled = torch.where(own, operand, float("inf") if low else -float("inf"))
        return evaluate_with(
            self.structure.model, node, (filled, *node.args[1:]), dict(node.kwargs)
        )

    def _softmax(self, node: fx.Node, env: dict[fx.Node, Any], stage: int) -> Tensor:
        operand: Tensor = env[node.args[0]]  # type: ignore[index]
        owner = self._owners(self.structure.ids[node.args[0]])
        if not bool((owner > 0).any()):
            return evaluate(self.structure.model, node, env, self.x)  # type: ignore[no-any-return]
        if bool((owner <= 0).any()):
            raise NoRuleError(f"{node.format_node()}: owned and other channels in one softmax")
        filled = torch.where(owner == stage, operand, -float("inf"))
        out: Tensor = evaluate_with(
            self.structure.model, node, (filled, *node.args[1:]), dict(node.kwargs)
        )
        return out
