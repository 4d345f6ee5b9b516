"""What every exit said of every sample, recorded once and used for any target.

Source: ENAS4D, "Grid search for threshold" (its database of confidence and correctness).
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from s2d_compiler.calibration.instances import Floats, Integers
from s2d_compiler.errors import CalibrationError, first_line
from s2d_compiler.fields import shown
from s2d_compiler.memory import let_through
from s2d_compiler.output import atomic_write
from s2d_compiler.runtime.measures import LARGER_IS_CERTAIN, MEASURES, largest_value

if TYPE_CHECKING:
    from s2d_compiler.dynamic import DynamicModel

_FORMAT = "s2d-records"
_VERSION = 1
#: More bytes than this are no records: a file that claims more is not unpacked.
_LARGEST = 32 * 2**30
#: How much measures may lie outside their range: rounding of single precision, many classes.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """What s exits said of n samples.

    Attributes:
        labels: (n,) the right classes, from 0.
        predictions: (n, s) the classes that each exit names, -1 where its output is NaN.
        measures: By name ("confidence", "entropy", "margin") (n, s) values; NaN never leaves.
        classes: Number of classes.
        network: SHA-256 of the network's graph and weights.
        data: Where the samples come from.
        preprocessing: What was done to them, as plain data; None where unknown.
        logits: (s, n, C) what each exit returned, for temperatures; None where not kept.

    Raises:
        CalibrationError: They contradict each other.
    """

    labels: Integers
    predictions: Integers
    measures: Mapping[str, Floats]
    classes: int
    network: str
    data: str
    preprocessing: Mapping[str, Any] | None = None
    logits: NDArray[np.float32] | Floats | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{len(self):,} samples of {self.data} at {self.stages} exits"

    @property
    def stages(self) -> int:
        """Number of exits."""
        return int(self.predictions.shape[1])

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n, s) whether each exit is right."""
        found: NDArray[np.bool_] = self.predictions == self.labels[:, None]
        return found

    @property
    def nan_confidences(self) -> tuple[int, ...]:
        """Per exit, samples whose measure is NaN; they never leave early."""
        return tuple(int(count) for count in np.isnan(self.measures["confidence"]).sum(0))

    def certainty(self, measure: str) -> Floats:
        """(n, s - 1) values of a measure at the early exits, larger for more certainty."""
        return signed(measure, self.measures[measure][:, :-1])

    def part(self, rows: slice, text: str) -> Records:
        """Some of the samples.

        Args:
            rows: Which.
            text: What their name gets after that of the data, such as ``"[2500:]"``.

        Raises:
            CalibrationError: There are none.
        """
        chosen = np.arange(len(self))[rows]
        if not len(chosen):
            raise CalibrationError(
                f"records of {self.data}: {text} holds none of their {len(self):,} samples; name "
                "a part that holds some."
            )
        return Records(
            labels=self.labels[chosen],
            predictions=self.predictions[chosen],
            measures={name: values[chosen] for name, values in self.measures.items()},
            classes=self.classes,
            network=self.network,
            data=f"{self.data}{text}",
            preprocessing=self.preprocessing,
            logits=None if self.logits is None else self.logits[:, chosen],
        )

    def require_network(self, dyn: DynamicModel) -> None:
        """Refuse the records of another network.

        Raises:
            CalibrationError: They are.
        """
        if self.network != fingerprint(dyn) or self.stages != len(dyn.stages):
            raise CalibrationError(
                f"records of {self.data}: they are of another network (or of this one before it "
                "was trained further), and its confidences are not this one's; record again."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as .npz, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "version": np.array(_VERSION),
            "labels": self.labels,
            "predictions": self.predictions,
            "classes": np.array(self.classes),
            "network": np.array(self.network),
            "data": np.array(self.data),
            "preprocessing": np.array(
                json.dumps(None if self.preprocessing is None else dict(self.preprocessing))
            ),
            **self.measures,
        }
        if self.logits is not None:
            arrays["logits"] = self.logits
        atomic_write(path, lambda stream: np.savez_compressed(stream, **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Records:
        """Read what ``save`` wrote; nothing in the file is run.

        Raises:
            CalibrationError: The file is damaged, newer, or something else.
        """
        name = os.fspath(path)
        try:
            arrays = _arrays(name)
        except CalibrationError:
            raise
        except FileNotFoundError as error:
            raise CalibrationError(
                f"{name}: no such file of records; s2d calibrate with --data and --records writes "
                "one."
            ) from error
        except Exception as error:  # what damaged archives make numpy raise is no fixed list
            let_through(error)
            raise CalibrationError(
                f"{name}: this is no file of records, or a damaged one ({type(error).__name__}: "
                f"{first_line(error)[:120]}); remove it and record again."
            ) from error
        return _decoded(arrays, name)


def _arrays(name: str) -> dict[str, Any]:
    with zipfile.ZipFile(name) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _LARGEST:
        raise CalibrationError(
            f"{name}: it claims to hold {size:,} bytes, more than records do; remove it and record "
            "again."
        )
    with Path(name).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _decoded(arrays: Mapping[str, Any], name: str) -> Records:
    def one(key: str, kinds: str) -> Any:
        value = arrays.get(key)
        if not isinstance(value, np.ndarray) or value.ndim or value.dtype.kind not in kinds:
            refuse(key, "is missing, or of another kind")
        return value.item()

    def many(key: str, kinds: str, dims: int) -> Any:
        value = arrays.get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.ndim != dims:
            refuse(key, "is missing, or of another kind")
        return value

    def refuse(key: str, problem: str) -> NoReturn:
        raise CalibrationError(
            f"{name}: {key} {problem}; this is no file of records, or a damaged one: remove it and "
            "record again."
        )

    if "format" not in arrays:  # the user's images, perhaps: nothing to be removed
        raise CalibrationError(
            f"{name}: it holds {', '.join(sorted(arrays)[:8]) or 'nothing'}, and this is no file "
            "of records; name one that s2d calibrate --records wrote."
        )
    if one("format", "U") != _FORMAT:
        refuse("format", f"is {shown(one('format', 'U'))}")
    if one("version", "iu") != _VERSION:
        raise CalibrationError(
            f"{name}: records of version {one('version', 'iu')}, and this package reads version "
            f"{_VERSION}; upgrade s2d-compiler, or record again."
        )
    preprocessing: Any = None
    try:
        preprocessing = json.loads(one("preprocessing", "U"))
    except (ValueError, RecursionError):
        refuse("preprocessing", "is no JSON")
    if preprocessing is not None and not isinstance(preprocessing, dict):
        refuse("preprocessing", "is no object")
    logits = many("logits", "f", 3) if "logits" in arrays else None
    try:
        return Records(
            labels=many("labels", "i", 1).astype(np.int64),
            predictions=many("predictions", "i", 2).astype(np.int64),
            measures={key: many(key, "f", 2).astype(np.float64) for key in MEASURES},
            classes=one("classes", "i"),
            network=one("network", "U"),
            data=one("data", "U"),
            preprocessing=preprocessing,
            logits=None if logits is None else logits.astype(np.promote_types(logits.dtype, "f4")),
        )
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error


def _validate(records: Records) -> None:
    n, s = len(records.labels), records.stages

    def refuse(what: str, problem: str) -> NoReturn:
        raise CalibrationError(f"records: {what} {problem}; they are damaged, record again.")

    if not n:
        refuse("there", "are 0 samples")
    if records.classes < 2 or s < 1:
        refuse("the network", f"has {records.classes} classes and {s} exits")
    if records.predictions.shape != (n, s):
        refuse("predictions", f"are of shape {records.predictions.shape} for {n} labels")
    for what, found, least in (
        ("labels", records.labels, 0),
        ("predictions", records.predictions.reshape(-1), -1),
    ):
        if not (least <= found.min() and found.max() < records.classes):
            refuse(what, f"lie outside the {records.classes} classes")
    for name in MEASURES:
        values = records.measures[name]
        if values.shape != (n, s):
            refuse(name, f"is of shape {values.shape} for {n} samples at {s} exits")
        known = values[~np.isnan(values)]
        largest = largest_value(name, records.classes)
        if len(known) and not (known.min() >= -_ROUNDING and known.max() <= largest + _ROUNDING):
            refuse(name, f"has values outside 0 to {largest:.4g}")
    if records.logits is not None and (
        records.logits.shape[:2] != (s, n)
        or records.logits.shape[2] not in ({1, 2} if records.classes == 2 else {records.classes})
    ):
        refuse("logits", f"are of shape {records.logits.shape}")


def signed(measure: str, values: Floats) -> Floats:
    """Values of a measure within its range, larger for more certainty; NaN stays."""
    if LARGER_IS_CERTAIN[measure]:
        return np.clip(values, 0.0, 1.0)
    return -np.maximum(values, 0.0)


# -- which network ---------------------------------------------------------------------------------


def fingerprint(dyn: DynamicModel) -> str:
    """SHA-256 of what a network computes: graphs, modules, weights. Settings do not count."""
    from s2d_compiler.format import to_data

    data = to_data(dyn)
    digest = hashlib.sha256()
    for key in ("stages", "modules", "tensors"):
        _digest(digest, data[key])
    return digest.hexdigest()


def _digest(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("training", "requires_grad"):  # not what is computed
                digest.update(f"{key!r}:".encode())
                _digest(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _digest(digest, item)
    else:
        digest.update(f"{value!r};".encode())
