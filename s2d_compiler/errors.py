"""Every exception of the package.

A message names, in one or two sentences, the place, the value found, the rule
that it breaks and the remedy. The docstring of each class is its reference:
when it is raised, an example, and what to do.
"""

from __future__ import annotations


class S2DError(Exception):
    """Base of every error that s2d-compiler raises on purpose.

    Catching it separates a mistake in what was handed in (a plan, a model, a
    file) from a defect of the compiler, which raises anything else.
    """


class PlanError(S2DError):
    """A plan is malformed, contradicts itself, or does not fit the model.

    Example: ``plan.json: default.split: 9 is not below groups (8); cut points
    count channel groups from 1 to 7``. Edit the plan; ``s2d inspect MODEL
    --write-plan FILE`` writes one that fits.
    """


class ModelFileError(S2DError):
    """A model file cannot be read, or is refused because reading it runs code.

    Save a state dict and name the architecture with ``--arch``, or pass
    ``--trust`` for a file whose origin you trust.
    """


class CaptureError(S2DError):
    """``torch.export`` cannot turn the model into one graph.

    The message names the line of the model's source that stops it. Remove the
    data-dependent control flow there, or transform the part of the model that
    has none.
    """


class InputShapeError(S2DError):
    """The input shape is unknown, or the model does not accept it.

    Give ``example_inputs``, or ``input_shape`` in the plan, channels first
    and without the batch: ``[3, 224, 224]``.
    """


class PassError(S2DError):
    """A pass was given a graph that it cannot rewrite, or left a broken one.

    Raised by a pass's own conditions and by the graph verifier that runs
    between passes; it points at a wrong order of passes or a defect in one.
    """


class CheckError(S2DError):
    """The self-check found that the result is not what the plan says.

    This is a defect of the compiler, never of the model: nothing is written.
    Please report the model and the plan.
    """


class VerifyError(S2DError):
    """A staged network is not what its plan makes of the model.

    The message names the first place that differs. Compile the model again; if the network was
    trained since, verify it with ``trained=True`` (``--trained``).
    """


class FormatError(S2DError):
    """A ``dyn.pt`` file is damaged, of a newer format, or is no such file.

    Compile the model again, or upgrade the package if the file is newer.
    """


class OutputError(S2DError):
    """An output file cannot be written.

    Nothing is left behind: output files appear whole or not at all.
    """


class OutOfMemoryError(S2DError):
    """There is not as much memory as a step takes; the message says which step, and how much.

    Compile for a smaller input shape, leave out the self-check (``--no-check``), which holds the
    network in double precision beside the original, or use a computer with more free memory.
    Nothing is written, and an existing output stays as it was.
    """


class UsageError(S2DError):
    """Options contradict each other or what they are about, such as a submodule that is none.

    ``s2d COMMAND --help`` lists what a command takes.
    """
