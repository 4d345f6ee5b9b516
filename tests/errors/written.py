"""Model files, written by hand and by torch."""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from s2d_compiler.errors import ModelFileError
from s2d_compiler.reading import read_model
from tests.errors.case import Case

REMEDY = "name the function that builds the network with --arch module:function; or pass --trust"


def said(trigger: Callable[[Path], object], *parts: str) -> Case:
    return Case(trigger, ModelFileError, *parts)


def content(data: bytes, *parts: str, name: str = "model.pt", **given: Any) -> Case:
    """A file of these bytes."""

    def trigger(folder: Path) -> object:
        Path(name).write_bytes(data)
        return read_model(name, **given)

    return said(trigger, *parts)


def saved(make: Callable[[], object], *parts: str, legacy: bool = False, **given: Any) -> Case:
    """What torch.save writes of something."""

    def trigger(folder: Path) -> object:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)
        try:
            torch.save(make(), "model.pt", _use_new_zipfile_serialization=not legacy)
        finally:
            sys.setrecursionlimit(limit)
        return read_model("model.pt", **given)

    return said(trigger, *parts)


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", compression) as file:
        warnings.simplefilter("ignore", UserWarning)  # a name twice
        for name, data in entries.items():
            file.writestr(name.rstrip("*"), data)
    return written.getvalue()


def pickled(data: bytes) -> bytes:
    """What torch.save would write, with this pickle."""
    others = {"archive/byteorder": b"little", "archive/version": b"3"}
    return zipped({"archive/data.pkl": data, **others})
