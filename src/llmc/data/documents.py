"""Documents out of files: plain text, JSON lines, JSON, CSV and Parquet, read as a stream.

A document comes as one piece or several. Long texts are cut where GPT-2's split into words has a boundary whatever follows: before
the first blank after a word. The pieces' tokens in a row are then the tokens of the whole, so a file of any size is tokenised in
parallel and in little memory.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_PIECE = 1 << 20  # characters
_LONGEST_WORD = 64 << 20  # characters without a blank: no text looks like that
_LONGEST_LINE = 1 << 30  # of JSON lines, in bytes

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Progress = Callable[[int], object]  # is told how many bytes of input have been consumed


class Piece(NamedTuple):
    text: str
    first: bool  # whether a document begins here


def read_pieces(path: Path, column: str = "text", progress: Progress = lambda count: None) -> Iterator[Piece]:
    """The documents of a file, by its suffix: JSON lines, JSON, CSV, TSV, Parquet, else one document of text.

    column: the field that has the text, in files of records.
    ValueError, naming file and place, where the file is not what its suffix says or has no such column.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        return _read_text(path, progress)
    reader = {".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}
    rows = reader.get(suffix, _read_csv)(path, column, progress)
    return (Piece(text, True) for text in rows)


def read_documents(paths: Iterable[Path], column: str = "text") -> Iterator[str]:
    """Whole documents."""
    for path in paths:
        parts: list[str] = []
        for piece in read_pieces(path, column):
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
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:  # a mark of some editors, not a character of the text
            offset = len(codecs.BOM_UTF8)
            progress(offset)
        else:
            file.seek(0)
        while True:
            raw = file.read(_PIECE)
            kept = len(decoder.getstate()[0])  # bytes of a character that is not whole yet
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
            cut = _boundary(text)
            if cut == 0:
                rest = text
                if len(rest) > _LONGEST_WORD:
                    raise ValueError(f"{path}: no blank in {len(rest)} characters before byte {offset}: is this text?")
                continue
            yield Piece(text[:cut], first)
            rest, first = text[cut:], False
    if text or first:
        yield Piece(text, first)


def _boundary(text: str) -> int:
    """The last place where a blank or line break follows a character that is neither; 0 where there is none."""
    at = len(text)
    while (at := max(text.rfind(" ", 0, at), text.rfind("\n", 0, at))) > 0:
        if not text[at - 1].isspace():
            return at
    return 0


def _field(record: Any, column: str, place: str) -> str:
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
            yield _field(record, column, f"{path}:{number}")


def load_json(path: Path) -> Any:
    with open(path, "rb") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not JSON: {e}") from e


def _read_json(path: Path, column: str, progress: Progress) -> Iterator[str]:
    """One array; it is held in memory while it is read."""
    records = load_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a {type(records).__name__}, expected an array of strings or records")
    for i, record in enumerate(records):
        yield _field(record, column, f"{path}: record {i}")
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


def data_files(path: Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES + TABLE_SUFFIXES) -> list[Path]:
    """A file, or the files of a folder and its subfolders that have one of the suffixes, in sorted order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"'{path}' does not exist")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in suffixes)
    if not files:
        raise FileNotFoundError(f"folder '{path}' has no text ({', '.join(suffixes)})")
    return files
