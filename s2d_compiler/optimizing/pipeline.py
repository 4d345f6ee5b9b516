"""From a network to its optimised form."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from passes.base import Pass, Pipeline
from passes.fold_norms import FoldNorms
from passes.fuse_onednn import FuseOneDNN
from passes.remove_identities import RemoveIdentities
from passes.sum_parts import ShareConcatenations, SumParts
from s2d_compiler.errors import UsageError
from s2d_compiler.optimizing.backends import BACKENDS, CompiledStage, why_not
from s2d_compiler.optimizing.model import OptimizedModel, RunningParts
from s2d_compiler.optimizing.shapes import example_inputs, record_shapes

if TYPE_CHECKING:
    from s2d_compiler.dynamic import StagedNetwork
    from s2d_compiler.program import Program

log = logging.getLogger(__name__)

#: How layers read several parts.
READS = ("auto", "sum", "concatenate")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")
#: With ``reads="auto"`` parts are summed where their concatenation would copy at least so many
#: bytes for each layer more that the sum runs (docs/optimized.md).
COPIED_BYTES = 1_000_000


def optimize(
    network: StagedNetwork,
    *,
    backend: str = "auto",
    memory_format: str = "auto",
    reads: str = "auto",
    batch: int = 1,
    examples: Sequence[torch.Tensor] | None = None,
) -> OptimizedModel:
    """A form of a staged network that only runs, and runs fast; see ``DynamicModel.optimized``.

    Raises:
        UsageError: There is no such backend, here or at all, or no such option.
    """
    stages = copy.deepcopy([s for s in network.stages if isinstance(s, fx.GraphModule)])
    if len(stages) != len(network.stages):
        raise UsageError(
            "optimized: the stages are not all graph modules; optimise a network as transform or "
            "load give it."
        )
    tensor = next((p for p in network.parameters() if p.is_floating_point()), None)
    device = "cpu" if tensor is None else tensor.device.type
    backend = _require(backend, reads, memory_format, batch, device)
    parts = network.parts
    wiring = [interface.inputs for interface in parts.interfaces]
    given = _examples(examples, parts.input_shapes, parts.batch, tensor)
    is_image = _is_image_network(stages) if memory_format == "auto" else (
        memory_format == "channels_last"
    )  # fmt: skip
    rewritten = rewrite(stages, wiring, given, backend, reads, parts.batch or batch)
    if is_image:
        rewritten = [_channels_last(stage) for stage in rewritten]
    runnable: list[nn.Module] = [*rewritten]
    if backend == "inductor":
        dynamic = _dynamic_dimensions(rewritten, wiring, given, parts.batch)
        runnable = [CompiledStage(s, d) for s, d in zip(rewritten, dynamic, strict=True)]
    kept = {f.name: getattr(parts, f.name) for f in dataclasses.fields(parts)}
    kept.pop("channels_last", None)
    made = OptimizedModel(runnable, RunningParts(**kept, channels_last=is_image), backend)
    made.settings = network.settings
    return made


def optimize_static(
    program: Program,
    *,
    backend: str = "eager",
    memory_format: str = "auto",
    batch: int = 1,
    inputs: Sequence[torch.Tensor] = (),
) -> nn.Module:
    """The captured original, rewritten and run as ``optimize`` does with stages.

    Args:
        program: The original.
        backend: As for ``optimize``.
        memory_format: As for ``optimize``; inputs should come in this format.
        batch: Samples to reckon with; a compiled form is made for this number.
        inputs: Example inputs; of the captured shapes when left out.

    Returns:
        A module that takes the program's inputs, and gives its flat outputs.
    """
    graph = copy.deepcopy(program.graph_module)
    tensor = next((p for p in graph.parameters() if p.is_floating_point()), None)
    device = "cpu" if tensor is None else tensor.device.type
    backend = _require(backend, "auto", memory_format, batch, device)
    given = _examples(inputs or None, program.input_shapes, program.batch, tensor)
    wiring = [tuple(("input", k) for k in range(len(given)))]
    (graph,) = rewrite([graph], wiring, given, backend, "concatenate", batch)
    if memory_format == "channels_last" or (memory_format == "auto" and _is_image_network([graph])):
        graph = _channels_last(graph)
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    graph.eval()
    if backend == "inductor":
        from s2d_compiler.optimizing.backends import frozen

        compiled: nn.Module = frozen(graph)
        return compiled
    return graph


def rewrite(
    stages: Sequence[fx.GraphModule],
    wiring: Sequence[Sequence[tuple[Any, ...]]],
    inputs: Sequence[torch.Tensor],
    backend: str,
    reads: str,
    batch: int,
) -> list[fx.GraphModule]:
    """Run the passes of a backend over graphs of their own."""
    for stage in stages:
        stage.eval()
        for node in stage.graph.nodes:
            node.meta.clear()  # which stage a node is of: all of one, now
        for parameter in stage.parameters():
            parameter.requires_grad_(False)
    record_shapes(stages, wiring, inputs)
    first: list[Pass] = [RemoveIdentities(), ShareConcatenations(), FoldNorms()]
    if reads != "concatenate":
        first.append(SumParts(least_bytes=COPIED_BYTES if reads == "auto" else 0, batch=batch))
    found = [_run(first, stage) for stage in stages]
    if backend == "onednn":
        record_shapes(found, wiring, inputs)
        found = [_run([FuseOneDNN(batch)], stage) for stage in found]
    return found


def _run(passes: Sequence[Pass], stage: fx.GraphModule) -> fx.GraphModule:
    return Pipeline(tuple(passes)).run(stage)


def _examples(
    examples: Sequence[torch.Tensor] | None,
    shapes: Sequence[tuple[int, ...]],
    batch: int | None,
    like: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Inputs to record shapes with: two samples, for of one, what has no batch looks as if it had.

    A network of one batch size gets that many.
    """
    if examples is None:
        return example_inputs(shapes, batch or 2, like)
    if batch is None and all(v.ndim and len(v) == 1 for v in examples):
        return [v.expand(2, *v.shape[1:]) for v in examples]
    return list(examples)


def _require(backend: str, reads: str, memory_format: str, batch: int, device: str) -> str:
    """Check options; the backend, chosen where it is to be chosen."""
    for what, value, known in (
        ("backend", backend, ("auto", *BACKENDS)),
        ("reads", reads, READS),
        ("memory_format", memory_format, MEMORY_FORMATS),
    ):
        if value not in known:
            raise UsageError(f"{what}: there is no {value!r}; take one of {', '.join(known)}.")
    if type(batch) is not int or batch < 1:
        raise UsageError(f"batch: {batch!r} is no number of samples; give 1 or more.")
    if backend == "auto":
        return "eager" if why_not("onednn", device) else "onednn"
    reason = why_not(backend, device)
    if reason is not None:
        raise UsageError(f"backend: {backend} cannot be had here: {reason}; take another one.")
    return backend


def _is_image_network(stages: Sequence[fx.GraphModule]) -> bool:
    """Whether two-dimensional convolutions do most of the layers' work, by their weights."""
    convolutions = others = 0
    for stage in stages:
        for module in stage.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                convolutions += 1
            elif isinstance(module, nn.Linear) and weight is not None:
                others += 1
    return convolutions > others


def _channels_last(stage: fx.GraphModule) -> fx.GraphModule:
    """Four-dimensional weights in channels-last; packed ones stay as they are."""
    for module in stage.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 4:
                data = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(data, requires_grad=False)
    return stage


def _dynamic_dimensions(
    stages: Sequence[fx.GraphModule],
    wiring: Sequence[Sequence[tuple[Any, ...]]],
    inputs: Sequence[torch.Tensor],
    batch: int | None,
) -> list[list[list[int]]]:
    """Per stage and placeholder, which dimensions follow the batch, from batches of two sizes."""
    if batch is not None:
        return [[[] for _ in places] for places in wiring]
    sizes: list[list[list[Any]]] = []
    for count in (2, 3):
        record_shapes(stages, wiring, [v[:1].expand(count, *v.shape[1:]) for v in inputs])
        sizes.append(
            [[n.meta.get("shape") for n in s.graph.nodes if n.op == "placeholder"] for s in stages]
        )
    found = []
    for two, three in zip(*sizes, strict=True):
        found.append(
            [
                [] if a is None or b is None else [d for d, n in enumerate(a) if n != b[d]]
                for a, b in zip(two, three, strict=True)
            ]
        )
    return found
