"""DynamicModel: the staged network that a transform returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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
from s2d_compiler.runtime.measures import Function
from s2d_compiler.runtime.policies import Policy
from s2d_compiler.runtime.predictions import Predictions
from s2d_compiler.runtime.settings import RunSettings

if TYPE_CHECKING:
    from s2d_compiler.optimizing import OptimizedModel
    from s2d_compiler.prefix import StagePrefix
    from s2d_compiler.runtime.engine import Engine


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


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """What a network is called with, and what it returns.

    Attributes:
        input_shapes: Shape of each input without the batch.
        batch: None, or the only batch size that the network takes.
        output_spec: pytree structure of the original's output; None for one tensor.
        input_spec: pytree structure of ``(positional, keyword)`` inputs; None where all are
            positional tensors.
    """

    input_shapes: tuple[tuple[int, ...], ...]
    batch: int | None
    output_spec: Any
    input_spec: Any = None

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
            others = sorted({type(v).__name__ for v in inputs if not isinstance(v, torch.Tensor)})
            count = ", ".join([f"{len(tensors)}", *(f"a {name}" for name in others)])
            rule = "; each input is a tensor by itself" if others else ""
            raise InputShapeError(
                f"the network takes {len(expected)} input(s), got {count}{rule}; hand in those "
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

    def __getstate__(self) -> dict[str, Any]:
        """A structure is pickled as an example of it, which all releases of torch read."""
        state = dict(self.__dict__)
        for key in ("output_spec", "input_spec"):
            if (spec := state[key]) is not None:
                state[key] = (pytree.tree_unflatten([0] * spec.num_leaves, spec),)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key in ("output_spec", "input_spec"):
            if state[key] is not None:
                state[key] = pytree.tree_structure(state[key][0])
        self.__dict__.update(state)


@dataclass(frozen=True)
class DynamicParts(CallShape):
    """Everything that a staged network is made of besides its modules.

    Attributes:
        plan: The plan.
        cost: Cost per stage.
        report: What was cut and why.
        provenance: State-dict key -> slice of the original.
        interfaces: Per stage, what it takes and hands on.
        owners: Stage of every atom of the original, from 1; none with exits along depth.
        made_by: Versions, command, hash of the model and seed.
    """

    plan: AnyPlan
    cost: Cost
    report: Report | DepthReport
    provenance: Mapping[str, Slice]
    interfaces: tuple[Interface, ...]
    owners: tuple[int, ...]
    made_by: Mapping[str, Any]

    def __deepcopy__(self, memo: object) -> DynamicParts:
        """Nothing in it changes, so that copies of a network share it."""
        return self

    def read_after(self, number: int) -> set[tuple[int, int]]:
        """Features that stages after this one (an index) read: stage and position."""
        return {
            (where[1], where[2])
            for interface in self.interfaces[number + 1 :]
            for where in interface.inputs
            if where[0] == "feature"
        }


def _call_text(spec: Any) -> str:
    """The structure of a call, with a star for every tensor."""
    inputs, keywords = pytree.tree_unflatten([_Star()] * spec.num_leaves, spec)
    parts = [*(repr(v) for v in inputs), *(f"{k}={v!r}" for k, v in keywords.items())]
    return f"({', '.join(parts)})"


class _Star:
    def __repr__(self) -> str:
        return "*"


class StagedNetwork(nn.Module):
    """Stages with exits, and how to run them.

    Calling it runs every stage and returns a tuple with one output per stage, each of the
    original's structure. ``stages`` is a ``nn.ModuleList``; each stage returns
    ``(outputs, features)``: its exit's flat outputs and what later stages read.

    Args:
        stages: The stages.
        parts: What else there is to know of them.

    Attributes:
        settings: How it is to be run: policy, preprocessing, recorded times. Replaced as a whole,
            such as by ``dataclasses.replace(dyn.settings, policy=...)``.
    """

    def __init__(self, stages: Sequence[nn.Module], parts: DynamicParts):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.parts = parts
        self.settings = RunSettings()
        self._engine: Engine | None = None

    @property
    def cost(self) -> Cost:
        """MACs and parameters per stage."""
        return self.parts.cost

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
            needed = self.parts.read_after(number)
            features = {k: value for k, value in features.items() if k in needed}
            yield self.parts.structured(leaves)

    def predict(
        self,
        inputs: Any,
        policy: Policy | None = None,
        *,
        keywords: Mapping[str, Any] | None = None,
    ) -> Predictions:
        """Answer a batch: each sample leaves where the policy says, and only the rest goes on.

        A batch gives what its samples alone would give. Networks whose samples depend on each
        other run sample by sample; networks that take one batch size only run later stages for
        the whole batch as long as one sample needs them. No gradients are kept.

        Args:
            inputs: What the network takes, such as (N, C, H, W) images; a tuple of its inputs
                where there are several. N may be 0.
            policy: When to leave; the stored one (``settings.policy``) when None.
            keywords: Inputs that the network takes by keyword.

        Raises:
            PolicyError: There is no policy, or it does not fit the network.
            InputShapeError: The inputs are not of the shape the network was compiled for.
            UsageError: The network is in training mode.
        """
        return self.engine.predict(inputs, policy, keywords or {})

    def anytime(
        self,
        inputs: Any,
        *,
        measure: str | Function = "confidence",
        keywords: Mapping[str, Any] | None = None,
    ) -> Iterator[Predictions]:
        """One answer per stage, better ones later: stop when you like.

        A stage runs when its answer is asked for.

        Args:
            inputs: As ``predict`` takes them.
            measure: What ``confidence`` is to be.
            keywords: Inputs that the network takes by keyword.

        Yields:
            The answers of each stage for all samples.

        Raises:
            PolicyError: There is no such measure.
            InputShapeError: The inputs are not of the shape the network was compiled for.
            UsageError: The network is in training mode.
        """
        return self.engine.anytime(inputs, measure, keywords or {})

    @property
    def engine(self) -> Engine:
        """What runs the stages with early exits, and knows where samples lie in features."""
        from s2d_compiler.runtime.engine import Engine

        if self._engine is None or self._engine.network() is not self:
            self._engine = Engine(self)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}


class DynamicModel(StagedNetwork):
    """A network of several stages, each with an exit, as a transform makes it.

    ``stages`` is a ``nn.ModuleList`` of ``torch.fx.GraphModule``.

    Args:
        stages: The stage subgraphs.
        parts: Everything else.
    """

    def __init__(self, stages: list[fx.GraphModule], parts: DynamicParts):
        super().__init__(stages, parts)

    @property
    def plan(self) -> AnyPlan:
        """The plan that made it."""
        return self.parts.plan

    @property
    def report(self) -> Report | DepthReport:
        """What was cut, left whole, coupled, unknown, and why; or where exits stand."""
        return self.parts.report

    @property
    def provenance(self) -> Mapping[str, Slice]:
        """State-dict key -> where the tensor came from in the original."""
        return MappingProxyType(dict(self.parts.provenance))

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

    def optimized(
        self,
        *,
        backend: str = "auto",
        memory_format: str = "auto",
        reads: str = "auto",
        batch: int = 1,
        examples: Sequence[torch.Tensor] | None = None,
    ) -> OptimizedModel:
        """A form that only runs, and runs fast: the same answers but for rounding.

        Batch norms are folded, concatenations shared or replaced by sums, dropout taken out. It
        has copies of the weights; this network is left as it is.

        Args:
            backend: ``"eager"``; ``"onednn"``, fused convolutions of packed weights (CPU,
                float32); ``"inductor"``, torch's compiler, which takes minutes; ``"auto"``,
                oneDNN where it can be had.
            memory_format: ``"channels_last"``, ``"contiguous"``, or ``"auto"``: channels-last for
                convolutional networks.
            reads: How layers read the parts of several stages: by ``"sum"`` of one layer per part,
                by ``"concatenate"``, or ``"auto"``, whichever should be faster for ``batch``.
            batch: Samples that will mostly come at once; any number runs.
            examples: Example inputs, where they are not of the weights' type.

        Raises:
            UsageError: There is no such backend, here or at all, or no such option.
        """
        from s2d_compiler.optimizing import optimize

        return optimize(self, backend=backend, memory_format=memory_format, reads=reads,
                        batch=batch, examples=examples)  # fmt: skip

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
