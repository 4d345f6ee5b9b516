"""Writing output files: whole or not at all.

A file is written beside its destination, brought to the disk, and moved into place in one step.
Whatever stops the writing, an interrupt included, leaves the destination as it was.

Until it is whole, the file has no name where the system allows that (``O_TMPFILE``, on Linux's
usual file systems), so that a process that is killed leaves nothing behind. Elsewhere, and for
the moment in which a named file is replaced, it has a hidden name of the form ``HIDDEN``. Its
writer holds a lock on it; hidden files that nobody holds are removed by the next writing in that
folder. ``docs/guarantees.md`` says what is promised.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, Self

from s2d_compiler.errors import OutputError
from s2d_compiler.interrupts import heed

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # not a POSIX system: nothing is locked, and nothing is removed later
    _fcntl = None

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HIDDEN", "atomic_write", "check_writable"]

HIDDEN = re.compile(r"\..+\.s2d-([0-9a-f]{8})-[0-9a-f]{16}", re.DOTALL)
"""The names of files that are not whole yet: what is to become of them, host, random digits."""


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it appears whole or not at all.

    A symbolic link is written through: the file that it points to is replaced, the link stays.
    An existing file keeps its permissions; a new one gets those that the umask leaves. Of two
    processes that write one file at once, the last to finish wins.

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
        _remove_abandoned(target.parent)
        with _Draft(target) as draft:
            _fill(draft.file, write)
            draft.publish()
    except OSError as error:
        raise _explain(path, error) from error
    _sync_folder(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError now if ``atomic_write`` to this path would fail later.

    Long work can so refuse a bad destination before it starts. Nothing is left behind.
    """
    target = _resolve(path)
    try:
        with _Draft(target):
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
        raise OutputError(
            f"{path} is a device or a pipe; only plain files are written whole, name one"
        )
    if not os.access(target, os.W_OK):
        raise _explain(path, PermissionError(errno.EACCES, "write-protected"))
    return target


def _fill(file: BinaryIO, write: Callable[[BinaryIO], object]) -> None:
    before = sys.exception()
    try:
        write(file)
    except Exception as error:
        reason = _reason(error, before)
        if reason is error:
            raise
        raise reason from None
    heed()  # what was written may be of a computation that an interrupt led astray
    file.flush()
    os.fsync(file.fileno())


def _reason(error: BaseException, before: BaseException | None) -> BaseException:
    """Why a file could not be filled.

    After the file refused to be written, or an interrupt struck, torch.save finds its archive
    incomplete and raises that. What was raised first, and not before the writing, is the reason.
    """
    context: BaseException | None = error
    while context is not None and context is not before:
        if isinstance(context, (OSError, MemoryError)) or not isinstance(context, Exception):
            return context
        context = context.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk; some file systems cannot, and the file is whole anyway."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- files that are not whole yet ------------------------------------------------------------------

#: What a system that can link unnamed files may refuse for good reason; a copy would fail, too.
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EROFS, errno.EIO)


class _Draft:
    """A file beside its destination, locked while it is being written.

    It is open, has no name if the system can do without, and is gone after the ``with`` block
    unless it was published.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.name: Path | None = None  # set before the name is made, so that no name is left over
        try:
            mode: int | None = stat.S_IMODE(target.stat().st_mode)
        except OSError:
            mode = None
        self.mode = mode

    def __enter__(self) -> Self:
        try:
            self.file = self._open_unnamed() or self._open_hidden()
            return self  # an interrupt may strike even here
        except BaseException:
            self._remove_name()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(OSError):  # everything was flushed before, or is not wanted
                self.file.close()
        finally:
            self._remove_name()

    def publish(self) -> None:
        """Give the file its name, in place of the one that has it."""
        if self.name is None:
            if self.mode is not None:
                os.fchmod(self.file.fileno(), self.mode)
            elif self._link(self.target):
                return
            self.name = _hidden_name(self.target)
            if not self._link(self.name):
                self._copy_to_hidden()
        if self.mode is not None:
            os.chmod(self.name, self.mode)
        if _fcntl is None:
            self.file.close()  # what is open cannot be moved there
        os.replace(self.name, self.target)
        self.name = None

    def _open_unnamed(self) -> BinaryIO | None:
        flag = getattr(os, "O_TMPFILE", 0)
        if not flag:
            return None
        try:
            descriptor = os.open(self.target.parent, flag | os.O_RDWR, self._first_mode())
        except OSError:  # many reasons; with a name, the right one shows
            return None
        file = os.fdopen(descriptor, "w+b")
        if os.path.exists(_descriptor_path(descriptor)) and _lock(descriptor):
            return file
        file.close()
        return None

    def _open_hidden(self) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        while True:
            self.name = _hidden_name(self.target)
            descriptor = os.open(self.name, flags, self._first_mode())
            file = os.fdopen(descriptor, "w+b")
            if _lock(descriptor) and _is_at(descriptor, self.name):
                return file
            file.close()  # removed, between its creation and its lock, as one that nobody holds

    def _first_mode(self) -> int:
        """As private as the file to be replaced may be; what the umask leaves for a new one."""
        return 0o666 if self.mode is None else 0o600

    def _link(self, name: Path) -> bool:
        """Give an unnamed file a name; False where the name is taken, or that cannot be done."""
        descriptor = self.file.fileno()
        try:
            # With a folder's descriptor, of which an absolute path makes no use, Python calls
            # linkat, which follows the symbolic link in /proc to the file itself.
            os.link(_descriptor_path(descriptor), name, src_dir_fd=descriptor)
        except OSError as error:
            if error.errno in _FINAL:
                raise
            return False
        return True

    def _copy_to_hidden(self) -> None:
        unnamed = self.file
        self.file = self._open_hidden()
        with unnamed:
            unnamed.seek(0)
            shutil.copyfileobj(unnamed, self.file)
        self.file.flush()
        os.fsync(self.file.fileno())

    def _remove_name(self) -> None:
        if self.name is not None:
            with suppress(OSError):
                os.unlink(self.name)


def _hidden_name(target: Path) -> Path:
    return target.parent / f".{target.name[:40]}.s2d-{_host()}-{secrets.token_hex(8)}"


def _host() -> str:
    """This computer: only its own locks tell whether a writer lives."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _descriptor_path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed or its process ends; False if another holds it.

    Where files cannot be locked, none is, and none is ever taken for abandoned.
    """
    if _fcntl is not None:
        try:
            _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except OSError as error:
            return error.errno != errno.EWOULDBLOCK
    return True


def _is_at(descriptor: int, name: Path) -> bool:
    """Whether an open file has this name."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(name, follow_symlinks=False))
    return False


def _remove_abandoned(folder: Path) -> None:
    """Remove hidden files whose writers were killed; those of living writers are locked."""
    if _fcntl is None:
        return
    with suppress(OSError):
        for name in os.listdir(folder):
            found = HIDDEN.fullmatch(name)
            if found is not None and found[1] == _host():
                with suppress(OSError):
                    _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    assert _fcntl is not None
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        if _is_at(descriptor, path) and stat.S_ISREG(os.fstat(descriptor).st_mode):
            path.unlink()
    finally:
        os.close(descriptor)


# -- what the system says --------------------------------------------------------------------------

_REASONS = {
    errno.EACCES: "permission denied; choose a place that you may write to",
    errno.EPERM: "the system does not permit it; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space or choose another disk",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another disk",
    errno.EFBIG: "the file is larger than the file system allows; choose another disk",
    errno.EIO: "the disk reports an error; choose another disk",
    errno.ENOENT: "its folder was removed meanwhile; create it again",
    errno.EISDIR: "a folder has taken its name; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.ELOOP: "its symbolic links form a circle; name the file itself",
}


def _explain(path: str | os.PathLike[str], error: OSError | ValueError) -> OutputError:
    if isinstance(error, ValueError):
        return OutputError(f"{path!r} is no file name ({error}); name a file")
    reason = _REASONS.get(error.errno or 0) or f"{error.strerror or error}; choose another place"
    return OutputError(f"{path} cannot be written: {reason}")
