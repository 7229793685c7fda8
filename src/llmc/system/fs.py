"""The few file-system operations that saving relies on, in one class, so that tests can make each of them fail or crash.

A file is written under a temporary name in the same directory, flushed to the disk and renamed, and then the directory is flushed.
So after a crash at any point the file has either its old content or the new. The temporary name has a prefix, not a suffix, because
llm.c takes every file that begins with DONE_ for a finished checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from llmc.values import decimal_bytes

StrPath = str | os.PathLike[str]

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # errors of a full disk, file or account
_PREFIX = ".tmp-"
_PIECE = 32 << 20  # bytes per call to write: Python handles a signal only between two calls


def shell_word(text: StrPath) -> str:
    """Return a path as a word of a command line that a user may copy into a shell."""
    text = os.fspath(text)
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)


class Fs:
    """The operating system's file system. Every method raises OSError if the system refuses."""

    def make_directory(self, path: Path) -> None:
        """Create a directory and its parents, if they are not there."""
        path.mkdir(parents=True, exist_ok=True)

    def open_new(self, path: Path) -> int:
        """Create an empty file, or empty an existing one, and return a file descriptor to write it."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        """Write the first bytes of data, as many as the system takes at once, and return their number."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Wait until everything written to the file is on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a file descriptor."""
        os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file; one that has the new name already is replaced."""
        _retry(lambda: os.replace(old, new))

    def remove(self, path: Path) -> None:
        """Remove a file."""
        _retry(lambda: os.remove(path))

    def fsync_directory(self, path: Path) -> None:
        """Wait until the names of the files in a directory are on the disk."""
        if os.name == "nt":  # Windows cannot open a directory, and NTFS logs a rename by itself
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes can still be written to the disk that holds path."""
        return shutil.disk_usage(path).free


def _retry(call: Callable[[], None]) -> None:
    """Call, and on Windows try again if permission is denied: a virus scanner or a reader may hold a file for a moment."""
    for attempt in range(5):
        try:
            return call()
        except PermissionError:
            if os.name != "nt" or attempt == 4:
                raise
            time.sleep(0.1)


SYSTEM = Fs()


def temporary_name(path: Path) -> Path:
    """Return the name under which this process writes the file that will become path."""
    return path.with_name(f"{_PREFIX}{os.getpid()}-{path.name}")


def write_all(fd: int, data: Any, *, fs: Fs = SYSTEM) -> int:
    """Write all of a bytes-like object, and return the number of bytes."""
    view = memoryview(data).cast("B")
    total = len(view)
    while len(view):
        count = fs.write(fd, view[:_PIECE])
        if count <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        view = view[count:]
    return total


@contextlib.contextmanager
def named_errors(path: StrPath, temporary: Path, needed: int | None = None) -> Iterator[None]:
    """Make an OSError name the file that was to be written; of a full disk it also tells how much was written, and how much there is.

    Args:
        path: what the file will be called.
        temporary: what it is called while it is written.
        needed: its size in bytes, if that is known.
    """
    try:
        yield
    except OSError as e:
        if e.filename != os.fspath(path) and e.strerror is not None:
            e.filename = os.fspath(path)
            if e.errno in FULL:
                written = temporary.stat().st_size if temporary.exists() else 0
                e.strerror += f" after {decimal_bytes(written)}" + (
                    "" if needed is None else f" of {decimal_bytes(needed)}"
                )
        raise


def stage(
    path: Path, pieces: Iterable[Any], *, fs: Fs = SYSTEM, tap: Callable[[memoryview], None] | None = None
) -> int:
    """Write a file under its temporary name and flush it to the disk. publish() gives it its name.

    Args:
        path: what the file will be called.
        pieces: the content, as bytes-like objects.
        fs: the file system.
        tap: called with every piece before it is written, as for a checksum.

    Returns:
        The number of bytes.

    Raises:
        OSError: if a step failed. The temporary file is removed then.
    """
    temporary = temporary_name(path)
    needed = sum(memoryview(piece).nbytes for piece in pieces) if isinstance(pieces, list) else None
    total = 0
    try:
        with named_errors(path, temporary, needed):
            fd = fs.open_new(temporary)
            try:
                for piece in pieces:
                    view = memoryview(piece).cast("B")
                    if tap is not None:
                        tap(view)
                    total += write_all(fd, view, fs=fs)
                fs.fsync(fd)
            finally:
                fs.close(fd)
    except BaseException:
        unstage(path, fs=fs)
        raise
    return total


def publish(path: Path, *, fs: Fs = SYSTEM) -> None:
    """Give a staged file its name, and flush the directory.

    Args:
        path: what the file will be called; a file of this name is replaced.
        fs: the file system.

    Raises:
        OSError: if that failed. If it was the renaming, the temporary file is removed.
    """
    try:
        fs.rename(temporary_name(path), path)
    except BaseException:
        unstage(path, fs=fs)
        raise
    fs.fsync_directory(path.parent)


def unstage(path: Path, *, fs: Fs = SYSTEM) -> None:
    """Remove the file that was staged for path, if there is one."""
    try:
        fs.remove(temporary_name(path))
    except OSError:
        pass


def write_atomically(path: StrPath, pieces: Iterable[Any], *, fs: Fs = SYSTEM) -> None:
    """Write a file so that at any time, a crash included, it has either its old content or all of the new.

    Args:
        path: the file.
        pieces: the content, as bytes-like objects.
        fs: the file system.

    Raises:
        OSError: if a step failed.
    """
    stage(Path(path), pieces, fs=fs)
    publish(Path(path), fs=fs)


def remove_temporaries(directory: StrPath) -> None:
    """Remove the temporary files that killed processes left in a directory. Those of processes that still run stay."""
    for path in Path(directory).glob(_PREFIX + "*"):
        writer = re.match(re.escape(_PREFIX) + r"(\d+)-", path.name)
        # In a container the killed process may well have had the number that this process has now.
        if writer and (int(writer[1]) == os.getpid() or not psutil.pid_exists(int(writer[1]))):
            try:
                path.unlink()
            except OSError:
                pass
