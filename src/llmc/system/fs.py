"""The few file-system operations that saving relies on, behind one seam so that tests can fail and crash each of them.

A file is written under a temporary name in the same directory, flushed to the disk, renamed, and the directory flushed: after a
crash at any point the name has either the old content or the new. The temporary name has a prefix, not a suffix, because llm.c
takes every file that begins with DONE_ for a finished checkpoint.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

StrPath = str | os.PathLike[str]

_PREFIX = ".tmp-"
_PIECE = 32 << 20  # bytes handed to the system at a time, so that a signal is not kept waiting


class Fs:
    """The operating system's file system."""

    def make_directory(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def open_new(self, path: Path) -> int:
        """A file descriptor for a new, empty file."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        """Writes some of data; returns how many bytes."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        _patiently(lambda: os.replace(old, new))

    def remove(self, path: Path) -> None:
        _patiently(lambda: os.remove(path))

    def fsync_directory(self, path: Path) -> None:
        if os.name == "nt":  # there a directory cannot be opened; NTFS logs the rename
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        import shutil

        return shutil.disk_usage(path).free


def _patiently(call: Callable[[], None]) -> None:
    """On Windows a virus scanner or a reader may hold a file for a moment."""
    for attempt in range(5):
        try:
            return call()
        except PermissionError:
            if os.name != "nt" or attempt == 4:
                raise
            time.sleep(0.1)


SYSTEM = Fs()


def temporary_name(path: Path) -> Path:
    """Where this process writes what will become path."""
    return path.with_name(f"{_PREFIX}{os.getpid()}-{path.name}")


def stage(
    path: Path, pieces: Iterable[Any], *, fs: Fs = SYSTEM, tap: Callable[[memoryview], None] | None = None
) -> int:
    """Writes bytes-like pieces to the temporary name of path and flushes them to the disk; returns the number of bytes.

    tap sees every byte in order (a checksum, say). OSError where a step failed: then the temporary file is gone.
    """
    temporary = temporary_name(path)
    total = 0
    try:
        fd = fs.open_new(temporary)
        try:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                if tap is not None:
                    tap(view)
                while len(view):
                    count = fs.write(fd, view[:_PIECE])
                    if count <= 0:
                        raise OSError(errno.EIO, "the system wrote nothing", str(temporary))
                    view = view[count:]
                    total += count
            fs.fsync(fd)
        finally:
            fs.close(fd)
    except BaseException:
        unstage(path, fs=fs)
        raise
    return total


def publish(path: Path, *, fs: Fs = SYSTEM) -> None:
    """Gives what was staged its name, for good. OSError where that failed: the temporary file is then gone."""
    try:
        fs.rename(temporary_name(path), path)
    except BaseException:
        unstage(path, fs=fs)
        raise
    fs.fsync_directory(path.parent)


def unstage(path: Path, *, fs: Fs = SYSTEM) -> None:
    """Removes what was staged, if it is there."""
    try:
        fs.remove(temporary_name(path))
    except OSError:
        pass


def write_atomically(path: StrPath, pieces: Iterable[Any], *, fs: Fs = SYSTEM) -> None:
    """Writes bytes-like pieces to path, which has either its old content or all of the new. OSError where a step failed."""
    stage(Path(path), pieces, fs=fs)
    publish(Path(path), fs=fs)


def remove_temporaries(directory: StrPath) -> None:
    """What killed processes left half-written."""
    for path in Path(directory).glob(_PREFIX + "*"):
        writer = re.match(re.escape(_PREFIX) + r"(\d+)-", path.name)
        # In a container the dead process may well have had our number.
        if writer and (int(writer[1]) == os.getpid() or not psutil.pid_exists(int(writer[1]))):
            try:
                path.unlink()
            except OSError:
                pass
