"""What a run trains on if its data are a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.datasets import text
from llmc.formats.shards import write_shard
from llmc.training import sources

WORDS = "the cat sat on the mat. the dog sat on the log. "


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a data folder as `llmc data text` does."""
    (tmp_path / "my.txt").write_text(WORDS * 40, encoding="utf-8")
    text.prepare([tmp_path / "my.txt"], tmp_path / "data", tokenizer="bytes", shard_size=1000)
    assert names(sorted((tmp_path / "data").iterdir())) == [
        "text_train_000000.bin", "text_train_000001.bin", "text_val_000000.bin", "tokenizer.bin"
    ]  # fmt: skip
    return tmp_path / "data"


def test_folder_of_llmc_data(folder: Path) -> None:
    found = sources.prepare(llmc.TrainConfig(data=(str(folder),)), None)
    assert names(found.train) == ["text_train_000000.bin", "text_train_000001.bin"]
    assert names(found.val) == ["text_val_000000.bin"]
    assert found.tokenizer is not None and found.vocab_size == 257


def test_validation_data_of_its_own(folder: Path, tmp_path: Path) -> None:
    """The folder's validation files are not trained on, even if other files are used for validation."""
    write_shard(tmp_path / "other.bin", np.arange(50))
    found = sources.prepare(llmc.TrainConfig(data=(str(folder),), val_data=(str(tmp_path / "other.bin"),)), None)
    assert len(found.train) == 2 and names(found.val) == ["other.bin"]
    found = sources.prepare(llmc.TrainConfig(data=(str(folder),), val_data=(str(folder),)), None)
    assert len(found.train) == 2 and names(found.val) == ["text_val_000000.bin"]


@pytest.mark.parametrize("name", ["val.bin", "tiny_shakespeare_val.bin", "TinyStories_val.bin", "x_val_000000.bin"])
def test_names_of_validation_files(tmp_path: Path, name: str) -> None:
    for one in (name, "train.bin", "evaluation.bin", "valley.bin"):
        write_shard(tmp_path / one, np.arange(50))
    found = sources.prepare(llmc.TrainConfig(data=(str(tmp_path),)), None)
    assert (names(found.train), names(found.val)) == (["evaluation.bin", "train.bin", "valley.bin"], [name])


def test_a_folder_of_validation_files_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "text_val_000000.bin", np.arange(50))
    with pytest.raises(ValueError, match=r"for validation only, as 'text_val_000000\.bin'"):
        sources.prepare(llmc.TrainConfig(data=(str(tmp_path),)), None)


def test_a_folder_of_texts_may_have_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS * 40, encoding="utf-8")
    (tmp_path / "picture.bin").write_bytes(b"abc")
    llmc.Tokenizer.byte_level().save(tmp_path / "tokenizer.bin")
    found = sources.prepare(llmc.TrainConfig(data=(str(tmp_path),), tokenizer="bytes"), tmp_path / "run")
    assert names(found.train) == ["train.bin"] and found.train[0].parent == tmp_path / "run" / "data"
