"""The reader of documents: plain text, JSON lines, JSON, CSV and Parquet, compressed or not, as a stream.

A document comes as one piece or several. A long text is cut at places at which GPT-2's split into words has a boundary, whatever text
follows (words.py). The pieces' tokens in a row are then the tokens of the whole text, so a file of any size is tokenised in parallel
and in little memory.

What is wrong is of two kinds. A record that has no text (not JSON, null, another type, no such field, ...) is a bad record: the
caller chooses whether it ends the reading or is skipped and counted. A file that is damaged, or is no text, always ends it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import importlib
import io
import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from llmc.data.roles import EOT
from llmc.data.words import cut
from llmc.system.fs import shell_word

_PIECE = 1 << 20  # characters
_LONGEST_LINE = 1 << 30  # characters of a line of JSON lines
_HEAD = 512  # bytes by which it is told what a file is

STDIN = Path("-")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

Progress = Callable[[int], object]  # is called with the number of bytes of input read since the last call


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file is, in lower case: .jsonl of a.JSONL and of a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_SUFFIXES else name.suffix


def input_size(paths: Iterable[Path]) -> int | None:
    """Return the bytes of files together; None if that is not known, as of a pipe."""
    paths = list(paths)
    return sum(p.stat().st_size for p in paths) if all(p.is_file() for p in paths) else None


class Piece(NamedTuple):
    """A part of a document, or all of it.

    Attributes:
        text: the characters.
        first: whether the document begins with this piece.
    """

    text: str
    first: bool


class BadRecord(ValueError):
    """What is wrong with one record, without its place."""


@dataclass
class _Count:
    """The records of one file; `first` has place and fault of the first bad one."""

    records: int = 0
    bad: int = 0
    first: str = ""


@dataclass
class DocumentReader:
    """Reads the documents of files as a stream, and counts the records that it skips.

    The suffix says what a file is: JSON lines, JSON, CSV, TSV or Parquet, which have a document in each record; any other file is
    text. Texts and all of these but Parquet may be compressed by gzip, bzip2, xz or zstandard, in UTF-8, or in UTF-16 with its
    byte order mark; Path("-") is the standard input, read as text.

    Args:
        column: the field of a record that has the text, or a chat: a list of messages with role and content. A dot leads into a
            nested record, as "data.text", unless a field has that very name.
        on_bad_record: "stop" to raise an error at a record without a text, "skip" to leave it out.
        separator: the mark between the documents of a text file; white space next to it is dropped, and so are documents that have
            nothing else. Empty: a text file is one document, as it is.

    Raises:
        ValueError: if on_bad_record is something else.
    """

    column: str = "text"
    on_bad_record: str = "stop"
    separator: str = ""
    _counts: dict[Path, _Count] = field(default_factory=dict, init=False)
    _stdin_read: bool = field(default=False, init=False)
    _with_marks: Path | None = field(default=None, init=False)  # a text that has end-of-text as letters

    def __post_init__(self) -> None:
        if self.on_bad_record not in ("stop", "skip"):
            raise ValueError(f"on_bad_record is {self.on_bad_record!r}, expected stop or skip")

    def pieces(self, path: Path, progress: Progress = lambda count: None) -> Iterator[Piece]:
        """Read the documents of a file.

        Args:
            path: the file.
            progress: called as bytes of the file are read.

        Raises:
            ValueError: if the file is not what its suffix says, is damaged, or has a bad record that is not to be skipped; the message
                names file and place.
            ImportError: if the file needs a package that is not installed: Parquet, or zstandard before Python 3.14.
        """
        suffix = suffix_of(path)
        if suffix == ".parquet":
            # Closed at once, also after an error: Windows neither replaces nor removes an open file.
            with contextlib.closing(_read_parquet(path, self.column, progress)) as records:
                yield from self._texts(path, records)
            return
        if path == STDIN and self._stdin_read:
            raise ValueError("the standard input, '-', is named twice, but can be read only once")
        self._stdin_read |= path == STDIN
        with _open(path, progress) as source:
            if suffix in (".jsonl", ".ndjson"):
                yield from self._texts(path, _read_json_lines(path, source.lines("\n")))
            elif suffix == ".json":
                yield from self._texts(path, _read_json(path, source.lines("\n")))
            elif suffix in (".csv", ".tsv"):
                yield from self._texts(path, _read_csv(path, source.lines(""), self.column, suffix))
            else:
                yield from _pieces(self._parts(path, source))

    def stream(self, paths: Iterable[Path], progress: Progress = lambda count: None) -> Iterator[Piece]:
        """Read the documents of several files; errors as of pieces().

        Raises:
            ValueError: besides, at the end, if not one record was good.
        """
        found, bad = False, False
        for path in paths:
            for piece in self.pieces(path, progress):
                found = True
                yield piece
            bad |= path in self._counts and self._counts[path].bad > 0
        if bad and not found:
            raise ValueError(f"not one record is good: {self.report()[0]}")

    def documents(self, paths: Iterable[Path]) -> Iterator[str]:
        """Read the documents of several files, each as one string; errors as of stream()."""
        return (document.text for document in join_pieces(self.stream(paths)))

    def report(self) -> list[str]:
        """Return what the user should know of what was read, in lines: records that were skipped, marks that were read as letters."""
        lines = []
        if bad := {path: count for path, count in self._counts.items() if count.bad}:
            total, records = sum(c.bad for c in bad.values()), sum(c.records for c in self._counts.values())
            files = [f"{count.bad:,} in {path} (first: {count.first})" for path, count in bad.items()]
            more = [f"and in {len(files) - 5} more files"] if len(files) > 5 else []
            lines.append(f"skipped {total:,} of {records:,} records: {', '.join([*files[:5], *more])}")
        if self._with_marks is not None:
            lines.append(
                f"{self._with_marks} has {EOT}, which is read as letters; --document-separator '{EOT}' cuts documents there"
            )
        return lines

    def _parts(self, path: Path, source: _Source) -> Iterator[tuple[str, bool]]:
        """Read a text in parts, each with whether its document ends there."""
        if self.separator:
            yield from _cut(source.characters(), self.separator)
            return
        for text in source.characters():
            if self._with_marks is None and EOT in text:
                self._with_marks = path
            yield text, False
        yield "", True

    def _texts(self, path: Path, records: Iterator[tuple[str, Any]]) -> Iterator[Piece]:
        """Turn records, each with its place, into documents."""
        count = self._counts[path] = _Count()  # a file that is read again is counted anew
        for place, record in records:
            count.records += 1
            try:
                text = _text_of(record, self.column)
            except BadRecord as e:
                if self.on_bad_record == "stop":
                    raise ValueError(f"{path}: {place}: {e}; --on-bad-record skip leaves such records out") from e
                count.bad += 1
                count.first = count.first or f"{place}: {e}"
            else:
                yield Piece(text, True)


def join_pieces(pieces: Iterable[Piece], may_cut: Callable[[str, str], bool] = lambda *_: False) -> Iterator[Piece]:
    """Put the pieces of each document together again, but between two that may_cut() lets be apart."""
    held: list[Piece] = []
    for piece in pieces:
        if held and (piece.first or may_cut(held[-1].text, piece.text)):
            yield Piece("".join(p.text for p in held), held[0].first)
            held = []
        held.append(piece)
    if held:
        yield Piece("".join(p.text for p in held), held[0].first)


# ---- files as streams of characters ----


# What a file is, by its first bytes. A name is no proof: browsers unpack .gz files on the way and keep the name.
_COMPRESSED = {  # the modules, which a Python may have been built without
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "lzma",
    b"\x28\xb5\x2f\xfd": "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
}
_BYTE_ORDER_MARKS = {  # UTF-32's first: it begins like UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NO_TEXT = {  # for which there is better advice than where its first byte of 0 is
    b"%PDF-": "a PDF: extract its text first, as with pdftotext",
    b"{\\rtf": "RTF: save it as plain text",
    b"PK\x03\x04": "a zip archive, or a file made of one (.docx, .xlsx, .epub, .npz, .pt): unpack it, or save it as text",
    b"PAR1": "Parquet: give the file the suffix .parquet",
    b"\xff\xff\xff\xff": "an Arrow stream, as save_to_disk of datasets writes it: save it by to_parquet() or to_json()",
    b"\x93NUMPY": "a NumPy array, not text: `llmc data tokens` converts one of token ids",
}


class _Source(io.RawIOBase):
    """A stream of bytes whose first ones have been looked at, and that says where it is damaged."""

    def __init__(self, path: Path, file: Any, progress: Progress) -> None:
        self._path, self._file, self._progress = path, file, progress
        self._count = 0
        self.head = self._rest = self._taken(file.read, _HEAD)
        self._mark = b""
        self._encoding = "utf-8"

    def _taken(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            data = read(size)
        except Exception as e:  # a decompressor has its own errors, and the standard library's
            if isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno is not None):
                raise
            raise ValueError(f"{self._path}: damaged or incomplete after {self._count:,} bytes of content: {e}") from e
        self._count += len(data)
        self._progress(len(data))
        return data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        data = data or self._taken(self._file.read1, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def begin_text(self) -> None:
        """Find the encoding, and pass over the byte order mark: it is no character of the text."""
        for self._mark, self._encoding in {**_BYTE_ORDER_MARKS, b"": "utf-8"}.items():
            if self.head.startswith(self._mark):
                break
        self._rest = self._rest[len(self._mark) :]
        for magic, what in _NO_TEXT.items():
            if self.head.startswith(magic):
                raise ValueError(f"{self._path}: {what}")
        if self._encoding == "utf-8" and (at := self.head.find(b"\0")) >= 0:
            raise ValueError(f"{self._path}: not text: byte {at} is 0 (UTF-16 is read if it has its byte order mark)")

    def characters(self) -> Iterator[str]:
        """Read the text in long parts."""
        decoder = codecs.getincrementaldecoder(self._encoding)()
        file, offset = io.BufferedReader(self), len(self._mark)
        while True:
            raw = file.read(_PIECE)
            kept = len(decoder.getstate()[0])  # bytes of a character whose other bytes have not been read yet
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as e:
                raise ValueError(
                    f"{self._path}: not {self._encoding.upper()} text: byte {offset - kept + e.start} is 0x{e.object[e.start]:02x}"
                ) from e
            offset += len(raw)
            if text:
                yield text
            if not raw:
                return

    def lines(self, newline: str) -> io.TextIOWrapper:
        """Return the text as a file. A byte that is not UTF-8 becomes a lone surrogate, for _check_bytes() to find."""
        errors = "surrogateescape" if self._encoding == "utf-8" else "replace"
        return io.TextIOWrapper(io.BufferedReader(self, 1 << 16), self._encoding, errors, newline)


@contextlib.contextmanager
def _open(path: Path, progress: Progress) -> Iterator[_Source]:
    """Open a text, compressed or not."""
    if path == STDIN and sys.stdin is None:
        raise ValueError("there is no standard input to read")
    with contextlib.nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb") as file:
        source = _Source(path, file, progress)
        for magic, module in _COMPRESSED.items():
            if source.head.startswith(magic):
                source = _Source(path, _decompressor(path, module)(io.BufferedReader(source)), lambda count: None)
                break
        source.begin_text()
        yield source


def _decompressor(path: Path, module: str) -> Callable[[Any], Any]:
    try:
        opener: Callable[[Any], Any] = importlib.import_module(module).open
    except ImportError as e:
        backport = "reading zstandard needs a package: pip install backports.zstd"
        raise ImportError(
            f"{path}: {backport if module.startswith('backports') else f'this Python was built without {module}'}"
        ) from e
    return opener


# ---- text ----


def _cut(texts: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Cut a text, which comes in any parts, into documents, and drop the white space around them."""
    rest, begun = "", False  # begun: a part of the document has been yielded
    for text in texts:
        *ended, rest = (rest + text).split(separator)
        for document in ended:
            document = document.rstrip() if begun else document.strip()
            if document or begun:
                yield document, True
            begun = False
        rest = rest if begun else rest.lstrip()
        # What may be the beginning of a separator, or white space before one, waits for what follows.
        sure = len(rest[: max(0, len(rest) - len(separator) + 1)].rstrip())
        if sure:
            yield rest[:sure], False
            rest, begun = rest[sure:], True
    rest = rest.rstrip()
    if rest or begun:
        yield rest, True


def _pieces(parts: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    """Cut documents at boundaries between words; an empty document is a piece, too."""
    rest, first = "", True
    for text, ends in parts:
        pieces, rest = cut(rest, text)
        if ends and (rest or (first and not pieces)):
            pieces, rest = [*pieces, rest], ""
        for piece in pieces:
            yield Piece(piece, first)
            first = False
        first = first or ends


# ---- records ----


def _text_of(record: Any, column: str) -> str:
    """Return a record's text.

    Raises:
        BadRecord: if it has none.
    """
    if isinstance(record, BadRecord):
        raise record
    value = record if isinstance(record, str) else _field(record, column)
    if isinstance(value, str):
        return value
    if _is_chat(value):
        return "\n\n".join(_message(message, number) for number, message in enumerate(value, 1))
    hint = "" if value is None else _hint(record, column)
    raise BadRecord(f"'{column}' is {_kind(value)}, expected text{hint}")


def _field(record: Any, column: str) -> Any:
    if not isinstance(record, dict):
        raise BadRecord(f"{_kind(record)}, expected text or a record with '{column}'")
    if column in record:
        return record[column]
    value: Any = record
    names = column.split(".")
    for i, name in enumerate(names):
        if not isinstance(value, dict):
            raise BadRecord(f"'{'.'.join(names[:i])}' is {_kind(value)}, expected a record")
        if name not in value:
            raise BadRecord(f"no field '{column}'{_hint(record, column)}")
        value = value[name]
    return value


def _hint(record: dict[str, Any], column: str) -> str:
    """Name a record's fields, and the option that chooses one; if one alone other than column has text, that one."""
    texts = [name for name, value in _leaves(record) if name != column and (isinstance(value, str) or _is_chat(value))]
    names = [f"{name!r:.60}" for name in [*record][:20]] + ["..."] * (len(record) > 20)
    choice = f": choose one with --column {shell_word(texts[0]) if len(texts) == 1 else 'NAME'}" if texts else ""
    return f"; its fields are {', '.join(names) or 'none'}{choice}"


def _leaves(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a record", str: "text"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


# Chats are written in two forms: {"role": "user", "content": "..."}, and {"from": "human", "value": "..."} of ShareGPT.


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in value
        )
    )


def _message(message: dict[str, Any], number: int) -> str:
    content = message["content"] if "content" in message else message["value"]
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRecord(f"the content of message {number} is {_kind(content)}, expected text")
    return f"{message.get('role', message.get('from'))}: {content}"


def _check_bytes(text: str) -> None:
    """Raise BadRecord if a byte of a text was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadRecord(f"not UTF-8: it has the byte 0x{ord(text[e.start]) & 0xFF:02x}") from e


# Each of the readers yields a record's place and the record, or in place of it a BadRecord.


def _read_json_lines(path: Path, file: IO[str], first: str = "") -> Iterator[tuple[str, Any]]:
    """Read records, a line each; first: the first line, if it has been read already."""
    number = 0
    while line := first or file.readline(_LONGEST_LINE):
        number, first = number + 1, ""
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"{path}: line {number}: more than {_LONGEST_LINE:,} characters: is this JSON lines?")
        if not line.strip():
            continue
        record: Any
        try:
            _check_bytes(line)
            record = json.loads(line)
        except BadRecord as e:
            record = e
        except (ValueError, RecursionError) as e:
            record = BadRecord(f"not JSON: {e}")
        yield f"line {number}", record


def _read_json(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """Read a file that is one array, which is held in memory as a whole, or JSON lines in spite of its name."""
    first = file.readline()
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(first), dict):
            return _read_json_lines(path, file, first)
    content = first + file.read()
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds {_kind(records)}, expected an array of texts or records")
    return ((f"record {number}", record) for number, record in enumerate(records))


def _read_csv(path: Path, file: IO[str], column: str, suffix: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_LINE)
    rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        names = next(filter(None, rows), [])  # blank lines may come first
        _field(dict.fromkeys(names, ""), column)
    except (csv.Error, BadRecord) as e:
        raise ValueError(f"{path}: {e}") from e
    at = names.index(column)
    record: Any
    while True:
        try:
            if (row := next(rows, None)) is None:
                return
            if not row:  # a blank line
                continue
            if len(row) <= at:
                raise BadRecord(f"the row ends before column '{column}'")
            _check_bytes(record := row[at])
        except BadRecord as e:
            record = e
        except csv.Error as e:
            if "end of data" in str(e):
                raise ValueError(f"{path}: line {rows.line_num}: the file ends inside of quotes") from e
            record = BadRecord(f"not CSV: {e}")
        yield f"line {rows.line_num}", record


def _read_parquet(path: Path, column: str, progress: Progress) -> Generator[tuple[str, Any], None, None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError(f"{path}: reading Parquet needs a package: pip install pyarrow") from e
    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = [file.schema.column(i).path for i in range(len(file.schema))]
            if not any(f"{name}.".startswith(f"{column}.") for name in fields):
                for batch in file.iter_batches(batch_size=1):
                    try:
                        _field(batch.to_pylist()[0], column)
                    except BadRecord as e:
                        raise ValueError(f"{path}: {e}") from e
            done = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for number, record in enumerate(batch.to_pylist(), done):
                    yield f"row {number}", record
                progress(
                    size * (done + batch.num_rows) // file.metadata.num_rows - size * done // file.metadata.num_rows
                )
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}: not a whole Parquet file: {e}") from e
