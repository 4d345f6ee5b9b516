"""Running the stages of a network with early exits."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2d_compiler.errors import InputShapeError, PolicyError, UsageError
from s2d_compiler.runtime.batches import Batch, SingleSamples, TogetherBatch, WholeBatch, Wiring
from s2d_compiler.runtime.deciding import Decider
from s2d_compiler.runtime.measures import (
    Function,
    function_values,
    measure_values,
)
from s2d_compiler.runtime.policies import (
    Deadline,
    Policy,
    Thresholds,
    require_policy,
    thresholds_of,
)
from s2d_compiler.runtime.predictions import Predictions
from s2d_compiler.runtime.sample_axes import (
    WHOLE,
    SampleAxes,
    SampleAxis,
    UnknownError,
    Values,
    find_sample_axes,
    output_axes,
)

if TYPE_CHECKING:
    from s2d_compiler.dynamic import StagedNetwork
    from s2d_compiler.runtime.timings import Timings

_NEVER = Thresholds(())


class Engine:
    """Runs a staged network sample by sample within batches.

    It looks once, at the first batch of more than one sample, where samples lie in what stages
    hand on (``sample_axes``), and keeps nothing else between calls.

    Args:
        network: The network, which it does not keep alive.
    """

    def __init__(self, network: StagedNetwork):
        self.network = weakref.ref(network)
        parts = network.parts
        self.parts = parts
        self.wiring = Wiring(
            tuple(interface.inputs for interface in parts.interfaces),
            tuple(frozenset(parts.read_after(n)) for n in range(len(parts.interfaces))),
        )
        self.macs = tuple(stage.macs for stage in parts.cost.stages)
        self.cumulative = tuple(stage.cumulative_macs for stage in parts.cost.stages)
        self._axes: SampleAxes | None = None
        self._alone: Sequence[Sequence[SampleAxis]] = ()
        self._knows_axes = False

    # -- the two ways to run -----------------------------------------------------------------------

    def predict(
        self, inputs: Any, policy: Policy | None, keywords: Mapping[str, Any]
    ) -> Predictions:
        """See ``StagedNetwork.predict``."""
        began = time.perf_counter()
        network = self._network()
        settings = network.settings
        policy = settings.policy if policy is None else require_policy(policy)
        if policy is None:
            raise PolicyError(
                "predict: there is no policy, neither given nor stored; hand one in, such as "
                "Thresholds((0.9, 0.8)), or let s2d calibrate find one."
            )
        given = self._given(inputs, keywords)
        self._check(policy, settings.timings, given[0].device)
        with torch.no_grad():
            samples = _samples(given)
            if samples == 0:
                return self._nothing(network, given)
            batch = self._batch(network, given, samples)
            decider = Decider(policy, self.macs, samples, settings.timings, batch.is_whole, began)
            return self._leave_early(batch, decider, policy, samples)

    def anytime(
        self, inputs: Any, measure: str | Function, keywords: Mapping[str, Any]
    ) -> Iterator[Predictions]:
        """See ``StagedNetwork.anytime``."""
        network = self._network()
        policy = _NEVER if measure == "confidence" else Thresholds((), measure)
        given = self._given(inputs, keywords)
        return self._anytime(network, given, policy)

    def _anytime(
        self, network: StagedNetwork, given: tuple[Any, ...], policy: Thresholds
    ) -> Iterator[Predictions]:
        samples = _samples(given)
        batch: Batch | None = None
        for number, macs in enumerate(self.cumulative):
            with torch.no_grad():
                if samples == 0:
                    yield self._nothing(network, given)
                    continue
                batch = batch or self._batch(network, given, samples)
                leaves = batch.run(number)
                output = self.parts.structured(tuple(leaves))
                values, is_measured = self._values(policy, batch, number, leaves, samples)
            device = values.device
            yield Predictions(
                output,
                torch.full((samples,), number, device=device),
                values,
                torch.full((samples,), macs, device=device),
                int(values.isnan().sum()) if is_measured else 0,
            )

    def _leave_early(
        self, batch: Batch, decider: Decider, policy: Policy, samples: int
    ) -> Predictions:
        measured = thresholds_of(policy) or _NEVER
        last = len(self.macs) - 1
        collected: _Collected | None = None
        rows: Tensor | None = None  # of the samples that are left; None for all
        undefined = 0
        for number in range(last + 1):
            leaves = batch.run(number)
            left = samples if rows is None else len(rows)
            values, is_measured = self._values(measured, batch, number, leaves, left)
            if left == 1:  # no copies, and one look at the device
                value = float(values)
                undefined += is_measured and value != value
                if number < last and decider.one_stays(number, value):
                    continue
                stay: Tensor | None = _NOBODY
            else:
                stay = _NOBODY if number == last else decider.staying(number, values)
                undefined += int(values.isnan().sum()) if is_measured else 0
            if stay is None:
                continue
            staying = None if stay is _NOBODY else stay.nonzero().flatten()
            if staying is not None and len(staying) == left:
                continue
            if collected is None and (staying is None or not len(staying)):
                return self._all_at(batch, number, leaves, values, samples, undefined)
            if collected is None:
                collected = _Collected(self, batch, samples, values)
            if staying is None or not len(staying):
                collected.put(number, rows, leaves, values, None)
                break
            collected.put(number, rows, leaves, values, (~stay).nonzero().flatten())
            batch.keep(staying)
            rows = staying if rows is None else rows[staying]
        assert collected is not None
        return collected.predictions(undefined)

    def _all_at(
        self,
        batch: Batch,
        number: int,
        leaves: Sequence[Any],
        values: Tensor,
        samples: int,
        undefined: int,
    ) -> Predictions:
        device = values.device
        return Predictions(
            self.parts.structured(tuple(leaves)),
            torch.full((samples,), number, device=device),
            values,
            torch.full((samples,), self.cumulative[number], device=device),
            undefined,
        )

    # -- what a call is made of --------------------------------------------------------------------

    def _network(self) -> StagedNetwork:
        network = self.network()
        assert network is not None
        if network.training:
            raise UsageError(
                "predict: the network is in training mode, in which samples depend on each other "
                "(batch norm) and on chance (dropout); call dyn.eval() first."
            )
        return network

    def _given(self, inputs: Any, keywords: Mapping[str, Any]) -> tuple[Any, ...]:
        positional = inputs if isinstance(inputs, tuple) else (inputs,)
        given = self.parts.flat_inputs(positional, keywords)
        counts = sorted({len(v) for v in given if isinstance(v, Tensor) and v.ndim})
        if len(counts) > 1:
            raise InputShapeError(
                f"the inputs hold {' and '.join(map(str, counts))} samples; hand in as many of "
                "each, the same ones in the same order."
            )
        return given

    def _check(self, policy: Policy, timings: Timings | None, device: torch.device) -> None:
        """Require that a policy fits the network; what depends on outputs shows later."""
        thresholds = thresholds_of(policy)
        if thresholds is not None:
            thresholds.require_stages(len(self.macs))
        if isinstance(policy, Deadline):
            self._check_timings(timings, device)

    def _check_timings(self, timings: Timings | None, device: torch.device) -> None:
        """Require times of this network, recorded on such a device."""
        if timings is None:
            raise PolicyError(
                "deadline: no times are recorded for this network, so nobody knows what fits; "
                "record them on the machine that it runs on: s2d bench --record."
            )
        if len(timings.stages) != len(self.macs):
            raise PolicyError(
                f"deadline: times are recorded for {len(timings.stages)} stages, and the network "
                f"has {len(self.macs)}; record them again: s2d bench --record."
            )
        recorded = timings.machine.get("device", device.type)
        if recorded != device.type:
            raise PolicyError(
                f"deadline: times are recorded on {recorded}, and the inputs are on {device.type}; "
                "record them there: s2d bench --record."
            )

    def _values(
        self,
        thresholds: Thresholds,
        batch: Batch,
        number: int,
        leaves: Sequence[Any],
        samples: int,
    ) -> tuple[Tensor, bool]:
        """The measure at one exit; NaN and False where outputs have none and none is needed."""
        output = self.parts.structured(tuple(leaves))
        measure = thresholds.measure
        if not isinstance(measure, str):
            return function_values(measure, output, samples), True
        is_first = isinstance(output, Tensor) and _is_first(batch.axis(number, 0), output, samples)
        if thresholds is _NEVER and not (is_first and _are_logits(output)):
            leaf = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
            device = None if leaf is None else leaf.device
            return torch.full((samples,), torch.nan, device=device), False
        if isinstance(output, Tensor) and not is_first:
            raise PolicyError(
                f"measure {measure!r}: the exit returns a tensor of shape {tuple(output.shape)}, "
                f"of which dimension 0 does not count the {samples} sample(s); hand in measure=, "
                "a function from the output to (N,) numbers of which larger ones are more certain."
            )
        temperature = 1.0 if thresholds.temperatures is None else thresholds.temperatures[number]
        values = measure_values(measure, output, temperature)
        if number < len(thresholds.values):
            classes = max(output.shape[1], 2) if output.ndim > 1 else 2
            thresholds.require_classes(number, classes)
        return values, True

    def batch_of(self, inputs: tuple[Any, ...]) -> Batch:
        """A batch at its start, from flat inputs that fit the network; to run stages by hand."""
        return self._batch(self._network(), inputs, _samples(inputs))

    def _batch(self, network: StagedNetwork, given: tuple[Any, ...], samples: int) -> Batch:
        stages = list(network.stages)
        if samples == 1:
            return TogetherBatch(stages, self.wiring, None, given)
        if self.parts.batch is not None:
            return WholeBatch(stages, self.wiring, given)
        if not self._knows_axes:
            try:
                self._axes = find_sample_axes(self._run_all, given)
            except UnknownError:  # for now; other samples may show it
                alone = output_axes(self._run_all, given)
                return SingleSamples(stages, self.wiring, alone, given)
            if self._axes is None:  # where one sample fails, it is for these inputs
                self._alone = output_axes(self._run_all, given)
            self._knows_axes = True
        if self._axes is None:
            return SingleSamples(stages, self.wiring, self._alone, given)
        return TogetherBatch(stages, self.wiring, self._axes, given)

    def _run_all(self, inputs: tuple[Tensor, ...]) -> Values:
        network = self.network()
        assert network is not None
        features: dict[tuple[int, int], Any] = {}
        outputs: list[tuple[Any, ...]] = []
        for number, stage in enumerate(network.stages):
            arguments = [
                inputs[where[1]] if where[0] == "input" else features[where[1], where[2]]
                for where in self.wiring.inputs[number]
            ]
            leaves, handed = stage(*arguments)
            features.update({(number, k): value for k, value in enumerate(handed)})
            outputs.append(tuple(leaves))
        return features, outputs

    def _nothing(self, network: StagedNetwork, given: tuple[Any, ...]) -> Predictions:
        """For no samples: outputs of the right shape, from a run on one."""
        one = tuple(v.new_zeros((1, *v.shape[1:])) for v in given)
        leaves = TogetherBatch(list(network.stages), self.wiring, None, one).run(0)
        device = given[0].device
        output = self.parts.structured(
            tuple(v[:0] if isinstance(v, Tensor) and v.ndim else v for v in leaves)
        )
        none = torch.zeros(0, dtype=torch.long, device=device)
        return Predictions(output, none, torch.zeros(0, device=device), none.clone())


#: Everybody leaves.
_NOBODY = torch.zeros(0, dtype=torch.bool)


class _Collected:
    """Answers of samples that leave at different stages, put together in input order."""

    def __init__(self, engine: Engine, batch: Batch, samples: int, values: Tensor):
        self.engine = engine
        self.batch = batch
        self.samples = samples
        device = values.device
        self.leaves: list[Any] | None = None
        self.stage = torch.zeros(samples, dtype=torch.long, device=device)
        self.confidence = values.new_zeros(samples)
        self.deepest = 0

    def put(
        self,
        number: int,
        rows: Tensor | None,
        leaves: Sequence[Any],
        values: Tensor,
        leaving: Tensor | None,
    ) -> None:
        """Take the answers of those that leave: rows among those that were left, None for all."""
        self.deepest = number
        if self.leaves is None:
            self.leaves = [self._room(number, k, leaf) for k, leaf in enumerate(leaves)]
        if leaving is None:
            places = rows
        else:
            places = leaving if rows is None else rows[leaving]
            values = values[leaving]
        assert places is not None
        for position, leaf in enumerate(leaves):
            axis = self._axis(number, position)
            if axis is None:
                self.leaves[position] = leaf
                continue
            value = leaf if leaving is None else axis.take(leaf, leaving)
            axis.put(self.leaves[position], places, value)
        self.stage[places] = number
        self.confidence[places] = values.to(self.confidence.dtype)

    def _room(self, number: int, position: int, leaf: Any) -> Any:
        axis = self._axis(number, position)
        return leaf if axis is None else axis.empty(leaf, self.samples)

    def _axis(self, number: int, position: int) -> SampleAxis | None:
        axis = self.batch.axis(number, position)
        return None if axis is None or axis.dimension is None else axis

    def predictions(self, undefined: int) -> Predictions:
        engine = self.engine
        cumulative = torch.tensor(engine.cumulative, device=self.stage.device)
        macs = cumulative[self.stage]
        if self.batch.is_whole:
            macs = cumulative[self.deepest].expand(self.samples).clone()
        assert self.leaves is not None
        return Predictions(
            engine.parts.structured(tuple(self.leaves)),
            self.stage,
            self.confidence,
            macs,
            undefined,
        )


def _samples(given: tuple[Any, ...]) -> int:
    return next((len(v) for v in given if isinstance(v, Tensor)), 1)


def _is_first(axis: SampleAxis | None, output: Tensor, samples: int) -> bool:
    """Whether dimension 0 counts the samples."""
    return axis == WHOLE and output.ndim > 0 and output.shape[0] == samples


def _are_logits(output: Tensor) -> bool:
    return output.ndim >= 1 and output.is_floating_point()
