"""Reading the trained network from its file, without running code that the file brings along.

What is read without trust: whole models whose layers are torch's, torchvision's or timm's
(`allowance.py`), and state dicts of any network for which the function that builds it is named
(`architecture.py`). Everything else is refused by name, or read under ``trust``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from s2d_compiler import allowance, architecture, archive
from s2d_compiler._version import FILE_FORMAT
from s2d_compiler.errors import ModelFileError
from s2d_compiler.memory import explained
from s2d_compiler.whole_model import UnsoundError, check_sound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader

__all__ = ["describe_origin", "read_model"]

logger = logging.getLogger(__name__)

_NESTS = (
    "model", "state_dict", "model_state_dict", "net", "network", "module", "weights", "params",
    "model_ema", "ema", "ema_state_dict", "state_dict_ema",
)  # fmt: skip
"""Where checkpoints keep the network, the one to take first first."""

_REMEDY = (
    "save a state dict, torch.save(model.state_dict(), ...), and name the function that builds "
    "the network with --arch module:function; or pass --trust, which lets the file run any code "
    "that it holds"
)
_EXAMPLE = "--arch torchvision.models:resnet18 or --arch mypackage.net:build"


def read_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> nn.Module:
    """Read a trained network, onto the CPU and otherwise as it was stored.

    Args:
        path: a whole model (``torch.save(model, path)``), a state dict or a checkpoint that holds
            either, a ``.safetensors`` file, or, under ``trust``, an exported program (``.pt2``).
        arch: for a state dict, the function that builds the network: ``module:function``, such
            as ``torchvision.models:resnet18`` or ``mypackage.net:build``; modules of the current
            directory are found too. Naming it runs it.
        arch_kwargs: its keyword arguments, such as ``{"num_classes": 10}``.
        trust: let the file run any code that it holds, as unpickling it means.

    Raises:
        ModelFileError: saying why the file cannot be read, or is refused, and what to do.
        OutOfMemoryError: it does not fit in memory.
    """
    with explained(f"reading {path}", "close other programs"):
        return _read_model(Path(path), arch, arch_kwargs, trust)


def _read_model(
    path: Path, arch: str | None, arch_kwargs: Mapping[str, Any] | None, trust: bool
) -> nn.Module:
    if arch is None and arch_kwargs:
        raise ModelFileError("--arch-kwargs are given without --arch; name the function they go to")
    with _open(path) as file:
        content = _read_content(path, file, trust)
    if not trust:
        _check_sound(str(path), content)
    found, where = _find_network(content)
    name = f'{path}, under "{where}"' if where else str(path)
    if isinstance(found, nn.Module):
        if arch is not None:
            logger.warning("%s holds a whole model; --arch %s is not needed", name, arch)
        if not trust:
            _check_sound(name, found)
        _check_whole(name, found)
        return found
    if isinstance(content, Mapping) and content.get("format") == FILE_FORMAT:
        _fail(path, f"this is a compiled network already; look at it with s2d show {path}")
    if found is None:
        _fail(
            path,
            f"it holds {_describe(content)}, neither a network nor a state dict; save one of these "
            "with torch.save",
        )
    if arch is None:
        tensors = sum(isinstance(value, torch.Tensor) for value in found.values())
        count = f"{tensors} tensor" if tensors == 1 else f"{tensors} tensors"
        _fail(
            name,
            f"this is a state dict ({count}), which has no architecture; name the "
            f"function that builds it: {_EXAMPLE}",
        )
    model = architecture.build(arch, arch_kwargs or {})
    architecture.fill(model, found, name, arch)
    return model


def describe_origin(path: str | os.PathLike[str]) -> dict[str, str | int]:
    """Name, size and SHA-256 of a file, for the record of what a result was made from."""
    path = Path(path)
    with _open(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": path.name, "bytes": file.tell(), "sha256": digest}


def _fail(place: object, problem: str, error: BaseException | None = None) -> NoReturn:
    raise ModelFileError(f"{place}: {problem}") from error


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    try:
        if path.is_dir():
            _fail(path, "this is a folder; name the model's file")
        if path.exists() and not path.is_file():
            _fail(path, "this is a device or a pipe; name a plain file")
        file = path.open("rb")
    except FileNotFoundError:
        _fail(path, "there is no such file; check the path")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        _fail(path, f"cannot be read ({reason}); check the path and your rights", error)
    with file:
        yield file


# What kind of file it is


def _read_content(path: Path, file: BufferedReader, trust: bool) -> Any:
    start = file.read(512)
    file.seek(0)
    if not start:
        _fail(path, "the file is empty; save or copy the model again")
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        return _read_safetensors(path)
    if start.startswith(b"PK"):
        kind = _zip_kind(path, file)
        if kind == "exported":
            return _read_exported(path, trust)
        return _read_trusted(path, file) if trust else _read_zip(path, file)
    if start.startswith(b"\x80") and path.suffix != ".onnx":
        return _read_trusted(path, file) if trust else _read_legacy(path, file)
    _fail(
        path,
        f"{_guess(path, start)}; a model is saved with torch.save or as .safetensors: name one",
    )


_SIGNATURES = (
    (b"\x93NUMPY", "this is a numpy array"),
    (b"\x89HDF", "this is an HDF5 file, as Keras writes them"),
    (b"\x1f\x8b", "this is compressed with gzip; unpack it first"),
    (b"version https://git-lfs", "this is a pointer of Git LFS; fetch the file with git lfs pull"),
    (b"<", "this is a web page or XML; the download went wrong"),
    (b"GGUF", "this is a GGUF file"),
)


def _guess(path: Path, start: bytes) -> str:
    for signature, text in _SIGNATURES:
        if start.startswith(signature):
            return text
    if path.suffix == ".onnx":
        return "this is an ONNX file, which torch does not read; save the original network"
    if start[257:262] == b"ustar":
        return "this is a tar archive"
    if start.isascii() and start.decode().replace("\n", "").replace("\t", "").isprintable():
        return "this is a text file"
    return "this is no model file that torch reads"


def _zip_kind(path: Path, file: BufferedReader) -> str:
    """Refuse archives that are no models, that are damaged, or unpack to more than they weigh."""
    try:
        names = archive.check_members(file)
    except archive.ArchiveError as error:
        _fail(path, f"{error}; it is damaged or made to do harm, copy it again", error)
    except Exception as error:
        _fail(path, f"the file is damaged or cut off ({error}); copy it again", error)
    if any(name.startswith("code/") for name in names) or "constants.pkl" in names:
        _fail(
            path,
            "this is a TorchScript archive, whose code cannot be captured; load the original "
            "Python model and save its state dict, torch.save(model.state_dict(), ...)",
        )
    if "archive_format" in names or any("exported_program" in name for name in names):
        return "exported"
    if "data.pkl" not in names:
        _fail(path, "this is a zip archive, but none that torch.save wrote; name one that is")
    return "saved"


# Reading each kind


def _read_zip(path: Path, file: BufferedReader) -> Any:
    """Read what torch.save wrote, with nothing but the allowance."""
    try:
        listed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        allowed = allowance.resolve(listed)
        file.seek(0)
        pickle_bytes = archive.open_as_torch_does(file).get_record("data.pkl")
        allowance.check_calls(pickle_bytes, listed)
    except archive.ArchiveError as error:
        _fail(path, f"{error}; it is damaged or made to do harm, copy it again", error)
    except allowance.RefusedError as error:
        _fail(path, f"refused: {error}; {_REMEDY}", error)
    except Exception as error:
        _refuse_unreadable(path, error)
    file.seek(0)
    with torch.serialization.safe_globals(allowed):
        return _load_weights_only(path, file)


def _read_legacy(path: Path, file: BufferedReader) -> Any:
    """Read the format before torch 1.6: tensors, and no classes."""
    try:
        return _load_weights_only(path, file)
    except ModelFileError as error:
        if "refused: " not in str(error):
            raise
        raise ModelFileError(
            f"{error}; a whole model in this old format can also be saved again by a newer torch"
        ) from error


def _load_weights_only(path: Path, file: BufferedReader) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        _refuse_unreadable(path, error)


def _refuse_unreadable(path: Path, error: Exception) -> NoReturn:
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        _fail(path, f"refused: reading it would use {found[1]}; {_REMEDY}", error)
    if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" in text:
        _fail(
            path,
            "refused: its pickle has instructions that torch.save does not write unless told to "
            f"(pickle_protocol); save it again without, or {_REMEDY}",
            error,
        )
    _fail(
        path,
        f"torch cannot read it ({_first_line(error)}); it is damaged or no model, copy or save it "
        "again",
        error,
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "WeightsUnpickler error" in str(error) and lines:
        lines = lines[-2:]
    text = lines[0].strip()[:160] if lines else "no reason given"
    return f"{type(error).__name__}: {text}"


def _read_trusted(path: Path, file: BufferedReader) -> Any:
    try:
        with architecture.importing_from_here(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:
        hint = "; make that work, or save a state dict"
        if "__main__" in str(error):
            hint = (
                "; its class was defined in the script that saved it: move the class to a module "
                "and save the model again, or save a state dict"
            )
        elif isinstance(error, ModuleNotFoundError):
            hint = "; install that module, or run this from the folder that holds it"
        _fail(path, f"reading it raised {_first_line(error)}{hint}", error)


def _read_exported(path: Path, trust: bool) -> nn.Module:
    if not trust:
        _fail(
            path,
            "this is an exported program, and torch's documentation says that loading one is not "
            "safe; pass --trust if you trust its origin, or save a state dict of the original "
            "network and name the function that builds it with --arch",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
    except Exception as error:
        _fail(
            path,
            f"torch cannot load this exported program ({_first_line(error)}); copy it again, or "
            f"export it with torch {torch.__version__}",
            error,
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        _fail(path, f"damaged, or no safetensors file ({_first_line(error)}); copy it again", error)


# Where the network is in what was read


def _find_network(content: Any, depth: int = 0) -> tuple[nn.Module | Mapping[str, Any] | None, str]:
    """The network or state dict in a checkpoint, and the keys that lead to it."""
    if isinstance(content, nn.Module):
        return content, ""
    if not isinstance(content, Mapping) or depth > 3:
        return None, ""
    found = {}
    for key in _NESTS:
        network, below = _find_network(content.get(key), depth + 1)
        if network is not None:
            found[f"{key}.{below}".rstrip(".")] = network
    if found:
        where, *others = found
        if others:
            logger.warning("the file holds several networks; %s is read, not %s", where, others)
        return found[where], where
    if all(isinstance(key, str) for key in content) and any(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        return content, ""
    return None, ""


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(json.dumps(str(key)[:40]) for key in list(content)[:6])
        return f"a dictionary ({keys})" if keys else "an empty dictionary"
    return f"an object of type {type(content).__name__}"


def _check_sound(name: str, content: object) -> None:
    """Before any code of its classes runs."""
    try:
        check_sound(content)
    except UnsoundError as error:
        _fail(name, f"refused: {error}; {_REMEDY}", error)
    except RecursionError as error:
        _fail(name, "refused: it is nested too deeply; it is damaged or made to do harm", error)


def _check_whole(name: str, model: nn.Module) -> None:
    """A whole model may come from a damaged file, or from a torch that is too old or too new."""
    try:
        state = model.state_dict()
        meta = [key for key, value in state.items() if getattr(value, "is_meta", False)]
        str((model.training, model))
    except Exception as error:
        _fail(
            name, f"the model is damaged or incomplete ({_first_line(error)}); save it again", error
        )
    if meta:
        _fail(name, f"{meta[0]} has no numbers (it is on the meta device); save a filled model")
