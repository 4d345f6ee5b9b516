"""``s2d train``: all stages of a staged network together."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from s2d_compiler.commands.data_options import DataSource, read_device
from s2d_compiler.commands.options import (
    REPORTING,
    SOURCE,
    ModelSource,
    Reporting,
    Result,
    require_other_file,
)
from s2d_compiler.commands.recipe_options import RECIPE, RecipeOptions
from s2d_compiler.errors import UsageError
from s2d_compiler.output import check_writable

if TYPE_CHECKING:
    from rich.table import Table

    from s2d_compiler.data import Data
    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.training import History

log = logging.getLogger(__name__)

_Hidden = Parameter(show_default=False)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class TrainingSource(DataSource):
    """Where images come from, and what is done to them.

    Args:
        data: cifar10:DIR, cifar100:DIR, folder:DIR (a folder of images per class), FILE.npz
            (arrays images and labels) or package.module:function (returns a data set).
        split: Which part, such as train or test; a slice may follow: train[:45000].
        validation_data: Images to measure the accuracy of every stage on after each epoch;
            without it, but with --validation-split, another part of the same data.
        validation_split: Which part of these, such as train[45000:].
        batch_size: Images in each step of each process (128).
        limit: Use at most so many images, evenly spaced.
        resize: Resize images: a number for the shorter side, such as 256, or HEIGHTxWIDTH. These
            and the following settings are stored with the trained network, and taken from the
            network where they are not given.
        crop: Keep the middle: a number for a square, such as 224, or HEIGHTxWIDTH.
        interpolation: How images are resized: bilinear, bicubic or nearest.
        channels: rgb, bgr or gray; without it, those that the images have.
        scale: What pixels are multiplied with; without it, 1/255 for bytes, 1 for other numbers.
        mean: What is subtracted then, per channel, such as 0.485,0.456,0.406.
        std: What is divided by then, per channel, such as 0.229,0.224,0.225.
    """

    batch_size: Annotated[int | None, _Hidden] = None  # type: ignore[assignment]
    validation_data: Annotated[str | None, _Hidden] = None
    validation_split: Annotated[str | None, _Hidden] = None

    def validation(self) -> Data | None:
        """The images that are held out, if any are named.

        Raises:
            UsageError, DataError: They cannot be read.
        """
        from s2d_compiler.data import open_data

        if self.validation_data is None and self.validation_split is None:
            return None
        named = self.validation_data or self.data
        assert named is not None  # the training data were opened before
        return open_data(named, self.validation_split)


DATA = TrainingSource()


def train_network(
    dyn: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    teacher: Annotated[Path | None, _Hidden] = None,
    original: Annotated[Path | None, _Hidden] = None,
    source: ModelSource = SOURCE,
    data: TrainingSource = DATA,
    options: RecipeOptions = RECIPE,
    checkpoint: Annotated[Path | None, _Hidden] = None,
    resume: str = "auto",
    checkpoint_seconds: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 300.0,
    checkpoint_steps: Annotated[
        int | None, Parameter(validator=validators.Number(gte=1), show_default=False)
    ] = None,
    log_file: Annotated[
        Path | None, Parameter(name=["--log", "--log-file"], show_default=False)
    ] = None,
    tensorboard: Annotated[Path | None, _Hidden] = None,
    device: str = "cpu",
    reporting: Reporting = REPORTING,
) -> Result | None:
    """Train all stages of a compiled network together.

    Interrupted or killed, it goes on from its checkpoint when it is started again.

    Args:
        dyn: The compiled network, dyn.pt.
        output: The file to write, a network as dyn.pt is; an existing one is replaced.
        teacher: A network to learn from: a file as s2d compile takes it. Without it, the last
            stage of a plan with "final": "original" is the teacher of the others.
        original: The network that dyn.pt was compiled from, for --form masked; without it, the
            teacher, if it is that. --arch and its like are about teacher and original.
        checkpoint: The file that keeps a training that is not over; without it, the output's name
            with .checkpoint after it, which is removed at the end.
        resume: auto: go on from the checkpoint if there is one; must: only go on; never: begin
            anew.
        checkpoint_seconds: After how many seconds the checkpoint is written, besides each epoch.
        checkpoint_steps: After how many steps it is written.
        log_file: Write what each epoch was like into this file, as one JSON object per line
            (torchrun takes --log for one of its own options; write --log-file there).
        tensorboard: Write the same for TensorBoard into this folder (pip install
            s2d-compiler[tensorboard]).
        device: Where to train, such as cpu or cuda.
    """
    from s2d_compiler.format import load
    from s2d_compiler.training import fit
    from s2d_compiler.training.distributed import joined

    recipe = options.recipe(data.batch_size)
    path = checkpoint or output.with_name(f"{output.name}.checkpoint")
    _check_files(dyn, output, path, log_file, data, teacher, original)
    with joined(device) as place:
        _check_resume(resume, path)
        staged = load(dyn, read_device(place or device))
        source.require_shape_of(dyn, staged.parts.input_shapes)
        images, held_out = data.open(labels=recipe.labels), data.validation()
        models = {file: source.read(file) for file in (teacher, original) if file is not None}
        is_first = _is_first()
        if is_first:
            data.warn_of_defaults(staged.settings.preprocessing, images)
        with _keeping_note(path), _reports(log_file, tensorboard, reporting, is_first) as report:
            history = fit(
                staged,
                images,
                recipe,
                validation=held_out,
                preprocessing=data.preprocessing(staged.settings.preprocessing),
                teacher=models.get(teacher) if teacher is not None else None,
                original=models.get(original) if original is not None else None,
                checkpoint=path,
                checkpoint_seconds=checkpoint_seconds,
                checkpoint_steps=checkpoint_steps,
                on_progress=report,
            )
        if not is_first:
            return None
        staged.to("cpu").save(output)
    if checkpoint is None:
        path.unlink(missing_ok=True)
    return _result(staged, history, output)


def _check_files(
    dyn: Path,
    output: Path,
    checkpoint: Path,
    log_file: Path | None,
    data: TrainingSource,
    teacher: Path | None,
    original: Path | None,
) -> None:
    """Refuse files that cannot be written, or are others', before anything long begins."""
    named = {
        "the data": data.data,
        "the validation data": data.validation_data,
        "the teacher": teacher,
        "the original": original,
    }
    inputs = {what: Path(file) for what, file in named.items() if file is not None}
    require_other_file(output, inputs)
    inputs |= {"the network": dyn, "the output": output}
    require_other_file(checkpoint, inputs)
    written = [output, checkpoint]
    if log_file is not None:
        require_other_file(log_file, {**inputs, "the checkpoint": checkpoint})
        written.append(log_file)
    for file in written:
        check_writable(file)


def _check_resume(resume: str, checkpoint: Path) -> None:
    from s2d_compiler.training.checkpoints import read_checkpoint
    from s2d_compiler.training.distributed import Processes

    if resume not in ("auto", "must", "never"):
        raise UsageError(f"--resume: {resume[:60]!r} is none of auto, must, never; write one")
    if resume == "must" and not checkpoint.exists():
        raise UsageError(
            f"--resume: must, and there is no checkpoint {checkpoint}; name the one to go on from "
            "with --checkpoint, or write auto"
        )
    processes = Processes()
    # What is no checkpoint is somebody's, and stays.
    if resume == "never" and processes.is_first and read_checkpoint(checkpoint) is not None:
        checkpoint.unlink()
    processes.all_of(None)  # nobody goes on before it is gone


def _is_first() -> bool:
    from s2d_compiler.training.distributed import Processes

    return Processes().is_first


@contextmanager
def _keeping_note(checkpoint: Path) -> Iterator[None]:
    """Say where an interrupted training is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.exists():
            log.warning(
                "what was done is kept in %s; the same command goes on from there", checkpoint
            )
        raise


@contextmanager
def _reports(
    log_file: Path | None, tensorboard: Path | None, reporting: Reporting, is_first: bool
) -> Iterator[Any]:
    """Whatever is told about a training while it runs; nothing in processes after the first."""
    from s2d_compiler.commands.training_reports import reports

    if not is_first:
        yield None
        return
    with reports(log_file, tensorboard, reporting) as report:
        yield report


def _result(staged: DynamicModel, history: History, output: Path) -> Result:
    last = history.epochs[history.kept - 1]
    document = {"output": str(output), **history.to_dict()}
    before = f", {history.resumed} of them before" if history.resumed else ""
    distilled = f", {history.distill:.0%} distilled" if history.distill else ""
    lines = [
        f"{len(history.epochs)} epochs{before}; trained in the {history.form} form{distilled}",
        *([] if history.teacher is None else [f"the teacher: {history.teacher:.2%} right"]),
        f"weights of epoch {history.kept}; written: {output}",
        f"Next: choose thresholds with s2d calibrate {shlex.quote(str(output))} --data ... "
        "--target drop=1% -o FILE, on images that it was not trained on.",
    ]
    return Result(document, [_table(staged, last), "\n".join(lines)])


def _table(staged: DynamicModel, last: Any) -> Table:
    from rich.table import Table

    table = Table("stage", "loss", "right in training", "right in validation", "MACs", box=None)
    for number, cost in enumerate(staged.cost.stages):
        shares = [
            values[number] if values else None for values in (last.accuracies, last.validation)
        ]
        loss = last.stage_losses[number]
        table.add_row(
            str(number + 1),
            "-" if loss is None else f"{loss:.4f}",
            *("-" if share is None else f"{share:.2%}" for share in shares),
            f"{cost.cumulative_macs:,}",
        )
    return table
