"""Writing output files: whole or not at all.

A file is written beside its destination, brought to the disk, and moved into place in one step.
Whatever stops the writing, an interrupt included, leaves the destination as it was.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from s2d_compiler.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["atomic_write", "check_writable"]


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it appears whole or not at all.

    A symbolic link is written through: the file that it points to is replaced, the link stays.
    An existing file keeps its permissions; a new one gets those that the umask leaves.

    Args:
        path: the file to write or replace.
        write: is given a binary file, open for writing and seeking, and fills it.

    Raises:
        OutputError: the folder is missing, the path is a folder, or the system refuses (rights,
            full disk, read-only file system). Anything but an ``OSError`` that ``write`` raises
            passes through.
    """
    target = _resolve(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except OSError as error:
        raise _explain(path, error) from error
    temporary = Path(name)
    try:
        _fill(descriptor, write)
        temporary.chmod(_mode_for(target))
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _explain(path, error) from error
        raise
    _sync_folder(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError now if ``atomic_write`` to this path would fail later.

    Long work can so refuse a bad destination before it starts. Nothing is left behind.
    """
    target = _resolve(path)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _explain(path, error) from error


def _resolve(path: str | os.PathLike[str]) -> Path:
    """Follow symbolic links and refuse what cannot be replaced by a file."""
    if not os.fspath(path):
        raise OutputError("the output path is empty; name a file")
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise OutputError(
                f"{path}: the folder {target.parent} does not exist; create it first"
            ) from None
        return target
    except (OSError, ValueError) as error:
        raise _explain(path, error) from error
    if stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is a device or a pipe; only plain files are written whole")
    if not os.access(target, os.W_OK):
        raise _explain(path, PermissionError(errno.EACCES, "write-protected"))
    return target


def _fill(descriptor: int, write: Callable[[BinaryIO], object]) -> None:
    with open(descriptor, "w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _mode_for(target: Path) -> int:
    """The permissions of the file that is replaced, or those a new file would have."""
    with suppress(OSError):
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk; some file systems cannot, and the file is whole anyway."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_REASONS = {
    errno.EACCES: "permission denied; choose a place that you may write to",
    errno.EPERM: "the system does not permit it; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space or choose another disk",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another disk",
    errno.EFBIG: "the file is larger than the file system allows; choose another disk",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.ELOOP: "its symbolic links form a circle; name the file itself",
}


def _explain(path: str | os.PathLike[str], error: OSError | ValueError) -> OutputError:
    if isinstance(error, ValueError):
        return OutputError(f"{path!r} is no file name ({error}); name a file")
    reason = _REASONS.get(error.errno or 0)
    return OutputError(f"{path} cannot be written: {reason or error.strerror or error}")
