"""Archives that ``torch.save`` wrote, looked through before torch opens them.

torch reads the numbers of a tensor from a member of a zip archive, and everything else from a
pickle. Neither is taken at its word here: members are compared with their checksums and with the
size of the file, and the pickle may name nothing but what a `dyn.pt` needs.
"""

from __future__ import annotations

import os
import zipfile
from typing import IO, Any

import torch

from s2d_compiler import allowance

__all__ = ["ArchiveError", "check_data_only", "check_members", "open_as_torch_does", "require_end"]

#: The functions that make dense tensors, and how many arguments they get.
_TENSORS = {"torch._utils._rebuild_tensor_v2": 6, "torch._utils._rebuild_tensor_v3": 7}
_HOOKS = "collections.OrderedDict"
#: A file of data names these, kinds of numbers, and nothing else.
_NAMES = {
    *_TENSORS,
    _HOOKS,
    "torch.storage.UntypedStorage",
    *(f"torch.{kind.__name__}" for kind in torch._storage_classes if kind.__module__ == "torch"),
    *(str(kind) for kind in vars(torch).values() if isinstance(kind, torch.dtype)),
}


class ArchiveError(Exception):
    """The archive is damaged, or made to do harm; the message says how."""


def require_end(file: IO[bytes]) -> None:
    """Tell an archive that was cut off from what is none.

    Raises:
        ArchiveError: It begins as one and does not end.
    """
    if file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file):
        raise ArchiveError("it is incomplete, its end is missing")
    file.seek(0)


def check_members(file: IO[bytes]) -> list[str]:
    """Require members that are whole and, together, no larger than the file.

    Returns:
        Their names without the folder that all of them lie in.

    Raises:
        ArchiveError: Something does not hold.
        zipfile.BadZipFile: It is no archive, or its parts do not lie where it says.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ArchiveError("two of its parts have one name")
        if any("/../" in f"/{name}/" or name.startswith("/") for name in names):
            raise ArchiveError("a part has a name that leads out of it")
        if sum(entry.file_size for entry in entries) > size:
            raise ArchiveError("its parts claim to be larger than the file")
        if (damaged := archive.testzip()) is not None:
            raise ArchiveError(f"the checksum of {damaged!a:.60} does not match")
    file.seek(0)
    return [name.partition("/")[2] for name in names]


def check_data_only(file: IO[bytes]) -> None:
    """Require a pickle of plain containers and dense tensors.

    Raises:
        ArchiveError: torch finds other members than ``check_members`` did.
        allowance.RefusedError: The pickle names or calls anything else.
    """
    allowance.check_data(open_as_torch_does(file).get_record("data.pkl"), _NAMES, _TENSORS, _HOOKS)
    file.seek(0)


def open_as_torch_does(file: IO[bytes]) -> Any:
    """torch's own reader of archives, which has to find the members that were checked.

    Raises:
        ArchiveError: It finds others: the archive has two tables of contents.
    """
    with zipfile.ZipFile(file) as archive:
        checked = {e.filename: (e.header_offset, e.file_size) for e in archive.infolist()}
    file.seek(0)
    reader: Any = torch._C.PyTorchFileReader(file)
    folder = next(iter(checked), "").partition("/")[0]
    found = {
        f"{folder}/{name}": (reader.get_record_header_offset(name), reader.get_record_size(name))
        for name in reader.get_all_records()
    }
    if found != checked:
        raise ArchiveError("it has two tables of contents that differ")
    return reader
