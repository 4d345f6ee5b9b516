"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler.errors import TrainingDivergedError
from s2d_compiler.evaluation.evaluating import right_of
from s2d_compiler.training import checkpoints
from s2d_compiler.training.feeding import Feed
from s2d_compiler.training.history import EpochResult, Progress
from s2d_compiler.training.losses import JointLoss
from s2d_compiler.training.recipe import Recipe
from s2d_compiler.training.schedules import learning_rate
from s2d_compiler.training.trainees import Trainee

__all__ = ["Loop"]

#: The loss has diverged when its mean over about so many steps ...
_STEPS = 50
#: ... is so many times that of guessing, and of the first step.
_TIMES = 3.0

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
    path: str | None
    every_seconds: float
    every_steps: int | None
    on_progress: Callable[[Progress], None] | None
    epoch: int = 0
    step: int = 0
    history: list[EpochResult] = field(default_factory=list)
    best: dict[str, Any] | None = None
    resumed: int = 0

    def __post_init__(self) -> None:
        self.parameters = self.trainee.parameters()
        self.optimizer = _optimizer(self.recipe, self.trainee.network, self.parameters)
        self.scaler: Any = None
        if self.recipe.precision == "float16":
            self.scaler = torch.amp.GradScaler(self.device.type)
        self.sums = self._no_sums()
        self.first_loss: float | None = None
        self.smooth = 0.0
        self.elapsed = 0.0
        self.done_here = 0

    def _no_sums(self) -> Tensor:
        # joint loss, losses of all stages, right ones of all stages
        return torch.zeros(1 + 2 * self.trainee.stages, dtype=torch.float64, device=self.device)

    # -- the whole -------------------------------------------------------------------------------

    def __call__(self, is_asked_to_end: Callable[[], bool]) -> None:
        """Train until the end, or until asked to end, with a checkpoint then.

        Raises:
            TrainingDivergedError: The loss went astray.
        """
        self.started = time.monotonic()
        self.written = self.started
        while self.epoch < self.recipe.epochs:
            self.trainee.train()
            for inputs, labels in self.feed.epoch(self.epoch, self.step):
                self.take_step(inputs, labels)
                if is_asked_to_end():
                    self.save()
                    return
                if self._is_due() and self.step < self.feed.steps:
                    self.save()
            result = self.finish_epoch(is_asked_to_end)
            if result is None:
                self.save()
                return
            self.save()
            self._report(result)
            if is_asked_to_end():
                return

    def _is_due(self) -> bool:
        if self.path is None:
            return False
        if self.every_steps is not None and self.step % self.every_steps == 0:
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
        with self._autocast():
            outputs = self.trainee.logits(inputs, frozen=self.is_taught_by_last)
            taught = self._taught(inputs, outputs)
        trained = outputs[: len(self.trainee.trained)]
        loss, each = self.loss(trained, labels, taught)
        self._watch(float(loss.detach()))
        self.optimizer.zero_grad(set_to_none=True)
        self._descend(loss)
        self._add(loss, each, trained, labels)
        self.step += 1
        self.done_here += 1
        if self.on_progress is not None:
            self._report(None)

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
            return self.trainee._logits(self.teacher(inputs), len(inputs))

    def _descend(self, loss: Tensor) -> None:
        clip = self.recipe.clip_norm
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                nn.utils.clip_grad_norm_(self.parameters.values(), clip)
            self.optimizer.step()
            return
        self.scaler.scale(loss).backward()
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _add(
        self, loss: Tensor, each: list[Tensor], trained: list[Tensor], labels: Tensor | None
    ) -> None:
        stages = self.trainee.stages
        self.sums[0] += loss.detach()
        for stage, (of_stage, logits) in enumerate(zip(each, trained, strict=True)):
            self.sums[1 + stage] += of_stage.detach()
            if labels is not None:
                self.sums[1 + stages + stage] += right_of(logits.detach(), labels).sum()

    def _watch(self, loss: float) -> None:
        if self.first_loss is None:
            self.first_loss = self.smooth = loss
        self.smooth += (loss - self.smooth) / _STEPS
        guessing = self.loss.of_guessing(len(self.trainee.trained), self.classes)
        bound = _TIMES * max(guessing, self.first_loss)
        if not math.isfinite(loss):
            self._diverge(f"the loss is {loss}, and it must stay finite")
        if self.smooth > bound:
            self._diverge(
                f"the loss has risen to {self.smooth:.3g} (mean of about {_STEPS} steps), over "
                f"{_TIMES:g} times that of guessing ({guessing:.3g}) and of the first step "
                f"({self.first_loss:.3g})"
            )

    def _diverge(self, problem: str) -> None:
        kept = "no checkpoint was written"
        if self.path is not None and (found := checkpoints.read_checkpoint(self.path)) is not None:
            checkpoints.take(self.trainee.network, found["weights"])
            kept = f"{self.path} keeps the training as it was before"
        raise TrainingDivergedError(
            f"epoch {self.epoch + 1}, step {self.step + 1}: {problem}; lower the learning rate "
            f"({self.recipe.lr:g}), warm up (warmup_steps) or clip gradients (clip_norm); {kept}."
        )

    # -- an epoch --------------------------------------------------------------------------------

    def finish_epoch(self, is_asked_to_end: Callable[[], bool]) -> EpochResult | None:
        """Validate, and note what the epoch was like; None if asked to end before that."""
        validation = self._validate(is_asked_to_end)
        if validation is None:
            return None
        now = time.monotonic()
        seconds = self.elapsed + now - self.started
        before = sum(result.seconds for result in self.history)
        losses, accuracies = self._means()
        result = EpochResult(
            self.epoch + 1,
            losses[0],
            tuple(losses[1 + k] if k != self.trainee.frozen else None
                  for k in range(self.trainee.stages)),
            accuracies,
            validation,
            self.optimizer.param_groups[0]["lr"],
            seconds - before,
        )  # fmt: skip
        self.history.append(result)
        if self.recipe.keep == "best" and validation:
            score = sum(validation[k] for k in self.trainee.trained)
            if self.best is None or score > self.best["score"]:
                weights = {
                    name: tensor.cpu().clone()
                    for name, tensor in checkpoints.tensors_of(self.trainee.network).items()
                }
                self.best = {"score": score, "epoch": self.epoch + 1, "weights": weights}
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = self._no_sums()
        return result

    def _means(self) -> tuple[list[float], tuple[float | None, ...]]:
        steps, stages = max(1, self.step), self.trainee.stages
        sums = self.sums.tolist()
        losses = [value / steps for value in sums[: 1 + stages]]
        if self.feed.labels is None:
            return losses, ()
        images = steps * self.recipe.batch_size * self.feed.processes
        right: list[float | None] = [value / images for value in sums[1 + stages :]]
        if self.trainee.frozen is not None:
            right[self.trainee.frozen] = None
        return losses, tuple(right)

    def _validate(self, is_asked_to_end: Callable[[], bool]) -> tuple[float, ...] | None:
        if self.validation is None:
            return ()
        self.trainee.network.eval()
        right = torch.zeros(self.trainee.stages, dtype=torch.long, device=self.device)
        count = 0
        with torch.no_grad():
            for inputs, labels in self.validation():
                outputs = self.trainee.logits(inputs)
                right += torch.stack([right_of(logits, labels).sum() for logits in outputs])
                count += len(labels)
                if is_asked_to_end():
                    return None
        return tuple(value / count for value in right.tolist())

    def _report(self, result: EpochResult | None) -> None:
        if self.on_progress is None:
            return
        seconds = time.monotonic() - self.started
        speed = self.done_here / seconds if seconds else 0.0
        done = self.epoch * self.feed.steps + self.step
        left = self.recipe.epochs * self.feed.steps - done
        if result is None:
            losses, accuracies = self._means()
            loss, epoch, step = losses[0], self.epoch + 1, self.step
        else:
            loss, accuracies = result.loss, result.accuracies
            epoch, step = result.epoch, self.feed.steps
        images = self.recipe.batch_size * self.feed.processes
        self.on_progress(
            Progress(
                epoch, step, self.feed.steps, self.recipe.epochs, loss, accuracies,
                self.optimizer.param_groups[0]["lr"], speed * images,
                left / speed if speed else 0.0, result,
            )
        )  # fmt: skip

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, if one is wanted and the weights are finite.

        Raises:
            TrainingDivergedError: They are not.
            OutputError: The file cannot be written; the one before stays.
        """
        weights = checkpoints.tensors_of(self.trainee.network)
        if not all(bool(t.isfinite().all()) for t in self.parameters.values()):
            self._diverge("weights are no longer finite")
        if self.path is None:
            return
        now = time.monotonic()
        data = {
            "run": self.run,
            "now": checkpoints.hash_of(weights),
            "epoch": self.epoch,
            "step": self.step,
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "sums": self.sums,
            "first_loss": self.first_loss,
            "smooth": self.smooth,
            "history": [result.to_dict() for result in self.history],
            "best": self.best,
            "random": checkpoints.random_states(self.device),
            "elapsed": self.elapsed + now - self.started,
        }
        checkpoints.write_checkpoint(self.path, data)
        self.written = time.monotonic()

    def resume(self, found: dict[str, Any]) -> None:
        """Go on from a checkpoint of this run.

        Raises:
            CheckpointError: Something in it is damaged.
        """
        weights = checkpoints.tensors_of(self.trainee.network)
        checkpoints.require_like(found.get("weights"), weights, "weights")
        checkpoints.require_like(found.get("sums"), self.sums, "sums")
        checkpoints.take(self.trainee.network, found["weights"])
        checkpoints.load_optimizer(self.optimizer, found.get("optimizer"))
        if self.scaler is not None:
            self.scaler.load_state_dict(found["scaler"])
        self.epoch, self.step = found["epoch"], found["step"]
        self.sums = found["sums"].to(self.device)
        self.first_loss, self.smooth = found["first_loss"], found["smooth"]
        self.history = [EpochResult.from_dict(row) for row in found["history"]]
        self.best = found["best"]
        self.elapsed = found["elapsed"]
        self.resumed = len(self.history)
        checkpoints.set_random_states(found["random"], self.device)


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
