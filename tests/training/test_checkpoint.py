"""Checkpoints on the disk: their layout, and that no crash, full disk or damage loses what was saved."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import FailingFs, RecordingFs, disk_states
from runs import cut_at, tiny_data, tiny_settings

import llmc
from llmc.checkpoint import FoundCheckpoint, finished_steps, newest_good
from llmc.formats.manifest import DataFile, Manifest, signed
from llmc.formats.state_file import (
    StateSlice,
    TrainState,
    read_state_file,
    state_file_optimizer,
    state_file_pieces,
    state_order,
)
from llmc.formats.stream import CheckpointDamaged
from llmc.system.fs import remove_temporaries, write_atomically
from llmc.training.trainer import Trainer

# ---- formats ----


def test_the_state_file_is_laid_out_as_llm_c_reads_it(tmp_path: Path) -> None:
    """The offsets at which llm.c's load_state() reads."""
    settings = cut_at(tmp_path, 3, dtype="bf16")
    raw = (Path(settings["output_dir"]) / "state_00000003_00000.bin").read_bytes()
    trainer = Trainer(llmc.TrainConfig(**settings))
    n = trainer.model.num_parameters
    ints = np.frombuffer(raw[:1024], dtype="<i4")
    assert list(ints[:6]) == [20240527, 1, 1, 0, 1, 1] and ints[10] == 3
    state = trainer.train_loader.state()
    samples, shards = len(state["sample_indices"]), len(state["shard_indices"])
    assert len(raw) == 1024 + 3 * 4 * n + (8 + 4 * shards) + (8 + 4 * samples) + (8 + 4 + 4 + 4 * 624 + 8)
    moments = np.frombuffer(raw[1024 : 1024 + 4 * n], dtype="<f4")
    rows = trainer.optimizer.state()
    assert np.array_equal(moments, np.concatenate([row.moments[0].to_host().ravel() for row in rows.values()]))


class Values:
    """A tensor of f32 values."""

    def __init__(self, *values: float) -> None:
        self.array = np.array(values, np.float32)
        self.numel = self.array.size

    def read(self, begin: int, count: int) -> Any:
        return self.array[begin : begin + count]


SLICES = [StateSlice(2, 2), StateSlice(1, 1), StateSlice(1, 1), StateSlice(2, 2)]  # the middle ones of a matrix


def muon_state() -> bytes:
    moments = [Values(1, 2), Values(3), Values(4), Values(5, 6), Values(7, 8), Values(9, 10)]
    order = {"shard_indices": [0], "sample_indices": [1, 0], "rng": (1, 2, np.zeros(624, np.uint32))}
    state = TrainState(3, 3, 5, {"shard": 0, "row": 4, "rows_per_sample": 2, **order}, shuffle=True)
    parts = state_file_pieces(state, "muon", moments, Values(), [])
    return b"".join(bytes(memoryview(part).cast("B")) for part in parts)


def test_the_state_of_an_optimizer_that_llm_c_does_not_have(tmp_path: Path) -> None:
    """Second moments of some parameters only, in a version that llm.c refuses."""
    raw = muon_state()
    ints = np.frombuffer(raw[:1024], "<i4")
    assert list(ints[:8]) == [20240527, 2, 1, 0, 0, 1, int.from_bytes(b"llmc", "little"), 1] and ints[10] == 3
    assert np.array_equal(np.frombuffer(raw[1024 : 1024 + 40], "<f4"), range(1, 11))
    path = tmp_path / "state_00000003_00000.bin"
    path.write_bytes(raw)
    found = []
    saved = read_state_file(path, "muon", SLICES, lambda kind, i, values: found.append((kind, i, *values)))
    assert found == [(0, 0, 1, 2), (0, 1, 3), (0, 2, 4), (0, 3, 5, 6), (1, 0, 7, 8), (1, 3, 9, 10)]
    assert saved.sample == 2 and list(saved.order["sample_indices"]) == [1, 0]
    assert state_file_optimizer(path) == "muon" and list(state_order(SLICES, True))[6:] == [
        (2, 0),
        (1, 1),
        (1, 2),
        (2, 3),
    ]
    with pytest.raises(ValueError, match=r"00000.bin: the state of muon, expected that of adamw"):
        read_state_file(path, "adamw", [StateSlice(6, 2)], lambda *_: None)


@pytest.mark.parametrize(("version", "number"), [(1, 1), (2, 0), (2, 7), (2, -1), (3, 1)])
def test_the_state_of_an_unknown_optimizer_is_damage(tmp_path: Path, version: int, number: int) -> None:
    raw = bytearray(muon_state())
    raw[4:8], raw[28:32] = struct.pack("<i", version), struct.pack("<i", number)
    path = tmp_path / "state_00000003_00000.bin"
    path.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match=f"version {version}"):
        state_file_optimizer(path)


# ---- crashes: every state that a disk may be in ----


def test_every_crash_state_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Steps 1, 2 and 3 are saved, and two are kept: in whatever state a crash leaves the disk, the newest finished one is found."""
    fs = RecordingFs()
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, keep_checkpoints=1)), fs=fs)
    finished: list[int] = []  # how many operations had been done when each save returned
    for _ in range(3):
        trainer.train_step()
        trainer.save()
        finished.append(len(fs.ops))
    models = {}
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    count_states = 0
    for count in range(len(fs.ops) + 1):
        sure = sum(count >= end for end in finished)  # the newest step whose save has returned
        for state in disk_states(fs.ops, count):
            count_states += 1
            for path in crashed.iterdir():
                path.unlink()
            for name, data in state.items():
                (crashed / name).write_bytes(data)
            warnings: list[str] = []
            found = newest_good(crashed, warn=warnings.append)
            step = found.step if found else 0
            assert step >= sure, (count, fs.ops[max(0, count - 1)][:2], warnings)
            if step:
                raw = (crashed / f"model_{step:08d}.bin").read_bytes()
                assert models.setdefault(step, raw) == raw
    assert count_states > 200 and set(models) == {1, 2, 3}


# ---- saves that fail ----


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        InterruptedError(errno.EINTR, "Interrupted"),
        None,
    ],
    ids=["ENOSPC", "EIO", "EACCES", "EINTR", "short write"],
)
def test_the_nth_call_fails(tmp_path: Path, error: OSError | None) -> None:
    """For every n the caller gets the error, the earlier checkpoint stays good, nothing half-written is left, and a later save works."""
    fs = FailingFs()
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, keep_checkpoints=1)), fs=fs)
    run = tmp_path / "run"
    trainer.train_step()
    trainer.save()
    for n in itertools.count(1):
        trainer.train_step()
        before = newest_good(run, warn=pytest.fail)
        fs.fail_at(n, error)
        raised = None
        try:
            trainer.save()
        except OSError as e:
            raised = e
        assert raised in (None, error)
        found = newest_good(run, warn=lambda text: None)
        assert found is not None and before is not None and found.step in (before.step, trainer.step)
        assert raised is not None or found.step == trainer.step
        assert not list(run.glob(".tmp-*")) or raised is not None
        if fs.calls < n:
            assert raised is None and n > 10
            break
    fs.fail_at(0)
    trainer.save()
    FoundCheckpoint.open(run, trainer.step).verify()


def test_saving_a_step_again_that_fails_keeps_what_was_saved(tmp_path: Path) -> None:
    fs = FailingFs()
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, max_steps=3)), fs=fs)
    trainer.fit()
    fs.fail_at(3, OSError(errno.EIO, "Input/output error"))
    trainer.fit()  # nothing to train, nothing to save
    assert fs.calls == 0
    with pytest.raises(OSError, match="Input/output error"):
        trainer.save()
    FoundCheckpoint.open(tmp_path / "run", 3).verify()
    assert not list((tmp_path / "run").glob(".tmp-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is of POSIX")
def test_full_disk_by_the_system_itself(tmp_path: Path) -> None:
    """The operating system refuses to write past a limit: one line is printed, 'continue' exits with 0, the old file is untouched."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from llmc.system.fs import write_atomically\n"
        "try:\n    write_atomically(sys.argv[1], [b'x' * 100000])\n"
        "except OSError as e:\n    print('refused', e.errno)\n"
    )
    path = tmp_path / "file"
    write_atomically(path, [b"old"])
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (
        done.stdout == f"refused {errno.EFBIG}\n" and path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    )


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    names = [
        f".tmp-{living.pid}-model.bin",
        ".tmp-mynotes",
        f".tmp-{int(dead.stdout)}-model.bin",
        f".tmp-{os.getpid()}-x",
    ]
    for name in names:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    living.communicate(b"\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[:2])


# ---- damage ----


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("damage")
    settings = tiny_settings(folder)
    trainer = Trainer(llmc.TrainConfig(**settings))
    for _ in range(2):
        trainer.train_step()
        trainer.save()
    return {**settings, "resume": True}


@pytest.mark.parametrize("kind", ["model", "state", "DONE"])
def test_every_flipped_bit_and_truncation_is_found(two_checkpoints: dict[str, Any], kind: str) -> None:
    run = Path(two_checkpoints["output_dir"])
    path = next(run.glob(f"{kind}_00000002*"))
    whole = path.read_bytes()
    rng = random.Random(kind)
    damaged = []
    for _ in range(150):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(raw))
    damaged += [whole[:cut] for cut in {0, 1, 4, 1023, 1024, len(whole) // 2, len(whole) - 1} if cut < len(whole)]
    damaged += [whole + b"\0", b"\0" * len(whole)]
    try:
        for raw in damaged:
            path.write_bytes(raw)
            warnings: list[str] = []
            found = newest_good(run, warn=warnings.append)
            assert found is not None
            if found.step == 2:  # damage to white space or the like: the manifest must mean the same
                assert kind == "DONE" and found.manifest == Manifest.from_json(whole, path)
            else:
                assert found.step == 1 and len(warnings) == 1 and path.name in warnings[0]
    finally:
        path.write_bytes(whole)


# Changes of a manifest's values, and the value that the error names.
WRONG_VALUES = {
    "optimizer_step": lambda m: m["state"].update(optimizer_step="1"),
    "optimizer_rng": lambda m: m["state"].update(optimizer_rng=2**64),
    "shuffle": lambda m: m["state"].update(shuffle=1),
    "extra": lambda m: m["state"].update(extra=[]),
    "state.loader.row": lambda m: m["state"]["loader"].update(row=-1),
    "state.loader.epoch": lambda m: m["state"]["loader"].pop("epoch"),
    "rows_per_sample": lambda m: m["state"]["loader"].update(rows_per_sample=0),
    "loader": lambda m: m["state"].update(loader=None),
    "state": lambda m: m.pop("state"),
    "config": lambda m: m.update(config=[]),
    "dtype": lambda m: m.update(dtype=None),
    "data": lambda m: m.update(data={}),
    r"data\[0\].name": lambda m: m["data"][0].update(name=3),
    r"data\[1\].crc32": lambda m: m["data"][1].update(crc32=True),
    "model_00000002.bin.bytes": lambda m: m["files"]["model_00000002.bin"].update(bytes=1.5),
    r"crc32\[0\]": lambda m: m["files"]["model_00000002.bin"].update(crc32=["x"]),
    "2 checksums for": lambda m: m["files"]["model_00000002.bin"].update(crc32=[1, 2]),
    "format is 2": lambda m: m.update(format=2),
    "of step 7": lambda m: m.update(step=7),
}


@pytest.mark.parametrize("message", WRONG_VALUES)
def test_a_wrong_value_in_a_manifest_is_named(two_checkpoints: dict[str, Any], tmp_path: Path, message: str) -> None:
    raw = (Path(two_checkpoints["output_dir"]) / "DONE_00000002").read_bytes()
    manifest = json.loads(raw)["manifest"]
    WRONG_VALUES[message](manifest)
    (tmp_path / "DONE_00000002").write_text(signed(manifest))
    with pytest.raises(CheckpointDamaged, match=f"DONE_00000002: damaged manifest: .*{message}"):
        FoundCheckpoint.open(tmp_path, 2)


def test_a_manifest_round_trip(two_checkpoints: dict[str, Any]) -> None:
    path = Path(two_checkpoints["output_dir"]) / "DONE_00000002"
    raw = path.read_bytes()
    outer = json.loads(raw)
    assert outer["crc32"] == zlib.crc32(json.dumps(outer["manifest"], indent=1, sort_keys=True).encode())
    manifest = Manifest.from_json(raw, path)
    assert manifest.to_json().encode() == raw
    again = [*manifest.data]
    assert manifest.differences(["seed"], {"seed": 42}, again, defaults={}) == []
    again[1] = DataFile("val.bin", 5, 5)
    assert manifest.differences(["seed"], {"seed": 1}, again, defaults={}) == [
        "seed was 42, is 1",
        "the data changed (val.bin)",
    ]
    assert manifest.differences([], {}, manifest.data[::-1], defaults={}) == ["the data changed (their order)"]


# ---- the real thing ----


_SAVE_FOREVER = """
import sys, llmc
from llmc.training.trainer import Trainer
sys.path.insert(0, {tests!r})
from runs import tiny_settings
from pathlib import Path
settings = tiny_settings(Path({folder!r}), max_steps=100000, checkpoint_every=1, keep_checkpoints=2, resume=True, val_every=0)
trainer = Trainer(llmc.TrainConfig(**settings))
print("ready", flush=True)
trainer.fit()
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """After each SIGKILL during saves the newest good checkpoint is of a later step than before."""
    rng, reached = random.Random(1), 0
    code = _SAVE_FOREVER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    tiny_data(tmp_path / "data")
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline().rstrip() == b"ready"
        while max(finished_steps(tmp_path / "run"), default=0) <= reached:  # one more save at least
            assert child.poll() is None
            time.sleep(0.01)
        try:
            child.wait(0.1 + 0.3 * rng.random())
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        found = newest_good(tmp_path / "run", warn=lambda text: None)
        assert found is not None and found.step > reached
        reached = found.step
