"""Checkpoints of runs: resuming gives the same bits, and no crash, full disk or damage loses what was saved."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import filelock
import numpy as np
import pytest
from runs import same_weights, tiny_data, tiny_run, tiny_settings, weights

import llmc
from llmc import checkpoint as ckpt
from llmc.formats.shards import write_shard
from llmc.system.fs import Fs, remove_temporaries, write_atomically
from llmc.training.trainer import Trainer, TrainingStopped


def everything(trainer: Trainer) -> list[Any]:
    """Weights, moments, masters, data order, generators, windows."""
    rows = trainer.optimizer.state()
    tensors = [t.to_host() for row in rows.values() for t in row if t is not None]
    loader = trainer.train_loader.state()
    windows = [trainer.loss_outliers.state(), trainer.grad_outliers.state()]
    return [
        *trainer.model.parameters.values(),
        *tensors,
        loader,
        windows,
        trainer.optimizer.rng_state,
        trainer.step,
    ]


def equal(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(
                np.array_equal(x[k], y[k]) if k != "rng" else repr(x[k]) == repr(y[k]) for k in x
            )
        return np.array_equal(
            np.asarray(x).view(np.uint8) if isinstance(x, np.ndarray) else x,
            np.asarray(y).view(np.uint8) if isinstance(y, np.ndarray) else y,
        )

    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_resume_is_bit_identical(tmp_path: Path, dtype: str, master_weights: bool, background: bool) -> None:
    options = {"dtype": dtype, "master_weights": master_weights, "async_save": background, "total_batch_size": 64}
    whole = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "whole", **options)))
    whole.fit()
    options["checkpoint_every"] = 3

    class Stop(llmc.Callback):
        def on_step(self, trainer: Trainer, info: Any) -> None:
            if info.step == 4:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        llmc.train(**tiny_settings(tmp_path / "cut", **options), callbacks=[Stop()])
    resumed = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path / "cut", **options, resume=True)))
    assert resumed.step == 3
    resumed.fit()
    assert equal(everything(whole), everything(resumed))
    log = {line.split()[0]: line for line in (tmp_path / "cut/run/main.log").read_text().splitlines() if "trl" in line}
    log_whole = {
        line.split()[0]: line for line in (tmp_path / "whole/run/main.log").read_text().splitlines() if "trl" in line
    }
    assert log == log_whole


def cut_at(folder: Path, step: int, **options: Any) -> dict[str, Any]:
    """A run stopped after a checkpoint of the given step, and its settings with resume."""
    settings = tiny_settings(folder, checkpoint_every=step, **options)
    trainer = Trainer(llmc.TrainConfig(**settings))
    for _ in range(step):
        trainer.train_step()
    trainer.save()
    return {**settings, "resume": True}


def test_resume_with_another_batch_size_sees_the_same_samples(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 3, total_batch_size=128, batch_size=4)
    same = Trainer(llmc.TrainConfig(**settings))
    other = Trainer(llmc.TrainConfig(**{**settings, "batch_size": 2}))
    for _ in range(70):  # past the end of an epoch
        a = np.concatenate([same.train_loader.next_batch()[0] for _ in range(2)])
        b = np.concatenate([other.train_loader.next_batch()[0] for _ in range(4)])
        assert np.array_equal(a, b)


@pytest.mark.parametrize(("old", "new"), [("f32", "bf16"), ("bf16", "f32")])
def test_resume_in_another_dtype(tmp_path: Path, old: str, new: str) -> None:
    settings = cut_at(tmp_path, 4, dtype=old)
    before = Trainer(llmc.TrainConfig(**settings))
    after = Trainer(llmc.TrainConfig(**{**settings, "dtype": new}))
    whole, narrow = (before, after) if old == "f32" else (after, before)
    rows = narrow.optimizer.state()
    for name, array in whole.model.parameters.items():
        joined = ckpt.join_master(
            narrow.model.parameter_tensors()[name].to_host().ravel(), rows[name][2].to_host().ravel()
        )
        assert np.array_equal(joined, array.ravel()), name
    assert abs(before.train_step().loss - after.train_step().loss) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate was 0.01, is 1.0"),
        ({"max_steps": 9}, "max_steps was 8, is 9"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"shuffle": False}, "shuffle was True, is False"),
    ],
)
def test_changed_settings_are_refused_unless_allowed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = cut_at(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        Trainer(llmc.TrainConfig(**{**settings, **changes}))
    assert Trainer(llmc.TrainConfig(**{**settings, **changes, "allow_changes": True})).step == 2


def test_changed_data_are_refused(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    write_shard(Path(settings["data"][0]), np.zeros(4000, dtype=np.uint32), vocab_size=61)
    with pytest.raises(ValueError, match=r"the data changed \(train.bin\)"):
        Trainer(llmc.TrainConfig(**settings))


def test_changed_text_is_refused_before_anything_is_overwritten(tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three. " * 200)
    shape = {"data": (str(text),), "val_data": (), "tokenizer": "bpe:270", "vocab_size": None}
    tiny_run(tmp_path, **shape, checkpoint_every=8)
    run = tmp_path / "run"
    before = {name: (run / name).read_bytes() for name in ("data/train.bin", "tokenizer.bin")}
    text.write_text("four five six. " * 200)
    for resume in (True, False):
        with pytest.raises(ValueError, match="is not what the run was trained on|has checkpoints of an earlier run"):
            tiny_run(tmp_path, **shape, resume=resume)
    assert before == {name: (run / name).read_bytes() for name in before}
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, **shape, resume=True, allow_changes=True)))
    assert trainer.step == 8 and trainer.tokenizer is not None
    assert (run / "tokenizer.bin").read_bytes() == before["tokenizer.bin"]
    assert "four" in trainer.tokenizer.decode(int(t) for t in trainer.train_loader.next_batch()[0].ravel())


def test_a_run_directory_in_use_is_not_overwritten(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    with pytest.raises(ValueError, match=r"has checkpoints of an earlier run \(step 2\): continue it with --resume"):
        Trainer(llmc.TrainConfig(**{**settings, "resume": False}))


def test_resume_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert same_weights(weights(tiny_run(tmp_path / "a", resume=True)), weights(tiny_run(tmp_path / "b")))


def test_keep_and_major(tmp_path: Path) -> None:
    tiny_run(tmp_path, checkpoint_every=1, keep_checkpoints=2, major_every=3)
    assert ckpt.finished_steps(tmp_path / "run") == [3, 6, 7, 8]
    models = sorted(p.name for p in (tmp_path / "run").glob("model_*.bin"))
    assert models == [f"model_{s:08d}.bin" for s in (3, 6, 7, 8)]


def test_best_model_is_kept(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, save_best=True, max_steps=40, val_every=5)
    best = llmc.GPT2.from_checkpoint(tmp_path / "run" / "best.bin")
    loader = llmc.DataLoader([tmp_path / "data" / "val.bin"], 2, 16)
    loss = np.mean([best.evaluate(*loader.next_batch()) for _ in range(2)])
    assert loss == pytest.approx(min(result.history["val_loss"][1:]), abs=1e-6)


def test_llmc_reads_our_state_file_layout(tmp_path: Path) -> None:
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
    assert np.array_equal(moments, np.concatenate([row[0].to_host().ravel() for row in rows.values()]))


def test_resume_from_llmc_s_own_checkpoint(tmp_path: Path) -> None:
    """An empty DONE file, and nothing of ours in the state's header."""
    settings = cut_at(tmp_path, 3)
    run = Path(settings["output_dir"])
    (run / "DONE_00000003").write_bytes(b"")
    state = bytearray((run / "state_00000003_00000.bin").read_bytes())
    state[24:28] = bytes(4)
    (run / "state_00000003_00000.bin").write_bytes(state)
    trainer = Trainer(llmc.TrainConfig(**settings))
    assert trainer.step == 3
    trainer.fit()
    assert same_weights(
        {k: np.array(v) for k, v in trainer.model.parameters.items()}, weights(tiny_run(tmp_path / "whole"))
    )


# ---- crashes: every state that a disk may be in ----


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
    """What a directory may hold after a crash behind the first count operations: data not synced may be kept, lost or
    garbled; names not synced may be old or new, up to any operation since."""
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


def test_every_crash_state_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Saves of steps 1, 2 and 3, of which two are kept: whatever the disk was left with, the newest finished one is found."""
    fs = RecordingFs()
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, keep_checkpoints=1)), fs=fs)
    finished: list[int] = []  # how many operations had been done when each save returned
    for _ in range(3):
        trainer.train_step()
        trainer.save()
        finished.append(len(fs.ops))
    models = {}
    where = tmp_path / "crashed"
    where.mkdir()
    count_states = 0
    for count in range(len(fs.ops) + 1):
        sure = sum(count >= end for end in finished)  # the newest step whose save had returned
        for state in disk_states(fs.ops, count):
            count_states += 1
            for path in where.iterdir():
                path.unlink()
            for name, data in state.items():
                (where / name).write_bytes(data)
            warnings: list[str] = []
            found = ckpt.newest_good(where, warn=warnings.append)
            step = found[0] if found else 0
            assert step >= sure, (count, fs.ops[max(0, count - 1)][:2], warnings)
            if step:
                raw = (where / f"model_{step:08d}.bin").read_bytes()
                assert models.setdefault(step, raw) == raw
    assert count_states > 200 and set(models) == {1, 2, 3}


class FailingFs(Fs):
    """The n-th call fails."""

    def __init__(self, n: int, error: OSError | None) -> None:
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
    """For every n: training goes on, the earlier checkpoint stays good, nothing half-written is left, a later save works."""
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, keep_checkpoints=1)))
    run = tmp_path / "run"
    said: list[str] = []
    trainer.log.text = said.append  # type: ignore[method-assign]
    trainer.train_step()
    trainer.save()
    for n in itertools.count(1):
        trainer.train_step()
        before = ckpt.newest_good(run, warn=pytest.fail)
        fs = FailingFs(n, error)
        trainer._checkpointer.fs = trainer.fs = fs  # type: ignore[union-attr]
        said.clear()
        trainer._save(background=False)
        found = ckpt.newest_good(run, warn=said.append)
        assert found is not None and before is not None and found[0] in (before[0], trainer.step)
        if error is not None and fs.calls >= n and found[0] == before[0]:
            assert any("checkpoint could not be written" in text and str(error.strerror) in text for text in said)
        assert not list(run.glob(".tmp-*")) or (fs.calls >= n and isinstance(error, OSError))
        if fs.calls < n:
            assert found[0] == trainer.step and n > 10
            break
    trainer._checkpointer.fs = Fs()  # type: ignore[union-attr]
    trainer.save()
    assert ckpt.verify(run, trainer.step) is not None


def test_on_save_error_stop(tmp_path: Path) -> None:
    fs = FailingFs(3, OSError(errno.ENOSPC, "No space left on device"))
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, on_save_error="stop")), fs=fs)
    with pytest.raises(TrainingStopped, match=r"No space left on device.*earlier ones are untouched"):
        trainer.fit()


def test_failed_final_save_is_an_error(tmp_path: Path) -> None:
    class Full(Fs):
        def free_bytes(self, path: Path) -> int:
            return 1000

    config = llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=3))
    with pytest.raises(TrainingStopped, match=r"a checkpoint needs 0\.1 MB, 0\.0 MB are free"):
        Trainer(config, fs=Full()).fit()


def test_failed_background_save_is_reported(tmp_path: Path) -> None:
    fs = FailingFs(3, OSError(errno.ENOSPC, "No space left on device"))
    config = llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, async_save=True))
    result = Trainer(config, fs=fs).fit()
    assert result.step == 8 and ckpt.finished_steps(tmp_path / "run") == [4, 6, 8]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("No space left on device" in row.get("text", "") for row in rows)


def test_any_other_error_of_a_background_save_ends_the_run(tmp_path: Path) -> None:
    class Broken(Fs):
        def rename(self, old: Path, new: Path) -> None:
            if new.name.startswith("model_"):
                raise RuntimeError("a mistake")
            super().rename(old, new)

    config = llmc.TrainConfig(**tiny_settings(tmp_path, checkpoint_every=2, async_save=True))
    with pytest.raises(RuntimeError, match="a mistake"):
        Trainer(config, fs=Broken()).fit()


def test_saving_a_step_again_that_fails_keeps_what_was_saved(tmp_path: Path) -> None:
    class Broken(Fs):
        def write(self, fd: int, data: memoryview) -> int:
            raise OSError(errno.EIO, "Input/output error")

    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path, max_steps=3)))
    trainer.fit()
    assert trainer._checkpointer is not None
    trainer._checkpointer.fs = Broken()
    trainer.fit()  # nothing to train, nothing to save
    with pytest.raises(OSError, match="Input/output error"):
        trainer.save()
    assert ckpt.verify(tmp_path / "run", 3) is not None
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_what_fails_after_the_last_step_does_not_cost_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer) -> str:
        raise RuntimeError("no sample")

    monkeypatch.setattr(Trainer, "sample", fail)
    with pytest.raises(RuntimeError, match="no sample"):
        tiny_run(tmp_path, sample_every=8)
    assert ckpt.verify(tmp_path / "run", 8) is not None


def test_data_that_vanish_do_not_keep_a_run_from_saving(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    trainer = Trainer(llmc.TrainConfig(**settings))
    trainer.train_step()
    Path(settings["data"][0]).rename(tmp_path / "gone.bin")
    trainer.save()
    Path(tmp_path / "gone.bin").rename(settings["data"][0])
    assert Trainer(llmc.TrainConfig(**settings, resume=True)).step == 1


def test_checkpoint_every(tmp_path: Path) -> None:
    """-n 0: at the end only, of any model; -1: never."""
    tiny_run(tmp_path)
    assert ckpt.finished_steps(tmp_path / "run") == [8]
    tiny_run(tmp_path / "never", checkpoint_every=-1)
    assert ckpt.finished_steps(tmp_path / "never" / "run") == []


def test_one_process_at_a_time_in_a_run_directory(tmp_path: Path) -> None:
    trainer = Trainer(llmc.TrainConfig(**tiny_settings(tmp_path)))
    with filelock.FileLock(tmp_path / "run" / ".lock", timeout=0), pytest.raises(llmc.Error, match="another process"):
        trainer.fit()
    assert trainer.fit().step == 8


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


class FullDisk(io.RawIOBase):
    """What a file on a full disk does, on every system."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_log(path: Path, append: bool) -> TextIO:
        if path.name == "metrics.jsonl":
            return io.TextIOWrapper(io.BufferedWriter(FullDisk()), encoding="utf-8", newline="\n")
        return whole(path, append)

    whole = llmc.training.logs._open_log
    monkeypatch.setattr(llmc.training.logs, "_open_log", open_log)
    assert tiny_run(tmp_path, progress="lines").step == 8
    assert capsys.readouterr().out.count("MetricsLog cannot be written and is left out") == 1
    assert len((tmp_path / "run" / "main.log").read_text().splitlines()) == 11


def test_logs_go_on_below_a_torn_line(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 4)
    for name in ("main.log", "metrics.jsonl"):
        with open(tmp_path / "run" / name, "ab") as file:
            file.write(b"s:4 t")
    llmc.train(**settings)
    lines = (tmp_path / "run" / "main.log").read_text().splitlines()
    assert "s:4 t" in lines and any(line.startswith("s:4 trl:") for line in lines)


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
            found = ckpt.newest_good(run, warn=warnings.append)
            assert found is not None
            if found[0] == 2:  # a blank or a letter of the manifest's form: it must mean the same
                assert kind == "DONE" and found[1] == json.loads(whole)["manifest"]
            else:
                assert found[0] == 1 and len(warnings) == 1 and path.name in warnings[0]
    finally:
        path.write_bytes(whole)


def test_damage_is_named_and_the_run_goes_on_from_the_one_before(
    two_checkpoints: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(two_checkpoints["output_dir"]) / "state_00000002_00000.bin"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1])
        assert Trainer(llmc.TrainConfig(**two_checkpoints)).step == 1
        said = capsys.readouterr().out
        assert (
            "checkpoint of step 2 is damaged and passed over" in said
            and f"{len(whole) - 1} bytes, its manifest says {len(whole)}" in said
        )
    finally:
        path.write_bytes(whole)


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    settings = cut_at(tmp_path, 2)
    (Path(settings["output_dir"]) / "model_00000002.bin").unlink()
    with pytest.raises(ckpt.CheckpointDamaged, match="no checkpoint is whole"):
        Trainer(llmc.TrainConfig(**settings))


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
    """SIGKILL during saves: the next start finds a good checkpoint, of a step beyond the one that this start went on from."""
    rng, reached = random.Random(1), 0
    code = _SAVE_FOREVER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    tiny_data(tmp_path / "data")
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline().rstrip() == b"ready"
        while max(ckpt.finished_steps(tmp_path / "run"), default=0) <= reached:  # however slow the machine is
            assert child.poll() is None
            time.sleep(0.01)
        try:
            child.wait(0.1 + 0.3 * rng.random())
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        found = ckpt.newest_good(tmp_path / "run", warn=lambda text: None)
        assert found is not None and found[0] > reached
        reached = found[0]


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is of POSIX")
def test_full_disk_by_the_system_itself(tmp_path: Path) -> None:
    """The operating system refuses to write past a limit: one line, exit code 0 for 'continue', the old file untouched."""
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
