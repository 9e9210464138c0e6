"""What may be written, and where: one rule for every command.

Nothing is overwritten that the command did not write itself, and nothing that is an input. An output is locked while it
is written, so two runs never share one. A file appears under its name whole or not at all.
"""

import errno
import fcntl
import glob
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO


def refuse_inputs(output: Path, inputs: Iterable[str | Path]) -> None:
    """Raises ValueError where an input is the output or lies in it, or would find the output when it is read again.

    Args:
        inputs: files, folders and patterns, as the user gave them.
    """
    target = output.resolve()
    for path in inputs:
        given = os.fspath(path)
        if glob.has_magic(given) and not os.path.exists(given):
            if _would_find(given, target):
                raise ValueError(f"{output}: the output would be found by the input {given}; choose a place outside")
            continue
        source = Path(given).resolve()
        if source == target or target in source.parents:
            raise ValueError(f"{output}: the output would overwrite the input {given}")
        if source in target.parents:
            raise ValueError(f"{output}: the output lies within the input {given}; choose a place outside")


def _would_find(pattern: str, target: Path) -> bool:
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed]).resolve()
    return root in target.parents and _matches(target.relative_to(root).parts, parts[fixed:])


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """`glob.glob`'s rule, part by part: `**` stands for any number of folders, or at the end for anything."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def refuse_existing(path: Path, is_own: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Raises FileExistsError where `path` exists, unless it is a file of the command and `overwrite` is asked for.

    Args:
        is_own: whether the command wrote this regular file.
    """
    if not os.path.lexists(path):
        return
    if _is_special(path):
        raise FileExistsError(f"{path} is a folder, a link or a device: name a file")
    if not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    if not is_own(path):
        raise FileExistsError(f"{path} is not overwritten: it is nothing that this command wrote")


def refuse_foreign_files(
    folder: Path, own_names: re.Pattern[str], is_own: Callable[[Path], bool] = lambda path: True
) -> None:
    """Raises FileExistsError naming a file below `folder` that the command did not write.

    Args:
        own_names: matches the whole path, below `folder` and with slashes, of each file that the command may write. A
            symbolic link, or what else is no regular file, is never one, and folders count by the files in them.
        is_own: whether the command wrote a file of such a name, for names that others may give as well.
    """
    for parent, folders, names in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted([*names, *links]):
            path = Path(parent, name)
            own = own_names.fullmatch(path.relative_to(folder).as_posix()) and not _is_special(path) and is_own(path)
            if not own and os.path.lexists(path):  # a run that goes on may have removed it
                raise FileExistsError(f"{folder}: not written to: it holds what bivec did not write, as {str(path)!r}")


def _is_special(path: Path) -> bool:
    """Whether something other than a regular file stands there: a link, a folder, a device."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _raise(error: OSError) -> None:
    raise error


class AtomicFile:
    """`handle` is a temporary file that `publish` renames to its final name; until then `abort` leaves no trace.

    Args:
        wait: until another run no longer holds the temporary file, instead of refusing.
    """

    def __init__(self, temporary: Path, *, wait: bool = False):
        self.temporary = temporary
        self.handle: BinaryIO = open_locked(temporary, wait=wait)
        self._status = os.fstat(self.handle.fileno())

    def finish(self) -> None:
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def publish(self, final: Path) -> None:
        os.replace(self.temporary, final)
        sync(final.parent)
        self.handle.close()

    def is_pending(self) -> bool:
        """Whether it is neither published nor aborted, also in the middle of an interrupted `publish`."""
        return not self.handle.closed and self.stands_at(self.temporary)

    def stands_at(self, path: Path) -> bool:
        """Whether `path` names this file, and not one that somebody else put there."""
        try:
            return os.path.samestat(self._status, os.lstat(path))
        except FileNotFoundError:
            return False

    def abort(self) -> None:
        if self.is_pending():
            self.temporary.unlink()
        with suppress(OSError):  # what is still buffered may not fit on the disk
            self.handle.close()


@contextmanager
def open_output(
    path: Path, inputs: Iterable[Path] = (), *, overwrite: bool, is_own: Callable[[Path], bool]
) -> Iterator[Callable[[bytes], None]]:
    """One small file, for a command that works first and writes at the end: yields what publishes its whole content.

    The temporary file is there and locked from the beginning, which shows that the place is writable.

    Args:
        is_own: whether an existing file is one that the command wrote, and may be overwritten.
    Raises:
        ValueError: as `refuse_inputs`.
        FileExistsError: `path` is no file, or exists and may not be overwritten, or another run is writing it.
        FileNotFoundError: the folder to write in does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {str(path.parent)!r} does not exist")
    refuse_existing(path, is_own, overwrite=overwrite)
    refuse_inputs(path, inputs)
    file = AtomicFile(path.with_name(f".{path.name}.partial"))

    def publish(content: bytes) -> None:
        with naming(path):
            file.handle.write(content)
            file.finish()
            file.publish(path)

    try:
        yield publish
    finally:
        file.abort()


@contextmanager
def open_file(path: Path, inputs: Iterable[Path]) -> Iterator[Path]:
    """A file that appears whole or not at all: yields a temporary one beside it, locked, which then takes its name.

    Args:
        path: does not exist.
    Raises:
        ValueError: as `refuse_inputs`.
        FileExistsError: `path` exists, or another run is writing it.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; name a new file")
    refuse_inputs(path, inputs)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = AtomicFile(path.with_name(f".{path.name}.partial"))
        try:
            yield file.temporary
            file.finish()
            file.publish(path)
        finally:
            file.abort()


@contextmanager
def open_folder(path: Path, inputs: Iterable[Path], own_names: re.Pattern[str]) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields a temporary one beside it, locked, which then takes its name.

    Args:
        path: does not exist, or is an empty folder.
        own_names: as in `refuse_foreign_files`, of what a killed run may have left in the temporary folder.
    Raises:
        ValueError: as `refuse_inputs`.
        FileExistsError: `path` or what has the temporary folder's name must be kept, or another run is writing it.
    """
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is no empty folder")
    if not path.name:
        raise FileExistsError(f"{str(path)!r} is no name of a new folder")
    refuse_inputs(path, inputs)
    temporary = path.with_name(f".{path.name}.partial")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = AtomicFile(path.with_name(f".{path.name}.lock"))
        try:
            if os.path.lexists(temporary):
                refuse_foreign_files(temporary, own_names)
                shutil.rmtree(temporary)
            temporary.mkdir()
            try:
                yield temporary
                _sync_files(temporary)
                if path.exists():
                    path.rmdir()
                temporary.replace(path)
                sync(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        finally:
            lock.abort()


def _sync_files(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def open_locked(path: Path, *, wait: bool = False, shared: bool = False) -> BinaryIO:
    """`path`, locked; emptied unless the lock is `shared`, which others may then have too.

    Raises:
        FileExistsError: another process has the lock, and `wait` is false.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        handle = _open_appending(path)  # not truncated before the lock is ours
        try:
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            if _same_file(handle, path):
                if not shared:
                    handle.truncate(0)
                return handle
        except BlockingIOError:
            handle.close()
            raise FileExistsError(f"{path}: another run is writing this output") from None
        except FileNotFoundError:
            pass  # the run that had the lock has just published the file: take the free name
        handle.close()


def lock_output(output: Path, lock: Path, *, shared: bool = False) -> BinaryIO:
    """`lock`, held by this process for the run that writes `output`; unless `shared`, it says who holds it.

    Raises:
        FileExistsError: another run has it, or it is no regular file.
    """
    try:
        handle = open_locked(lock, shared=shared)
    except FileExistsError:
        if _is_special(lock):
            raise
        owner = lock.read_text(encoding="utf-8") or "a share of it"
        raise FileExistsError(f"{output}: another run is writing this output ({owner})") from None
    if not shared:
        try:
            with naming(output):
                handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                handle.flush()
        except BaseException:
            with suppress(OSError):  # what is still buffered may not fit on the disk
                handle.close()
            raise
    return handle


def _open_appending(path: Path) -> BinaryIO:
    """`path`, made if need be; a link is not followed to what it names."""
    try:  # readable too, which some network file systems want for a shared lock
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileExistsError(f"{path} is a symbolic link, which is not written through") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileExistsError(f"{path} is not a regular file, and is not written to")
    return open(descriptor, "ab")


def _same_file(handle: BinaryIO, path: Path) -> bool:
    return os.path.samestat(os.fstat(handle.fileno()), os.lstat(path))


def sync(path: Path) -> None:
    """Makes what a file holds durable, or the names in a folder (renames, removals)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk's error does not say where: name the output."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
