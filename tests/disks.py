"""File systems for tests: one that records what is asked of it, one that fails; and what a crash may leave on a disk."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmc.system.fs import Fs


@dataclass
class _File:
    """A file's bytes as written, and how many of them had reached the disk at the last fsync."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None


class RecordingFs(Fs):
    """The real file system, and a list of what was asked of it."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, ...]] = []
        self._names: dict[int, Path] = {}

    def open_new(self, path: Path) -> int:
        fd = super().open_new(path)
        self._names[fd] = path
        self.ops.append(("open", path.name))
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        count = super().write(fd, data)
        self.ops.append(("write", self._names[fd].name, bytes(data[:count])))
        return count

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.ops.append(("fsync", self._names[fd].name))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.ops.append(("rename", old.name, new.name))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.ops.append(("remove", path.name))

    def fsync_directory(self, path: Path) -> None:
        super().fsync_directory(path)
        self.ops.append(("fsync_directory",))


LOSSES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "kept": lambda data, synced: data,
    "dropped": lambda data, synced: synced,
    "zeroed": lambda data, synced: synced + bytes(len(data) - len(synced)),
    "half": lambda data, synced: data[: (len(synced) + len(data)) // 2],
    "garbled": lambda data, synced: synced + bytes(b ^ 0x5A for b in data[len(synced) :]),
}


def disk_states(ops: list[tuple[Any, ...]], count: int) -> list[dict[str, bytes]]:
    """Return what a directory may hold after a crash behind the first count operations.

    Data that were not synced may be kept, lost or garbled; names that were not synced may be old or new, up to any operation since.
    """
    now: dict[str, _File] = {}
    names: list[dict[str, _File]] = [{}]  # since the last fsync of the directory
    for op in ops[:count]:
        if op[0] == "open":
            now = {**now, op[1]: _File()}
        elif op[0] == "write":
            now[op[1]].data += op[2]
        elif op[0] == "fsync":
            now[op[1]].synced = bytes(now[op[1]].data)
        elif op[0] == "rename":
            now = {k: v for k, v in now.items() if k != op[1]} | {op[2]: now[op[1]]}
        elif op[0] == "remove":
            now = {k: v for k, v in now.items() if k != op[1]}
        names = [now] if op[0] == "fsync_directory" else [*names, now]
    states = []
    for directory, loss in itertools.product(names, LOSSES.values()):
        states.append({name: loss(bytes(f.data), f.synced or b"") for name, f in directory.items()})
    return [dict(s) for s in {tuple(sorted(s.items())): s for s in states}.values()]


class FailingFs(Fs):
    """The real file system, one call of which fails."""

    def __init__(self) -> None:
        self.fail_at(0)

    def fail_at(self, n: int, error: OSError | None = None) -> None:
        """Let the n-th call from now on raise the error; None lets it write only one byte. n = 0 lets all calls succeed."""
        self.n, self.error, self.calls = n, error, 0

    def _call(self) -> bool:
        self.calls += 1
        if self.calls == self.n and self.error is not None:
            raise self.error
        return self.calls == self.n

    def open_new(self, path: Path) -> int:
        self._call()
        return super().open_new(path)

    def write(self, fd: int, data: memoryview) -> int:
        short = self._call()
        return super().write(fd, data[:1] if short else data)

    def fsync(self, fd: int) -> None:
        self._call()
        super().fsync(fd)

    def rename(self, old: Path, new: Path) -> None:
        self._call()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._call()
        super().remove(path)

    def fsync_directory(self, path: Path) -> None:
        self._call()
        super().fsync_directory(path)

    def free_bytes(self, path: Path) -> int:
        self._call()
        return super().free_bytes(path)


def small_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let the disk take so many bytes more."""
    real = os.write

    def write(self: Fs, fd: int, data: memoryview) -> int:
        nonlocal free
        if not free:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(fd, data[:free])
        free -= count
        return count

    monkeypatch.setattr(Fs, "write", write)
