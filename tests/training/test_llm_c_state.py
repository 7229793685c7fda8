"""State files that several processes of llm.c wrote: with ZeRO each has a part of every slice, without it each has everything."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import cut_at, same_weights

import llmc
from llmc import _llmc
from llmc.checkpoint import newest_good
from llmc.training.trainer import Trainer

HEADER = 1024


def slice_sizes(model: llmc.Model) -> list[int]:
    """Return the elements of each slice in the order of the file: a parameter of the layers has one for each layer."""
    layers = model.config.num_layers
    sizes = []
    for spec in _llmc.parameter_table(model.config.native()):
        count = 1 if spec.name in ("wte", "wpe", "lnfw", "lnfb") else layers
        sizes += [int(np.prod(spec.shape)) // count] * count
    return sizes


def as_llm_c(run: Path, step: int, processes: int, sizes: list[int], *, zero: bool) -> list[Path]:
    """Write a checkpoint's state anew as so many processes of llm.c would have, and return the files."""
    path = run / f"state_{step:08d}_00000.bin"
    raw = path.read_bytes()
    header = bytearray(raw[:HEADER])
    header[24:28] = bytes(4)  # llmc's mark
    kinds = 2 + int.from_bytes(header[16:20], "little")
    end = HEADER + 4 * kinds * sum(sizes)
    floats, rest = np.frombuffer(raw[HEADER:end], "<f4"), raw[end:]
    pieces = np.split(floats, np.cumsum(sizes * kinds)[:-1])
    paths = []
    for rank in range(processes):
        header[8:16] = struct.pack("<2i", processes, rank)
        mine = [np.split(piece, processes)[rank] if zero else piece for piece in pieces]
        paths.append(run / f"state_{step:08d}_{rank:05d}.bin")
        paths[-1].write_bytes(bytes(header) + b"".join(piece.tobytes() for piece in mine) + rest)
    (run / f"DONE_{step:08d}").write_bytes(b"")
    return paths


def state_of(trainer: Trainer) -> dict[str, Any]:
    tensors = {}
    for name, row in trainer.optimizer.state().items():
        for kind, tensor in enumerate((*row.moments, row.master)):
            if tensor is not None:
                tensors[f"{name} {kind}"] = tensor.to_host()
    return {**tensors, **{name: np.array(array) for name, array in trainer.model.parameters.items()}}


def checkpoint(tmp_path: Path, processes: int, dtype: str = "f32") -> tuple[dict[str, Any], list[int]]:
    """Train to step 3 with batches that the processes divide; return the settings to go on with, and the sizes of the slices."""
    settings = cut_at(tmp_path, 3, layers=2, dtype=dtype, batch_size=4, total_batch_size=128)
    # A sample of llm.c has a batch of each process. It does not say how many rows that is.
    settings["batch_size"] = 4 // processes
    return settings, slice_sizes(Trainer(llmc.TrainConfig(**settings)).model)


@pytest.mark.parametrize(("processes", "dtype"), [(2, "f32"), (4, "f32"), (4, "bf16")])
@pytest.mark.parametrize("zero", [True, False])
def test_parts_are_read_as_the_whole(tmp_path: Path, processes: int, dtype: str, zero: bool) -> None:
    settings, sizes = checkpoint(tmp_path, processes, dtype)
    expected = Trainer(llmc.TrainConfig(**settings))
    as_llm_c(tmp_path / "run", 3, processes, sizes, zero=zero)
    found = Trainer(llmc.TrainConfig(**settings))
    assert found.step == 3 and same_weights(state_of(expected), state_of(found))
    assert not all(np.all(array == 0) for array in state_of(found).values())
    for _ in range(5):
        assert expected.train_step().loss == found.train_step().loss
    assert same_weights(state_of(expected), state_of(found))


def test_parts_are_removed_with_their_checkpoint(tmp_path: Path) -> None:
    settings, sizes = checkpoint(tmp_path, 2)
    parts = as_llm_c(tmp_path / "run", 3, 2, sizes, zero=True)
    llmc.train(**{**settings, "keep_checkpoints": 1})
    assert not any(path.exists() for path in parts) and (tmp_path / "run" / "DONE_00000008").exists()


def missing(parts: list[Path]) -> None:
    parts[1].unlink()


def of_another_step(parts: list[Path]) -> None:
    raw = bytearray(parts[1].read_bytes())
    raw[40:44] = struct.pack("<i", 2)
    parts[1].write_bytes(raw)


def twice_the_same(parts: list[Path]) -> None:
    shutil.copy(parts[0], parts[1])


def shorter(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "no checkpoint is whole"),
        (of_another_step, r"_00001.bin: does not belong to state_00000003_00000.bin"),
        (twice_the_same, r"_00001.bin: written by process 0 of 2, expected 1"),
        (shorter, r"_00001.bin: truncated"),
    ],
)
def test_a_part_that_is_wrong_is_named(
    tmp_path: Path, damage: Callable[[list[Path]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, sizes = checkpoint(tmp_path, 2)
    damage(as_llm_c(tmp_path / "run", 3, 2, sizes, zero=True))
    with pytest.raises(llmc.Error, match=message):
        Trainer(llmc.TrainConfig(**settings))
    assert damage is not missing or "state_00000003_00001.bin: missing" in capsys.readouterr().out


def test_slices_that_cannot_have_been_divided(tmp_path: Path) -> None:
    settings, sizes = checkpoint(tmp_path, 1)
    (path,) = as_llm_c(tmp_path / "run", 3, 1, sizes, zero=True)
    raw = bytearray(path.read_bytes()[:20000])
    raw[8:12] = struct.pack("<i", 3)
    for rank in range(3):
        raw[12:16] = struct.pack("<i", rank)
        (tmp_path / "run" / f"state_00000003_{rank:05d}.bin").write_bytes(raw)
    with pytest.raises(llmc.Error, match=r"a part of 3, but \d+ weights have no such parts"):
        Trainer(llmc.TrainConfig(**settings))


def test_all_parts_are_looked_for(tmp_path: Path) -> None:
    _, sizes = checkpoint(tmp_path, 4)
    parts = as_llm_c(tmp_path / "run", 3, 4, sizes, zero=False)
    assert newest_good(tmp_path / "run", warn=pytest.fail) is not None
    parts[3].unlink()
    warnings: list[str] = []
    assert newest_good(tmp_path / "run", warn=warnings.append) is None and "_00003.bin: missing" in warnings[0]
