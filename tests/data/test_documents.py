"""Reading documents: bad records, fields, chats, compressed files, pipes, encodings, marks between documents, and what is no text."""

from __future__ import annotations

import argparse
import bz2
import codecs
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmc
from llmc import cli
from llmc.commands import data as data_command
from llmc.data import documents
from llmc.data.documents import STDIN, DocumentReader, Piece, input_size
from llmc.data.roles import EOT
from llmc.datasets import text
from llmc.formats.shards import read_shard
from llmc.training import sources

WORDS = "the cat sat on the mat, naïve café 你好. "
TEXTS = [WORDS * n for n in (1, 30, 2, 7)]


def compressor(suffix: str) -> Callable[[bytes], bytes]:
    if suffix == "zst":
        name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        pytest.importorskip(name, reason="needs zstandard: pip install backports.zstd")
        compress: Callable[[bytes], bytes] = importlib.import_module(name).compress
        return compress
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix]


def read(*paths: Path, **how: Any) -> list[str]:
    return list(DocumentReader(**how).documents(paths))


def write_records(path: Path, records: list[Any]) -> None:
    """Write records in the form that the suffix says. CSV has no null: its rows are short instead."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            rows = [[i, r["text"]] if r.get("text") is not None else [i] for i, r in enumerate(records)]
            csv.writer(file).writerows([["id", "text"], *rows])
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text(f"[{', '.join(lines)}]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")


# ---- compressed files ----

compressed = pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])


@compressed
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    compress = compressor(suffix)
    write_records(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    (tmp_path / "a.txt").write_bytes("".join(TEXTS).encode())
    for name in ("a.jsonl", "a.txt"):
        whole = (tmp_path / name).read_bytes()
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(compress(whole[:999]) + compress(whole[999:]))  # as `cat a.gz b.gz` makes it
        consumed: list[int] = []
        assert "".join(p.text for p in DocumentReader().pieces(path, consumed.append)) == "".join(TEXTS)
        assert sum(consumed) == input_size([path]) == path.stat().st_size
        path.replace(tmp_path / name)
        assert "".join(read(tmp_path / name)) == "".join(TEXTS)  # the content says it, not the name


@compressed
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    compress = compressor(suffix)
    data = compress(np.random.default_rng(0).integers(97, 123, 200_000, np.uint8).tobytes())
    changed = bytearray(data)
    changed[len(data) // 2] ^= 255
    for content in (data[:-9], data[: len(data) // 2], bytes(changed)):
        for how in ("stop", "skip"):
            (tmp_path / f"a.txt.{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=rf"a\.txt\.{suffix}: damaged or incomplete after [\d,]+ bytes"):
                read(tmp_path / f"a.txt.{suffix}", on_bad_record=how)


def test_a_name_that_promises_too_much(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(WORDS.encode())
    assert read(tmp_path / "a.txt.gz") == [WORDS]


def test_zstandard_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("Python has it")
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ImportError, match=r"a\.zst: .*pip install backports\.zstd$"):
        read(tmp_path / "a.zst")


# ---- pipes ----


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text from a pipe gives what the file gives, even if a BPE is trained on it first; compressed or not."""
    content = (WORDS * 500).encode()
    (tmp_path / "a.txt").write_bytes(content)
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)

    def tokens(name: str, stdin: bytes = b"") -> list[int]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        out = str(tmp_path / "out")
        args = parser.parse_args(["text", name, "-tk", "bpe:300", "--val", "0", "-o", out, "--overwrite"])
        assert data_command.run(args) == 0
        read_tokens: list[int] = read_shard(tmp_path / "out" / "text_train_000000.bin").tolist()
        return read_tokens

    expected = tokens(str(tmp_path / "a.txt"))
    assert tokens("-", content) == tokens("-", gzip.compress(content)) == expected and len(expected) > 1000
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match="'-', is named twice"):
        read(STDIN, STDIN)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((WORDS * 500).encode()))
    writer.start()
    written = text.prepare([tmp_path / "pipe"], tmp_path / "out", tokenizer="bytes", val=0)
    writer.join()
    assert written.train_tokens == 1 + len((WORDS * 500).encode())


# ---- what is text ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_encodings_by_their_byte_order_marks(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_PIECE", 999)  # cuts characters in two
    mark = codecs.lookup(encoding).encode("\ufeff")[0]
    whole = WORDS * 100
    for name, content in (
        ("a.txt", whole),
        ("a.jsonl", json.dumps({"text": whole}, ensure_ascii=False)),
        ("a.json", json.dumps([whole], ensure_ascii=False)),
        ("a.csv", f'text\r\n"{whole}"\r\n'),
    ):
        (tmp_path / name).write_bytes(mark + content.encode(encoding))
        assert read(tmp_path / name) == [whole]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    zipped, array = io.BytesIO(), io.BytesIO()
    zipfile.ZipFile(zipped, "w").writestr("word/document.xml", "x")
    np.save(array, np.arange(9))
    for content, what in (
        (b"%PDF-1.7\n", "a PDF: extract its text"),
        (zipped.getvalue(), r"a zip archive, .*\.docx"),
        (array.getvalue(), "a NumPy array"),
        (b"PAR1", r"the suffix \.parquet"),
        (b"a" * 257 + b"ustar\x00", "byte 262 is 0"),
        (WORDS.encode("utf-16-le"), "byte 1 is 0 .*UTF-16"),
    ):
        for name, stored in (("a.txt", content), ("a.csv", content), ("a.txt.gz", gzip.compress(content))):
            (tmp_path / name).write_bytes(stored)
            with pytest.raises(ValueError, match=f"{name}: .*{what}"):
                read(tmp_path / name, on_bad_record="skip")


# ---- records ----


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_bad_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_records(path, [{"text": t} for t in ["a", None, "", None, "b"]])
    reader = DocumentReader(on_bad_record="skip")
    for _ in range(2):  # counts do not add up over readings
        assert list(reader.documents([path])) == ["a", "", "b"]
        (report,) = reader.report()
        assert report.startswith(f"skipped 2 of 5 records: 2 in {path} (first: ")
    with pytest.raises(ValueError, match=rf"a\.{suffix}: (line|row|record) \d: .*--on-bad-record skip"):
        read(path)
    write_records(path, [{"text": None}] * 3)
    with pytest.raises(ValueError, match=r"(not one record is good: skipped 3 of 3|no field 'text')"):
        read(path, on_bad_record="skip")


def test_every_kind_of_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": 1}', b'{"text": ["a"]}', b"{}", b"7", b"{oops", b'{"text": "\xff"}', b"[" * 10**5]
    good = b'\r\n{"text": "a"}\r\n\r\n"b"'  # blank lines are no records
    for line in lines:
        path.write_bytes(line + good)
        assert read(path, on_bad_record="skip") == ["a", "b"]
        with pytest.raises(ValueError, match=r"a\.jsonl: line 1: "):
            read(path)
    path = tmp_path / "a.csv"
    for line in (b"1", b"1,\xff", b'1,"a"b'):
        path.write_bytes(b"id,text\n" + line + b'\n\n2,"a\nb"\n3,c\n')
        assert read(path, on_bad_record="skip") == ["a\nb", "c"]
    path.write_bytes(b'id,text\n1,a\n2,"b\n3,c\n')
    with pytest.raises(ValueError, match="ends inside of quotes"):
        read(path, on_bad_record="skip")
    with pytest.raises(ValueError, match="on_bad_record is 'ignore'"):
        DocumentReader(on_bad_record="ignore")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_fields(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_records(path, [{"id": 1, "data": {"text": "a"}}, {"id": 2, "data": {"text": "b"}}, {"id": 3, "data": None}])
    assert read(path, column="data.text", on_bad_record="skip") == ["a", "b"]
    with pytest.raises(ValueError, match=r"its fields are 'id', 'data': choose one with --column data\.text"):
        read(path)
    with pytest.raises(ValueError, match=r"(row|line|record) \d: 'data' is null"):
        read(path, column="data.text")
    write_records(path, [{"data.text": "a", "body": "b"}])
    assert read(path, column="data.text") == ["a"]
    with pytest.raises(ValueError, match=r"'data\.text', 'body': choose one with --column NAME"):
        read(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    for user, content in (("Hi.", "Hello."), ([{"type": "text", "text": "Hi."}], parts)):
        write_records(
            path, [{"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": content}]}]
        )
        assert read(path, column="messages") == ["user: Hi.\n\nassistant: Hello."]
    with pytest.raises(ValueError, match="--column messages"):
        read(path)
    write_records(path, [{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}])
    assert read(path, column="conversations") == ["human: Hi.\n\ngpt: Hello."]
    write_records(path, [{"messages": [{"role": "a", "content": "b"}, {"role": "c", "content": None}]}])
    with pytest.raises(ValueError, match="the content of message 2 is null"):
        read(path, column="messages")


def test_json_lines_by_the_name_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n{"text": null}')
    assert read(tmp_path / "a.json", on_bad_record="skip") == ["a", "b"]


# ---- marks between documents ----


@given(
    st.lists(st.sampled_from([EOT, "<|endoftext", "|>", "<", "a b", " c", "\n", "  "]), max_size=12), st.integers(1, 9)
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_marks_fall_anywhere(parts: list[str], size: int) -> None:
    whole = "".join(parts)
    cut = documents._cut((whole[i : i + size] for i in range(0, len(whole), size)), EOT)
    pieces = list(documents._pieces(cut))
    expected = [d.strip() for d in whole.split(EOT) if d.strip()]
    assert [p.text for p in documents.join_pieces(pieces)] == expected and sum(p.first for p in pieces) == len(expected)


def test_marks_are_letters_unless_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"one\n{EOT}\ntwo\n{EOT}\n".encode())
    reader = DocumentReader()
    assert list(reader.documents([path])) == [path.read_bytes().decode()]
    assert len(reader.report()) == 1 and f"--document-separator '{EOT}'" in reader.report()[0]
    reader = DocumentReader(separator=EOT)
    assert list(reader.pieces(path)) == [Piece("one", True), Piece("two", True)] and not reader.report()
    written = text.prepare([path], tmp_path / "out", tokenizer="bytes", separator=EOT, val=0)
    assert read_shard(written.train[0]).tolist() == [256, *b"one", 256, *b"two"]


# ---- training ----


def test_processes_cannot_share_standard_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train_main(["--data", "-", "--processes", "2"]) == 2
    assert "llmc data text -" in capsys.readouterr().err


def test_a_run_reads_as_llmc_data_does(tmp_path: Path) -> None:
    rows: list[Any] = [{"data": {"body": f"{t}{EOT}{t}"}} for t in TEXTS]
    write_records(tmp_path / "a.jsonl", [*rows[:2], {"data": None}, *rows[2:]])
    (tmp_path / "a.txt").write_text(EOT.join(TEXTS), encoding="utf-8")
    written = text.prepare(
        [tmp_path / "a.jsonl", tmp_path / "a.txt"], tmp_path / "out", tokenizer="bytes", column="data.body",
        on_bad_record="skip", separator=EOT, val=0,
    )  # fmt: skip
    said: list[str] = []
    found = sources.prepare(
        llmc.TrainConfig(
            data=(str(tmp_path / "a.jsonl"), str(tmp_path / "a.txt")), tokenizer="bytes", column="data.body",
            on_bad_record="skip", document_separator=EOT,
        ),
        None,
        said.append,
    )  # fmt: skip
    assert said == [
        f"skipped 1 of 5 records: 1 in {tmp_path / 'a.jsonl'} (first: line 3: 'data' is null, expected a record)"
    ]
    train, val = (read_shard(p) for p in (*found.train, *found.val))
    tokens = np.concatenate([train, val[1:]])  # what is held out of a document begins with end-of-text as well
    assert tokens.tolist() == read_shard(written.train[0]).tolist()
    assert tokens.tolist().count(256) == len(rows) + len(TEXTS)
