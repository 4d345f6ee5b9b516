"""The commands: ``s2d-compile``, and ``s2d`` with ``compile``, ``inspect``, ``show``, ``verify``.

A command computes its `Result` and prints nothing; `_run` prints it, as text or as JSON, and
turns errors into a sentence and an exit status:

- 0: done.
- 1: a defect of s2d-compiler.
- 2: a mistake in what was handed in (an `S2DError`, or an option that does not exist), or too
  little memory or disk for it.
- 130: interrupted. 143: terminated (SIGTERM). 129: the terminal is gone (SIGHUP). 141: whoever
  read the output stopped reading.

Errors and warnings go to stderr. With ``--json`` stdout holds one JSON document whatever
happens: the result, or ``{"error": {"type": ..., "message": ...}}``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter, validators
from rich.console import Console, ConsoleDimensions
from rich.measure import Measurement

from s2d_compiler._version import __version__
from s2d_compiler.errors import OutputError, S2DError, UsageError
from s2d_compiler.interrupts import Terminated, terminable
from s2d_compiler.output import check_writable
from s2d_compiler.plan import Plan
from s2d_compiler.plan_rules import read_input_shape

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from torch import fx, nn

    from s2d_compiler.analysis.cost import Cost
    from s2d_compiler.checking import Proof
    from s2d_compiler.compiler import Between
    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.program import Program

__all__ = ["UsageError", "compile_main", "main"]

#: Loggers whose warnings the commands show: the package's own, and Python's ``warnings``.
_LOGGERS = ("s2d_compiler", "passes", "py.warnings")
#: A page that any table fits on.
_WIDE = ConsoleDimensions(width=10_000, height=50)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Reporting:
    """How a command reports.

    Args:
        quiet: Print nothing but errors.
        as_json: Print one JSON document on stdout, also for an error.
        debug: Log every step, and show the traceback of an error.
    """

    quiet: bool = False
    as_json: Annotated[bool, Parameter(name="--json")] = False
    debug: bool = False


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the trained network comes from.

    Args:
        arch: The function that builds the network, for a file that holds a state dict, such as
            torchvision.models:resnet18 or mypackage.net:build.
        arch_kwargs: Its keyword arguments as JSON, such as '{"num_classes": 10}'.
        trust: Let the model's file run any code that it holds; for files of known origin only.
        input_shape: Shape of one input without the batch, such as 3x224x224; goes before the one
            that a plan holds.
        submodule: The part of the network that this is about, such as backbone; the input shape
            and the plan are this part's. Without it, the whole network.
    """

    arch: Annotated[str | None, Parameter(show_default=False)] = None
    arch_kwargs: Annotated[str | None, Parameter(show_default=False)] = None
    trust: bool = False
    input_shape: Annotated[str | None, Parameter(show_default=False)] = None
    submodule: Annotated[str | None, Parameter(show_default=False)] = None

    def as_options(self) -> str:
        """How these options stand on a command line, with a space after each."""
        given = [
            ("--arch", self.arch),
            ("--arch-kwargs", self.arch_kwargs),
            ("--submodule", self.submodule),
        ]
        words = [f"{name} {shlex.quote(value)} " for name, value in given if value is not None]
        return "".join(words) + ("--trust " if self.trust else "")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The input shape as numbers.

        Raises:
            UsageError, PlanError: It is none.
        """
        if self.input_shape is None:
            return None
        if not re.fullmatch("[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", self.input_shape):
            raise UsageError(
                f"--input-shape: {json.dumps(self.input_shape)[:60]} is no shape; write the shape "
                "of one input without the batch, such as 3x224x224"
            )
        return read_input_shape(
            [int(size) for size in self.input_shape.split("x")], "--input-shape"
        )

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the function that builds the network.

        Raises:
            UsageError: They are no JSON object.
        """
        if self.arch_kwargs is None:
            return {}
        example = """write an object, such as '{"num_classes": 10}'"""
        try:
            value = json.loads(self.arch_kwargs)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--arch-kwargs: not JSON ({error}); {example}") from error
        if not isinstance(value, dict):
            raise UsageError(f"--arch-kwargs: {json.dumps(value)[:60]} is no object; {example}")
        return value

    def read(self, path: Path) -> nn.Module:
        """Read the network, or the part of it that is asked for."""
        from s2d_compiler.reading import read_model
        from s2d_compiler.submodules import part_of

        model = read_model(path, arch=self.arch, arch_kwargs=self.keywords, trust=self.trust)
        return part_of(model, self.submodule)


_REPORTING = Reporting()
_SOURCE = ModelSource()
_COMMAND_LINE = Annotated[str, Parameter(parse=False)]


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found.

    Attributes:
        document: What ``--json`` prints.
        text: What is printed otherwise.
    """

    document: Mapping[str, Any]
    text: Sequence[RenderableType]


# -- s2d-compile -----------------------------------------------------------------------------------


def compile_model(
    model: Path,
    /,
    *,
    splits: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    source: ModelSource = _SOURCE,
    no_check: bool = False,
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**62))] = 0,
    print_passes: bool = False,
    reporting: Reporting = _REPORTING,
    command_line: _COMMAND_LINE = "",
) -> Result:
    """Rewrite a trained network as a dynamic one: stages of channels with early exits.

    Args:
        model: The trained network: a file of torch.save, or .safetensors.
        splits: The plan, a JSON file; s2d inspect MODEL --write-plan FILE writes one to edit.
        output: The file to write; an existing one is replaced.
        no_check: Skip the proof in float64 that the result is what the plan says.
        seed: Seed of the random numbers of that proof.
        print_passes: Print the graph after each pass, on stderr.
    """
    shape = source.shape
    plan = Plan.load(splits)
    if shape is not None:
        plan = replace(plan, input_shape=shape)
    _require_other_file(output, {"the model": model, "the plan": splits})
    check_writable(output)
    made_by = {"command": command_line, "model": _origin(model), "seed": seed}
    if source.submodule is not None:
        made_by["submodule"] = source.submodule
    program = _capture(source.read(model), plan.input_shape)
    between = _print_pass if print_passes and not reporting.quiet else None
    dyn, proof = _compile(program, plan, made_by, between, None if no_check else seed)
    dyn.save(output)
    document = {"output": str(output), **_document(dyn), "proof": _proof_document(proof)}
    written = f"written: {output}{_permissions(dyn)}"
    rest = f"{dyn.report}\n{_proof_line(proof)}\n\n{written}\n{_next(dyn, output)}"
    return Result(document, [dyn.cost.table(), rest])


def _require_other_file(output: Path, inputs: Mapping[str, Path]) -> None:
    for what, path in inputs.items():
        with suppress(OSError, ValueError):
            if os.path.samefile(output, path):
                raise OutputError(f"{output} is {what} itself; name another file to write")


def _origin(model: Path) -> dict[str, Any]:
    from s2d_compiler.reading import describe_origin

    return dict(describe_origin(model))


def _capture(model: nn.Module, input_shape: Sequence[int] | None) -> Program:
    from s2d_compiler.tracing import capture

    return capture(model, None, input_shape)


def _compile(
    program: Program,
    plan: Plan,
    made_by: Mapping[str, Any],
    between: Between | None,
    seed: int | None,
) -> tuple[DynamicModel, Proof | None]:
    """Compile, and prove the result unless there is no seed for it."""
    from s2d_compiler.analysis.assignment import assign
    from s2d_compiler.analysis.channels import analyse_channels
    from s2d_compiler.checking import check
    from s2d_compiler.compiler import compile_program

    assignment = assign(program, analyse_channels(program), plan)
    made_by = {**made_by, "checked": seed is not None}
    dyn = compile_program(program, plan, between=between, made_by=made_by, assignment=assignment)
    return dyn, None if seed is None else check(dyn, assignment, seed=seed)


def _print_pass(step: Any, graph_module: fx.GraphModule) -> None:
    """Print the graph that a pass left, and the stages that it calls."""
    print(f"== after {step.name}\n{str(graph_module.graph).strip()}", file=sys.stderr)
    for name, stage in graph_module.named_modules():
        if name and hasattr(stage, "graph"):
            print(f"-- {name}\n{str(stage.graph).strip()}", file=sys.stderr)


def _document(dyn: DynamicModel) -> dict[str, Any]:
    return {
        "plan": dyn.plan.to_dict(),
        "cost": dyn.cost.to_dict(),
        "report": dyn.report.to_dict(),
        "made_by": dict(dyn.parts.made_by),
        "input_shapes": [list(shape) for shape in dyn.parts.input_shapes],
    }


def _proof_document(proof: Proof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    return {
        "errors": list(proof.errors),
        "spreads": list(proof.spreads),
        "tensors": proof.tensors,
        "is_vacuous": proof.is_vacuous,
    }


def _proof_line(proof: Proof | None) -> str:
    if proof is None:
        return "not checked (--no-check)"
    if proof.is_vacuous:
        return "checked in float64, inconclusive: the outputs hardly depend on the input"
    return f"checked in float64: {proof}"


def _permissions(dyn: DynamicModel) -> str:
    """What reading the file takes beyond its name, if anything."""
    from s2d_compiler.format import permissions

    operators, types = permissions(dyn)
    needed = [f"operators={json.dumps(operators)}"] if operators else []
    needed += [f"types=[{', '.join(types)}]"] if types else []
    return f" (read it with load(path, {', '.join(needed)}))" if needed else ""


def _next(dyn: DynamicModel, output: Path) -> str:
    """What the stages are good for as they are, and what to do."""
    if dyn.plan.stages == 1:
        return "The one stage computes what the original does; there is nothing to train."
    who = "The exits are untrained: the stages do not have the original's accuracy yet"
    if dyn.plan.final == "original":
        who = (
            "The exits are untrained: all stages but the last, which is the original itself, do "
            "not have its accuracy yet"
        )
    part = dyn.parts.made_by.get("submodule")
    if part is not None:
        return (
            f"{who}.\nNext: put an exit where the part was, model.{part} = "
            f'load("{output}").at_stage(1), and fine-tune; examples/detector_backbone.py shows how.'
        )
    return (
        f"{who}.\nNext: fine-tune {output} on your data, with the sum of the stages' "
        "cross-entropies as loss; examples/digits.py shows how."
    )


# -- s2d inspect -----------------------------------------------------------------------------------


def inspect(
    model: Path,
    /,
    *,
    source: ModelSource = _SOURCE,
    stages: int = 3,
    groups: int = 8,
    write_plan: Annotated[Path | None, Parameter(show_default=False)] = None,
    force: bool = False,
    layers: bool = False,
    reporting: Reporting = _REPORTING,
) -> Result:
    """Show what a plan may choose for a network, and write a plan to start from.

    Args:
        model: The trained network: a file of torch.save, or .safetensors.
        stages: How many stages the plans are to have.
        groups: In how many groups channels are counted.
        write_plan: Write a plan to edit to this file.
        force: Replace the plan's file if there is one.
        layers: List every layer.
    """
    from s2d_compiler.inspecting import inspect_model
    from s2d_compiler.plan_rules import check_counts

    shape = source.shape
    check_counts(stages, groups, "--")
    if write_plan is not None:
        if os.path.lexists(write_plan) and not force:
            raise OutputError(
                f"{write_plan} exists and may hold your edits; name another file, or pass --force "
                "to replace it"
            )
        _require_other_file(write_plan, {"the model": model})
        check_writable(write_plan)
    program = _capture(source.read(model), shape)
    space = inspect_model(program, stages=stages, groups=groups)
    text: list[RenderableType] = [space.layer_table()] if layers else []
    text += [space.table(), space.remarks()]
    if write_plan is not None:
        space.starter_plan().save(write_plan)
        text.append(
            f"\nwritten: {write_plan}\nNext: edit it, then s2d-compile {shlex.quote(str(model))} "
            f"{source.as_options()}--splits {shlex.quote(str(write_plan))} -o dyn.pt"
        )
    written = None if write_plan is None else str(write_plan)
    return Result({**space.to_dict(), "written": written}, text)


# -- s2d show --------------------------------------------------------------------------------------


def show(
    dyn: Path,
    /,
    *,
    layers: bool = False,
    graph: Annotated[int | None, Parameter(show_default=False)] = None,
    report: bool = False,
    reporting: Reporting = _REPORTING,
) -> Result:
    """Show a compiled network: cost per stage, plan and origin.

    Args:
        dyn: The compiled network, dyn.pt.
        layers: List every layer of every stage with its cost.
        graph: Print the graph of this stage, counted from 1.
        report: Print what was cut, left whole, coupled and unknown, and why.
    """
    from s2d_compiler.format import load_to_show

    staged = load_to_show(dyn)
    count = len(staged.stages)
    if graph is not None and not 1 <= graph <= count:
        raise UsageError(f"--graph: {graph} is no stage; {dyn} has stages 1 to {count}, give one")
    document = _document(staged)
    text: list[RenderableType] = [staged.cost.table(), f"plan: {staged.plan}"]
    text.append("\n".join(_made_by_lines(staged.parts.made_by)))
    if layers:
        text.append(_layer_table(staged.cost))
    if report:
        text.append(str(staged.report))
    if graph is not None:
        code = str(staged.stages[graph - 1].graph).strip()
        document["graph"] = code
        text.append(code)
    return Result(document, text)


def _made_by_lines(made_by: Mapping[str, Any]) -> Iterator[str]:
    yield "made by:"
    for key, value in made_by.items():
        shown = value
        if isinstance(value, Mapping):
            shown = ", ".join(f"{name} {item}" for name, item in value.items())
        yield f"  {key}: {shown}"


def _layer_table(cost: Cost) -> Table:
    from rich.table import Table

    table = Table()
    for title in ("stage", "layer", "operator"):
        table.add_column(title, overflow="fold")
    for title in ("MACs", "parameters"):
        table.add_column(title, justify="right", overflow="fold")
    for number, stage in enumerate(cost.stages, start=1):
        for row in stage.layers:
            counts = (f"{row.macs:,}", f"{row.parameters:,}")
            table.add_row(str(number), row.name, row.operator, *counts)
        table.add_section()
    return table


# -- s2d verify ------------------------------------------------------------------------------------


def verify_network(
    model: Path,
    dyn: Path,
    /,
    *,
    source: ModelSource = _SOURCE,
    trained: bool = False,
    reporting: Reporting = _REPORTING,
) -> Result:
    """Show that a compiled network is what its plan makes of a model.

    What every stage computes is derived from the model and the plan, and from the compiled
    network, down to single elements of weights; both must agree.

    Args:
        model: The original, a file of torch.save, or .safetensors.
        dyn: The compiled network, dyn.pt.
        trained: Let weights and batch-norm statistics differ, of a network that was trained
            since it was compiled.
    """
    from s2d_compiler.format import load
    from s2d_compiler.verification import verify

    staged = load(dyn)
    submodule = source.submodule or staged.parts.made_by.get("submodule")
    found = verify(replace(source, submodule=None).read(model), staged, submodule=submodule,
                   trained=trained)  # fmt: skip
    document = {
        "stages": found.stages,
        "nodes": found.nodes,
        "terms": found.terms,
        "equal": found.weights.equal,
        "changed": list(found.weights.changed),
    }
    tensors = found.weights.equal + len(found.weights.changed)
    weights = f"all {tensors} tensors hold the original's numbers"
    if found.weights.changed:
        weights = f"{len(found.weights.changed)} of {tensors} tensors hold other numbers (trained)"
    text = (
        f"verified: {found.stages} stages compute what the plan makes of {model}\n"
        f"{found.nodes:,} nodes with {found.terms:,} values, each derived twice; {weights}; the "
        "costs are what runs"
    )
    return Result(document, [text])


# -- running a command -----------------------------------------------------------------------------


def _app(name: str, text: str) -> App:
    return App(
        name=name,
        help=text,
        help_format="plaintext",
        version=f"s2d-compiler {__version__}",
        default_parameter=Parameter(negative=""),
        suppress_keyboard_interrupt=False,
    )


def compile_main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2d-compile``; returns the exit status."""
    app = _app("s2d-compile", "")
    app.default(compile_model)
    return _run("s2d-compile", app, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2d``; returns the exit status."""
    app = _app("s2d", "Turn a trained network into a dynamic one: stages with early exits.")
    app.command(compile_model, name="compile")
    app.command(inspect)
    app.command(show)
    app.command(verify_network, name="verify")
    return _run("s2d", app, argv)


def _run(program: str, app: App, argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    # Until the options are read, or where they cannot be, what was asked for is taken as it stands.
    reporting = Reporting("--quiet" in words, "--json" in words, "--debug" in words)
    try:
        call, bound, injected = app.parse_args(words, exit_on_error=False, print_error=False)
        reporting = bound.arguments.get("reporting", _REPORTING)
        if "command_line" in injected:
            bound.arguments["command_line"] = shlex.join([program, *words])
        with terminable(), _logging(reporting), _explaining_memory(program):
            result = call(*bound.args, **bound.kwargs)
        if isinstance(result, Result):
            _show(result, reporting)
    except CycloptsError as error:
        text = " ".join(str(error).split())
        return _fail(
            program, UsageError(f"{text} {program} --help lists what there is."), reporting
        )
    except S2DError as error:
        return _fail(program, error, reporting)
    except Terminated as error:
        _say(sys.stderr, f"{program}: terminated")
        return 128 + error.signal
    except KeyboardInterrupt:
        _say(sys.stderr, f"{program}: interrupted")
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except Exception as error:
        return _fail_by_defect(program, error, reporting)
    return 0


@contextmanager
def _explaining_memory(program: str) -> Iterator[None]:
    """For what no step of the command explains better."""
    from s2d_compiler.memory import explained

    with explained(program, "close other programs"):
        yield


def _show(result: Result, reporting: Reporting) -> None:
    if reporting.as_json:
        _say(sys.stdout, json.dumps(result.document, indent=2))
    elif not reporting.quiet:
        _say(sys.stdout, *result.text)


def _fail(program: str, error: S2DError, reporting: Reporting) -> int:
    return _report_error(program, error, str(error), reporting, status=2)


def _fail_by_defect(program: str, error: Exception, reporting: Reporting) -> int:
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    remedy = "" if reporting.debug else "; run it again with --debug and"
    text = (
        f"{type(error).__name__}: {first.strip()[:300]}{notes}. This is a defect of s2d-compiler"
        f"{remedy or ';'} report what it prints."
    )
    return _report_error(program, error, text, reporting, status=1)


def _report_error(
    program: str, error: Exception, text: str, reporting: Reporting, *, status: int
) -> int:
    if reporting.debug:
        _say(sys.stderr, "".join(traceback.format_exception(error)).rstrip())
    _say(sys.stderr, f"{program}: {text}")
    if reporting.as_json:
        document = {"error": {"type": type(error).__name__, "message": text}}
        try:
            _say(sys.stdout, json.dumps(document, indent=2))
        except (BrokenPipeError, OutputError):
            _abandon_stdout()
    return status


def _say(stream: Any, *parts: RenderableType) -> None:
    """Print text as it stands, and tables as wide as they are, whatever the terminal's width.

    Raises:
        OutputError: The stream cannot be written, but still has a reader.
    """
    if stream is None:  # closed by whoever started the command
        return
    encoding = stream.encoding or "utf-8"
    try:
        text = _rendered(Console(file=stream, markup=False, highlight=False), parts)
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon_stdout()
        raise OutputError(
            f"the output cannot be printed ({error.strerror or error}); send it elsewhere, or to a "
            "file with room"
        ) from error


def _rendered(console: Console, parts: Sequence[RenderableType]) -> str:
    with console.capture() as capture:
        for part in parts:
            console.size = _WIDE
            if not isinstance(part, str):
                width = Measurement.get(console, console.options, part).maximum
                console.size = ConsoleDimensions(width, _WIDE.height)
            console.print(part, soft_wrap=isinstance(part, str))
    return capture.get()


def _abandon_stdout() -> None:
    """Nobody reads it: let nothing that is still buffered complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _logging(reporting: Reporting) -> Iterator[None]:
    """Show what the package logs on stderr while a command runs."""
    level = logging.ERROR if reporting.quiet else logging.WARNING
    if reporting.debug:
        level = logging.DEBUG
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (old_level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


class _Formatter(logging.Formatter):
    """``warning: text``, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "py.warnings":
            text = text.splitlines()[0]
        return f"{record.levelname.lower()}: {text}"
