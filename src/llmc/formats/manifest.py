"""The manifest: what llmc writes into a checkpoint's DONE file, which llm.c leaves empty.

It is JSON with a checksum of itself, and vouches for the two other files of the checkpoint by their sizes and checksums. It also has
the settings and data of the run, and the small part of its state that llm.c does not keep.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmc.formats.stream import CheckpointDamaged

_FORMAT = 1
_PIECE = 64 << 20  # bytes under one checksum, so that damage can be placed

_T = TypeVar("_T")


class Checksums:
    """The checksums of a file that is being written: call it with every part of the file in order."""

    def __init__(self) -> None:
        self._crcs: list[int] = []
        self._crc, self._size = 0, 0

    def __call__(self, view: memoryview) -> None:
        while len(view):
            room = _PIECE - self._size % _PIECE
            part, view = view[:room], view[room:]
            self._crc = zlib.crc32(part, self._crc)
            self._size += len(part)
            if len(part) == room:
                self._crcs.append(self._crc)
                self._crc = 0

    def record(self) -> FileRecord:
        """Return the record of all that was seen."""
        rest = [self._crc] if self._size % _PIECE else []
        return FileRecord(self._size, self._crcs + rest)


@dataclass(frozen=True)
class FileRecord:
    """A file's size, and the CRC-32 of each 64 MiB of it."""

    bytes: int
    crc32: list[int]

    def verify(self, path: Path) -> None:
        """Compare a file with the record.

        Raises:
            CheckpointDamaged: if it differs, is missing or cannot be read; the message names the place.
        """
        try:
            size = path.stat().st_size
            if size != self.bytes:
                raise CheckpointDamaged(f"{path}: {size} bytes, its manifest says {self.bytes}")
            with open(path, "rb") as file:
                for i, crc in enumerate(self.crc32):
                    if zlib.crc32(file.read(_PIECE)) != crc:
                        end = min(size, (i + 1) * _PIECE)
                        raise CheckpointDamaged(f"{path}: damaged between bytes {i * _PIECE} and {end}")
        except FileNotFoundError:
            raise CheckpointDamaged(f"{path}: missing, though its manifest exists") from None
        except OSError as e:
            raise CheckpointDamaged(f"{path}: cannot be read: {e}") from e


@dataclass(frozen=True)
class DataFile:
    """A token file that a run was trained on: its name without folders, its size, and the CRC-32 of its first and last MiB."""

    name: str
    bytes: int
    crc32: int


@dataclass(frozen=True)
class LoaderPosition:
    """Where the data loader stands; the order of shards and samples is in the state file."""

    rows_per_sample: int
    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class SavedState:
    """The part of a TrainState that JSON holds."""

    optimizer_step: int
    optimizer_rng: int
    shuffle: bool
    loader: LoaderPosition
    extra: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        llmc: the version that wrote it.
        step: number of updates made.
        files: records of the model and the state file, by name.
        state: what the state file does not hold.
        config: the run's settings, as JSON holds them.
        model: the fields of the model's config.
        dtype: 'f32' or 'bf16'.
        data: the token files that the run was trained on.
    """

    llmc: str
    step: int
    files: dict[str, FileRecord]
    state: SavedState
    config: dict[str, Any]
    model: dict[str, Any]
    dtype: str
    data: list[DataFile]

    def to_json(self) -> str:
        """Return the text of the DONE file."""
        return signed({"format": _FORMAT, **asdict(self)})

    @staticmethod
    def from_json(text: bytes, path: Path) -> Manifest:
        """Read the text of a DONE file.

        Args:
            text: the file's content.
            path: the file, for messages.

        Raises:
            CheckpointDamaged: if the text is not a manifest with a matching checksum, or a value is missing or of a wrong type; the
                message names the value.
        """
        try:
            outer = _Object(_typed("text", json.loads(text), dict))
            values = _Object(outer.object("manifest").values)
            if zlib.crc32(_canonical(values.values).encode()) != outer.integer("crc32"):
                raise ValueError("its checksum does not match")
            if (version := values.integer("format")) != _FORMAT:
                raise ValueError(f"its format is {version}, this llmc reads {_FORMAT}")
            return _manifest(values)
        except (ValueError, RecursionError) as e:
            raise CheckpointDamaged(f"{path}: damaged manifest: {e}") from e

    def differences(
        self, names: Iterable[str], config: Mapping[str, Any], data: list[DataFile], *, defaults: Mapping[str, Any]
    ) -> list[str]:
        """Return in words how a run differs from the one that was saved.

        Args:
            names: the settings that are compared.
            config: the run's settings.
            data: the run's token files.
            defaults: what a setting was if the manifest does not have it, because the llmc that wrote it did not have it yet. A
                setting that neither has was None.
        """
        pairs = ((n, self.config.get(n, defaults.get(n)), config.get(n)) for n in names)
        out = [f"{n} was {then}, is {now}" for n, then, now in pairs if then != now]
        if self.data != data:
            before, after = ({file.name: file for file in files} for files in (self.data, data))
            changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)) or [
                "their order"
            ]
            out.append(f"the data changed ({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''})")
        return out


def signed(values: dict[str, Any]) -> str:
    """Return a manifest's values as JSON with a checksum of themselves."""
    crc = zlib.crc32(_canonical(values).encode())
    return json.dumps({"crc32": crc, "manifest": values}, indent=1, sort_keys=True) + "\n"


def _canonical(values: dict[str, Any]) -> str:
    """Return the text of which the checksum is taken."""
    return json.dumps(values, indent=1, sort_keys=True)


class _Object:
    """A JSON object whose values are taken by the type that they must have.

    Every method raises ValueError, which names the value, if it is missing or of another type.
    """

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self.values, self._place = values, place

    def _get(self, name: str, kind: type[_T]) -> tuple[str, _T]:
        place = self._place + name
        if name not in self.values:
            raise ValueError(f"it has no {place}")
        return place, _typed(place, self.values[name], kind)

    def object(self, name: str) -> _Object:
        place, values = self._get(name, dict)
        return _Object(values, f"{place}.")

    def objects(self, name: str) -> list[_Object]:
        place, rows = self._get(name, list)
        return [_Object(_typed(f"{place}[{i}]", row, dict), f"{place}[{i}].") for i, row in enumerate(rows)]

    def text(self, name: str) -> str:
        return self._get(name, str)[1]

    def boolean(self, name: str) -> bool:
        return self._get(name, bool)[1]

    def integer(self, name: str, bits: int = 64) -> int:
        place, value = self._get(name, int)
        if not 0 <= value < 2**bits:
            raise _wrong(place, value)
        return value

    def integers(self, name: str) -> list[int]:
        place, values = self._get(name, list)
        return [_typed(f"{place}[{i}]", value, int) for i, value in enumerate(values)]


def _typed(place: str, value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(place, value)
    return value


def _wrong(place: str, value: Any) -> ValueError:
    return ValueError(f"its {place} is {value!r:.60}")


def _manifest(values: _Object) -> Manifest:
    files = {}
    for name in (listed := values.object("files")).values:
        row = listed.object(name)
        files[name] = FileRecord(row.integer("bytes"), row.integers("crc32"))
        if len(files[name].crc32) != -(-files[name].bytes // _PIECE):
            raise ValueError(f"it has {len(files[name].crc32)} checksums for the {files[name].bytes} bytes of {name}")
    state = values.object("state")
    loader = state.object("loader")
    position = LoaderPosition(*(loader.integer(name, 63) for name in ("rows_per_sample", "epoch", "shard", "row")))
    if position.rows_per_sample == 0:
        raise _wrong("state.loader.rows_per_sample", 0)
    return Manifest(
        llmc=values.text("llmc"),
        step=values.integer("step"),
        files=files,
        state=SavedState(
            optimizer_step=state.integer("optimizer_step"),
            optimizer_rng=state.integer("optimizer_rng"),
            shuffle=state.boolean("shuffle"),
            loader=position,
            extra=state.object("extra").values,
        ),
        config=values.object("config").values,
        model=values.object("model").values,
        dtype=values.text("dtype"),
        data=[DataFile(row.text("name"), row.integer("bytes"), row.integer("crc32")) for row in values.objects("data")],
    )
