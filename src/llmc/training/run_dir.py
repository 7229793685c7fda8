"""The run directory: made, checked and locked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llmc import _llmc
from llmc.checkpoint import finished_steps
from llmc.system.fs import remove_temporaries
from llmc.training.settings import RunConfig, TrainConfig

_LOCK = ".lock"


def open_run_directory(config: RunConfig) -> Path | None:
    """Make the run directory if there is none, and remove what killed processes left half-written in it.

    Returns:
        Its path, or None if the run keeps nothing.

    Raises:
        ValueError: if it has checkpoints, and the run is not to be resumed.
        OSError: if it cannot be made or written to.
    """
    if not config.output_dir:
        return None
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _check_writable(directory)
    remove_temporaries(directory)
    steps = finished_steps(directory)
    if steps and not config.resume:
        raise ValueError(
            f"{directory} has checkpoints of an earlier run (step {steps[-1]}): continue it with --resume (-y 1), or "
            "choose another run directory"
        )
    return directory


def _check_writable(directory: Path) -> None:
    probe = directory / f".tmp-probe-{np.random.default_rng().integers(1 << 30)}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise PermissionError(f"run directory '{directory}' cannot be written to: {e}") from e


def used_directory(config: TrainConfig) -> Path | None:
    """Return the run directory of these settings if a run has been in it, so that one may still be."""
    directory = Path(config.output_dir) if config.output_dir else None
    return directory if directory is not None and (directory / _LOCK).exists() else None


def in_use(directory: Path) -> bool:
    """Return whether a process trains in a run directory, as far as this user and the file system can tell."""
    import filelock

    path = directory / _LOCK
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, NotImplementedError, OSError):
        return True
    lock.release()
    return False


@contextmanager
def locked(directory: Path | None, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from training in a run directory.

    Args:
        directory: None if there is nothing to lock.
        warn: is told if the file system has no locks.

    Raises:
        llmc.Error: if another process trains there.
    """
    if directory is None:
        yield
        return
    import filelock

    lock = filelock.FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise _llmc.Error(f"{directory}: another process trains in this run directory") from None
    except NotImplementedError:
        warn(f"warning: the file system of {directory} has no locks: let no other process train there")
    try:
        yield
    finally:
        lock.release()
