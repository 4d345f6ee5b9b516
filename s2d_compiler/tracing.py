"""Capture a model with ``torch.export`` and make it a ``Program``."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export.graph_signature import InputKind

from s2d_compiler.attributes import find, put, read
from s2d_compiler.canonicalize import canonicalize, products_to_layers
from s2d_compiler.errors import CaptureError, InputShapeError, first_line
from s2d_compiler.functionalize import functionalize, pieces_to_slices
from s2d_compiler.interrupts import heed
from s2d_compiler.memory import explained, let_through
from s2d_compiler.program import Dropped, Program, safe_name
from s2d_compiler.raising import Raiser
from s2d_compiler.regions import inline_regions
from s2d_compiler.selected_sizes import settle_sizes
from s2d_compiler.unmerge import unmerge_batch

log = logging.getLogger(__name__)

#: No branch of a usual model tells batches of this size from larger ones.
_ANY_BATCH = 1 << 20
#: Batch sizes for which every guard must hold.
_BATCHES_TRIED = 12
#: Example batch of the capture: a number that no other dimension of a usual model has.
EXAMPLE_BATCH = 5

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.lazy.LazyModuleMixin)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_HERE = os.path.dirname(os.path.abspath(__file__))


@explained("capturing the model", "give a smaller input shape (--input-shape)")
def capture(
    model: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    input_shape: Sequence[int] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Program:
    """Capture ``model`` in evaluation mode, with a free batch size where it allows one.

    Args:
        model: Any module that ``torch.export`` can capture. Its weights, training flags and
            attributes are left as they are.
        example_inputs: Positional inputs: tensors with a batch in dimension 0, or tuples, lists
            and dicts of them.
        input_shape: Shape of one input without the batch, used when there are no examples.
            Without both: the first convolution's channels at 224 (by 224 for images).
        example_kwargs: Keyword inputs, likewise.

    Raises:
        InputShapeError: The model does not run on inputs of this shape.
        CaptureError: ``torch.export`` cannot make one graph of it.
        OutOfMemoryError: The model does not fit in memory with inputs of this shape.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module; pass the module itself."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is a TorchScript module, which torch.export does not read; "
            "pass the Python model that it was scripted from."
        )
    notes: list[str] = []
    given = _given(model, example_inputs, example_kwargs)
    call = _default_call(model, input_shape, notes) if given is None else given.map(_rebatched)
    with evaluation_mode(model):
        exported, batch = _export(model, call, _own_batches(given, call), notes)
        return _program(model, exported, call, batch, notes)


# -- inputs -------------------------------------------------------------------------------------


def _first_tensor(model: nn.Module) -> torch.Tensor | None:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t for t in tensors if t.is_floating_point()), None)


def guess_input_shape(model: nn.Module) -> tuple[int, ...]:
    """The first convolution's channels at 224 by 224.

    Raises:
        InputShapeError: There is no convolution to tell.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            rank = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
            n = next(r for kind, r in rank.items() if isinstance(module, kind))
            return (module.in_channels, *[224] * n)
    raise InputShapeError(
        "the model has no convolution that tells its input shape; give example_inputs, "
        'or "input_shape" in the plan, such as [3, 224, 224].'
    )


_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Call:
    """What a model is called with: tensors, or tuples, lists and dicts of them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors in the order of the captured program's inputs."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return tuple(v for v in leaves if isinstance(v, torch.Tensor))

    @property
    def structure(self) -> Any:
        """The pytree of both, None where all inputs are positional tensors."""
        if not self.kwargs and all(isinstance(v, torch.Tensor) for v in self.args):
            return None
        return pytree.tree_structure((self.args, self.kwargs))

    def map(self, change: Callable[[Any], Any]) -> Call:
        """The same call with every tensor changed."""
        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs))
        return Call(args, kwargs)


def _given(
    model: nn.Module,
    example_inputs: Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
) -> Call | None:
    """The example call, keywords in the order of the signature; None without examples."""
    if isinstance(example_inputs, torch.Tensor):
        raise InputShapeError(
            "example_inputs is a tensor, and a model may have several inputs; give a tuple, (x,)."
        )
    if example_inputs is None and not example_kwargs:
        return None
    _require_one_batch(example_inputs, example_kwargs)
    kwargs = dict(example_kwargs or {})
    names = list(inspect.signature(model.forward).parameters)
    order = sorted(kwargs, key=lambda name: names.index(name) if name in names else len(names))
    return Call(tuple(example_inputs or ()), {name: kwargs[name] for name in order})


def _require_one_batch(*examples: Any) -> None:
    """The batch is dimension 0 of every tensor."""
    batches = {v.shape[0] for v in pytree.tree_leaves(examples)
               if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] != 1}  # fmt: skip
    if len(batches) > 1:
        raise InputShapeError(
            f"example inputs have {' and '.join(map(str, sorted(batches)))} in dimension 0, which "
            "is the batch of all; give them one batch size, or wrap the model in one whose forward "
            "holds the tensors that have no batch."
        )


def _default_call(model: nn.Module, input_shape: Sequence[int] | None, notes: list[str]) -> Call:
    if input_shape is None:
        input_shape = guess_input_shape(model)
        shape = "x".join(map(str, input_shape))
        notes.append(f"input shape assumed to be {shape} (give input_shape to change it)")
        log.warning("input shape not given: assuming %s", shape)
    like = _first_tensor(model)
    options: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
    call = Call((torch.zeros(EXAMPLE_BATCH, *input_shape, **options),))
    if like is not None and like.dtype in _HALVES:
        # A model that casts its input takes any type; captured in its own, it would take that only.
        single = call.map(torch.Tensor.float)
        with evaluation_mode(model):
            return call if _failure(model, single) is not None else single
    return call


def _own_batches(given: Call | None, call: Call) -> list[Call]:
    """Inputs for a model that fixes its batch size: the examples as they were given; without
    any, those of the capture, and a batch of one."""
    if given is None:
        return [call, call.map(lambda value: value[:1])]
    if all(v.shape[0] for v in given.tensors if v.dim()):
        return [given]
    return [call]


def _rebatched(value: Any) -> Any:
    """An example with the batch size of the capture."""
    if not isinstance(value, torch.Tensor):
        raise InputShapeError(
            f"an example input is a {type(value).__name__}; inputs must be tensors, or tuples, "
            "lists and dicts of tensors, since anything else would be fixed at the example's "
            "value. Leave it out where it has a default, or wrap the model in one whose forward "
            "takes the tensors and sets the rest."
        )
    if value.dim() == 0:
        return value
    if value.shape[0] == 0:
        return value.new_zeros((EXAMPLE_BATCH, *value.shape[1:]))
    return value[:1].detach().expand(EXAMPLE_BATCH, *value.shape[1:]).clone()


# -- export -------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every training flag put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _export(
    model: nn.Module, call: Call, own_batches: list[Call], notes: list[str]
) -> tuple[torch.export.ExportedProgram, int | None]:
    try:
        exported = _run_export(model, call, _free_batch(model, call))
        _require_every_batch(exported)
        return exported, None
    except Exception as error:
        let_through(error)
        heed()
        first = error
    given = next((each for each in own_batches if _failure(model, each) is None), own_batches[0])
    _require_runs(model, given)
    try:
        fixed = _run_export(model, _copies(given), None)
    except Exception as second:
        let_through(second)
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {first_line(second)}"
            f"{_where(second)}. Values of tensors must not decide what runs; remove that from "
            "the model's forward, or transform the part without it."
        ) from second
    batch = next((int(v.shape[0]) for v in given.tensors if v.dim()), 1)
    log.debug("dynamic batch refused: %s", first)
    notes.append(
        f"the model fixes its batch size{_where(first)}: the result takes batches of {batch} only; "
        "give example_inputs of the batch that it will run on"
    )
    log.warning(notes[-1])
    return fixed, batch


def _require_every_batch(exported: torch.export.ExportedProgram) -> None:
    """Require that the program holds for every batch, not for those on one side of a branch.

    torch itself leaves out only a batch of 0 and of 1.
    """
    for allowed in exported.range_constraints.values():
        if allowed.lower > 2 or allowed.upper < _ANY_BATCH:
            raise ValueError(f"it was captured for batches of {allowed.lower} to {allowed.upper}")
    for guard in _guards(exported):
        symbols = guard.free_symbols
        for batch in range(2, 2 + _BATCHES_TRIED):
            if len(symbols) == 1 and str(guard.subs(dict.fromkeys(symbols, batch))) == "False":
                raise ValueError(f"it was captured for batches of which {guard} holds")


def _guards(exported: torch.export.ExportedProgram) -> list[Any]:
    """What capture took for granted about sizes, as expressions."""
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if not isinstance(size, int):
                return [guard.expr for guard in size.node.shape_env.guards]
    return []


def _free_batch(model: nn.Module, call: Call) -> dict[str, Any]:
    """Which dimensions are free: dimension 0 of every tensor, in the form of the signature."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    marks: dict[str, Any] = pytree.tree_map(
        lambda v: (
            {0: torch.export.Dim.DYNAMIC} if isinstance(v, torch.Tensor) and v.dim() else None
        ),
        dict(bound.arguments),
    )
    return marks


def _copies(call: Call) -> Call:
    """Copies, for a model that may write into its inputs."""
    return call.map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v)


def _failure(model: nn.Module, call: Call) -> Exception | None:
    """What running the model raises, if anything. Its buffers are put back afterwards."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            copies = _copies(call)
            model(*copies.args, **copies.kwargs)
    except Exception as error:
        let_through(error)
        return error
    finally:
        for buffer, value in kept:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
    return None


def _run_export(model: nn.Module, call: Call, dynamic: Any) -> torch.export.ExportedProgram:
    quiet = contextlib.redirect_stderr(io.StringIO())  # where torch prints the graph so far
    with warnings.catch_warnings(), torch.no_grad(), _quiet_export(), quiet:
        warnings.simplefilter("ignore")
        return torch.export.export(
            model, call.args, call.kwargs, dynamic_shapes=dynamic, strict=False
        )


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch's own logging of a failed export off the terminal; the error says it."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.fx.experimental", "torch.export", "torch._dynamo", "torch._subclasses")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require_runs(model: nn.Module, call: Call) -> None:
    """Tell a wrong input shape from a model that cannot be captured."""
    error = _failure(model, call)
    if error is not None:
        _require_operands(model, call)
        _require_rank(model, call.tensors)
        shapes = ", ".join("x".join(map(str, v.shape[1:])) for v in call.tensors)
        raise InputShapeError(
            f"{type(model).__name__} does not run on an input of shape {shapes}{_where(error)}: "
            f"{first_line(error)}. If it was made for another shape, give that (example_inputs, "
            '"input_shape" in the plan, --input-shape); if only a part of it is to be compiled, '
            "name that (--submodule)."
        ) from error


def _require_operands(model: nn.Module, call: Call) -> None:
    """Say plainly when the model takes more inputs than it was given."""
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise InputShapeError(
            f"{type(model).__name__}.forward does not take {len(call.tensors)} input(s) like "
            f"these: {error}. Give an example of all its inputs, which the commands cannot: "
            "transform(model, plan, (image, other), example_kwargs={...}) in Python, and "
            "inspect_model(model, example_inputs=(image, other))."
        ) from error


def _require_rank(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Say plainly when the number of dimensions cannot be right."""
    try:
        expected = guess_input_shape(model)
    except InputShapeError:
        return
    if len(inputs) == 1 and inputs[0].dim() != len(expected) + 1:
        given = "x".join(map(str, inputs[0].shape[1:]))
        raise InputShapeError(
            f"the input shape {given} has {inputs[0].dim() - 1} dimensions, but the model's first "
            f"convolution takes {len(expected)} (channels first, without the batch), such as "
            f"{'x'.join(map(str, expected))}; give that many."
        )


def _where(error: BaseException) -> str:
    """``, at file:line: code`` of the last frame in the model's own source."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE, "<"))]
    if not own:
        return ""
    frame = own[-1]
    return f", at {frame.filename}:{frame.lineno} ({frame.line})"


# -- program ------------------------------------------------------------------------------------


def _program(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    call: Call,
    batch: int | None,
    notes: list[str],
) -> Program:
    lifted = _Lifted(model, exported)
    graph, written = functionalize(
        inline_regions(exported.graph_module), lifted.constants, lifted.add_constant
    )
    notes += written
    lifted.unlift(graph)
    graph_module = fx.GraphModule(lifted.root, graph, class_name=type(model).__name__)
    settle_sizes(graph_module, _copies(call).tensors)
    for node in graph.nodes:
        node.meta["path"] = _module_path(node)
    pieces_to_slices(graph)
    canonicalize(graph, lambda value: lifted.add_constant(value, graph_module))
    unmerge_batch(graph)
    products_to_layers(graph)
    Raiser(graph_module, lifted.sources, model).run()
    output_spec = _flat_output(graph, exported)
    if batch is not None:
        _mark_fixed_batch(graph, batch)
    graph.lint()
    graph_module.recompile()
    return Program(
        graph_module=graph_module,
        sources=lifted.sources,
        batch=batch,
        input_shapes=tuple(tuple(v.shape[1:]) for v in call.tensors),
        examples=call.tensors,
        dropped=_dropped(model, graph_module, lifted.sources),
        output_spec=output_spec,
        notes=tuple(notes),
        input_spec=call.structure,
        buffers=frozenset(name for name, _ in model.named_buffers(remove_duplicate=False)),
    )


class _Lifted:
    """Turns the inputs that export lifted out of the model back into attributes."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram):
        self.root = nn.Module()
        self.sources: dict[str, str] = {}
        self.attributes: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.count = 0
        tensors = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        persistent = set(model.state_dict(keep_vars=True))
        names = {id(t): name for name, t in reversed([*tensors.items(), *buffers.items()])}
        for spec in exported.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                target = str(spec.target)
                tensor = tensors.get(target, buffers.get(target))
                assert tensor is not None, target
                target = names.get(id(tensor), target)
                held = safe_name(target)
                self.attributes[spec.arg.name] = held
                if find(self.root, held) is None:
                    put(self.root, held, tensor, saved=target in persistent)
                if target in persistent:
                    self.sources[held] = target
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                self.constants[spec.arg.name] = exported.constants[str(spec.target)]

    def add_constant(self, value: torch.Tensor, root: nn.Module | None = None) -> str:
        name = f"_constants.c{self.count}"
        self.count += 1
        put(root or self.root, name, value.detach(), saved=False)
        return name

    def unlift(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op != "placeholder" or node.name not in self.attributes:
                continue
            with graph.inserting_before(node):
                created = graph.get_attr(self.attributes[node.name])
            held = read(self.root, str(created.target))
            created.meta = dict(node.meta) | {"parameter": isinstance(held, nn.Parameter)}
            node.replace_all_uses_with(created)
            graph.erase_node(node)


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"@\d+", "", path).removeprefix("L['self'].").removeprefix("L__self__")


def _mark_fixed_batch(graph: fx.Graph, batch: int) -> None:
    """Note the batch at every value that holds as many samples, in its first dimension."""
    sampled: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and not sampled.intersection(node.all_input_nodes):
            continue
        sampled.add(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] % batch == 0:
            node.meta["fixed_batch"] = batch


def _flat_output(graph: fx.Graph, exported: torch.export.ExportedProgram) -> Any:
    """Leave the flat list of outputs in the graph; return the pytree of the original's."""
    spec = exported.call_spec.out_spec
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    values = list(output.args[0])[-spec.num_leaves :] if spec.num_leaves else []
    output.args = (tuple(values),)
    return None if spec == pytree.tree_structure(0) else spec


def _dropped(model: nn.Module, graph_module: fx.GraphModule, sources: dict[str, str]) -> Dropped:
    read: set[str] = set()
    paths: set[str] = set()
    for node in graph_module.graph.nodes:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            paths.add(re.sub(r"@\d+", "", str(path)))
        if node.op == "get_attr":
            read.add(sources.get(str(node.target), str(node.target)))
        if node.op == "call_module":
            read |= {
                source
                for target, source in sources.items()
                if target.rpartition(".")[0] == node.target
            }
    unused = [
        name
        for name, module in model.named_modules()
        if name
        and (keys := {f"{name}.{k}" for k, _ in module.named_parameters()})
        and not keys & read
    ]
    top = [
        n for n in unused if not any(n.startswith(f"{other}.") for other in unused if other != n)
    ]
    silent = [
        name
        for name, module in model.named_modules()
        if name
        and not list(module.children())
        and not list(module.parameters())
        and name not in paths
        and not isinstance(module, nn.Identity | nn.Sequential | nn.ModuleList | nn.ModuleDict)
        and not any(name.startswith(f"{other}.") for other in top)
    ]
    return Dropped(modules=tuple(silent), unused=tuple(top))
