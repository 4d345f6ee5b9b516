"""Every exception of the package.

A message names, in one or two sentences, the place, the value found, the rule
that it breaks and the remedy. The docstring of each class is its reference:
when it is raised, an example, and what to do. ``docs/errors.md`` is made of
them (``python -m docs.errors_page``).
"""

from __future__ import annotations


class S2DError(Exception):
    """Base of every error that s2d-compiler raises on purpose.

    Catching it separates a mistake in what was handed in (a plan, a model, a
    file) from a defect of the compiler, which raises anything else. The
    commands print its message as one line and end with status 2; a defect is
    printed as such and ends with status 1.
    """


class PlanError(S2DError):
    """A plan is malformed, contradicts itself, or does not fit the model.

    The message begins with the plan's file and the place in it.

    Example:
        spec.json: default.split: 8 is not below groups (8); cut points lie between 1 and 7

    What to do:
        Edit the plan. ``s2d inspect MODEL --write-plan FILE`` writes one that fits, and an
        editor checks plans with ``plan.schema.json`` (``python -m s2d_compiler.plan_schema``
        says where it is).
    """


class ModelFileError(S2DError):
    """A model file cannot be read, or is refused because reading it runs code.

    Example:
        model.pt, under "model": this is a state dict (2 tensors), which has no architecture; name
        the function that builds it: --arch torchvision.models:resnet18 or --arch
        mypackage.net:build

    What to do:
        Save a state dict and name the architecture with ``--arch``, or pass ``--trust`` for a
        file whose origin you trust.
    """


class CaptureError(S2DError):
    """``torch.export`` cannot turn the model into one graph.

    The message names the line of the model's source that stops it.

    Example:
        the model turns autocast on inside itself (cpu, torch.bfloat16), which a captured graph
        cannot keep. Take the autocast region out of the model's forward, and run the whole
        network under autocast instead.

    What to do:
        Remove the data-dependent control flow at that line, or transform the part of the model
        that has none (``--submodule``).
    """


class InputShapeError(S2DError):
    """The input shape is unknown, the model does not accept it, or a compiled network gets another.

    Example:
        input of shape (2, 3, 8, 7): the network was compiled for (N, 3, 8, 8); resize the input,
        or compile again with "input_shape" in the plan.

    What to do:
        Give ``example_inputs``, or ``input_shape`` in the plan, channels first and without the
        batch: ``[3, 224, 224]``. Give a compiled network inputs of the shape that it was
        compiled for.
    """


class PassError(S2DError):
    """A pass was given a graph that it cannot rewrite, or left a broken one.

    Raised by a pass's own conditions, by the graph verifier that runs between passes, and by
    what rules read with. Its last line (a note) says which pass was running.

    Example:
        add-exits needs a graph that is split, this one is empty; run it after split-channels

    What to do:
        Look at the order of the passes, and at the pass or rule that you added. Without any of
        your own it is a defect of the compiler: please report the model and the plan.
    """


class CheckError(S2DError):
    """The self-check found that the result is not what the plan says.

    Example:
        stage 1 is built differently the second time, and both graphs must be equal: it was
        changed, or this is a defect of the compiler; please report the model and the plan.

    What to do:
        Nothing is written. Unless the network was changed after it was compiled, this is a
        defect of the compiler, never of the model: please report the model and the plan.
    """


class VerifyError(S2DError):
    """A staged network is not what its plan makes of the model.

    The message names the first place that differs.

    Example:
        stage 1, node 'relu_default' (aten.sigmoid.default): none of the 288 numbers that it
        computes is one that the plan gives stage 1; operator, operands, settings or slice differ;
        the file is damaged, or was not made from this model; compile the model again.

    What to do:
        Give the model and the plan's example inputs that the network was made from. Compile the
        model again; if the network was trained since, verify it with ``trained=True``
        (``--trained``).
    """


class PolicyError(S2DError):
    """A policy does not fit the network, or is none: thresholds, budgets, deadlines.

    Example:
        thresholds: 1 for a network of 3 stages; give one per stage but the last (2).

    What to do:
        Give what the message asks for. ``s2d calibrate`` finds thresholds, ``s2d bench --record``
        the times that a deadline needs.
    """


class CalibrationError(S2DError):
    """Thresholds cannot be found or promised, or records cannot be used.

    The target cannot be met by any thresholds, there are too few samples for the promise that is
    asked for, a budget is below what stage 1 costs, or a file of records is damaged or of another
    network.

    Example:
        300 samples are too few to promise this (least cost at an accuracy at most 0.5% below the
        last stage) with a confidence of 95%: it takes 921 at the least, and more where stages
        disagree; give more samples, a weaker target, or no --confidence.

    What to do:
        Change the target as the message says, give more samples, or record again.
        ``docs/calibration.md`` lists the targets, and what a promise takes.
    """


class TrainingDivergedError(S2DError):
    """The loss of a training is no longer finite, or has grown beyond what guessing gives.

    Example:
        epoch 1, step 1: the loss is nan, and it must stay finite; lower the learning rate (0.05),
        warm up (warmup_steps) or clip gradients (clip_norm); there is no checkpoint to go back
        to.

    What to do:
        As the message says. The last checkpoint was written before that and is kept, and the
        network holds its weights.
    """


class CheckpointError(S2DError):
    """A training cannot go on from a checkpoint: it is damaged, or of another training.

    Example:
        c: recipe.lr is 0.05 there and 0.1 here, and a training goes on only as it began; give
        what it began with, or name another file.

    What to do:
        Give the same network, data, recipe and teacher, or name another file for another
        training.
    """


class ProcessError(S2DError):
    """Another process of a training with several processes does not answer any more.

    Example:
        process 1: another process of this training does not answer (Connection closed by peer),
        and each step takes all of them; see what it said, and start all again

    What to do:
        Look at what the other process printed: it ended first. With a checkpoint, the training
        goes on from there when all are started again.
    """


class FormatError(S2DError):
    """A ``dyn.pt`` file is damaged, of a newer format, or is no such file.

    Also raised where a network holds what a file cannot: code, or modules of other classes. A
    damaged file is refused with the place in it.

    Example:
        dyn.pt: its format has version 3, and this package reads versions up to 2; upgrade
        s2d-compiler.

    What to do:
        Compile the model again, or upgrade the package if the file is newer. Allow operators and
        classes that you trust by name: ``load(path, operators=[...], types=[...])``.
    """


class DataError(S2DError):
    """Labelled images cannot be read, or do not fit the network.

    Example:
        a.npz: it holds x, y, and images is missing; store it under that name

    What to do:
        Put the data where the message says; none are downloaded. ``docs/data.md`` lists the forms
        that are read, and what preprocessing makes of them.
    """


class OutputError(S2DError):
    """An output file cannot be written.

    Example:
        out.pt cannot be written: the disk is full; free some space or choose another disk

    What to do:
        Choose a place that can be written to. Nothing is left behind: output files appear whole
        or not at all.
    """


class OutOfMemoryError(S2DError):
    """There is not as much memory as a step takes; the message says which step, and how much.

    Example:
        reading dyn.pt takes more memory than there is free (4.00 GiB, 4,294,967,296 bytes, asked
        for at once); check that the file is the one you mean, or use a computer with more memory.

    What to do:
        Compile for a smaller input shape, leave out the self-check (``--no-check``), which holds
        the network in double precision beside the original, or use a computer with more free
        memory. Nothing is written, and an existing output stays as it was.
    """


class UsageError(S2DError):
    """Options contradict each other or what they are about, such as a submodule that is none.

    Example:
        --graph: 9 is no stage; dyn.pt has stages 1 to 3, give one

    What to do:
        ``s2d COMMAND --help`` lists what a command takes.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows and without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
