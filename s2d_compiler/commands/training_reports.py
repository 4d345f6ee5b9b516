"""What is told about a training while it runs: a bar, a line per epoch, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d_compiler.errors import UsageError
from s2d_compiler.output import atomic_write

if TYPE_CHECKING:
    from s2d_compiler.commands.options import Reporting
    from s2d_compiler.training import EpochResult, Progress

__all__ = ["epoch_line", "reports"]

Report = Callable[["Progress"], None]


@contextmanager
def reports(
    log_file: Path | None, tensorboard: Path | None, reporting: Reporting
) -> Iterator[Report]:
    """A callback for ``fit`` that tells what was asked for.

    Args:
        log_file: A file of JSON lines, written anew, whole, after each epoch.
        tensorboard: A folder for TensorBoard.
        reporting: With ``--quiet`` or ``--json`` nothing is shown.

    Raises:
        UsageError: TensorBoard is not installed.
    """
    told: list[Report] = []
    writer = None if tensorboard is None else _writer(tensorboard)
    if log_file is not None:
        told.append(lambda progress: _write_log(log_file, progress))
    if writer is not None:
        told.append(lambda progress: _write_scalars(writer, progress))
    try:
        with _shown(reporting) as show:
            told.append(show)

            def tell_all(progress: Progress) -> None:
                for tell in told:
                    tell(progress)

            yield tell_all
    finally:
        if writer is not None:
            writer.close()


def epoch_line(result: EpochResult, epochs: int) -> str:
    """An epoch in one line."""
    parts = [f"epoch {result.epoch}/{epochs}", f"loss {result.loss:.4f}"]
    if result.accuracies:
        parts.append(f"training {_shares(result.accuracies)}")
    if result.validation:
        parts.append(f"validation {_shares(result.validation)}")
    return "  ".join([*parts, f"lr {result.lr:.3g}", f"{result.seconds:.1f} s"])


def _shares(values: Sequence[float | None]) -> str:
    return " ".join("-" if value is None else f"{value:.2%}" for value in values)


@contextmanager
def _shown(reporting: Reporting) -> Iterator[Report]:
    """A bar on a terminal, and a line per epoch, on stderr."""
    stream = sys.stderr
    if stream is None or reporting.quiet or reporting.as_json:
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, transient=True, disable=not stream.isatty()) as bar:
        task = bar.add_task("training", left="")

        def show(progress: Progress) -> None:
            if progress.result is not None:
                console.print(epoch_line(progress.result, progress.epochs), soft_wrap=True)
                return
            done = (progress.epoch - 1) * progress.steps + progress.step
            bar.update(
                task,
                completed=done,
                total=progress.epochs * progress.steps,
                description=bar_text(progress),
                left=f"{_time(progress.seconds_left)} left",
            )

        yield show


def bar_text(progress: Progress) -> str:
    """What stands before the bar."""
    accuracies = f"  right {_shares(progress.accuracies)}" if progress.accuracies else ""
    return (
        f"epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.3f}{accuracies}  lr "
        f"{progress.lr:.2g}  {progress.images_per_second:.0f} images/s"
    )


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _write_log(path: Path, progress: Progress) -> None:
    if progress.result is None:
        return
    lines = [json.dumps(result.to_dict()) + "\n" for result in progress.history]
    atomic_write(path, lambda file: file.write("".join(lines).encode()))


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard: TensorBoard is not installed ({error}), and it writes {folder}; "
            "install it with pip install s2d-compiler[tensorboard]"
        ) from error
    return SummaryWriter(str(folder))


def _write_scalars(writer: Any, progress: Progress) -> None:
    result = progress.result
    if result is None:
        return
    writer.add_scalar("loss", result.loss, result.epoch)
    writer.add_scalar("lr", result.lr, result.epoch)
    of_stages = {
        "loss": result.stage_losses,
        "training": result.accuracies,
        "validation": result.validation,
    }
    for what, values in of_stages.items():
        for stage, value in enumerate(values, start=1):
            if value is not None:
                writer.add_scalar(f"{what}/stage {stage}", value, result.epoch)
    writer.flush()
