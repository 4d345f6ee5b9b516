"""DynamicModel: the staged network that a transform returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from s2d_compiler.analysis.cost import Cost
from s2d_compiler.depth_report import DepthReport
from s2d_compiler.errors import InputShapeError, UsageError
from s2d_compiler.plans import AnyPlan
from s2d_compiler.provenance import Slice
from s2d_compiler.report import Report

if TYPE_CHECKING:
    from s2d_compiler.prefix import StagePrefix


@dataclass(frozen=True, slots=True)
class Interface:
    """What one stage takes and hands on.

    Attributes:
        inputs: Per placeholder of the stage ``("input", k)`` for the k-th input of the
            network, or ``("feature", stage, position)`` for a feature of an earlier stage
            (stages as indices into ``DynamicModel.stages``).
        features: Number of features that it hands on.
    """

    inputs: tuple[tuple[Any, ...], ...]
    features: int


@dataclass(frozen=True)
class DynamicParts:
    """Everything that a staged network is made of besides its modules.

    Attributes:
        plan: The plan.
        cost: Cost per stage.
        report: What was cut and why.
        provenance: State-dict key -> slice of the original.
        interfaces: Per stage, what it takes and hands on.
        owners: Stage of every atom of the original, from 1; none with exits along depth.
        input_shapes: Shape of each input without the batch.
        batch: None, or the only batch size that the network takes.
        output_spec: pytree structure of the original's output; None for one tensor.
        made_by: Versions, command, hash of the model and seed.
        input_spec: pytree structure of ``(positional, keyword)`` inputs; None where all are
            positional tensors.
    """

    plan: AnyPlan
    cost: Cost
    report: Report | DepthReport
    provenance: Mapping[str, Slice]
    interfaces: tuple[Interface, ...]
    owners: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    batch: int | None
    output_spec: Any
    made_by: Mapping[str, Any]
    input_spec: Any = None

    def __deepcopy__(self, memo: object) -> DynamicParts:
        """Nothing in it changes, so that copies of a network share it."""
        return self

    def flat_inputs(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
        """The input tensors in the order of the program, checked.

        Raises:
            InputShapeError: They are not of the structure or shape that it was compiled for.
        """
        leaves: tuple[Any, ...] = inputs
        if self.input_spec is not None:
            order = self.input_spec._children[1]._context
            known = {name: keywords[name] for name in order if name in keywords}
            found, spec = pytree.tree_flatten((inputs, {**known, **keywords}))
            if spec != self.input_spec:
                raise InputShapeError(
                    f"the inputs are {_call_text(spec)}; the network was compiled for "
                    f"{_call_text(self.input_spec)}: call it as the example inputs were given."
                )
            leaves = tuple(found)
        elif keywords:
            raise InputShapeError(
                f"the network was compiled without keyword inputs, got {', '.join(keywords)}; hand "
                "them in by position, or compile with example_kwargs."
            )
        self._check_shapes(leaves)
        return leaves

    def _check_shapes(self, inputs: tuple[Any, ...]) -> None:
        tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
        expected = self.input_shapes
        if len(tensors) != len(expected):
            raise InputShapeError(
                f"the network takes {len(expected)} input(s), got {len(tensors)}; hand in those "
                "that it was compiled with."
            )
        for tensor, shape in zip(tensors, expected, strict=True):
            if tuple(tensor.shape[1:]) != shape:
                raise InputShapeError(
                    f"input of shape {tuple(tensor.shape)}: the network was compiled for "
                    f"(N, {', '.join(map(str, shape))}); resize the input, or compile again with "
                    '"input_shape" in the plan.'
                )
        if self.batch is not None and tensors and tensors[0].shape[0] != self.batch:
            raise InputShapeError(
                f"batch of {tensors[0].shape[0]}: the original fixes its batch size, so this "
                f"network takes batches of {self.batch} only; hand in that many."
            )

    def structured(self, leaves: tuple[Any, ...]) -> Any:
        """Flat outputs in the original's structure."""
        spec = self.output_spec
        return leaves[0] if spec is None else pytree.tree_unflatten(list(leaves), spec)


def _call_text(spec: Any) -> str:
    """The structure of a call, with a star for every tensor."""
    inputs, keywords = pytree.tree_unflatten([_Star()] * spec.num_leaves, spec)
    parts = [*(repr(v) for v in inputs), *(f"{k}={v!r}" for k, v in keywords.items())]
    return f"({', '.join(parts)})"


class _Star:
    def __repr__(self) -> str:
        return "*"


class DynamicModel(nn.Module):
    """A network of several stages, each with an exit.

    Calling it runs every stage and returns a tuple with one output per stage, each of the
    original's structure. ``stages`` is a ``nn.ModuleList`` of ``torch.fx.GraphModule``; each
    returns ``(outputs, features)``: its exit's flat outputs and what later stages read.

    Args:
        stages: The stage subgraphs.
        parts: Everything else.
    """

    def __init__(self, stages: list[fx.GraphModule], parts: DynamicParts):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.parts = parts

    @property
    def plan(self) -> AnyPlan:
        """The plan that made it."""
        return self.parts.plan

    @property
    def cost(self) -> Cost:
        """MACs and parameters per stage."""
        return self.parts.cost

    @property
    def report(self) -> Report | DepthReport:
        """What was cut, left whole, coupled, unknown, and why; or where exits stand."""
        return self.parts.report

    @property
    def provenance(self) -> Mapping[str, Slice]:
        """State-dict key -> where the tensor came from in the original."""
        return MappingProxyType(dict(self.parts.provenance))

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Any, ...]:
        """Run all stages.

        Args:
            inputs: What the original takes, ``(N, C, H, W)`` for an image model.
            keywords: Those that it was compiled to take by keyword.

        Returns:
            One output per stage, each of the original's structure.
        """
        return tuple(self.exits(*inputs, **keywords))

    def exits(self, *inputs: Any, **keywords: Any) -> Iterator[Any]:
        """Run stage by stage: a stage runs when its output is asked for.

        Stop iterating, and the later stages never run. Features that no later stage reads are
        let go.

        Yields:
            The output of each stage, of the original's structure.

        Raises:
            InputShapeError: The inputs are not of the shape the network was compiled for.
        """
        yield from self.exits_of(self.parts.flat_inputs(inputs, keywords))

    def exits_of(self, inputs: tuple[Any, ...]) -> Iterator[Any]:
        """Like ``exits``, from the flat list of input tensors, without a check of their shapes."""
        features: dict[tuple[int, int], torch.Tensor] = {}
        for number, (stage, interface) in enumerate(
            zip(self.stages, self.parts.interfaces, strict=True)
        ):
            arguments = [
                inputs[where[1]] if where[0] == "input" else features[where[1], where[2]]
                for where in interface.inputs
            ]
            leaves, handed = stage(*arguments)
            del arguments
            features.update({(number, k): value for k, value in enumerate(handed)})
            needed = self.read_after(number)
            features = {k: value for k, value in features.items() if k in needed}
            yield self.parts.structured(leaves)

    def at_stage(self, stage: int) -> StagePrefix:
        """One exit as a module of its own, to be used where the original was.

        It runs the stages up to ``stage`` without the earlier ones' heads, shares this network's
        parameters, and returns one output of the original's structure.

        Args:
            stage: The exit, counted from 1 as in plans.

        Raises:
            UsageError: There is no such stage.
        """
        from s2d_compiler.prefix import StagePrefix

        if type(stage) is not int or not 1 <= stage <= len(self.stages):
            raise UsageError(
                f"at_stage: {stage!r} is no stage; the network has stages 1 to "
                f"{len(self.stages)}, give one of these."
            )
        stages = [s for s in self.stages if isinstance(s, fx.GraphModule)]
        return StagePrefix(stages, self.parts, stage)

    def read_after(self, number: int) -> set[tuple[int, int]]:
        """Features that stages after this one read."""
        return {
            (where[1], where[2])
            for interface in self.parts.interfaces[number + 1 :]
            for where in interface.inputs
            if where[0] == "feature"
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``dyn.pt``: data without code; see ``s2d_compiler.format``.

        Raises:
            OutputError: The file cannot be written; nothing is left behind.
        """
        from s2d_compiler.format import save

        save(self, path)


def interfaces_of(network: fx.GraphModule) -> tuple[Interface, ...]:
    """Read the stages' interfaces off the graph that calls them."""
    where: dict[fx.Node, tuple[Any, ...]] = {}
    found: list[Interface] = []
    placeholders = 0
    for node in network.graph.nodes:
        if node.op == "placeholder":
            where[node] = ("input", placeholders)
            placeholders += 1
        elif node.op == "call_module":
            inputs = tuple(where[a] for a in node.args if isinstance(a, fx.Node))
            where[node] = ("stage", len(found))
            stage = network.get_submodule(str(node.target))
            assert isinstance(stage, fx.GraphModule)
            output = next(n for n in stage.graph.nodes if n.op == "output")
            found.append(Interface(inputs, len(output.args[0][1])))
        elif node.op == "call_function":
            source, position = node.args
            assert isinstance(source, fx.Node)
            base = where[source]
            if base[0] == "stage":
                where[node] = ("outputs", base[1]) if position == 0 else ("features", base[1])
            else:
                where[node] = ("feature", base[1], position)
    return tuple(found)
