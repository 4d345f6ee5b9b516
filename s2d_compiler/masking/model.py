"""MaskedModel: all stages' outputs in one dense run, for training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from passes.base import Pipeline
from passes.mask import MaskChannels
from s2d_compiler.analysis.assignment import StageAssignment, assign, row_weights
from s2d_compiler.analysis.channels import ChannelAnalysis, analyse_channels
from s2d_compiler.attributes import read
from s2d_compiler.compiler import compile_program
from s2d_compiler.dynamic import CallShape, DynamicModel
from s2d_compiler.errors import PlanError, UsageError
from s2d_compiler.masking.layers import MaskedComputedLayer
from s2d_compiler.masking.masks import Mask
from s2d_compiler.masking.transfer import Weights, take_from, write_to
from s2d_compiler.memory import explained
from s2d_compiler.plan import Plan
from s2d_compiler.program import Program
from s2d_compiler.search_space import SearchSpace
from s2d_compiler.staging import staged_graph_of
from s2d_compiler.submodules import part_of
from s2d_compiler.tracing import capture


def masked(
    model: nn.Module,
    space_or_plan: SearchSpace | Plan | Mapping[str, Any],
    example_inputs: Sequence[Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    submodule: str | None = None,
) -> MaskedModel:
    """Turn a model into the form in which its staged networks are trained.

    Args:
        model: Any ``nn.Module`` that ``torch.export`` can capture; left untouched.
        space_or_plan: A search space, or a plan that cuts channels (or what
            ``Plan.from_dict`` takes). Number of stages and groups, order and final stage are then
            fixed; the form starts at the plan, or at the space's starter plan.
        example_inputs: As ``transform`` takes them.
        example_kwargs: Likewise.
        submodule: Path of the part to take, as in ``transform``.

    Returns:
        The masked form, in evaluation mode, with copies of the model's weights.

    Raises:
        PlanError: The plan does not fit the model, or puts exits along depth.
        InputShapeError, CaptureError: The model cannot be captured.
        UsageError: There is no such submodule.
        OutOfMemoryError: Either takes more memory than there is.
    """
    plan = _plan_of(space_or_plan)
    part = part_of(model, submodule)
    shape = plan.input_shape if example_inputs is None and example_kwargs is None else None
    captured = _Captured(part, example_inputs, shape, example_kwargs)
    made_by = {} if submodule is None else {"submodule": submodule}
    return MaskedModel(captured, plan, made_by)


def _plan_of(given: Any) -> Plan:
    if isinstance(given, SearchSpace):
        return given.starter_plan()
    if isinstance(given, Mapping) and "exits" not in given and "preset" not in given:
        return Plan.from_dict(given)
    if not isinstance(given, Plan):
        raise PlanError(
            f"masked: {type(given).__name__} is no plan that cuts channels, and only such plans "
            "have a masked form; train a network with exits along depth as transform() makes it, "
            "or give a Plan or a SearchSpace."
        )
    return given


class _Captured:
    """The static program and its analysis. Copies share it; a pickle captures it again."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Sequence[Any] | None,
        input_shape: tuple[int, ...] | None,
        example_kwargs: Mapping[str, Any] | None,
    ):
        self.given = (model, example_inputs, input_shape, example_kwargs)
        self._program: Program | None = capture(*self.given)
        self.channels: ChannelAnalysis = analyse_channels(self._program)
        self.row_weights: dict[str, npt.NDArray[np.float64]] = {}

    @property
    def program(self) -> Program:
        if self._program is None:
            self._program = capture(*self.given)
        return self._program

    def fix_order(self) -> None:
        """Keep what order "l1" goes by now."""
        self.row_weights = {
            name: row_weights(self.program, name)
            for name, layer in self.channels.layers.items()
            if len(layer.rows)
        }

    def assign(self, plan: Plan) -> StageAssignment:
        return assign(self.program, self.channels, plan, self.row_weights.__getitem__)

    def __deepcopy__(self, memo: object) -> _Captured:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}


class MaskedModel(nn.Module):
    """A network that computes the outputs of all stages of a plan in one dense run.

    Calling it returns a tuple with one output per stage, each of the original's structure, as
    calling a ``DynamicModel`` does. Parameters and buffers have the original's names; those of
    prediction layers and what follows them lie under ``exits.0``, ``exits.1``, ... once per
    stage, those of an untouched last stage under ``original``. Weights that no stage reads under
    the current plan are kept, and get no gradient.

    Made by ``masked``.

    Attributes:
        plan: The plan whose outputs it computes.
    """

    plan: Plan

    def __init__(self, captured: _Captured, plan: Plan, made_by: Mapping[str, Any]):
        super().__init__()
        if plan.order == "l1":
            captured.fix_order()
        self._captured = captured
        self._made_by = dict(made_by)
        assignment = captured.assign(plan)
        program = captured.program
        with explained("building the masked form", "give a smaller input shape"):
            network = Pipeline((MaskChannels(assignment),)).run(staged_graph_of(program))
        self._masks: dict[str, Mask] = network.meta["masks"]
        self._names: dict[tuple[int, str], str] = network.meta["weights"]
        self._call = CallShape(
            input_shapes=program.input_shapes,
            batch=program.batch,
            output_spec=program.output_spec,
            input_spec=program.input_spec,
        )
        self._unsaved = set(dict(network.named_buffers())) - set(network.state_dict())
        self.__dict__["_network"] = network
        device = next(iter([*network.parameters(), *network.buffers()]), torch.empty(0)).device
        network.to(device)  # masks are made on the CPU
        self._share()
        self._follow(assignment)
        self.plan = plan
        self.eval()

    def _share(self) -> None:
        """Hold what the graph module holds, under the same names, by sharing its tables."""
        network = self.__dict__["_network"]
        self._parameters, self._buffers = network._parameters, network._buffers
        self._modules = network._modules
        for name in self._unsaved:
            container, _, last = name.rpartition(".")
            (read(network, container) if container else network)._non_persistent_buffers_set.add(
                last
            )
        self._non_persistent_buffers_set = network._non_persistent_buffers_set

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._share()

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Any, ...]:
        """Run all stages at once.

        Args:
            inputs: What the original takes, ``(N, C, H, W)`` for an image model.
            keywords: Those that it takes by keyword.

        Returns:
            One output per stage, each of the original's structure.

        Raises:
            InputShapeError: The inputs are not of the shape of the examples.
        """
        leaves = self._call.flat_inputs(inputs, keywords)
        exits = self.__dict__["_network"](*leaves)
        return tuple(self._call.structured(leaves) for leaves in exits)

    def set_plan(self, plan: Plan | Mapping[str, Any]) -> None:
        """Compute another plan's outputs from now on; masks change, and nothing else.

        Raises:
            PlanError: The plan does not fit the model, or differs in what is fixed: number of
                stages, groups, order, final stage.
        """
        plan = self._checked(plan)
        self._follow(self._captured.assign(plan))
        self.plan = plan

    def _checked(self, plan: Plan | Mapping[str, Any]) -> Plan:
        plan = _plan_of(plan)
        for key in ("stages", "groups", "order", "final"):
            mine, others = getattr(self.plan, key), getattr(plan, key)
            if mine != others:
                raise PlanError(
                    f"{plan.source}: {key}: {others!r}, and this masked form was made for {mine!r} "
                    "for good; change the plan, or make another form with masked()."
                )
        return plan

    def _follow(self, assignment: StageAssignment) -> None:
        with torch.no_grad():
            for name, mask in self._masks.items():
                array = np.ascontiguousarray(mask.array(assignment))
                self.get_buffer(name).copy_(torch.from_numpy(array))
        for module in self.modules():
            if isinstance(module, MaskedComputedLayer):
                module.follow(assignment)

    # -- the staged form --------------------------------------------------------------------------

    def extract(self, plan: Plan | Mapping[str, Any] | None = None) -> DynamicModel:
        """The staged network of a plan with these weights, heads and running statistics.

        Args:
            plan: The plan; the current one when None.

        Raises:
            PlanError: As ``set_plan``.
        """
        plan = self.plan if plan is None else self._checked(plan)
        assignment = self._captured.assign(plan)
        program = self._captured.program
        dyn = compile_program(program, plan, assignment=assignment, made_by=self._made_by)
        weights = self._weights()
        floating = (t for t in weights.tensors.values() if t.is_floating_point())
        like = next(floating, torch.empty(0))
        write_to(weights, dyn.to(like.device, like.dtype), in_place=False)
        return dyn

    def load_dynamic(self, dyn: DynamicModel) -> None:
        """Take the weights, heads and running statistics of a staged network of the same plan.

        Raises:
            UsageError: It is of another plan or model.
        """
        self._require_same(dyn)
        take_from(self._weights(), dyn)

    def write_to(self, dyn: DynamicModel) -> None:
        """Write weights, heads and running statistics into a staged network of the same plan.

        Raises:
            UsageError: It is of another plan or model.
        """
        self._require_same(dyn)
        write_to(self._weights(), dyn)

    def _weights(self) -> Weights:
        last = self.plan.stages - 1 if self.plan.final == "original" else None
        tensors = {key: read(self, name) for key, name in self._names.items()}
        return Weights(tensors, last, dict(self._names))

    def _require_same(self, dyn: DynamicModel) -> None:
        if not isinstance(dyn, DynamicModel):
            raise UsageError(
                f"a {type(dyn).__name__} is no DynamicModel; give what transform(), load() or "
                "extract() return."
            )
        mine, others = _settings(self.plan), _settings(dyn.plan)
        for key in dict.fromkeys((*mine, *others)):
            if mine.get(key) != others.get(key):
                raise UsageError(
                    f"the staged network has the plan's {key!r} {_shown(others.get(key))}, and the "
                    f"masked form {_shown(mine.get(key))}, which must be the same; call set_plan() "
                    "with the network's plan, or extract() a network of this one."
                )
        owners = tuple(self._captured.assign(self.plan).owners.tolist())
        if dyn.parts.owners != owners:
            raise UsageError(
                "the staged network deals channels out to other stages than the masked form: it "
                'was made from another model, or from other weights with order "l1"; make the '
                "masked form from the model that the network was compiled from."
            )


def _settings(plan: Any) -> dict[str, Any]:
    """What a plan says about stages, apart from the input."""
    return {k: v for k, v in plan.to_dict().items() if k != "input_shape"}


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)[:200]
