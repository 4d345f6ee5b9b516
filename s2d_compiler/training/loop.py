"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler.errors import DataError, S2DError, TrainingDivergedError, first_line
from s2d_compiler.evaluation.evaluating import right_of
from s2d_compiler.memory import let_through
from s2d_compiler.training import checkpoints
from s2d_compiler.training.distributed import Processes
from s2d_compiler.training.feeding import Feed
from s2d_compiler.training.history import EpochResult, Progress
from s2d_compiler.training.losses import JointLoss
from s2d_compiler.training.recipe import Recipe
from s2d_compiler.training.schedules import learning_rate
from s2d_compiler.training.trainees import Trainee
from s2d_compiler.training.watching import Watch

__all__ = ["Loop"]

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass
class Loop:
    """A training, from wherever it is to its end.

    What it does in a step depends on its state and the recipe alone.
    """

    trainee: Trainee
    feed: Feed
    recipe: Recipe
    loss: JointLoss
    teacher: nn.Module | None
    is_taught_by_last: bool
    classes: int
    validation: Batches | None
    device: torch.device
    run: dict[str, Any]
    processes: Processes
    is_asked: Callable[[], bool]
    path: str | None
    every_seconds: float
    every_steps: int | None
    on_progress: Callable[[Progress], None] | None
    epoch: int = 0
    step: int = 0
    history: list[EpochResult] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_score: float = -1.0
    resumed: int = 0
    losses: list[float] = field(init=False)
    right: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.trainee.parameters()
        self.optimizer = _optimizer(self.recipe, self.trainee.network, self.parameters)
        self.scaler: Any = None
        if self.recipe.precision == "float16":
            self.scaler = torch.amp.GradScaler(self.device.type)
        self.watch = Watch(self.loss.of_guessing(len(self.trainee.trained), self.classes))
        self._begin_epoch()
        self.started = self.written = time.monotonic()
        self.elapsed = 0.0
        self.done_here = 0
        self.is_ending = self.is_due = False

    # -- the whole -------------------------------------------------------------------------------

    def __call__(self) -> None:
        """Train until the end, or until asked to end; a checkpoint is written then.

        Raises:
            TrainingDivergedError: The loss went astray.
        """
        self.started = self.written = time.monotonic()
        while self.epoch < self.recipe.epochs:
            self.trainee.train()
            for inputs, labels in self.feed.epoch(self.epoch, self.step):
                self.take_step(inputs, labels)
                if self.processes.count == 1:  # the others would not know
                    self.is_ending = self.is_asked()
                if self.is_ending or (self.is_due and self.step < self.feed.steps):
                    self.save()
                if self.is_ending:
                    return
            result = self.finish_epoch()
            self.save()
            if result is None:
                return
            self._report(result)

    def _is_due(self) -> bool:
        if self.path is None:
            return False
        if self.every_steps is not None and (self.step + 1) % self.every_steps == 0:
            return True
        return time.monotonic() - self.written >= self.every_seconds

    # -- a step ----------------------------------------------------------------------------------

    def take_step(self, inputs: Tensor, labels: Tensor | None) -> None:
        """One step of the optimiser."""
        rate = learning_rate(
            self.recipe,
            self.epoch * self.feed.steps + self.step,
            self.recipe.epochs * self.feed.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        each, trained = self.forward(inputs, labels)
        seen = self._agreed(each)
        weights = self.loss.weights_for(seen)
        joint = sum(weight * value for weight, value in zip(weights, seen, strict=True))
        if (problem := self.watch.see(joint)) is not None:
            self._diverge(problem)
        self.optimizer.zero_grad(set_to_none=True)
        terms = [weight * loss for weight, loss in zip(weights, each, strict=True)]
        self._descend(torch.stack(terms).sum())
        self.losses = [a + b for a, b in zip(self.losses, [joint, *seen], strict=True)]
        if labels is not None:
            self.right += torch.stack([right_of(logits.detach(), labels).sum()
                                       for logits in trained])  # fmt: skip
        self.step += 1
        self.done_here += 1
        if self.on_progress is not None:
            self._report(None)

    def forward(self, inputs: Tensor, labels: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The loss of each trained stage, and its logits."""
        with self._autocast(), self._explained(inputs):
            outputs = self.trainee.logits(inputs, frozen=self.is_taught_by_last)
            taught = self._taught(inputs, outputs)
        trained = outputs[: len(self.trainee.trained)]
        return self.loss.of_stages(trained, labels, taught), trained

    @contextmanager
    def _explained(self, inputs: Tensor) -> Iterator[None]:
        """The network took an image in evaluation mode; training mode may ask for more."""
        try:
            yield
        except S2DError:
            raise
        except Exception as error:
            let_through(error)
            raise DataError(
                f"{self.feed.data.name}: batches of shape {tuple(inputs.shape)}, and the network "
                f"fails with them in training mode ({first_line(error)[:160]}); take batches and "
                "a network that go together"
            ) from error

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.precision))

    def _taught(self, inputs: Tensor, outputs: list[Tensor]) -> Tensor | None:
        if self.is_taught_by_last:
            return outputs[-1].detach()
        if self.teacher is None:
            return None
        with torch.no_grad():
            return self.trainee.read(self.teacher(inputs), len(inputs))

    def _agreed(self, each: list[Tensor]) -> list[float]:
        """The losses over the joint batch; and whether some process is to end, or to save."""
        numbers = torch.stack([loss.detach() for loss in each]).double()
        if self.processes.count > 1:
            flags = torch.tensor([self.is_asked(), self._is_due()], dtype=torch.float64)
            found = self.processes.sum(torch.cat([numbers, flags.to(numbers.device)])).tolist()
            self.is_ending, self.is_due = found[-2] > 0, found[-1] > 0
            return [value / self.processes.count for value in found[:-2]]
        self.is_due = self._is_due()
        return numbers.tolist()

    def _descend(self, loss: Tensor) -> None:
        parameters, scaler = list(self.parameters.values()), self.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        self.processes.average_gradients(parameters)
        if self.recipe.clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
        if scaler is None:
            self.optimizer.step()
            return
        scaler.step(self.optimizer)
        scaler.update()

    def _diverge(self, problem: str) -> None:
        kept = "there is no checkpoint to go back to"
        if self.path is not None and (found := checkpoints.read_checkpoint(self.path)) is not None:
            checkpoints.take(self.trainee.network, found["weights"])
            kept = f"{self.path} keeps the training as it was before"
        raise TrainingDivergedError(
            f"epoch {self.epoch + 1}, step {self.step + 1}: {problem}; lower the learning rate "
            f"({self.recipe.lr:g}), warm up (warmup_steps) or clip gradients (clip_norm); {kept}."
        )

    # -- an epoch --------------------------------------------------------------------------------

    def finish_epoch(self) -> EpochResult | None:
        """Validate, and note what the epoch was like; None if asked to end before that."""
        self.processes.take_from_first(self.trainee.network.buffers())
        validation = self._validate()
        if validation is None:
            return None
        right = self.processes.sum(self.right.clone())
        losses, accuracies = self._means(right, self.processes.count)
        stages = range(self.trainee.stages)
        result = EpochResult(
            self.epoch + 1,
            losses[0],
            tuple(None if k == self.trainee.frozen else losses[1 + k] for k in stages),
            accuracies,
            validation,
            self.optimizer.param_groups[0]["lr"],
            self._seconds() - sum(result.seconds for result in self.history),
        )
        self.history.append(result)
        if self.recipe.keep == "best" and validation:
            self._keep_best(sum(validation[k] for k in self.trainee.trained))
        self.epoch, self.step = self.epoch + 1, 0
        self._begin_epoch()
        return result

    def _begin_epoch(self) -> None:
        count = len(self.trainee.trained)
        self.losses = [0.0] * (1 + count)
        self.right = torch.zeros(count, dtype=torch.long, device=self.device)

    def _seconds(self) -> float:
        return self.elapsed + time.monotonic() - self.started

    def _keep_best(self, score: float) -> None:
        if score > self.best_score:
            weights = checkpoints.tensors_of(self.trainee.network)
            self.best = {name: tensor.cpu().clone() for name, tensor in weights.items()}
            self.best_epoch, self.best_score = self.epoch + 1, score

    def _means(self, right: Tensor, processes: int) -> tuple[list[float], tuple[float | None, ...]]:
        """Mean losses and shares of right answers, of so many processes' answers."""
        steps = max(1, self.step)
        losses = [value / steps for value in self.losses]
        if self.feed.labels is None:
            return losses, ()
        images = steps * self.recipe.batch_size * processes
        shares: list[float | None] = [count / images for count in right.tolist()]
        if self.trainee.frozen is not None:
            shares.append(None)
        return losses, tuple(shares)

    def _validate(self) -> tuple[float, ...] | None:
        if self.validation is None:
            return () if not self.is_asked() or self.processes.count > 1 else None
        self.trainee.network.eval()
        found = torch.zeros(self.trainee.stages + 2, dtype=torch.long, device=self.device)
        with torch.no_grad():
            for inputs, labels in self.validation():
                outputs = self.trainee.logits(inputs)
                found[:-2] += torch.stack([right_of(logits, labels).sum() for logits in outputs])
                found[-2] += len(labels)
                if self.is_asked():
                    found[-1] = 1
                    break
        *right, count, is_ending = self.processes.sum(found).tolist()
        return None if is_ending else tuple(value / count for value in right)

    def _report(self, result: EpochResult | None) -> None:
        if self.on_progress is None:
            return
        seconds = time.monotonic() - self.started
        speed = self.done_here / seconds if seconds else 0.0
        done = self.epoch * self.feed.steps + self.step
        left = self.recipe.epochs * self.feed.steps - done
        if result is None:
            losses, accuracies = self._means(self.right, 1)
            loss, epoch, step = losses[0], self.epoch + 1, self.step
        else:
            loss, accuracies = result.loss, result.accuracies
            epoch, step = result.epoch, self.feed.steps
        images = self.recipe.batch_size * self.processes.count
        self.on_progress(
            Progress(
                epoch, step, self.feed.steps, self.recipe.epochs, loss, accuracies,
                self.optimizer.param_groups[0]["lr"], speed * images,
                left / speed if speed else 0.0, result, tuple(self.history),
            )
        )  # fmt: skip

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, if one is wanted and the weights are finite.

        Raises:
            TrainingDivergedError: They are not.
            OutputError: The file cannot be written; the one before stays.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in self.parameters.values()):
            self._diverge("weights are no longer finite, and they must be")
        if self.path is None:
            return
        state = self.state()
        if self.processes.is_first:
            checkpoints.write_checkpoint(self.path, state)
        self.written = time.monotonic()

    def state(self) -> dict[str, Any]:
        """All that the training is, for a checkpoint: what ``resume`` takes."""
        weights = checkpoints.tensors_of(self.trainee.network)
        return {
            "run": self.run,
            "now": checkpoints.hash_of(checkpoints.tensors_of(self.trainee.hand_over())),
            "epoch": self.epoch,
            "step": self.step,
            "weights": weights,
            "optimizer": checkpoints.slots_of(self.optimizer),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "losses": self.losses,
            "right": self.processes.all_of(self.right.cpu()),
            "watch": [self.watch.first, self.watch.mean],
            "history": self._rows(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "random": self.processes.all_of(checkpoints.random_states(self.device)),
            "seconds": self._seconds(),
        }

    def _rows(self) -> Tensor:
        width = len(EpochResult.columns(self.trainee.stages))
        rows = [result.to_row(self.trainee.stages) for result in self.history]
        return torch.tensor(rows, dtype=torch.float64).view(len(rows), width)

    def resume(self, found: dict[str, Any]) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            CheckpointError: Something in it is damaged.
        """
        assert self.path is not None
        slots = checkpoints.possible_slots_of(self.optimizer)
        fresh = {**self.state(), "optimizer": slots}
        checkpoints.require_state(self.path, found, fresh, self.recipe.epochs, self.feed.steps)
        checkpoints.take(self.trainee.network, found["weights"])
        checkpoints.set_slots(self.optimizer, found["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(found["scaler"])
        self.epoch, self.step = found["epoch"], found["step"]
        self.losses = found["losses"]
        self.right = found["right"][self.processes.rank].to(self.device)
        self.watch.first, self.watch.mean = found["watch"]
        self.history = [EpochResult.from_row(row, self.trainee.stages)
                        for row in found["history"].tolist()]  # fmt: skip
        self.best, self.best_epoch = found["best"], found["best_epoch"]
        self.best_score = found["best_score"]
        self.elapsed = found["seconds"]
        self.resumed = len(self.history)
        checkpoints.set_random_states(found["random"][self.processes.rank], self.device)


def _optimizer(
    recipe: Recipe, network: nn.Module, parameters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters.values()), "weight_decay": recipe.weight_decay}]
    if not recipe.decay_norms:
        plain = [p for p in parameters.values() if p.ndim <= 1]
        decayed = [p for p in parameters.values() if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
