"""The masked form of a network, evaluated the slow and obvious way.

This is the other half of the proof: it takes the *original* eager model, and the
answer to "which weight went to which stage" that a transformed network gives in its
``provenance``, and works out what every stage must output. It shares no code with the
compiler: the program is what ``make_fx`` records while the model runs (core ATen operators:
a convolution, a product of two matrices, a softmax), at a fixed batch, and the deployed
network's slices never appear. All stages > i are zeroed in a full-size network instead.

Two phases:

1. ``Structure``: the program, and beside every value a tensor of the same shape with the *id*
   of the channel position behind each element. Data movement moves ids by running the very
   same operator on them; heads or windows that are merged into the batch are nothing special.
2. ``masked_outputs``: every operator at full size for stages i = 1..s. Positions owned by a
   stage before i keep the value that stage gave them, later ones are zero, the rest is
   computed with the weights that are alive for stage i.

An operator that is in none of the tables below is an error: a reference does not guess.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

NOBODY = 0
"""Id and owner of a position that no stage owns: image channels, padding, parameters."""
VERSIONED = 1
"""Id of a value of which every stage has its own version."""
VERSION_OWNER = -1
"""What ``VERSIONED`` becomes in an owner tensor; stages are 1..s there."""
GROUPS_TO_CUT_BETWEEN = 8


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
# What operators do to positions, by ATen name


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    "relu sigmoid tanh silu gelu mish elu celu leaky_relu hardswish hardsigmoid hardtanh softplus "
    "_prelu_kernel threshold erf exp log log1p expm1 abs neg sign sqrt rsqrt square reciprocal "
    "sin cos "
    "add sub rsub mul div pow clamp clamp_min clamp_max maximum minimum where masked_fill "
    "eq ne lt le gt ge logical_not logical_and logical_or bitwise_not bitwise_and "
    "as_strided _to_copy clone alias detach lift_fresh_copy lerp addcmul addcdiv "
    "floor ceil round trunc"
)
CREATION = _names(
    "zeros ones full empty arange linspace scalar_tensor eye "
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like "
    "zero fill"
)
"""They read the type and size of their operand at most; values come from numbers."""
MOVING = _names(
    "view _unsafe_view reshape permute transpose t expand slice select split split_with_sizes "
    "unbind squeeze unsqueeze roll index index_select repeat pixel_shuffle pixel_unshuffle "
    "native_channel_shuffle unfold diagonal getitem"
)
WRITING = _names("slice_scatter select_scatter copy")
"""What is left of writes in place: the written operand with some positions replaced."""
JOINING = _names("cat stack")
POOLING = {
    "max_pool2d_with_indices": 2,
    "avg_pool2d": 2,
    "_adaptive_avg_pool2d": 2,
    "adaptive_max_pool2d": 2,
    "max_pool3d_with_indices": 3,
    "avg_pool3d": 3,
    "_adaptive_avg_pool3d": 3,
    "upsample_nearest2d": 2,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "reflection_pad2d": 2,
    "replication_pad2d": 2,
}
"""Operators over that many last dimensions, position by position in the others."""
REDUCTION = _names("mean sum amax amin max min var std linalg_vector_norm logsumexp prod")
SOFTMAX = _names("_softmax _log_softmax _safe_softmax")
UNKNOWN = _names("cumsum cumprod sort cummax cummin logcumsumexp kthvalue topk argsort")
PRODUCT = _names("mm bmm addmm baddbmm")
NORM_PER_CHANNEL = _names("native_batch_norm _native_batch_norm_legit_no_training")
WITH_PARAMETERS = NORM_PER_CHANNEL | _names("native_layer_norm native_group_norm _prelu_kernel")
"""Operators that a module applies: two calls of it have one slice of its parameters per stage."""


def kind_of(node: fx.Node) -> str:
    """Which of the tables above has the operator."""
    name = name_of(node)
    tables: list[tuple[Any, str]] = [
        (ELEMENTWISE, "elementwise"),
        (CREATION, "creation"),
        (MOVING, "moving"),
        (WRITING, "writing"),
        (JOINING, "joining"),
        (POOLING, "pooling"),
        (REDUCTION, "reduction"),
        (SOFTMAX, "softmax"),
        (UNKNOWN, "unknown"),
        (PRODUCT, "product"),
        (NORM_PER_CHANNEL, "norm"),
    ]
    if name in ("max", "min") and "dim" not in bound(node):
        return "elementwise" if "other" in bound(node) else "none"
    return next((kind for table, kind in tables if name in table), name)


# --------------------------------------------------------------------------------------
# The program


def name_of(node: fx.Node) -> str:
    """The ATen operator's name, without the overload and the underscore of writing in place."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    name = node.target._opname
    return name[:-1] if name.endswith("_") else name


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by their names in the operator's schema, defaults left out."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    names = [a.name for a in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


@contextmanager
def _whole_linear_layers() -> Iterator[None]:
    """While the model is traced, a linear layer is one product of two matrices, whatever the
    layout of its operand, and the fused forms of attention are taken apart."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        if a.dim() > 2 and b.dim() == 2:
            return torch.mm(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
        return plain(a, b)

    plain: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            mock.patch.object(F, "linear", linear),
            mock.patch.object(torch, "matmul", matmul),
            mock.patch.object(Tensor, "matmul", matmul),
            mock.patch.object(Tensor, "__matmul__", matmul),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def traced_program(model: nn.Module, names: Sequence[str], x: Tensor) -> fx.GraphModule:
    """What the model does to ``x``, as a graph whose inputs are the named tensors and ``x``."""

    def run(state: list[Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(names, state, strict=True)), (x,))

    tensors = parameters_and_buffers(model)
    with _whole_linear_layers():
        functional = torch.func.functionalize(run)
        traced = make_fx(functional)([tensors[name].detach() for name in names], x)
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        in_place = node.op == "call_function" and name_of(node) != _raw_name(node)
        if in_place and len(node.all_input_nodes[0].users) > 1:
            raise NoRuleError(f"{node.format_node()}: writes what others read")
    return traced


def _raw_name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", "getitem")


def evaluate(traced: fx.GraphModule, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """The value of ``node`` given those in ``env``, which are left as they are."""
    if node.op == "get_attr":
        return getattr(traced, str(node.target))
    args: Any
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
    if name_of(node) != _raw_name(node):
        args = (args[0].clone(), *args[1:])
    return evaluate_with(node, args, kwargs)


def evaluate_with(node: fx.Node, args: Any, kwargs: Any) -> Any:
    assert callable(node.target)
    if name_of(node) in ("view", "_unsafe_view"):  # ids and values differ in their layout
        return args[0].reshape(args[1])
    if name_of(node) == "as_strided":
        if list(args[0].shape) != list(args[1]):
            raise NoRuleError(f"{node.format_node()}: reads memory")
        return args[0]
    return node.target(*args, **kwargs)


# --------------------------------------------------------------------------------------
# Phase 1: ids


@dataclass
class Layer:
    """A convolution or linear layer and the positions around it, over all its call sites."""

    path: str
    operand: fx.Node
    """The weight as the program computes it; a linear layer's has its rows along dimension 1."""
    weight: Tensor
    """As the original computes it: rows, columns (per group), kernel."""
    groups: int
    rows: list[int]
    nodes: list[fx.Node] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    """Per call site, the id of every input channel."""
    input_resolutions: list[str] = field(default_factory=list)
    output_resolutions: list[str] = field(default_factory=list)

    @property
    def is_convolution(self) -> bool:
        return name_of(self.nodes[0]) == "convolution"

    def oriented(self, weight: Tensor) -> Tensor:
        """From the program's layout to rows, columns, kernel, or back."""
        return weight if self.is_convolution else weight.t()


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

    def tie(self, one: Tensor, other: Tensor, why: str) -> None:
        """Tie equal positions of two tensors of ids that broadcast against each other."""
        shape = (one + other).shape
        one, other = one.expand(shape), other.expand(shape)
        both = (one > VERSIONED) & (other > VERSIONED) & (one != other)
        if not bool(both.any()):
            return
        base = int(max(one.max(), other.max())) + 1
        for pair in _distinct(one[both] * base + other[both]):
            first, second = divmod(pair, base)
            self.pairs.add((first, second, why))
            low, high = sorted((self.find(first), self.find(second)))
            self.parent[high] = low


def _distinct(ids: Tensor) -> list[int]:
    return [int(item) for item in torch.unique(ids)]


CONSTANT, WEIGHT, ACTIVATION = 0, 1, 2
"""What a value is computed from: numbers and buffers; parameters as well; channels or the input."""


class Structure:
    """The traced program with the ids of every value, for inputs of the shape of ``x``.

    Attributes:
        traced: the eager model as ``make_fx`` sees it.
        ids: per node, the tree of id tensors (non-tensors stand for themselves).
        layers: per path, in program order.
        ties: which ids must live in one stage.
        gates: ids of operands of one atom that were broadcast against channels.
        coupled: nodes that each stage evaluates on its own channels.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        self.shape = x.shape
        tensors = parameters_and_buffers(model)
        self.names = list({id(t): name for name, t in reversed(tensors.items())}.values())
        self.names.reverse()
        self.parameters = {n for n in self.names if isinstance(tensors[n], nn.Parameter)}
        self.traced = traced_program(model, self.names, x)
        inputs = [node for node in self.traced.graph.nodes if node.op == "placeholder"]
        self.name_of_input = dict(zip(inputs, self.names, strict=False))
        self.input = inputs[-1]
        self.ids: dict[fx.Node, Any] = {}
        self.layers: dict[str, Layer] = {}
        self.ties = Ties()
        self.gates: set[int] = set()
        self.coupled: set[fx.Node] = set()
        self.mixing: set[fx.Node] = set()  # linear layers over another axis than the channels
        self.origin: dict[fx.Node, int] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.memo: dict[str, Any] = {}  # what callers worked out about this structure
        self._sampled: set[fx.Node] = {self.input}
        self._next_id = VERSIONED + 1
        self._layer_of: dict[str, Layer] = {}
        self._mixed: set[str] = set()
        self._expressions: dict[fx.Node, str] = {}
        self._sites: dict[str, Tensor] = {}
        self._predictions: list[str] | None = None
        self._run()

    # -- walking

    def _run(self) -> None:
        with torch.no_grad():
            for node in self.traced.graph.nodes:
                self.origin[node] = self._origin_of(node)
                if self._sampled.intersection(node.all_input_nodes):
                    self._sampled.add(node)
                if node.op != "output" and self.origin[node] != ACTIVATION:
                    self.constants[node] = self.constant(node, self.constants)
                self.ids[node] = self._ids_of(node)
                check_shapes(node, self.ids[node])

    def constant(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """The value of a node that does not depend on the input."""
        if node.op == "placeholder":
            return parameters_and_buffers(self.model)[self.name_of_input[node]].detach()
        # of what depends on the input, only the form is read
        missing = {n: _blank(n) for n in node.all_input_nodes if n not in env}
        return evaluate(self.traced, node, {**env, **missing} if missing else env)

    def _origin_of(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            if node is self.input:
                return ACTIVATION
            return WEIGHT if self.name_of_input[node] in self.parameters else CONSTANT
        if node.op == "get_attr" or (node.op == "call_function" and kind_of(node) == "creation"):
            return CONSTANT
        if self.is_weighted(node):
            return ACTIVATION
        return max((self.origin[n] for n in node.all_input_nodes), default=CONSTANT)

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether a node multiplies by a weight: a parameter, or what is computed from some."""
        if node.op != "call_function":
            return False
        name = name_of(node)
        if name == "convolution":
            return self.origin[node.args[1]] == WEIGHT  # type: ignore[index]
        if name not in ("mm", "addmm"):
            return False
        data, weight = node.args[-2:]
        return self.origin[weight] == WEIGHT != self.origin[data]  # type: ignore[index]

    def _ids_of(self, node: fx.Node) -> Any:
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: self.ids[n])
        if self.origin[node] != ACTIVATION or node is self.input:
            return self._filled(node, NOBODY)
        if self.is_weighted(node):
            return self._layer(node)
        if not any(_any_ids(self.ids[n]) for n in node.all_input_nodes):
            return self._filled(node, NOBODY)
        if name_of(node) in WITH_PARAMETERS:
            self._tie_call_sites(node)
        rules: dict[str, Callable[[fx.Node], Any]] = {
            "elementwise": self._elementwise,
            "moving": self._move,
            "writing": self._write,
            "joining": self._join,
            "pooling": self._pool,
            "reduction": self._reduce,
            "softmax": self._softmax,
            "unknown": self._unknown,
            "product": self._product,
            "norm": self._norm,
            "constant_pad_nd": self._pad,
            "native_layer_norm": self._layer_norm,
            "native_group_norm": self._group_norm,
            "convolution": self._fixed_filter,
        }
        kind = kind_of(node)
        if kind not in rules:
            raise NoRuleError(f"{node.format_node()}: no rule for {node.target}")
        return rules[kind](node)

    # -- helpers

    def _fresh(self, count: int) -> list[int]:
        first = self._next_id
        self._next_id += count
        return list(range(first, self._next_id))

    def _filled(self, node: fx.Node, code: int) -> Any:
        return tree_map(lambda v: _expanded(code, v.shape), shapes_of(node))

    def _unknown(self, node: fx.Node) -> Any:
        return self._filled(node, VERSIONED)

    def _first(self, node: fx.Node, ids: Tensor) -> Any:
        """Ids for the first of several results; the others are statistics that nobody reads."""
        values = shapes_of(node)
        return [ids, *(_expanded(NOBODY, v.shape) for v in values[1:])]

    def _operand(self, node: fx.Node) -> Tensor:
        ids: Tensor = self.ids[node.args[0]]  # type: ignore[index]
        return ids

    def _tied_along(self, ids: Tensor, d: int, why: str) -> Tensor:
        kept = ids.amax(d, keepdim=True)
        self.ties.tie(kept, ids, why)
        return kept

    def expression(self, node: fx.Node) -> str:
        """How a value is computed, as a text that is equal for equal computations."""
        if node not in self._expressions:
            if node.op != "call_function":
                text = self.name_of_input.get(node, str(node.target))
            else:
                args = fx.map_arg((node.args, dict(node.kwargs)), self._quoted)
                text = f"{node.target}{args}"
            self._expressions[node] = text
        return self._expressions[node]

    def _quoted(self, node: fx.Node) -> Any:
        return f"<{self.expression(node)}>"

    def sources(self, node: fx.Node) -> list[str]:
        """Names of the parameters that a value is computed from."""
        found: list[str] = []
        seen, pending = {node}, [node]
        while pending:
            one = pending.pop(0)
            if self.name_of_input.get(one) in self.parameters:
                found.append(self.name_of_input[one])
            pending += [n for n in one.all_input_nodes if n not in seen]
            seen.update(one.all_input_nodes)
        return found

    def is_computed(self, node: fx.Node | None) -> bool:
        """Whether an element of this weight or bias depends on more than one of a parameter's."""
        if node is None or node.op != "call_function":
            return False
        if kind_of(node) not in ("elementwise", "moving", "writing", "creation", "joining"):
            return True
        return any(self.is_computed(n) for n in node.all_input_nodes)

    # -- one rule per kind

    def _layer(self, node: fx.Node) -> Tensor:
        convolution = name_of(node) == "convolution"
        data, operand = node.args[:2] if convolution else node.args[-2:]
        assert isinstance(data, fx.Node)
        assert isinstance(operand, fx.Node)
        ids: Tensor = self.ids[data]
        shape = shapes_of(node).shape
        key = self.expression(operand) + (" convolved" if convolution else " multiplied")
        if not convolution and carried(ids) - {1}:
            self._mixed.add(key)
            self._keep_whole(key)
        if not convolution and 1 not in carried(ids) and carried(ids):
            self.mixing.add(node)
            return ids[:, :1].expand(shape)
        if convolution:
            if bound(node)["transposed"]:
                raise NoRuleError(f"{node.format_node()}: transposed convolution")
            columns = constant_along(ids, (0, *range(2, ids.dim())), node).flatten().tolist()
        elif 0 in carried(ids):
            self.mixing.add(node)
            return _expanded(VERSIONED, shape)
        else:
            columns = ids[0].tolist()
        if key not in self._layer_of:
            self._layer_of[key] = self._new_layer(node, operand)
            self._keep_whole(key)
        layer = self._layer_of[key]
        layer.input_resolutions.append(self._resolution(data, convolution))
        layer.output_resolutions.append(self._resolution(node, convolution))
        for earlier in layer.columns:
            self.ties.tie(
                torch.tensor(earlier), torch.tensor(columns), f"call sites of {layer.path}"
            )
        layer.nodes.append(node)
        layer.columns.append(columns)
        self._tie_groups(layer, columns)
        rows = torch.tensor(layer.rows)
        return rows.view(-1, *[1] * (len(shape) - 2)).expand(shape)

    def _keep_whole(self, key: str) -> None:
        """A layer that also mixes along positions is one atom of stage 1."""
        if key in self._mixed and key in self._layer_of:
            rows = torch.tensor(self._layer_of[key].rows)
            self._tied_along(rows, 0, f"{key} is a layer and mixes along positions")
            self.gates.add(int(rows[0]))

    def _new_layer(self, node: fx.Node, operand: fx.Node) -> Layer:
        convolution = name_of(node) == "convolution"
        weight = self.constants[operand] if convolution else self.constants[operand].t()
        groups = bound(node)["groups"] if convolution else 1
        tensors = parameters_and_buffers(self.model)
        largest = max(self.sources(operand), key=lambda name: tensors[name].numel())
        path = largest.removesuffix(".weight")
        count = sum(p.partition("[")[0] == path for p in self.layers)
        path = f"{path}[{count}]" if count else path
        layer = Layer(path, operand, weight, groups, self._fresh(weight.shape[0]))
        self.layers[path] = layer
        return layer

    def _resolution(self, node: fx.Node, convolution: bool) -> str:
        shape = list(shapes_of(node).shape)
        if node in self._sampled:
            shape[0] //= self.shape[0]
        if not convolution:
            return str(shape[0])
        merged = shape[:1] if shape[0] > 1 else []
        return "x".join(str(n) for n in (*merged, *shape[2:]))

    def _tie_groups(self, layer: Layer, columns: list[int]) -> None:
        groups = layer.groups
        if groups == 1:
            return
        read = torch.tensor(columns).view(groups, -1)
        written = torch.tensor(layer.rows).view(groups, -1)
        if groups >= GROUPS_TO_CUT_BETWEEN or groups == len(columns):
            for g in range(groups):
                why = f"group {g} of {layer.path}"
                self.ties.tie(written[g, :1], written[g], why)
                self.ties.tie(written[g, :1], read[g], why)
            return
        self._tied_along(read, 0, f"inputs of every group of {layer.path}")
        self._tied_along(written, 0, f"outputs of every group of {layer.path}")

    def _tie_call_sites(self, node: fx.Node) -> None:
        """A norm that is called twice has one slice per stage for both calls."""
        weight = bound(node).get("weight")
        ids = self._operand(node)
        if weight is None or shapes_of(weight).numel() == 1:
            return
        d = ids.dim() - 1 if name_of(node) == "native_layer_norm" else 1
        if carried(ids) - {d}:
            return
        columns = ids.movedim(d, 0).flatten(1)[:, 0]
        key = self.expression(weight)
        if key in self._sites:
            self.ties.tie(self._sites[key], columns, f"call sites of {key}")
        self._sites[key] = columns

    def _elementwise(self, node: fx.Node) -> Tensor:
        operands = [self.ids[n] for n in node.all_input_nodes]
        return self._combine(node, operands, shapes_of(node).shape)

    def _combine(
        self,
        node: fx.Node,
        operands: Sequence[Tensor],
        shape: Sequence[int],
        shared: Sequence[Tensor] = (),
    ) -> Tensor:
        """Positions of an elementwise result; ``shared`` operands gate whatever they hold."""
        aligned = [t[(None,) * (len(shape) - t.dim())] for t in operands]
        result = _expanded(NOBODY, shape)
        gates = [
            t
            for t, operand in zip(aligned, operands, strict=True)
            if any(operand is s for s in shared) or self._is_gate(t, aligned, shape)
        ]
        self.gates.update(i for t in gates for i in _distinct(t) if i > VERSIONED)
        for t in aligned:
            if any(t is gate for gate in gates) or not bool(t.any()):
                continue
            self.ties.tie(t, result, str(node))
            # a real position beats a version, a version beats nobody
            result = torch.where(result > VERSIONED, result, torch.maximum(result, t))
        for t in gates:
            result = torch.where(result == NOBODY, t, result)
        return result

    def _is_gate(self, t: Tensor, others: Sequence[Tensor], shape: Sequence[int]) -> bool:
        """Whether ``t`` is a value of one atom that is broadcast against several."""
        if not _any_ids(t):
            return False
        own = carried(t)
        wider = False
        for other in others:
            if other is t or not _any_ids(other):
                continue
            wide = any(t.shape[d] == 1 < other.shape[d] for d in range(len(shape)))
            versions = wide and not own and int(other.max()) == VERSIONED
            wider = wider or versions or bool(carried(other) - own)
        real = _distinct(t[t > VERSIONED]) if wider else []
        return len({self.ties.find(item) for item in real}) == 1

    def _move(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._moved)
        return evaluate_with(node, args, kwargs)

    def _moved(self, node: fx.Node) -> Any:
        """Ids of what is moved; the value of an index, which must not depend on the input."""
        if isinstance(self.ids[node], Tensor) and not shapes_of(node).is_floating_point():
            if node not in self.constants:
                raise NoRuleError(f"{node.format_node()}: moves by what the input says")
            return self.constants[node]
        return self.ids[node]

    def _write(self, node: fx.Node) -> Any:
        base, source = (self.ids[n] for n in node.args[:2])  # type: ignore[index]
        if name_of(node) == "copy":
            return source.expand(base.shape)
        d = int(bound(node).get("dim", 0)) % base.dim()
        if name_of(node) == "select_scatter":
            source = source.unsqueeze(d)
        if self._crosses(d, [base, source]):
            return self._leveled(node, d, [base, source]).expand(base.shape)
        return evaluate_with(node, (base.clone(), self.ids[node.args[1]], *node.args[2:]), {})  # type: ignore[index]

    def _join(self, node: fx.Node) -> Tensor:
        """Concatenation along channels passes positions through, along another axis it ties."""
        parts: list[Tensor] = [self.ids[n] for n in node.args[0]]  # type: ignore[union-attr, index]
        d = int(bound(node).get("dim", 0))
        if name_of(node) == "stack":
            d %= parts[0].dim() + 1
            parts = [part.unsqueeze(d) for part in parts]
        d %= parts[0].dim()
        if self._crosses(d, parts):
            return self._leveled(node, d, parts).expand(shapes_of(node).shape)
        return torch.cat(parts, d)

    @staticmethod
    def _crosses(d: int, parts: Sequence[Tensor]) -> bool:
        found = set().union(*(carried(part) for part in parts))
        return bool(found) and d not in found

    def _leveled(self, node: fx.Node, d: int, parts: Sequence[Tensor]) -> Tensor:
        """Operands that lie one after the other along another axis than the channels', tied."""
        result = parts[0].narrow(d, 0, 1)
        for part in parts[1:]:
            part = part.narrow(d, 0, 1)
            self.ties.tie(part, result, str(node))
            result = torch.where(result > VERSIONED, result, torch.maximum(result, part))
        return result

    def _pad(self, node: fx.Node) -> Tensor:
        """Padded channels are nobody's; padded rows belong to the channel they extend."""
        ids = self._operand(node)
        amounts = list(node.args[1])  # type: ignore[arg-type]
        axes = carried(ids) or {1}
        for k in range(len(amounts) // 2):
            d = ids.dim() - 1 - k
            low, high = amounts[2 * k], amounts[2 * k + 1]
            size = ids.shape[d]
            wanted = torch.arange(-low, size + high)
            ids = ids.index_select(d, wanted.clamp(0, size - 1))
            if d in axes:
                inside = (wanted >= 0) & (wanted < size)
                form = [-1 if e == d else 1 for e in range(ids.dim())]
                ids = torch.where(inside.view(form), ids, NOBODY)
        return ids

    def _pool(self, node: fx.Node) -> Any:
        ids = self._operand(node)
        last = range(ids.dim() - POOLING[name_of(node)], ids.dim())
        if carried(ids) & set(last):
            return self._unknown(node)
        kept = constant_along(ids, last, node)
        return tree_map(lambda v: kept.expand(v.shape), shapes_of(node))

    def _reduce(self, node: fx.Node) -> Any:
        ids = self._operand(node)
        dims, keepdim = reduction_of(node, ids.dim())
        reduced = ids
        if carried(ids) & dims and not carried(ids) - dims:
            self.coupled.add(node)
            sizes = [1 if d in dims else n for d, n in enumerate(ids.shape)]
            reduced = _expanded(VERSIONED, sizes)
        else:
            for d in dims:
                reduced = self._tied_along(reduced, d, f"{node} reduces one of several axes")
        if not keepdim:
            reduced = reduced.squeeze(tuple(dims))
        return tree_map(lambda v: reduced.expand(v.shape), shapes_of(node))

    def _softmax(self, node: fx.Node) -> Tensor:
        ids = self._operand(node)
        if int(node.args[1]) % ids.dim() in carried(ids):  # type: ignore[arg-type]
            self.coupled.add(node)
        return ids

    def _norm(self, node: fx.Node) -> Any:
        """Batch norm; with ``training`` it is an instance norm, the batch among the channels."""
        ids = self._operand(node)
        if bound(node).get("training") and carried(ids) - {1}:
            return self._unknown(node)
        return self._first(node, ids)

    def _layer_norm(self, node: fx.Node) -> Any:
        ids = self._operand(node)
        count = len(bound(node)["normalized_shape"])
        dims = set(range(ids.dim() - count, ids.dim()))
        if not carried(ids) & dims:
            return self._first(node, ids)
        if count > 1 or carried(ids) != dims or bool((ids <= VERSIONED).any()):
            return self._unknown(node)
        self.coupled.add(node)
        return self._first(node, ids)

    def _group_norm(self, node: fx.Node) -> Any:
        ids = self._operand(node)
        channels = constant_along(ids, (0, *range(2, ids.dim())), node).flatten()
        if not bool((channels > VERSIONED).any()):
            return self._first(node, ids)
        if bool((channels <= VERSIONED).any()):
            return self._unknown(node)
        by_group = channels.view(bound(node)["group"], -1)
        if len(by_group) >= GROUPS_TO_CUT_BETWEEN:
            self._tied_along(by_group, 1, f"{node} normalises groups")
        else:
            self._tied_along(by_group, 0, f"{node} normalises inside groups")
            self.coupled.add(node)
        return self._first(node, ids)

    def _fixed_filter(self, node: fx.Node) -> Tensor:
        """A convolution by constants: per channel if it is depthwise."""
        ids = self._operand(node)
        weight, groups = shapes_of(node.args[1]), bound(node)["groups"]
        same = groups == ids.shape[1] == weight.shape[0]
        if not same or carried(ids) - {1} or self.origin[node.args[1]] != CONSTANT:  # type: ignore[index]
            return _expanded(VERSIONED, shapes_of(node).shape)
        return constant_along(ids, range(2, ids.dim()), node).expand(shapes_of(node).shape)

    def _product(self, node: fx.Node) -> Tensor:
        """``out[b, i, j] = sum over c of one[b, i, c] * other[b, c, j]``, plus what is added."""
        shape = shapes_of(node).shape
        one, other = (self.ids[n] for n in node.args[-2:])  # type: ignore[index]
        if one.dim() == 2:
            one, other = one[None], other[None]
        result = self._matrix_product(node, one, other, (len(one), *shape[-2:])).view(shape)
        if len(node.args) == 3:
            result = self._combine(node, [result, self._operand(node)], shape)
        return result

    def _matrix_product(
        self, node: fx.Node, one: Tensor, other: Tensor, shape: Sequence[int]
    ) -> Tensor:
        wide, tall = carried(one), carried(other)
        unread = (wide == {2} and not _any_real(other)) or (tall == {1} and not _any_real(one))
        if unread or (1 in wide and 2 in tall and 0 not in wide | tall):
            return _expanded(VERSIONED, shape)
        why = f"{node} multiplies"
        one = self._tied_along(one, 2, why)
        other = self._tied_along(other, 1, why)
        if 1 in wide and 2 in tall:
            one = self._tied_along(one, 1, why)
            other = self._tied_along(other, 2, why)
            self.ties.tie(one, other, why)
            return torch.maximum(one, other).expand(shape)
        pairs = ((one, other), (other, one))
        shared = [t for t, u in pairs if carried(t) and 0 in carried(u) - carried(t)]
        return self._combine(node, [one, other], shape, shared)

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
                if self.is_weighted(user):
                    return False
                if user not in reached:
                    reached.add(user)
                    pending.append(user)
        return any(node.op == "output" for node in reached)

    def behind_heads(self) -> set[int]:
        """Ids (Python's) of all tensors of the prediction layers and of what follows them."""
        reached = {n for path in self.prediction_layers() for n in self.layers[path].nodes}
        for node in self.traced.graph.nodes:
            if self.origin[node] == ACTIVATION and not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        tensors = parameters_and_buffers(self.model)
        found: set[int] = set()
        for node, name in self.name_of_input.items():
            readers, pending = set(), [node]
            while pending:
                for user in pending.pop().users:
                    if self.origin[user] == ACTIVATION:
                        readers.add(user)
                    else:
                        pending.append(user)
            if readers and readers <= reached:
                found.add(id(tensors[name]))
        return found

    def _shares(self, layer: Layer) -> bool:
        own = {self.ties.find(row) for row in layer.rows}
        others = [row for other in self.layers.values() if other is not layer for row in other.rows]
        read = [c for other in self.layers.values() for call in other.columns for c in call]
        return any(self.ties.find(item) in own for item in (*others, *read) if item > VERSIONED)


def shapes_of(node: Any) -> Any:
    """The result of a node without its numbers: a tensor, or a list of tensors."""
    return node.meta["val"]


def _blank(node: fx.Node) -> Tensor:
    value = shapes_of(node)
    return torch.zeros(value.shape, dtype=value.dtype)


def _expanded(code: int, shape: Sequence[int]) -> Tensor:
    return torch.full((), code, dtype=torch.int64).expand(tuple(shape))


def _any_ids(tree: Any) -> bool:
    leaves = (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
    return any(_is_mixed(leaf) and bool(leaf.any()) for leaf in leaves)


def _any_real(ids: Tensor) -> bool:
    return _any_ids(ids) and int(ids.max()) > VERSIONED


def _is_mixed(ids: Tensor) -> bool:
    """False for what is nobody's by construction, however large."""
    return ids.numel() > 0 and (any(ids.stride()) or bool(ids.flatten()[0]))


def carried(ids: Tensor) -> set[int]:
    """The dimensions along which positions differ."""
    wide = [d for d in range(ids.dim()) if ids.shape[d] > 1 and ids.stride(d) != 0]
    return {d for d in wide if bool((ids != ids.narrow(d, 0, 1)).any())}


def constant_along(ids: Tensor, dims: Iterable[int], node: fx.Node) -> Tensor:
    """``ids`` with ``dims`` reduced to size 1, which must not lose anything."""
    kept = ids
    for d in dims:
        kept = kept.narrow(d, 0, 1)
    if not torch.equal(kept.expand(ids.shape), ids):
        raise NoRuleError(f"{node.format_node()}: positions differ along other dimensions")
    return kept


def reduction_of(node: fx.Node, rank: int) -> tuple[set[int], bool]:
    """Dimensions (non-negative) and ``keepdim`` of a reduction node."""
    given = bound(node)
    dim = given.get("dim")
    if dim is None or dim == []:
        raise NoRuleError(f"{node.format_node()}: reduces over everything")
    dims = [dim] if isinstance(dim, int) else list(dim)
    return {d % rank for d in dims}, bool(given.get("keepdim", False))


def check_shapes(node: fx.Node, ids: Any) -> None:
    if node.op == "output":
        return
    values = tree_flatten(shapes_of(node))[0] if "val" in node.meta else []
    for v, i in zip(values, tree_flatten(ids)[0], strict=False):
        if isinstance(v, Tensor) and v.shape != i.shape:
            raise NoRuleError(f"{node.format_node()}: ids {i.shape} for a value {v.shape}")


# --------------------------------------------------------------------------------------
# Phase 2: owners from provenance, then every operator once per stage


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


@dataclass(eq=False)
class Assignment:
    """What provenance says about the weighted layers.

    Attributes:
        stages: number of thin stages.
        masks: per layer path and stage from 1, a boolean (rows, columns) of what is stored.
        heads: paths whose rows several stages have.
        owner: per id, its stage; ``VERSION_OWNER`` for rows of heads, ``stages + 1`` for rows
            that no stage has: they count as dead.
        present: per stage from 1 and parameter of a computed weight or bias, which of its
            elements the stage stores.
    """

    stages: int
    masks: dict[str, list[Tensor]]
    heads: list[str]
    owner: Tensor
    present: list[dict[str, Tensor]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Assignment) or self.masks.keys() != other.masks.keys():
            return False
        same = torch.equal(self.owner, other.owner) and set(self.heads) == set(other.heads)
        return (
            same
            and all(
                torch.equal(one, two)
                for path, masks in self.masks.items()
                for one, two in zip(masks, other.masks[path], strict=True)
            )
            and all(
                torch.equal(tensor, theirs[name])
                for mine, theirs in zip(self.present, other.present, strict=True)
                for name, tensor in mine.items()
            )
        )


def computed_sources(structure: Structure) -> set[str]:
    """Parameters of weights and biases that are more than moved and scaled elements."""
    found: set[str] = set()
    for node in structure.traced.graph.nodes:
        if structure.is_weighted(node) and node not in structure.mixing:
            for operand in weights_of(node):
                if structure.is_computed(operand):
                    found.update(structure.sources(operand))
    return found


def weights_of(node: fx.Node) -> list[fx.Node]:
    """The weight and, if there is one, the bias of a layer."""
    if name_of(node) == "convolution":
        return [n for n in node.args[1:3] if isinstance(n, fx.Node)]
    return [n for n in (node.args[-1], *node.args[:-2]) if isinstance(n, fx.Node)]


def stored_elements(structure: Structure, dyn: DynamicLike) -> Callable[[str, int], Tensor]:
    """Which elements of a parameter a stage stores, by provenance."""
    tensors = parameters_and_buffers(structure.model)
    canonical = {id(tensors[name]): name for name in structure.names}
    entries: dict[tuple[str, int], list[SliceLike]] = {}
    for key, entry in dyn.provenance.items():
        if entry.source not in tensors:
            raise MaskedFormError(f"{key}: the original has no {entry.source}")
        name = canonical[id(tensors[entry.source])]
        entries.setdefault((name, stage_of_key(key)), []).append(entry)

    def stored(name: str, stage: int) -> Tensor:
        shape = tensors[name].shape
        found = torch.zeros(shape, dtype=torch.bool)
        for entry in entries.get((name, stage), []):
            if len(entry.index) != len(shape):
                raise MaskedFormError(f"index {entry.index} for {name} {tuple(shape)}")
            block = torch.ones([1] * len(shape), dtype=torch.bool)
            for d, index in enumerate(entry.index):
                if index is None:
                    continue
                line = torch.zeros(shape[d], dtype=torch.bool)
                line[list(index)] = True
                block = block & line.view([-1 if e == d else 1 for e in range(len(shape))])
            found |= block
        return found

    return stored


def read_assignment(structure: Structure, dyn: DynamicLike) -> Assignment:
    """Turn provenance into owners and masks; a row that is in several stages makes a head."""
    stages = thin_stages(dyn)
    stored = stored_elements(structure, dyn)
    masks: dict[str, list[Tensor]] = {}
    heads: list[str] = []
    owner = torch.full((structure._next_id,), stages + 1, dtype=torch.int64)
    owner[NOBODY], owner[VERSIONED] = 0, VERSION_OWNER
    for path, layer in structure.layers.items():
        per_stage = []
        for stage in range(1, stages + 1):
            stock = _Stock(
                structure, {n: stored(n, stage) for n in structure.sources(layer.operand)}
            )
            present = layer.oriented(stock.get(layer.operand)[1])
            mask = present.flatten(2)[..., 0] if present.dim() > 2 else present
            if not torch.equal(
                present, mask.view(*mask.shape, *[1] * (present.dim() - 2)).expand(present.shape)
            ):
                raise MaskedFormError(f"{path}: stage {stage} stores parts of kernels")
            per_stage.append(mask)
        masks[path] = per_stage
        rows = layer.weight.shape[0]
        held = torch.stack([m.any(1) for m in per_stage]) if per_stage else torch.zeros(0, rows)
        if bool((held.sum(0) > 1).any()):
            heads.append(path)
            owner[layer.rows] = VERSION_OWNER
            continue
        for stage in range(1, stages + 1):
            owner[torch.tensor(layer.rows)[held[stage - 1]]] = stage
    names = computed_sources(structure)
    kept = [{n: stored(n, stage) for n in names} for stage in range(1, stages + 1)]
    return Assignment(stages, masks, heads, owner, kept)


class _Stock:
    """Weights computed from the elements that one stage stores.

    The others are absent: what moves or scales elements carries absence on, reductions leave
    absent elements out and count the present ones, and what is absent in the end is zero.
    """

    def __init__(self, structure: Structure, present: Mapping[str, Tensor]) -> None:
        self.structure = structure
        self.present = present
        self._found: dict[fx.Node, tuple[Any, Any]] = {}

    def weight(self, node: fx.Node) -> Tensor:
        value, present = self.get(node)
        return torch.where(present, value, torch.zeros((), dtype=value.dtype))

    def get(self, node: fx.Node) -> tuple[Any, Any]:
        """The value, and which of its elements are present."""
        if node not in self._found:
            self._found[node] = self._compute(node)
        return self._found[node]

    def _compute(self, node: fx.Node) -> tuple[Any, Any]:
        value = self.structure.constants[node]
        if self.structure.origin[node] != WEIGHT:
            return value, tree_map(_all_there, value)
        if node.op == "placeholder":
            return value, self.present[self.structure.name_of_input[node]]
        args, kwargs = node.args, dict(node.kwargs)
        values = fx.map_arg((args, kwargs), lambda n: self.get(n)[0])
        kind, name = kind_of(node), name_of(node)
        if name == "lift_fresh_copy" or kind == "elementwise":
            parts = [self.get(n)[1] for n in node.all_input_nodes]
            parts = [part for part in parts if isinstance(part, Tensor)]
            there = parts[0]
            for part in parts[1:]:
                there = there & part
            return evaluate_with(node, *values), there.expand(value.shape)
        if kind in ("moving", "writing", "joining"):
            return evaluate_with(node, *values), evaluate_with(
                node, *fx.map_arg((args, kwargs), self._moved)
            )
        if name == "copy":
            return evaluate_with(node, *values), self.get(args[1])[1].expand(value.shape)  # type: ignore[arg-type]
        operand, there = self.get(args[0])  # type: ignore[arg-type]
        if kind == "reduction":
            dims, keepdim = reduction_of(node, operand.dim())
            return _reduced(node, operand, there, dims, keepdim)
        if kind == "norm":
            return self._normalised(node, operand, there, values[0])
        if name == "_weight_norm_interface":
            scale, present_scale = self.get(args[1])  # type: ignore[arg-type]
            out = evaluate_with(node, (torch.where(there, operand, 0.0), scale, *args[2:]), {})
            return out, (there & present_scale, _all_there(out[1]))
        if name == "mm":
            other, present = self.get(args[1])  # type: ignore[arg-type]
            product = torch.where(there, operand, 0.0) @ torch.where(present, other, 0.0)
            return product, (there.double() @ present.double()) > 0
        raise NoRuleError(f"{node.format_node()}: no rule for {node.target} in a weight")

    def _moved(self, node: fx.Node) -> Any:
        value, there = self.get(node)
        indexes = isinstance(value, Tensor) and not value.is_floating_point()
        return value if indexes and node in self.structure.constants else there

    def _normalised(
        self, node: fx.Node, operand: Tensor, there: Tensor, args: Sequence[Any]
    ) -> tuple[Any, Any]:
        """Batch norm with statistics of its own, over what is present of every channel."""
        given = bound(node)
        form = [-1 if d == 1 else 1 for d in range(operand.dim())]
        dims = {d for d in range(operand.dim()) if d != 1}
        if not given["training"]:
            raise NoRuleError(f"{node.format_node()}: running statistics in a weight")
        mean = _reduced_by("mean", operand, there, dims)
        square = _reduced_by("mean", (operand - mean) ** 2, there, dims)
        out = (operand - mean) / (square + given["eps"]).sqrt()
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                factor, held = self.get(given[name])
                there = there & held.view(form)
                out = out * factor.view(form) if name == "weight" else out + factor.view(form)
        return (out, None, None), (there, None, None)


def _all_there(value: Any) -> Any:
    return (
        torch.ones((), dtype=torch.bool).expand(value.shape) if isinstance(value, Tensor) else value
    )


def _reduced(
    node: fx.Node, operand: Tensor, there: Tensor, dims: set[int], keepdim: bool
) -> tuple[Tensor, Tensor]:
    name, given = name_of(node), bound(node)
    if name in ("var", "std"):
        correction = given.get("correction", 1)
        mean = _reduced_by("mean", operand, there, dims)
        total = _reduced_by("sum", (operand - mean) ** 2, there, dims)
        count = there.expand(operand.shape).sum(tuple(dims), keepdim=True)
        out = total / (count - (1 if correction is None else correction))
        out = out.sqrt() if name == "std" else out
    elif name == "linalg_vector_norm":
        if given.get("ord", 2) != 2:
            raise NoRuleError(f"{node.format_node()}: another norm than the second in a weight")
        out = _reduced_by("sum", operand**2, there, dims).sqrt()
    else:
        out = _reduced_by(name, operand, there, dims)
    kept = there.expand(operand.shape).amax(tuple(dims), keepdim=True)
    if not keepdim:
        out, kept = out.squeeze(tuple(dims)), kept.squeeze(tuple(dims))
    return out, kept


def _reduced_by(how: str, operand: Tensor, there: Tensor, dims: set[int]) -> Tensor:
    """A reduction of what is present, with the reduced dimensions kept at size 1."""
    every = tuple(dims)
    if how in ("sum", "mean"):
        total = torch.where(there, operand, 0.0).sum(every, keepdim=True)
        count = there.expand(operand.shape).sum(every, keepdim=True)
        return total / count if how == "mean" else total
    if how == "amax":
        return torch.where(there, operand, -math.inf).amax(every, keepdim=True)
    if how == "amin":
        return torch.where(there, operand, math.inf).amin(every, keepdim=True)
    raise NoRuleError(f"{how} in a weight")


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
        x: of the shape that the structure was made for.
        structure: of the model, if at hand.
        assignment: instead of the one that provenance tells.

    Returns:
        One output per stage, of the original's structure.
    """
    structure = structure or Structure(model, x)
    assignment = assignment or read_assignment(structure, dyn)
    assert x.shape == structure.shape, f"the program was traced for {structure.shape}"
    with torch.no_grad():
        outputs = _Runner(structure, assignment, x).run() if assignment.stages else []
        if dyn.plan.final == "original":
            outputs.append(model(x))
    return outputs


class _Runner:
    """Evaluates operator by operator, each for all stages in order."""

    def __init__(self, structure: Structure, assignment: Assignment, x: Tensor) -> None:
        self.structure = structure
        self.assignment = assignment
        self.x = x
        self.stages = range(1, assignment.stages + 1)
        self.stock = [_Stock(structure, present) for present in assignment.present]

    def run(self) -> list[Any]:
        """What every stage outputs."""
        # per node and stage; what no later operator reads is dropped
        env: dict[fx.Node, list[Any]] = {}
        graph = self.structure.traced.graph
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        for node in graph.nodes:
            if node.op == "output":
                break
            env[node] = self._values(node, env)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del env[source]
        return [self._outputs(node.args[0], env, stage) for stage in self.stages]

    def _outputs(self, tree: Any, env: dict[fx.Node, list[Any]], stage: int) -> Any:
        """Outputs in the form in which the model gives them."""
        leaves = fx.map_arg(tree, lambda n: env[n][stage - 1])
        return self.structure.traced.graph._codegen.process_outputs(leaves)

    def _values(self, node: fx.Node, env: dict[fx.Node, list[Any]]) -> list[Any]:
        structure = self.structure
        if node is structure.input:
            return [self.x for _ in self.stages]
        if structure.origin[node] != ACTIVATION:
            return [structure.constants[node] for _ in self.stages]
        found: list[Any] = []
        for stage in self.stages:
            seen = {source: env[source][stage - 1] for source in node.all_input_nodes}
            previous = found[-1] if found else None
            value = self._value(node, seen, previous, stage)
            found.append(self._kept(value, structure.ids[node], previous, stage))
        return found

    def _owners(self, ids: Tensor) -> Tensor:
        return self.assignment.owner[ids]

    def _kept(self, value: Any, ids: Any, previous: Any, stage: int) -> Any:
        """Earlier stages' positions keep their values; later stages' are dead."""
        if isinstance(value, (tuple, list)):
            befores = previous if previous is not None else [None] * len(value)
            triples = zip(value, ids, befores, strict=True)
            return tuple(self._kept(*triple, stage) for triple in triples)
        if not isinstance(value, Tensor) or not isinstance(ids, Tensor) or not _any_ids(ids):
            return value
        owner = self._owners(ids)
        earlier = (owner >= 1) & (owner < stage)
        if stage > 1 and bool(earlier.any()):
            value = torch.where(earlier, previous, value)
        if bool((owner > stage).any()):
            value = torch.where(owner > stage, torch.zeros((), dtype=value.dtype), value)
        return value

    def _value(self, node: fx.Node, env: dict[fx.Node, Any], previous: Any, stage: int) -> Any:
        structure = self.structure
        if structure.is_weighted(node) and node not in structure.mixing:
            env = env | self._weights(node, stage)
        elif node in structure.coupled:
            return self._coupled(node, env, previous, stage)
        return evaluate(structure.traced, node, env)

    def _weights(self, node: fx.Node, stage: int) -> dict[fx.Node, Tensor]:
        """A layer's operands at full size: what this stage does not store is zero."""
        layer = next(one for one in self.structure.layers.values() if node in one.nodes)
        weight, *biases = weights_of(node)
        found: dict[fx.Node, Tensor] = {}
        for operand in biases:
            if self.structure.is_computed(operand):
                found[operand] = self.stock[stage - 1].weight(operand)
        if self.structure.is_computed(weight):
            found[weight] = self.stock[stage - 1].weight(weight)
            return found
        mask = self.assignment.masks[layer.path][stage - 1]
        mask = mask.view(*mask.shape, *[1] * (layer.weight.dim() - 2))
        zero = torch.zeros((), dtype=layer.weight.dtype)
        found[weight] = torch.where(layer.oriented(mask), self.structure.constants[weight], zero)
        return found

    def _coupled(self, node: fx.Node, env: dict[fx.Node, Any], previous: Any, stage: int) -> Any:
        """The operator on the stage's own channels alone, by their own count."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        operand: Tensor = env[source]
        owner = self._owners(self.structure.ids[source])
        if not bool((owner > 0).any()):
            return evaluate(self.structure.traced, node, env)
        if bool((owner <= 0).any()):
            raise NoRuleError(f"{node.format_node()}: owned and other channels in one operator")
        own = owner == stage
        if kind_of(node) == "softmax":
            filled = torch.where(own, operand, -math.inf)
            return evaluate(self.structure.traced, node, env | {source: filled})
        if not bool(own.any()):
            if previous is None:
                raise MaskedFormError(f"{node.format_node()}: no stage has channels of it")
            return previous
        if bool(own.all()):
            return evaluate(self.structure.traced, node, env)
        d, places = _one_dimension(node, own)
        part = operand.index_select(d, places)
        arguments = dict(fx.map_arg(bound(node), lambda n: env[n]))
        if kind_of(node) == "reduction":
            return evaluate(self.structure.traced, node, env | {source: part})
        arguments |= {"input": part}
        for name in ("weight", "bias"):
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].index_select(0, places)
        if name_of(node) == "native_layer_norm":
            arguments["normalized_shape"] = [len(places)]
        else:
            arguments["C"] = len(places)
        out = node.target(**arguments)  # type: ignore[operator]
        whole = torch.zeros_like(operand).index_copy(d, places, out[0])
        return (whole, *out[1:])


def _one_dimension(node: fx.Node, own: Tensor) -> tuple[int, Tensor]:
    """The only dimension along which ``own`` differs, and where along it it holds."""
    dims = carried(own)
    if len(dims) != 1:
        raise NoRuleError(f"{node.format_node()}: channels along several dimensions")
    d = dims.pop()
    return d, own.movedim(d, 0).flatten(1)[:, 0].nonzero().flatten()
