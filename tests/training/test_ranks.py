"""Runs of several ranks: what they compute is what one process computes, and what they leave on the disk does not know of them."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KERNEL_SETS, make_backend
from mpi import mpiexec
from runs import VOCAB, same_weights, tiny_data, tiny_run, tiny_settings, weights

import llmc
from llmc import checkpoint
from llmc.checkpoint import finished_steps
from llmc.formats.eval_file import Example, write_eval_file
from llmc.formats.metrics import read_rows
from llmc.formats.shards import write_shard
from llmc.system.fs import Fs
from llmc.training import setup, sources
from llmc.training.ranks import Notes, SlowRanks
from llmc.training.settings import load_toml, resolve
from llmc.training.trainer import Trainer, TrainingStopped

pytest_plugins = ["thread_ranks"]
Ranks = Callable[[int, Callable[[int], Any]], list[Any]]

# Of each larger parameter every rank of four has a piece; the smaller ones are the last rank's alone.
SHAPE: dict[str, Any] = {"layers": 2, "channels": 64, "heads": 4}


def ranks_settings(folder: Path, micro_batches: int, **changes: Any) -> dict[str, Any]:
    """Return settings of a run whose updates have so many micro-batches; their paths are the same in any folder."""
    settings = tiny_settings(folder, **SHAPE, total_batch_size=micro_batches * 2 * 16, weight_decay=0.1)
    return {**settings, **changes}


def files(run: Path, *kinds: str) -> dict[str, str]:
    """Return the hash of each file of the run directory's checkpoints."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.iterdir())
        if path.name.split("_")[0] in (kinds or ("model", "state", "average", "DONE", "best.bin"))
    }


def hellaswag_file(path: Path) -> str:
    rng = np.random.default_rng(3)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, VOCAB, count).astype(np.uint16)

    examples = [
        Example(int(rng.integers(4)), tokens(3 + i % 4), [tokens(2 + i % 3) for _ in range(4)]) for i in range(7)
    ]
    write_eval_file(path, examples)
    return str(path)


def last_words(run: Path) -> list[str]:
    """Return the lines of a run's summary but the first, which has its time."""
    rows = read_rows(run / "metrics.jsonl")
    return [row["text"] for row in rows if row["kind"] == "message"][-1].splitlines()[1:]


# ---- numbers ----


@pytest.mark.parametrize(
    ("size", "zero_stage", "optimizer", "ema_decay"),
    [(2, 1, "adamw", 0.0), (3, 1, "muon", 0.9), (4, 1, "adamw", 0.0), (3, 0, "adamw", 0.5)],
)
def test_ranks_are_one_process_with_as_many_micro_batches(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_ranks: Ranks,
    size: int,
    zero_stage: int,
    optimizer: str,
    ema_decay: float,
) -> None:
    """To the bit: losses, norms, evaluations, and every byte of a checkpoint, its manifest included."""
    results = {}
    for folder, ranks in (("one", 1), ("many", size)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        changes: dict[str, Any] = {"checkpoint_every": 3, "val_steps": 5, "save_best": True, "sample_every": 4}
        changes |= {"hellaswag": True, "hellaswag_data": hellaswag_file(Path("h.bin")), "async_save": True}
        changes |= {"optimizer": optimizer, "zero_stage": zero_stage, "ema_decay": ema_decay}
        settings = ranks_settings(Path("."), size, sample_tokens=6, **changes)
        results[folder] = in_ranks(ranks, lambda rank: llmc.train(**settings))  # noqa: B023
    (one,), many = results["one"], results["many"]
    for result in many:
        for name in ("train_loss", "norm", "lr", "val_loss"):
            assert result.history[name] == one.history[name], name
        assert same_weights(weights(result), weights(one)) and result.step == 8
    assert files(tmp_path / "many" / "run") == files(tmp_path / "one" / "run")
    assert len(files(tmp_path / "one" / "run")) == 3 * (4 if ema_decay else 3) + 1
    logs = [(tmp_path / folder / "run" / "main.log").read_text() for folder in ("one", "many")]
    assert logs[0] == logs[1] and "eval:" in logs[0]
    words = [last_words(tmp_path / folder / "run") for folder in ("one", "many")]
    assert words[0] == words[1] and words[0][0].startswith("validation loss") and len(words[0]) == 7


@pytest.mark.parametrize(("optimizer", "master_weights"), [("adamw", True), ("adamw", False), ("muon", False)])
def test_zero_1_is_zero_0_in_bf16(tmp_path: Path, in_ranks: Ranks, optimizer: str, master_weights: bool) -> None:
    runs = {}
    for zero_stage in (0, 1):
        options = {"optimizer": optimizer, "master_weights": master_weights, "zero_stage": zero_stage}
        settings = ranks_settings(tmp_path / str(zero_stage), 3, dtype="bf16", max_steps=4, **options)
        results = in_ranks(3, lambda rank: llmc.train(**settings))  # noqa: B023
        assert all(same_weights(weights(result), weights(results[0])) for result in results)
        runs[zero_stage] = files(tmp_path / str(zero_stage) / "run", "model", "state")
    assert runs[0] == runs[1]


def test_the_optimizers_state_is_shared_among_the_ranks(tmp_path: Path, in_ranks: Ranks) -> None:
    settings = ranks_settings(tmp_path, 4, layers=4, channels=128)
    alone = Trainer(llmc.TrainConfig(**settings))
    shares = in_ranks(4, lambda rank: Trainer(llmc.TrainConfig(**settings)).optimizer.bytes)
    parameters = alone.model.num_parameters
    assert alone.optimizer.bytes >= 8 * parameters
    # Blocks of 1,024 and what is smaller than four of them are the last rank's.
    assert all(share < 1.2 * 8 * parameters / 4 for share in shares[:3]) and shares[3] < 1.6 * 8 * parameters / 4
    assert sum(shares) < 1.1 * alone.optimizer.bytes


# ---- resuming ----


def part(trainer: Trainer, steps: int) -> list[float]:
    """Make some updates and save; return their losses."""
    losses = [trainer.train_step().loss for _ in range(steps)]
    trainer.save()
    return losses


@pytest.mark.parametrize(
    ("chain", "dtype", "exact"),
    [((4, 1, 4), "f32", True), ((1, 4, 4), "bf16", False), ((4, 2, 1), "f32", False), ((1, 3, 2), "f32", False)],
)
def test_resume_on_another_number_of_ranks(
    tmp_path: Path, in_ranks: Ranks, chain: tuple[int, int, int], dtype: str, exact: bool
) -> None:
    """The bits are those of the uninterrupted run if each rank has one micro-batch, or all are one process's, in f32.

    Else the sums over micro-batches are rounded in another order.
    """
    settings = ranks_settings(tmp_path, 12 if 3 in chain else 4, dtype=dtype, max_steps=9, val_every=0)
    whole = tiny_run(tmp_path / "whole", **{**settings, "output_dir": str(tmp_path / "whole" / "run")})
    del settings["total_batch_size"]  # the checkpoint has it
    first = {**settings, "total_batch_size": (12 if 3 in chain else 4) * 32}
    losses: list[float] = []
    for i, ranks in enumerate(chain):

        def body(rank: int) -> list[float]:
            trainer = Trainer(llmc.TrainConfig(**(settings if i else first), resume=i > 0))  # noqa: B023
            assert trainer.step == 3 * i and trainer.config.total_batch_size == first["total_batch_size"]  # noqa: B023
            return part(trainer, 3)

        losses += in_ranks(ranks, body)[0]
    np.testing.assert_allclose(losses, whole.history["train_loss"], rtol=1e-5 if dtype == "f32" else 2e-3)
    if exact:
        assert losses == whole.history["train_loss"]
        assert (
            files(tmp_path / "run", "model")["model_00000009.bin"]
            == hashlib.sha256((tmp_path / "whole" / "run" / "model_00000009.bin").read_bytes()).hexdigest()
        )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_with_the_same_ranks_is_bit_identical(tmp_path: Path, in_ranks: Ranks, optimizer: str) -> None:
    """Moments, masters, generators and windows go to the ranks as they came from them; -z may change."""
    settings = ranks_settings(tmp_path / "whole", 3, dtype="bf16", max_steps=6, optimizer=optimizer)
    in_ranks(3, lambda rank: llmc.train(**settings))
    cut = {**settings, "output_dir": str(tmp_path / "cut")}
    in_ranks(3, lambda rank: part(Trainer(llmc.TrainConfig(**cut)), 3))
    in_ranks(3, lambda rank: llmc.train(**cut, resume=True, zero_stage=0))
    both = (tmp_path / "whole" / "run", tmp_path / "cut")
    assert files(both[0], "model") == {k: v for k, v in files(both[1], "model").items() if "6" in k}
    state = "state_00000006_00000.bin"
    assert files(both[0], "state")[state] == files(both[1], "state")[state]


@pytest.mark.parametrize(
    ("old", "dtype", "zero_stage"),
    [
        ({"dtype": "f32"}, "bf16", 1),
        ({"dtype": "f32"}, "bf16", 0),
        ({"dtype": "bf16"}, "f32", 1),
        ({"dtype": "bf16", "master_weights": False}, "bf16", 1),
    ],
)
def test_resume_in_another_dtype(
    tmp_path: Path, in_ranks: Ranks, old: dict[str, Any], dtype: str, zero_stage: int
) -> None:
    """What ranks load is what one process loads: both save the same bytes again."""
    settings = ranks_settings(tmp_path, 2, **old)
    part(Trainer(llmc.TrainConfig(**settings)), 2)
    saved = []
    for ranks in (1, 2):
        run = tmp_path / f"by{ranks}"
        shutil.copytree(tmp_path / "run", run)
        changes = {"output_dir": str(run), "dtype": dtype, "master_weights": True, "zero_stage": zero_stage}
        again = {**settings, **changes, "resume": True, "allow_changes": True}
        in_ranks(ranks, lambda rank: part(Trainer(llmc.TrainConfig(**again)), 0))  # noqa: B023
        saved.append(files(run, "model", "state"))
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("ranks", "batch_size", "expected"),
    [(1, 4, 4), (2, 4, 4), (4, 4, 4), (8, 4, 2), (16, 4, 1), (8, None, 2), (1, 6, 4)],
)
def test_a_resumed_run_keeps_its_total_batch_size(ranks: int, batch_size: int | None, expected: int) -> None:
    saved = {"total_batch_size": 16 * 128}
    for total in (-1, 16 * 128):
        given = llmc.TrainConfig(batch_size=batch_size, total_batch_size=total)
        config = resolve(given, "cpu", ranks=ranks, saved=saved)
        assert (config.total_batch_size, config.batch_size) == (16 * 128, expected)


def test_a_smaller_batch_size_is_said_and_not_kept(
    tmp_path: Path, in_ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ranks_settings(tmp_path, 2, max_steps=4)
    part(Trainer(llmc.TrainConfig(**settings)), 2)
    trainers = in_ranks(4, lambda rank: Trainer(llmc.TrainConfig(**settings, resume=True)))
    assert [trainer.config.batch_size for trainer in trainers] == [1] * 4
    assert (
        "batch_size is 1, not 2: it divides the run's 64 tokens of an update among 4 ranks\n" in capsys.readouterr().out
    )
    assert load_toml(tmp_path / "run" / "config.toml")["batch_size"] == 2
    assert "processes" not in load_toml(tmp_path / "run" / "config.toml")


def test_ranks_that_cannot_divide_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2048, expected a multiple of .* \* 3 processes = 8 \* 128 \* 3 = 3072"):
        resolve(llmc.TrainConfig(), "cpu", ranks=3, saved={"total_batch_size": 2048})
    assert resolve(llmc.TrainConfig(), "cpu", ranks=3).total_batch_size == 3 * 1024


def test_patience_and_the_end_are_the_same_for_all_ranks(
    tmp_path: Path, in_ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ranks_settings(tmp_path, 2, learning_rate=0.0, val_every=1, patience=2, progress="none")
    results = in_ranks(2, lambda rank: llmc.train(**settings))
    assert [(r.step, r.stopped_early) for r in results] == [(2, True)] * 2
    assert finished_steps(tmp_path / "run") == [2]
    settings["resume"] = True
    results = in_ranks(2, lambda rank: llmc.train(**settings))
    assert [(r.step, r.stopped_early, r.history["val_step"]) for r in results] == [(2, True, [])] * 2
    assert capsys.readouterr().out.count("run was stopped early at step 2 of 8") == 1
    longer = {**settings, "patience": 0, "max_steps": 3}
    assert [r.step for r in in_ranks(2, lambda rank: llmc.train(**longer))] == [3, 3]


# ---- what the ranks have in common ----


def test_settings_that_differ_are_named(tmp_path: Path, in_ranks: Ranks) -> None:
    settings = ranks_settings(tmp_path, 2)
    with pytest.raises(Exception, match="the settings differ: learning_rate is 0.02, rank 0 has 0.01"):
        in_ranks(2, lambda rank: Trainer(llmc.TrainConfig(**{**settings, "learning_rate": 0.01 * (1 + rank)})))


def test_ranks_with_other_kernel_sets_do_not_each_make_the_updates_of_muon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_ranks: Ranks
) -> None:
    """Their matmuls differ in the last bits, and so would their weights. With an owner for each matrix they have the same."""
    if len(KERNEL_SETS) < 2:
        pytest.skip("this CPU has one kernel set")
    backends = [make_backend(name, 1) for name in KERNEL_SETS[:2]]
    settings = ranks_settings(tmp_path, 2, optimizer="muon", max_steps=2)
    monkeypatch.setattr(setup, "open_device", lambda device, threads, local_rank: ("cpu", backends[local_rank]))
    with pytest.raises(ValueError, match=r"kernel sets \(\w+, \w+\): with --optimizer muon and -z 0"):
        in_ranks(2, lambda rank: llmc.train(**settings, zero_stage=0))
    one, other = in_ranks(2, lambda rank: llmc.train(**settings))
    assert same_weights(weights(one), weights(other))


def test_data_that_differ_are_named(tmp_path: Path, in_ranks: Ranks) -> None:
    settings = ranks_settings(tmp_path, 2)
    other = tmp_path / "other"
    train, val = tiny_data(other)
    write_shard(other / "train.bin", np.zeros(4000, dtype=np.uint32), vocab_size=VOCAB)

    def body(rank: int) -> Trainer:
        data = {"data": (train,), "val_data": (val,)} if rank else {}
        return Trainer(llmc.TrainConfig(**{**settings, **data}))

    with pytest.raises(
        Exception, match=r"the data differ: file 1 is 'train.bin of 9024 bytes, CRC-32 \w{8}', rank 0 has 'train.bin of"
    ):
        in_ranks(2, body)


@pytest.mark.parametrize("seen", [True, False])
def test_text_is_tokenized_once_if_rank_0s_tokens_are_seen(
    tmp_path: Path, in_ranks: Ranks, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three. " * 300)
    changes = {"data": (str(text),), "val_data": (), "tokenizer": "bpe:270", "vocab_size": None, "output_dir": None}
    settings = ranks_settings(tmp_path, 3, **changes)
    calls = []
    tokenize = sources.tokenize
    monkeypatch.setattr(sources, "tokenize", lambda *a: calls.append(1) or tokenize(*a))
    if not seen:
        monkeypatch.setattr(
            setup, "prepare_beside", lambda config, told: sources.prepare_beside(config, ["/nowhere", told[1]])
        )

    def body(rank: int) -> tuple[list[float], list[int], list[float]]:
        trainer = Trainer(llmc.TrainConfig(**settings))
        assert trainer.tokenizer is not None
        losses = [trainer.train_step().loss for _ in range(2)]
        trainer.validate()
        return losses, trainer.tokenizer.encode("one two"), trainer.history["val_bits_per_byte"]

    results = in_ranks(3, body)
    assert len(calls) == 2 * (1 if seen else 3) and all(result == results[0] for result in results)
    assert [len(bits) for _, _, bits in results] == [1, 1, 1]


# ---- stopping, failing, saving ----


class OnStep(llmc.Callback):
    """Does something after an update, on one rank."""

    def __init__(self, step: int, rank: int, action: Callable[[Trainer], object]) -> None:
        self.step, self.rank, self.action = step, rank, action

    def on_step(self, trainer: Trainer, info: Any) -> None:
        if (info.step, trainer.world.rank) == (self.step, self.rank):
            self.action(trainer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, in_ranks: Ranks, number: int) -> None:
    settings = ranks_settings(tmp_path, 3, max_steps=50)
    callback = OnStep(2, 1, lambda trainer: setattr(trainer._signals, "received", number))
    config = llmc.TrainConfig(**settings)
    results = in_ranks(3, lambda rank: Trainer(config, callbacks=[callback]).fit(pass_on_signal=False))
    # The update that follows carries the news.
    assert [(r.stopped_by, r.step) for r in results] == [(number, 4)] * 3
    assert finished_steps(tmp_path / "run") == [4]


def test_an_error_of_one_rank_is_told_to_the_others(tmp_path: Path, in_ranks: Ranks) -> None:
    settings = ranks_settings(tmp_path, 2)

    def fail(trainer: Trainer) -> None:
        raise RuntimeError("no luck")

    worlds = {}

    def body(rank: int) -> None:
        trainer = Trainer(llmc.TrainConfig(**settings), callbacks=[OnStep(1, 1, fail)])
        worlds[rank] = trainer.world
        trainer.fit()

    with pytest.raises((RuntimeError, llmc.Error), match="no luck|a rank has left"):
        in_ranks(2, body)
    assert worlds[0].meeting.failures == [(1, "RuntimeError: no luck", 1)]


def test_an_error_in_setup_is_told_to_the_others(tmp_path: Path, in_ranks: Ranks) -> None:
    settings = ranks_settings(tmp_path, 2)
    data = [settings["data"], (str(tmp_path / "nothing.bin"),)]
    with pytest.raises(FileNotFoundError, match="nothing.bin"):
        in_ranks(2, lambda rank: Trainer(llmc.TrainConfig(**{**settings, "data": data[rank]})))


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_a_checkpoint_for_which_something_lacks_is_left_out_by_all_ranks(
    tmp_path: Path, in_ranks: Ranks, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    settings = ranks_settings(tmp_path, 2, checkpoint_every=3)
    short = False

    class Disk(Fs):
        def free_bytes(self, path: Path) -> int:
            return 1000 if short and lacking == "disk" else super().free_bytes(path)

    enough = checkpoint.available_host_memory
    monkeypatch.setattr(
        checkpoint, "available_host_memory", lambda: 1000 if short and lacking == "memory" else enough()
    )

    def at(step: int, lacks: bool) -> OnStep:
        def switch(trainer: Trainer) -> None:
            nonlocal short
            short = lacks

        return OnStep(step, 0, switch)

    def body(rank: int, **changes: Any) -> int:
        callbacks = [at(0, True), at(4, False)]
        return Trainer(llmc.TrainConfig(**{**settings, **changes}), callbacks=callbacks, fs=Disk()).fit().step

    assert in_ranks(2, body) == [8, 8]
    assert finished_steps(tmp_path / "run") == [6, 8]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (warning,) = [row["text"] for row in rows if "could not be written" in row.get("text", "")]
    assert ("MB of memory are needed to gather" if lacking == "memory" else "a checkpoint needs") in warning
    stopped = {"output_dir": str(tmp_path / "stopped"), "on_save_error": "stop"}
    short = False
    with pytest.raises((TrainingStopped, llmc.Error), match="could not be written|a rank has left"):
        in_ranks(2, lambda rank: body(rank, **stopped))


def test_a_save_that_fails_in_the_background_is_warned_of(tmp_path: Path, in_ranks: Ranks) -> None:
    class Full(Fs):
        def fsync(self, fd: int) -> None:
            if not failed:
                failed.append(fd)
                raise OSError(errno.ENOSPC, "No space left on device")
            super().fsync(fd)

    failed: list[int] = [-1]  # not while the run is set up
    settings = ranks_settings(tmp_path, 2, checkpoint_every=4, async_save=True, save_best=False)

    def body(rank: int) -> int:
        return (
            Trainer(llmc.TrainConfig(**settings), callbacks=[OnStep(1, 0, lambda t: failed.clear())], fs=Full())
            .fit()
            .step
        )

    assert in_ranks(2, body) == [8, 8] and finished_steps(tmp_path / "run") == [8]
    assert "No space left on device" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_trainers_one_after_the_other(tmp_path: Path, in_ranks: Ranks) -> None:
    runs = [ranks_settings(tmp_path / str(seed), 2, seed=seed) for seed in (1, 2)]
    one, two = in_ranks(2, lambda rank: [llmc.train(**run).history["train_loss"][-1] for run in runs])
    assert one == two and one[0] != one[1]


# ---- what is said ----


def test_the_table_has_all_ranks(tmp_path: Path, in_ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ranks_settings(tmp_path, 3, progress="lines", max_steps=2)
    in_ranks(3, lambda rank: llmc.train(**settings))
    printed = capsys.readouterr().out
    assert printed.count("| num_processes         | 3 ") == 1 and "| zero_stage            | 1 " in printed
    assert "num_processes=3 and total_batch_size=96\n=> setting grad_accum_steps=1" in printed
    assert "memory of all 3 ranks" in printed and printed.count("step    1/2") == 1


def test_callbacks_run_on_every_rank_and_on_save_on_rank_0(tmp_path: Path, in_ranks: Ranks) -> None:
    called = []

    class Recorder(llmc.Callback):
        def on_step(self, trainer: Trainer, info: Any) -> None:
            called.append(("step", trainer.world.rank))

        def on_eval(self, trainer: Trainer, step: int, loss: float) -> None:
            called.append(("eval", trainer.world.rank))

        def on_save(self, trainer: Trainer, step: int, directory: Path) -> None:
            called.append(("save", trainer.world.rank))

    settings = ranks_settings(tmp_path, 2, max_steps=1)
    in_ranks(2, lambda rank: llmc.train(**settings, callbacks=[Recorder()]))
    assert sorted(called) == sorted([("step", 0), ("step", 1), ("save", 0)] + 2 * [("eval", 0), ("eval", 1)])


def test_notes_are_what_each_rank_said() -> None:
    ranks = [Notes(rank, 3) for rank in range(3)]
    said = [note.written(signal, seconds) for note, signal, seconds in zip(ranks, (0, 15, 0), (0.5, 0.25, 2.0))]
    assert all(len(numbers) == ranks[0].count for numbers in said)
    sums = [sum(column) for column in zip(*said)]
    assert all(note.read(sums) == (15, [0.5, 0.25, 2.0]) for note in ranks)
    assert ranks[0].read([0.0] * ranks[0].count) == (0, [0.0] * 3)


def test_a_slow_rank_is_named_after_ten_updates_and_not_again_for_a_hundred() -> None:
    slow = SlowRanks(["hosta", "hosta", "hostb", "hostb"])
    usual = [0.4, 0.41, 0.39, 0.812]
    for _ in range(9):
        assert slow.update(usual) == []
    assert slow.update(usual) == ["rank 3 on hostb is slow: 812 ms where the others take 400 ms"]
    assert [len(slow.update(usual)) for _ in range(100)] == [0] * 99 + [1]
    assert slow.update([0.4] * 4) == []  # once fast, ten updates again
    assert [len(slow.update([0.4, 0.9, 0.4, 0.4])) for _ in range(10)] == [0] * 9 + [1]
    two = SlowRanks(["a", "b"])
    assert [two.update([1.0, 1.6]) for _ in range(10)][-1] == [
        "rank 1 on b is slow: 1600 ms where the others take 1000 ms"
    ]
    assert all(SlowRanks(["a", "b"]).update([1.0, 1.4]) == [] for _ in range(20))
    assert SlowRanks(["a", "b"]).update([0.0, 0.0]) == []  # the first update knows of none before it


# ---- processes ----


@pytest.mark.parametrize(("size", "optimizer"), [(1, "adamw"), (2, "muon"), (3, "adamw"), (4, "adamw")])
def test_processes_are_one_process_with_as_many_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, optimizer: str
) -> None:
    """A run, its second half resumed from one process's checkpoint, and a run that is stopped. Rank 0 alone sees the run directories."""
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    shared = {"checkpoint_every": 3, "max_steps": 6, "layers": 1, "output_dir": "run", "optimizer": optimizer}
    settings = ranks_settings(tmp_path / "data", size, **shared)
    alone = llmc.train(**settings)
    half = {**settings, "output_dir": "half"}
    trainer = Trainer(llmc.TrainConfig(**half))
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    shutil.copytree("half", tmp_path / "many" / "half")

    kill = sys.platform != "win32"  # which has no signal that a process could send to itself and survive
    stopped = {**settings, "output_dir": "stopped", "kill": kill, "max_steps": 1000 if kill else 3, "val_every": 0}
    (tmp_path / "runs.json").write_text(json.dumps([settings, {**half, "resume": True}, stopped]))
    done = mpiexec(size, str(Path(__file__).with_name("rank.py")), "../runs.json", cwd=tmp_path / "many")
    number = signal.SIGTERM if kill else 0
    assert done.returncode == (128 + number if number else 0), done.stdout + done.stderr
    for rank in range(size):
        whole, resumed, ended = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert whole["train_loss"] == alone.history["train_loss"] and whole["val_loss"] == alone.history["val_loss"]
        assert resumed["train_loss"] == alone.history["train_loss"][3:] and resumed["end"] == 6
        assert (ended["stopped_by"], ended["end"]) == (number, 2 if size == 1 and number else 3)
    assert files(tmp_path / "many" / "run") == files(tmp_path / "one" / "run")
    kinds = ("model", "state")
    assert files(tmp_path / "many" / "half", *kinds).items() >= files(tmp_path / "one" / "run", *kinds).items()
    assert finished_steps(tmp_path / "many" / "stopped") == [2 if size == 1 and number else 3]
