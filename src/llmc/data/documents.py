"""The reader of documents: plain text, JSON lines, JSON, CSV and Parquet, as a stream.

A document comes as one piece or several. A long text is cut at places at which GPT-2's split into words has a boundary, whatever text
follows: before the first blank after a word. The pieces' tokens in a row are then the tokens of the whole text, so a file of any
size is tokenised in parallel and in little memory.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmc.data.words import cut

_PIECE = 1 << 20  # characters
_LONGEST_LINE = 1 << 30  # bytes of a line of JSON lines

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Progress = Callable[[int], object]  # is called with the number of bytes of input read since the last call


class Piece(NamedTuple):
    """A part of a document, or all of it.

    Attributes:
        text: the characters.
        first: whether the document begins with this piece.
    """

    text: str
    first: bool


@dataclass(frozen=True)
class DocumentReader:
    """Reads the documents of files as a stream.

    The suffix says what a file is: JSON lines, JSON, CSV, TSV or Parquet, which have a document in each record; any other file is one
    document of text.

    Args:
        column: the field of a record that has the text.
    """

    column: str = "text"

    def pieces(self, path: Path, progress: Progress = lambda count: None) -> Iterator[Piece]:
        """Read the documents of a file.

        Args:
            path: the file.
            progress: called as bytes of the file are read.

        Raises:
            ValueError: if the file is not what its suffix says, or has no such column; the message names file and place.
            ImportError: if the file is Parquet and pyarrow is not installed.
        """
        suffix = path.suffix.lower()
        if suffix not in TABLE_SUFFIXES:
            return _read_text(path, progress)
        reader = {
            ".jsonl": _read_json_lines,
            ".ndjson": _read_json_lines,
            ".json": _read_json,
            ".parquet": _read_parquet,
        }
        rows = reader.get(suffix, _read_csv)(path, self.column, progress)
        return (Piece(text, True) for text in rows)

    def documents(self, paths: Iterable[Path]) -> Iterator[str]:
        """Read the documents of several files, each as one string; errors as of pieces()."""
        return join_pieces(piece for path in paths for piece in self.pieces(path))


def join_pieces(pieces: Iterable[Piece]) -> Iterator[str]:
    """Put the pieces of each document together again."""
    parts: list[str] = []
    for piece in pieces:
        if piece.first and parts:
            yield "".join(parts)
            parts = []
        parts.append(piece.text)
    if parts:
        yield "".join(parts)


def _read_text(path: Path, progress: Progress) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, first, offset = "", True, 0
    with open(path, "rb") as file:
        if (
            file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        ):  # some editors write this mark; it is no character of the text
            offset = len(codecs.BOM_UTF8)
            progress(offset)
        else:
            file.seek(0)
        while True:
            raw = file.read(_PIECE)
            kept = len(decoder.getstate()[0])  # bytes of a character whose other bytes have not been read yet
            try:
                text = rest + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"{path}: not UTF-8 text: byte {offset - kept + e.start} is 0x{e.object[e.start]:02x}"
                ) from e
            offset += len(raw)
            progress(len(raw))
            if not raw:
                break
            pieces, rest = cut(text)
            for piece in pieces:
                yield Piece(piece, first)
                first = False
    if text or first:
        yield Piece(text, first)


def _text_of(record: Any, column: str, place: str) -> str:
    """Return a record's text; place names the record in an error."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a {type(record).__name__}, expected a string or a record with '{column}'")
    value = record.get(column)
    if not isinstance(value, str):
        found = f"'{column}' is {type(value).__name__}" if column in record else f"no '{column}'"
        raise ValueError(
            f"{place}: {found}; its fields are {', '.join(map(repr, record)) or 'none'}: choose with --column"
        )
    return value


def _read_json_lines(path: Path, column: str, progress: Progress) -> Iterator[str]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"{path}:{number}: a line of more than 1 GiB: is this JSON lines?")
            progress(len(line))
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}:{number}: not JSON: {e}") from e
            yield _text_of(record, column, f"{path}:{number}")


def load_json(path: Path) -> Any:
    """Read a whole JSON file.

    Raises:
        ValueError: if it is not JSON.
    """
    with open(path, "rb") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not JSON: {e}") from e


def _read_json(path: Path, column: str, progress: Progress) -> Iterator[str]:
    """Read a file that is one array. It is held in memory as a whole."""
    records = load_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a {type(records).__name__}, expected an array of strings or records")
    for i, record in enumerate(records):
        yield _text_of(record, column, f"{path}: record {i}")
    progress(path.stat().st_size)


def _read_csv(path: Path, column: str, progress: Progress) -> Iterator[str]:
    csv.field_size_limit(_LONGEST_LINE)
    with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
        try:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            if column not in (rows.fieldnames or ()):
                raise ValueError(
                    f"{path}: no column '{column}'; it has {', '.join(map(repr, rows.fieldnames or ())) or 'none'}: "
                    "choose with --column"
                )
            for row in rows:
                text = row[column]
                if text is None:
                    raise ValueError(f"{path}:{rows.line_num}: a row that ends before column '{column}'")
                yield text
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path}:{rows.line_num}: not CSV in UTF-8: {e}") from e
    progress(path.stat().st_size)


def _read_parquet(path: Path, column: str, progress: Progress) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError(f"{path}: reading Parquet needs a package: pip install pyarrow") from e
    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise ValueError(
                    f"{path}: no column '{column}'; it has {', '.join(map(repr, names))}: choose with --column"
                )
            done = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"{path}: column '{column}' has a {type(text).__name__}, expected text")
                    yield text
                progress(
                    size * (done + batch.num_rows) // file.metadata.num_rows - size * done // file.metadata.num_rows
                )
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}: not a whole Parquet file: {e}") from e


def language_reference() -> list[str]:
    """Return the topics of Python's language reference, a text that every Python carries. Releases differ a little in it."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
