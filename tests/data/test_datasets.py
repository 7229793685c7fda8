"""Data sets: the files are those that llm.c's scripts write, for any number of workers and any form of the text's files.

The oracle is the definition: end-of-text and the plain encoding of each document, one after the other.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import random
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmc
from llmc.commands import data as data_command
from llmc.data.documents import DocumentReader, Piece
from llmc.data.python_texts import language_reference
from llmc.data.roles import EOT
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.data.words import last_boundary
from llmc.datasets import fineweb, hellaswag, mmlu, text, tinyshakespeare, tinystories
from llmc.datasets.archive import unpacked
from llmc.formats.eval_file import Example, read_eval_file, write_eval_file
from llmc.formats.shards import ShardWriter, read_shard, write_shard
from llmc.system.cache import cache_directory

REFERENCE = "\n".join(language_reference())[:200_000]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a small BPE that splits text into words as GPT-2's does, and return its file; nothing is downloaded."""
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.bin"
    Tokenizer.train_bpe(REFERENCE, 512).save(path)
    return str(path)


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    try:
        return Tokenizer.gpt2()
    except ConnectionError as e:
        pytest.skip(f"GPT-2's vocabulary is not cached: {e}")


def by_definition(documents: list[str], tokenizer: Tokenizer) -> list[int]:
    return [token for document in documents for token in [tokenizer.eot_token, *tokenizer.encode(document)]]


def stories(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = REFERENCE.split(" ")
    ends = ["", "  ", "\n", " é 漢字 😀", EOT, " it's 1,234 \t\t x ", "\r\n"]
    picked = [(rng.randrange(len(words) - 300), rng.randrange(1, 300)) for _ in range(count)]
    return [rng.choice(ends) + " ".join(words[i : i + n]) + rng.choice(ends) for i, n in picked]


# ---- tokenising ----

tricky = st.text(alphabet="ab'é漢1.,\n\t\r \u00a0\u2028\x1c<|endoftext|>", max_size=80)


@given(st.lists(tricky, max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_documents_in_one_call(documents: list[str]) -> None:
    tokenizer = _small_bpe()
    tokens = tokenizer.encode_documents([Piece(d, True) for d in documents])
    assert tokens.tolist() == by_definition(documents, tokenizer)


@given(tricky, st.integers(1, 9))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_text_cut_into_pieces_has_the_same_tokens(whole: str, size: int) -> None:
    tokenizer = _small_bpe()
    tokens: list[int] = []
    rest = ""
    for at in range(0, len(whole), size):
        rest += whole[at : at + size]
        cut = last_boundary(rest)
        tokens += tokenizer.encode(rest[:cut])
        rest = rest[cut:]
    assert tokens + tokenizer.encode(rest) == tokenizer.encode(whole)


_cached: list[Tokenizer] = []


def _small_bpe() -> Tokenizer:
    if not _cached:
        _cached.append(Tokenizer.train_bpe(REFERENCE[:50_000] + " \n \n\n  \t " * 50, 400))
    return _cached[0]


def test_order_does_not_depend_on_workers(bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.data.tokenize._BATCH", 1000)
    tokenizer = Tokenizer.load(bpe)
    documents = stories(300)
    for workers in (1, 2, 5):
        tokens = np.concatenate(list(token_stream((Piece(d, True) for d in documents), tokenizer, workers)))
        assert tokens.tolist() == by_definition(documents, tokenizer)


def test_input_is_read_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.data.tokenize._BATCH", 1)
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield Piece("word", True)

    stream = token_stream(endless(), Tokenizer.byte_level(), workers=2)  # type: ignore[arg-type]
    for _ in range(10):
        next(stream)
    stream.close()
    assert taken < 20


def test_half_a_surrogate_pair_is_replaced() -> None:
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.decode(tokenizer.encode_to_numpy("a\ud83db")) == "a\ufffdb"


# ---- shards ----


@pytest.mark.parametrize(("vocab_size", "dtype", "magic"), [(65536, "<u2", 20240520), (65537, "<u4", 20240801)])
def test_shards_of_a_stream(tmp_path: Path, vocab_size: int, dtype: str, magic: int) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1000, dtype=np.uint32)
    with ShardWriter(lambda i: tmp_path / f"{i}.bin", vocab_size, shard_size=300) as writer:
        for part in np.array_split(tokens, [5, 5, 700]):
            writer.write(part)
    assert writer.counts == [300, 300, 300, 100]
    assert np.array_equal(np.concatenate([read_shard(p) for p in writer.paths]), tokens)
    for path, begin in zip(writer.paths, range(0, 1000, 300)):
        write_shard(tmp_path / "whole", tokens[begin : begin + 300], vocab_size=vocab_size)
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    header = np.fromfile(writer.paths[0], "<i4", 256)
    assert header[:3].tolist() == [magic, 1 if dtype == "<u2" else 7, 300] and not header[3:].any()


def test_a_shard_that_is_not_finished_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(lambda i: tmp_path / f"{i}.bin", 100, shard_size=3) as writer:
        writer.write(np.arange(5, dtype=np.uint32))
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["0.bin"]


def test_a_token_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="vocabulary of 10"),
        ShardWriter(lambda i: tmp_path / "x", 10) as w,
    ):
        w.write(np.array([10], dtype=np.uint32))


# ---- any text ----


def write_json_lines(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)) + "\n")


def write_json(path: Path, documents: list[str]) -> None:
    path.write_text(json.dumps(documents))


def write_csv(path: Path, documents: list[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        rows.writerows([["id", "text"], *([i, d] for i, d in enumerate(documents))])


def write_parquet(path: Path, documents: list[str]) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(documents)), "text": documents}), path, row_group_size=50
    )


FORMATS: dict[str, Callable[[Path, list[str]], None]] = {
    "jsonl": write_json_lines,
    "json": write_json,
    "csv": write_csv,
    "tsv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_records(tmp_path: Path, bpe: str, suffix: str) -> None:
    documents = stories(120)
    FORMATS[suffix](tmp_path / f"in.{suffix}", documents)
    consumed: list[int] = []
    pieces = list(DocumentReader().pieces(tmp_path / f"in.{suffix}", consumed.append))
    assert [p.text for p in pieces] == documents and all(p.first for p in pieces)
    assert sum(consumed) == (tmp_path / f"in.{suffix}").stat().st_size
    written = text.prepare([tmp_path / f"in.{suffix}"], tmp_path / "out", tokenizer=bpe, val=0, shard_size=10**9)
    assert read_shard(written.train[0]).tolist() == by_definition(documents, Tokenizer.load(bpe)) and not written.val
    assert Tokenizer.beside(tmp_path / "out") is not None


def test_a_long_text_comes_in_pieces(tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.data.documents._PIECE", 1000)
    whole = "".join(stories(100))
    (tmp_path / "a.txt").write_bytes(whole.encode())
    (tmp_path / "b.txt").write_bytes(b"")
    pieces = list(DocumentReader().pieces(tmp_path / "a.txt"))
    assert len(pieces) > 50 and "".join(p.text for p in pieces) == whole and [p.first for p in pieces].count(True) == 1
    assert list(DocumentReader().documents([tmp_path / "a.txt", tmp_path / "b.txt"])) == [whole, ""]
    written = text.prepare([tmp_path], tmp_path / "out", tokenizer=bpe, val=0)
    assert read_shard(written.train[0]).tolist() == by_definition([whole, ""], Tokenizer.load(bpe))


@pytest.mark.parametrize("val", [0.1, 0.3, 0.9])
def test_validation_is_the_last_part(tmp_path: Path, bpe: str, val: float) -> None:
    documents = stories(60)
    write_json_lines(tmp_path / "in.jsonl", documents)
    written = text.prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=bpe, val=val, shard_size=1000)
    tokens = by_definition(documents, Tokenizer.load(bpe))
    cut = len(tokens) - int(len(tokens) * val)
    assert np.concatenate([read_shard(p) for p in written.train]).tolist() == tokens[:cut]
    assert np.concatenate([read_shard(p) for p in written.val]).tolist() == tokens[cut:]
    assert (written.train_tokens, written.val_tokens) == (cut, len(tokens) - cut)
    assert [p.name for p in written.val] == [f"text_val_{i:06d}.bin" for i in range(len(written.val))]
    assert sorted((tmp_path / "out").glob("text_*.bin")) == sorted(written.train + written.val)


def test_an_earlier_run_is_not_mixed_in(tmp_path: Path, bpe: str) -> None:
    write_json_lines(tmp_path / "in.jsonl", stories(60))
    before = text.prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=bpe, shard_size=1000)
    with pytest.raises(FileExistsError, match="overwrite"):
        text.prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=bpe, shard_size=5000)
    after = text.prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=bpe, shard_size=5000, overwrite=True)
    assert len(after.train) < len(before.train)
    assert sorted((tmp_path / "out").glob("text_*.bin")) == sorted(after.train + after.val)


def test_input_that_cannot_be_read_costs_nothing(tmp_path: Path) -> None:
    """--overwrite deletes an earlier run's shards only when the first new tokens are there."""
    (tmp_path / "in.txt").write_bytes(REFERENCE[:5000].encode())
    (tmp_path / "bad.jsonl").write_bytes(b"<html>\n")

    def of_text(source: Path) -> None:
        text.prepare([source], tmp_path / "text", tokenizer="bytes", overwrite=True)

    def of_fineweb(source: Path) -> None:
        fineweb.prepare(tmp_path / "web", source=source, tokenizer="bytes", shard_size=1000, overwrite=True)

    for prepare, folder in ((of_text, "text"), (of_fineweb, "web")):
        prepare(tmp_path / "in.txt")
        before = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert len(before) > 2
        for source, error in (("mistyped", FileNotFoundError), ("bad.jsonl", ValueError)):
            with pytest.raises(error, match=source):
                prepare(tmp_path / source)
            assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.{suffix}"
    documents = ["naïve text, and more"]
    if suffix == "txt":
        path.write_bytes(documents[0].encode())
    elif suffix in ("csv", "tsv"):
        path.write_bytes(f'text\n"{documents[0]}"\n'.encode())  # the byte order mark comes before the column's name
    else:
        FORMATS[suffix](path, documents)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    consumed: list[int] = []
    assert "".join(p.text for p in DocumentReader().pieces(path, consumed.append)) == documents[0]
    assert sum(consumed) == path.stat().st_size


def test_a_bad_byte_is_counted_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood \xff bad")
    with pytest.raises(ValueError, match="byte 8 is 0xff"):
        list(DocumentReader().pieces(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", "byte 5 is 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', r"a.jsonl: line 2: 'text' is a number, .*--on-bad-record skip"),
        ("a.jsonl", b'{"body": "a"}\n', "a.jsonl: line 1: .*'text'.*'body'.*--column body"),
        ("a.jsonl", b"<html>\n", "a.jsonl: line 1: not JSON"),
        ("a.json", b'{\n"text": "a"\n}', "expected an array"),
        ("a.json", b'[{"text": "a"}', "not JSON"),
        ("a.csv", b"id,body\n1,a\n", "'text'.*'id', 'body'"),
        ("a.csv", b"id,text\n1\n", "ends before column"),
        ("a.csv", b"id,text\n1,\xff\n", "line 2: not UTF-8: it has the byte 0xff"),
        ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.prepare([tmp_path / name], tmp_path / "out", tokenizer="bytes")
    assert not list((tmp_path / "out").glob("*.bin"))


def test_the_command_that_an_error_suggests_works(tmp_path: Path) -> None:
    """Kind: what a failed command leaves behind, on which the corrected one fails."""
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(ValueError, match="3 tokens are too few to hold out 0.1 of them: give --val 0"):
        text.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bytes")
    assert text.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bytes", val=0).train_tokens == 3
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="there is no text in .*a.jsonl"):
        text.prepare([tmp_path / "a.jsonl"], tmp_path / "none", tokenizer="bytes", val=0)


def test_a_folder_has_one_tokenizer(tmp_path: Path) -> None:
    """Kind: token files beside the tokenizer of others, by which they would be read as other text."""
    (tmp_path / "a.txt").write_text(REFERENCE)
    (tmp_path / "bad.txt").write_bytes(b"a b " * (1 << 20) + b"\xff")
    out = tmp_path / "out"
    text.prepare([tmp_path / "a.txt"], out, tokenizer="bpe:300")
    with pytest.raises(FileExistsError, match=r"text_\w+\.bin there has another tokenizer, tokenizer\.bin: give"):
        text.prepare([tmp_path / "a.txt"], out, tokenizer="bytes", name="two")
    assert Tokenizer.beside(out).vocab_size == 300 and not [*out.glob("two*")]
    text.prepare([tmp_path / "a.txt"], out, tokenizer=str(out / "tokenizer.bin"), name="two")
    for path in out.glob("two*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8"):
        text.prepare([tmp_path / "bad.txt"], out, tokenizer="bytes", shard_size=10**5, overwrite=True, workers=1)
    assert Tokenizer.beside(out).vocab_size == 257  # of what is left, too
    assert max(read_shard(out / "text_train_000000.bin")) < 257


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_bytes(REFERENCE.encode())
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    out = str(tmp_path / "out")
    args = parser.parse_args(
        ["text", str(tmp_path / "in.txt"), "-o", out, "-tk", "bpe:300", "--prefix", "mine", "-s", "9999"]
    )
    assert data_command.run(args) == 0
    printed = capsys.readouterr().out
    assert "train on them: llmc-train -i" in printed and "mine_train_*.bin" in printed
    batches = llmc.DataLoader(f"{out}/mine_train_*.bin", 4, 8, vocab_size=300)
    assert batches.next_batch()[0].shape == (4, 8)


# ---- named data sets ----


def test_tinyshakespeare(tmp_path: Path) -> None:
    source = tmp_path / "input.txt"
    source.write_bytes(REFERENCE.encode())
    written = tinyshakespeare.prepare(tmp_path, source=source, tokenizer="bytes")
    tokenizer = Tokenizer.byte_level()
    sections = REFERENCE.split("\n\n")
    tokens = by_definition([s + "\n\n" for s in sections[:-1]] + sections[-1:], tokenizer)
    assert read_shard(written.val[0]).tolist() == tokens[:32768]
    assert read_shard(written.train[0]).tolist() == tokens[32768:]


def test_tinyshakespeare_matches_llm_c(tmp_path: Path, gpt2: Tokenizer) -> None:
    source = cache_directory() / tinyshakespeare.REMOTE.name
    if not source.is_file():
        pytest.skip(f"{source} is not there: `llmc data tinyshakespeare` downloads it")
    gpt2.save(tmp_path / "gpt2_tokenizer.bin")  # llm.c's file is enough to encode with
    for spec in ("gpt2", str(tmp_path / "gpt2_tokenizer.bin")):
        written = tinyshakespeare.prepare(tmp_path, source=source, tokenizer=spec)
        assert (written.train_tokens, written.val_tokens) == (305_260, 32_768)
        sums = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (*written.train, *written.val)]
        assert sums == [
            "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8",
            "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62",
        ]


def test_tinystories(tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    files = [stories(50, seed) for seed in range(3)]
    folder = tmp_path / "json"
    folder.mkdir()
    for i, documents in enumerate(files):
        (folder / f"data{i:02d}.json").write_text(json.dumps([{"story": d, "source": "x"} for d in documents]))
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as tar:
        for path in sorted(folder.iterdir(), reverse=True):
            tar.add(path, f"./{path.name}")
    tokenizer = Tokenizer.load(bpe)

    def expected(some: list[list[str]]) -> list[int]:
        shuffled = []
        for index, documents in enumerate(some):
            order = list(documents)
            random.Random(1337 + index).shuffle(order)
            shuffled += [d.strip() for d in order]
        return by_definition(shuffled, tokenizer)

    for source in (folder, tmp_path / "all.tar.gz"):
        written = tinystories.prepare(tmp_path / "out", source=source, tokenizer=bpe)
        assert [p.name for p in (*written.train, *written.val)] == ["TinyStories_train.bin", "TinyStories_val.bin"]
        assert read_shard(written.val[0]).tolist() == expected(files[:1])
        assert read_shard(written.train[0]).tolist() == expected(files[1:])
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes((tmp_path / "all.tar.gz").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole archive"):
        tinystories.prepare(tmp_path / "out", source=damaged, tokenizer=bpe)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_damaged_archive_is_not_taken_for_a_short_one(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a bit is flipped in gzip's data, in a tar's headers or at its end, one error is raised or the files are the same.

    Which flips gzip cannot see (in its name field, or a match that copies other zeros) depends on the times in the archive
    and on zlib, so gzip itself says which they are.
    """
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    for i in range(4):
        (tmp_path / f"{i}.json").write_bytes(random.Random(i).randbytes(700))
    whole = tmp_path / f"whole.{suffix}"
    with tarfile.open(whole, "w:gz" if suffix == "tar.gz" else "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(tmp_path.glob("*.json")):
            tar.add(path, path.name)

    def files(archive: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in unpacked(archive, archive.name, ".json").iterdir()}

    def visible(changed: bytes) -> bool:
        if suffix == "tar":
            return True
        try:
            return gzip.decompress(changed) != gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return True

    good, data = files(whole), whole.read_bytes()
    assert len(good) == 4
    seen = refused = 0
    if suffix == "tar":  # headers begin at 0, 1536, ...; each has a checksum over itself
        cases = [i for header in range(0, 4 * 1536, 1536) for i in range(header, header + 512, 37)] + [4 * 1536 + 5]
    else:
        cases = [*range(10, len(data), 11), *range(len(data) - 8, len(data))]
    for number, at in enumerate(cases):
        changed = bytearray(data)
        changed[at] ^= 1 << number % 8
        damaged = tmp_path / f"{number}.{suffix}"
        damaged.write_bytes(changed)
        seen += visible(changed)
        try:
            assert files(damaged) == good, at
        except ValueError as e:
            assert "not a whole archive" in str(e)
            refused += 1
    assert len(cases) * 0.9 < seen
    assert seen - (3 if suffix == "tar" else 0) <= refused <= seen  # a tar's checksum is itself padded, unchecked
    for size in (4 * 1536, 2 * 1536) if suffix == "tar" else (len(data) - 8, len(data) // 2):
        cut = tmp_path / f"cut_{size}.{suffix}"
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="not a whole archive"):
            files(cut)


@pytest.mark.parametrize("shard_size", [2, 777, 10_000, 10**8])
def test_fineweb(tmp_path: Path, shard_size: int) -> None:
    documents = ["ab", "", "c" * 2000, *stories(5)] if shard_size > 2 else ["ab", "cd"]
    for i, part in enumerate((documents[:2], documents[2:])):
        write_parquet(tmp_path / f"{i}.parquet", part)
    written = fineweb.prepare(tmp_path, kind="edu", source=tmp_path, shard_size=shard_size, tokenizer="bytes")
    tokens = by_definition(documents, Tokenizer.byte_level())
    paths = written.val + written.train
    assert [p.name for p in paths] == [f"edu_fineweb_{'train' if i else 'val'}_{i:06d}.bin" for i in range(len(paths))]
    parts = [read_shard(p) for p in paths]
    assert all(len(p) == shard_size for p in parts[:-1]) and np.concatenate(parts).tolist() == tokens
    some = fineweb.prepare(
        tmp_path, kind="edu", source=tmp_path, shard_size=shard_size, shards=2, tokenizer="bytes", overwrite=True
    )
    assert some.train_tokens + some.val_tokens == min(len(tokens), 2 * shard_size)


def test_hellaswag(tmp_path: Path, bpe: str) -> None:
    rows = [{"ctx": f"A man {i}", "label": i % 4, "endings": ["runs.", "sits é.", "is 1.", "sleeps"]} for i in range(9)]
    source = tmp_path / "val.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = hellaswag.prepare(tmp_path / "out", source=source, tokenizer=bpe)
    tokenizer = Tokenizer.load(bpe)
    examples = read_eval_file(path)
    for row, example in zip(rows, examples, strict=True):
        assert example.label == row["label"] and tokenizer.decode(example.context) == row["ctx"]
        assert [tokenizer.decode(c) for c in example.endings] == [f" {e}" for e in row["endings"]]
    # The bytes that the first example must have.
    raw = np.fromfile(path, "<u2", offset=1024)
    first = examples[0]
    body = [t for tokens in (first.context, *first.endings) for t in (len(tokens), *tokens)]
    assert raw[: 5 + len(body)].tolist() == [65535, 2 * (5 + len(body)), 0, first.label, 4, *body]
    assert np.fromfile(path, "<i4", 4).tolist()[:3] == [20240522, 1, 9]
    source.write_text('{"ctx": "a", "label": 4, "endings": ["b"]}\n')
    with pytest.raises(ValueError, match="label 4"):
        hellaswag.prepare(tmp_path / "out", source=source, tokenizer=bpe)
    source.write_text('{"ctx": "a"}\n')
    with pytest.raises(ValueError, match="val.jsonl:1"):
        hellaswag.prepare(tmp_path / "out", source=source, tokenizer=bpe)


def test_mmlu(tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    for name, letter in (("b_test.csv", "D"), ("a_test.csv", "A")):
        with open(folder / name, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerow(["What, then?", "1", "None", "3.50", 'a "b"', letter])
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    tokenizer = Tokenizer.load(bpe)
    for source in (tmp_path / "data", tmp_path / "data.tar"):
        first, second = read_eval_file(mmlu.prepare(tmp_path, source=source, tokenizer=bpe))
        assert (first.label, second.label) == (0, 3)
        assert tokenizer.decode(first.context) == "Question: What, then?\n\nAnswer:"
        assert [tokenizer.decode(c) for c in first.endings] == [" 1", " None", " 3.50", ' a "b"']


def test_an_eval_file_that_cannot_be(tmp_path: Path) -> None:
    one = np.ones(1, np.uint16)
    for example, message in (
        (Example(0, one + 65534, [one]), "token 65535"),
        (Example(0, np.ones(33000, np.uint16), [one]), "bytes"),
        (Example(0, one, [one[:0]]), "empty"),
        (Example(1, one, [one]), "label"),
    ):
        with pytest.raises(ValueError, match=message):
            write_eval_file(tmp_path / "x.bin", [example])


# ---- tokenizers ----


def test_tokenizer_json(tmp_path: Path, bpe: str) -> None:
    """Hugging Face's package with the same merges gives the same tokens, special ones in the text included."""
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    import tokenizers

    table = Tokenizer.load(bpe)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[EOT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([REFERENCE], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    json_tokenizer = Tokenizer.from_spec(str(tmp_path / "tokenizer.json"))
    assert (json_tokenizer.vocab_size, json_tokenizer.eot_token, json_tokenizer.file_name) == (600, 0, "tokenizer.json")
    for document in stories(30):
        ids = json_tokenizer.encode(document)
        assert (
            json_tokenizer.decode(ids)
            == document
            == "".join(json_tokenizer.stream(ids))
            == table.decode(table.encode(document))
        )
        assert 0 not in ids and json_tokenizer.encode_to_numpy(document).tolist() == ids
    source = tmp_path / "a.txt"
    source.write_bytes("".join(stories(30)).encode())
    written = text.prepare([source], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), val=0)
    assert read_shard(written.train[0]).tolist() == by_definition([source.read_bytes().decode()], json_tokenizer)
    again = Tokenizer.beside(tmp_path / "out")
    assert again is not None and again.tokens == json_tokenizer.tokens
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a Hugging Face tokenizer"):
        Tokenizer.load(tmp_path / "bad.json")


def test_gpt2_from_its_file_encodes_as_tiktoken_does(tmp_path: Path, gpt2: Tokenizer) -> None:
    gpt2.save(tmp_path / "gpt2_tokenizer.bin")
    table = Tokenizer.load(tmp_path / "gpt2_tokenizer.bin")
    for document in stories(50):
        assert table.encode(document) == gpt2.encode(document)
        assert table.decode(table.encode(document)) == document


# ---- extras ----


@pytest.mark.parametrize(
    ("missing", "packages"),
    [
        ("pyarrow", "pyarrow"),
        ("tokenizers", "tokenizers"),
        ("gguf", "gguf"),
        ("tensorboardX", "tensorboardX"),
        ("wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_as_pip_knows_it(
    missing: str, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message gives the package's own name: `pip install 'llmc[...]'` would bring another project, and `'.[...]'` needs a clone."""
    from llmc.hub.gguf import export_gguf
    from llmc.training.logs import check_packages

    (tmp_path / "a.parquet").touch()
    (tmp_path / "tokenizer.json").write_text("{}")
    use: dict[str, Callable[[], object]] = {
        "pyarrow": lambda: list(DocumentReader().pieces(tmp_path / "a.parquet")),
        "tokenizers": lambda: Tokenizer.load(tmp_path / "tokenizer.json"),
        "gguf": lambda: export_gguf(
            llmc.GPT2(llmc.GPT2Config(8, 257, 1, 1, 8)), tmp_path / "m.gguf", Tokenizer.byte_level()
        ),
        "tensorboardX": lambda: check_packages(llmc.TrainConfig(tensorboard=True)),
        "wandb": lambda: check_packages(llmc.TrainConfig(wandb="project")),
    }
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"pip install {packages}$"):
        use[missing]()
