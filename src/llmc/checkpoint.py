"""Checkpoints that survive.

A checkpoint of step s is llm.c's three files: model_<s>.bin, state_<s>_00000.bin (moments, master weights, data order) and DONE_<s>.
llm.c only looks whether DONE_<s> exists; here it is a manifest: sizes and checksums of the other two, the settings and data of the
run, and the little state that llm.c does not keep. It is written last and removed first, so whatever happens in between, every
DONE_<s> that exists speaks of files that were on the disk in full. llm.c reads our checkpoints, and we read llm.c's.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.system.fs import SYSTEM, Fs, StrPath, publish, stage, unstage, write_atomically
from llmc.system.memory import available_host_memory

if TYPE_CHECKING:
    from llmc.models.gpt2 import GPT2
    from llmc.optim.adamw import AdamW

MANIFEST_FORMAT = 1
_STATE_MAGIC = 20240527
_CHECKSUM_PIECE = 64 << 20
_CHUNK = 4 << 20  # elements moved at a time
_OURS = int.from_bytes(b"llmc", "little")  # at an unused place of the state's header: its DONE file is not empty
_MT_MATRIX = (0, 0x9908B0DF)  # the constants that llm.c's generator struct carries along


class CheckpointDamaged(_llmc.Error):
    """A checkpoint that is not whole: says which file, and what is wrong with it."""


# ---- tensors as streams of bytes ----


class _Readable(Protocol):
    """A tensor of a backend, or a copy of one."""

    @property
    def numel(self) -> int: ...
    def read(self, begin: int, count: int) -> NDArray[Any]: ...


_R = TypeVar("_R", bound=_Readable)


class _Copy:
    """A tensor's elements at one moment, in host memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array, self.numel = array, array.size

    def read(self, begin: int, count: int) -> NDArray[Any]:
        return self._array[begin : begin + count]


def _pieces(tensor: _Readable) -> Iterator[NDArray[Any]]:
    for begin in range(0, tensor.numel, _CHUNK):
        yield tensor.read(begin, min(_CHUNK, tensor.numel - begin))


def join_master(param: NDArray[np.uint16], low: NDArray[np.int16]) -> NDArray[np.float32]:
    """The f32 weights of bf16 parameters and the 16 bits below them (csrc/optim/master.h)."""
    return ((param.astype(np.uint32) << 16) + low.astype(np.int32).view(np.uint32)).view(np.float32)


def split_master(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """The inverse of join_master."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    high = ((bits + np.uint32(0x8000)) >> 16).astype(np.uint16)
    low = (bits - (high.astype(np.uint32) << 16)).astype(np.uint16).view(np.int16)
    return high, low


def save_model(model: GPT2, path: StrPath, *, fs: Fs = SYSTEM) -> None:
    """A llm.c model file of the model's dtype; whole or not at all."""
    write_atomically(path, _model_pieces(_weights(model)), fs=fs)


@dataclass
class _Weights(Generic[_R]):
    """The tensors of a checkpoint. masters: the lower halves of f32 weights, or empty."""

    header: bytes
    params: _R
    moments: list[_R]
    masters: list[_R]


def _weights(model: GPT2, optimizer: AdamW | None = None) -> _Weights[_llmc.Tensor]:
    rows = list(optimizer.state().values()) if optimizer else []
    masters = [low for _, _, low in rows if low is not None] if model.dtype == "bf16" else []
    return _Weights(
        _llmc.checkpoint_header(model.config.native(), model.dtype),
        model.all_parameters(),
        [m for m, _, _ in rows] + [v for _, v, _ in rows],
        masters if len(masters) == len(rows) else [],
    )


def _model_pieces(weights: _Weights[_R]) -> Iterator[Any]:
    yield weights.header
    yield from _pieces(weights.params)


class _Staging:
    """Host memory for the copy from which a checkpoint is written while training goes on.

    It is kept from save to save: the system takes longer to hand out new pages than the copying does.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def copy(self, weights: _Weights[_llmc.Tensor]) -> _Weights[_Copy] | None:
        """None where memory does not suffice for a copy."""
        needed = sum(_aligned(t) for t in (weights.params, *weights.moments, *weights.masters))
        if self._memory.size < needed:
            if available_host_memory() < needed:
                return None
            self._memory = np.empty(needed, np.uint8)
        used = 0

        def copied(tensor: _llmc.Tensor) -> _Copy:
            nonlocal used
            kind = _NUMPY[tensor.dtype]
            array = self._memory[used : used + tensor.numel * kind.itemsize].view(kind)
            tensor.to_host(array)
            used += _aligned(tensor)
            return _Copy(array)

        moments = [copied(t) for t in weights.moments]
        return _Weights(weights.header, copied(weights.params), moments, [copied(t) for t in weights.masters])


_NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    "i16": np.dtype(np.int16),
}


def _aligned(tensor: _llmc.Tensor) -> int:
    """Bytes of its copy, so that the next begins at a multiple of 64."""
    return -(-tensor.numel * _NUMPY[tensor.dtype].itemsize // 64) * 64


# ---- the state file ----


@dataclass
class TrainState:
    """What a run is made of beside its weights and moments."""

    step: int
    optimizer_step: int
    optimizer_rng: int
    loader: dict[str, Any]
    shuffle: bool
    extra: dict[str, Any] = field(default_factory=dict)  # of the Trainer: plain JSON


def _state_header(state: TrainState, master: bool) -> bytes:
    header = bytearray(1024)
    struct.pack_into("<6i", header, 0, _STATE_MAGIC, 1, 1, 0, int(master), int(state.shuffle))
    struct.pack_into("<i", header, 24, _OURS)
    struct.pack_into("<i", header, 40, state.step)
    # The state before the last update: llm.c rounds its weights anew from the masters with it.
    struct.pack_into("<QQ", header, 80, state.optimizer_rng, state.optimizer_rng)
    loader = state.loader
    struct.pack_into("<QQ", header, 120, loader["shard"], loader["row"] // loader["rows_per_sample"])
    return bytes(header)


def _loader_block(state: TrainState) -> bytes:
    if not state.shuffle:
        return b""
    loader = state.loader
    left, next_, words = loader["rng"]
    shards = np.asarray(loader["shard_indices"], dtype="<i4").tobytes()
    samples = np.asarray(loader["sample_indices"], dtype="<i4").tobytes()
    generator = (
        struct.pack("<QiI", 0, left, next_) + np.asarray(words, dtype="<u4").tobytes() + struct.pack("<2I", *_MT_MATRIX)
    )
    return struct.pack("<Q", len(shards) // 4) + shards + struct.pack("<Q", len(samples) // 4) + samples + generator


def _state_pieces(weights: _Weights[_R], state: TrainState) -> Iterator[Any]:
    yield _state_header(state, bool(weights.masters))
    for moment in weights.moments:
        yield from _pieces(moment)
    offset = 0
    for low in weights.masters:
        for begin in range(0, low.numel, _CHUNK):
            count = min(_CHUNK, low.numel - begin)
            yield join_master(weights.params.read(offset + begin, count), low.read(begin, count))
        offset += low.numel
    yield _loader_block(state)


# ---- saving ----


def checkpoint_names(step: int) -> tuple[str, str, str]:
    return f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"DONE_{step:08d}"


class _Checksums:
    """CRC-32 of each 64 MiB of a file, so that damage can be placed."""

    def __init__(self) -> None:
        self.crcs: list[int] = []
        self._crc, self._room = 0, _CHECKSUM_PIECE

    def __call__(self, view: memoryview) -> None:
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._crc = zlib.crc32(part, self._crc)
            self._room -= len(part)
            if self._room == 0:
                self._end_piece()

    def _end_piece(self) -> None:
        self.crcs.append(self._crc)
        self._crc, self._room = 0, _CHECKSUM_PIECE

    def finish(self) -> list[int]:
        if self._room < _CHECKSUM_PIECE:
            self._end_piece()
        return self.crcs


class Checkpointer:
    """Writes the checkpoints of one run directory, in the background where asked.

    keep: how many to keep, 0 for all. major_every: steps divisible by it are never removed.
    """

    def __init__(self, directory: StrPath, *, keep: int = 0, major_every: int = 0, fs: Fs = SYSTEM) -> None:
        self.directory = Path(directory)
        self.keep, self.major_every, self.fs = keep, major_every, fs
        self._staging = _Staging()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._completed: list[int] = []

    def save(
        self,
        model: GPT2,
        optimizer: AdamW,
        state: TrainState,
        manifest: dict[str, Any],
        *,
        background: bool = False,
    ) -> None:
        """Saves a checkpoint, then removes those that are too many. OSError where it cannot: then nothing that was saved is lost.

        background: returns once everything is copied in memory; an error comes out of the next poll(), wait() or save(). Where
        memory does not suffice for a copy, returns when the checkpoint is on the disk.
        """
        self.wait()
        self._check_space(model, optimizer)
        weights = _weights(model, optimizer)
        copy = self._staging.copy(weights) if background else None
        if copy is None:
            return self._write(state, manifest, weights)

        def write() -> None:
            try:
                self._write(state, manifest, copy)
            except Exception as e:
                self._error = e

        self._thread = threading.Thread(target=write, name="llmc-checkpoint")
        self._thread.start()

    def _check_space(self, model: GPT2, optimizer: AdamW) -> None:
        """Says that the disk is too small before it is full."""
        rows = optimizer.state().values()
        master = 4 if all(low is not None for _, _, low in rows) else 0
        needed = model.num_parameters * ((2 if model.dtype == "bf16" else 4) + 8 + master)
        free = self.fs.free_bytes(self.directory)
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
                str(self.directory),
            )

    def wait(self) -> None:
        """Until a save in the background has ended; its error if it failed."""
        self.join()
        self.poll()

    def poll(self) -> None:
        """The error of a save in the background that has failed, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def completed(self) -> list[int]:
        """Steps of the checkpoints that have been finished since the last call."""
        steps, self._completed = self._completed, []
        return steps

    def join(self) -> None:
        """As wait(), and keeps the error for the next of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: TrainState, manifest: dict[str, Any], weights: _Weights[_R]) -> None:
        model_name, state_name, done_name = checkpoint_names(state.step)
        self.fs.make_directory(self.directory)
        written = {}
        try:
            for name, pieces in ((model_name, _model_pieces(weights)), (state_name, _state_pieces(weights, state))):
                checksums = _Checksums()
                size = stage(self.directory / name, pieces, fs=self.fs, tap=checksums)
                written[name] = {"bytes": size, "crc32": checksums.finish()}
            # A checkpoint of this step that is being replaced must not vouch for a mixture of old and new.
            self._remove(self.directory / done_name)
            for name in written:
                publish(self.directory / name, fs=self.fs)
        except BaseException:
            for name in (model_name, state_name):
                unstage(self.directory / name, fs=self.fs)
            raise
        text = manifest_text(
            {**manifest, "format": MANIFEST_FORMAT, "step": state.step, "files": written, "state": _small(state)}
        )
        write_atomically(self.directory / done_name, [text.encode()], fs=self.fs)
        self._completed.append(state.step)
        self._remove_old(state.step)

    def _remove_old(self, newest: int) -> None:
        if self.keep <= 0:
            return
        steps = [s for s in finished_steps(self.directory) if not (self.major_every and s % self.major_every == 0)]
        for step in sorted((s for s in steps if s <= newest), reverse=True)[self.keep :]:
            remove_checkpoint(self.directory, step, fs=self.fs)

    def _remove(self, path: Path) -> None:
        if path.exists():
            self.fs.remove(path)
            self.fs.fsync_directory(path.parent)


def remove_checkpoint(directory: StrPath, step: int, *, fs: Fs = SYSTEM) -> None:
    """Removes DONE first: what is left after a crash half-way is no checkpoint, instead of a broken one."""
    model_name, state_name, done_name = checkpoint_names(step)
    for name in (done_name, model_name, state_name):
        path = Path(directory) / name
        if path.exists():
            fs.remove(path)
            fs.fsync_directory(path.parent)


def _small(state: TrainState) -> dict[str, Any]:
    """The part of the state that JSON holds; the order of samples is in the state file."""
    loader = {k: state.loader[k] for k in ("rows_per_sample", "epoch", "shard", "row")}
    return {
        "optimizer_step": state.optimizer_step,
        "optimizer_rng": state.optimizer_rng,
        "loader": loader,
        "shuffle": state.shuffle,
        "extra": state.extra,
    }


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with a checksum of itself."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    return json.dumps({"crc32": zlib.crc32(body.encode()), "manifest": manifest}, indent=1, sort_keys=True) + "\n"


# ---- loading ----


def finished_steps(directory: StrPath) -> list[int]:
    """Steps that have a DONE file, in ascending order."""
    steps = []
    if os.path.isdir(directory):
        for name in os.listdir(directory):
            if match := re.fullmatch(r"DONE_(\d{8,})", name):
                steps.append(int(match.group(1)))
    return sorted(steps)


def read_manifest(directory: StrPath, step: int) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None for one of llm.c, whose DONE file is empty. CheckpointDamaged otherwise."""
    _, state_name, done_name = checkpoint_names(step)
    path = Path(directory) / done_name
    raw = path.read_bytes()
    if not raw:
        if _is_ours(Path(directory) / state_name):
            raise CheckpointDamaged(f"{path}: empty, expected the manifest that was saved with {state_name}")
        return None
    try:
        outer = json.loads(raw)
        manifest = outer["manifest"]
        body = json.dumps(manifest, indent=1, sort_keys=True)
        if zlib.crc32(body.encode()) != outer["crc32"]:
            raise ValueError("its checksum does not match")
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this llmc reads {MANIFEST_FORMAT}")
        if manifest["step"] != step:
            raise ValueError(f"it is of step {manifest['step']}")
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointDamaged(f"{path}: damaged manifest: {e}") from e
    return dict(manifest)


def _is_ours(state_file: Path) -> bool:
    try:
        with open(state_file, "rb") as file:
            return file.read(28)[24:] == struct.pack("<i", _OURS)
    except OSError:
        return False


def _check_manifest(manifest: dict[str, Any]) -> None:
    """ValueError where a value is not of the kind that load_state() and the Trainer count on."""

    def check(place: str, value: Any, kind: type) -> None:
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not good or (isinstance(value, int) and not 0 <= value < 2**64):
            raise ValueError(f"its {place} is {value!r:.60}")

    check("config", manifest["config"], dict)
    check("data", manifest["data"], list)
    for row in manifest["data"]:
        check("data", row, dict)
        check("data", row["name"], str)
        check("data", row["bytes"], int)
        check("data", row["crc32"], int)
    check("files", manifest["files"], dict)
    for name, row in manifest["files"].items():
        check(name, row, dict)
        check(name, row["bytes"], int)
        check(name, row["crc32"], list)
        if len(row["crc32"]) != -(-row["bytes"] // _CHECKSUM_PIECE):
            raise ValueError(f"it has {len(row['crc32'])} checksums for the {row['bytes']} bytes of {name}")
    state = manifest["state"]
    check("state", state, dict)
    check("optimizer_step", state["optimizer_step"], int)
    check("optimizer_rng", state["optimizer_rng"], int)
    check("shuffle", state["shuffle"], bool)
    check("extra", state["extra"], dict)
    check("loader", state["loader"], dict)
    for name in ("rows_per_sample", "epoch", "shard", "row"):
        check(name, state["loader"][name], int)
        if state["loader"][name] >= 2**63 or state["loader"]["rows_per_sample"] == 0:
            raise ValueError(f"its loader is {state['loader']}")


def verify(directory: StrPath, step: int, *, model_only: bool = False) -> dict[str, Any] | None:
    """Checks sizes and checksums of a checkpoint's files; returns its manifest. CheckpointDamaged names file and place.

    model_only: the state file, which only resuming needs, may be damaged or gone.
    """
    manifest = read_manifest(directory, step)
    names = checkpoint_names(step)[:2]
    needed = names[:1] if model_only else names
    if manifest is None:
        for name in needed:
            if not (Path(directory) / name).is_file():
                raise CheckpointDamaged(f"{Path(directory) / name}: missing, though DONE_{step:08d} exists")
        return None
    if set(manifest["files"]) != set(names):
        raise CheckpointDamaged(f"DONE_{step:08d} speaks of {sorted(manifest['files'])}, expected {sorted(names)}")
    for name in needed:
        path, expected = Path(directory) / name, manifest["files"][name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointDamaged(f"{path}: {size} bytes, its manifest says {expected['bytes']}")
            with open(path, "rb") as file:
                for i, crc in enumerate(expected["crc32"]):
                    if zlib.crc32(file.read(_CHECKSUM_PIECE)) != crc:
                        raise CheckpointDamaged(
                            f"{path}: damaged between bytes {i * _CHECKSUM_PIECE} and {min(size, (i + 1) * _CHECKSUM_PIECE)}"
                        )
        except FileNotFoundError:
            raise CheckpointDamaged(f"{path}: missing, though DONE_{step:08d} exists") from None
        except OSError as e:
            raise CheckpointDamaged(f"{path}: cannot be read: {e}") from e
    return manifest


def newest_good(
    directory: StrPath, warn: Callable[[str], None], *, model_only: bool = False
) -> tuple[int, dict[str, Any] | None] | None:
    """The newest checkpoint that is whole, with its manifest; None where there is none. Damage on the way is named to warn."""
    for step in reversed(finished_steps(directory)):
        try:
            return step, verify(directory, step, model_only=model_only)
        except CheckpointDamaged as e:
            warn(f"checkpoint of step {step} is damaged and passed over: {e}")
    return None


def newest_model(directory: StrPath) -> Path | None:
    """The model file of a run directory's newest good checkpoint, else its best.bin; None where it has neither. Damage is warned of."""
    found = newest_good(directory, warn=lambda text: warnings.warn(text, stacklevel=2), model_only=True)
    if found is not None:
        return Path(directory) / checkpoint_names(found[0])[0]
    best = Path(directory) / "best.bin"
    return best if best.is_file() else None


def load_state(
    directory: StrPath, step: int, manifest: dict[str, Any] | None, model: GPT2, optimizer: AdamW
) -> TrainState:
    """Fills optimizer (and, from master weights, model) from a checkpoint whose model file is loaded already.

    The checkpoint may have another dtype: f32 weights become masters, and masters become f32 weights.
    """
    path = Path(directory) / checkpoint_names(step)[1]
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        header = reader.take(1024)
        magic, version, processes, _, has_master, shuffle = struct.unpack_from("<6i", header)
        if magic != _STATE_MAGIC or version != 1:
            raise CheckpointDamaged(f"{path}: magic {magic} version {version}, expected {_STATE_MAGIC} version 1")
        if processes != 1:
            raise _llmc.Error(
                f"{path}: written by {processes} processes of llm.c, each with a part; only 1 can be read"
            )
        rng, _ = struct.unpack_from("<QQ", header, 80)
        shard, sample = struct.unpack_from("<QQ", header, 120)
        if max(shard, sample) >= 2**31:  # both count in int32 elsewhere in the file
            raise CheckpointDamaged(f"{path}: stands at sample {sample} of shard {shard}")
        rows = optimizer.state()
        for moment in [row.m for row in rows.values()] + [row.v for row in rows.values()]:
            reader.fill(moment)
        if has_master:
            _load_masters(reader, model, rows)
        elif model.dtype == "bf16" and (Path(directory) / checkpoint_names(step)[0]).is_file():
            _masters_from_f32_model(Path(directory) / checkpoint_names(step)[0], model, rows)
        loader: dict[str, Any] = {
            "shard": shard,
            "sample": sample,
            "shard_indices": [],
            "sample_indices": np.empty(0, np.int32),
        }
        if shuffle:
            loader["shard_indices"] = reader.integers().tolist()
            loader["sample_indices"] = reader.integers()
            _, left, next_ = struct.unpack("<QiI", reader.take(16))
            loader["rng"] = (left, next_, np.frombuffer(reader.take(4 * 624), dtype="<u4"))
            reader.take(8)
        reader.end()
    small = manifest["state"] if manifest else {}
    loader.update(small.get("loader", {}))
    return TrainState(
        step=step,
        optimizer_step=small.get("optimizer_step", step),
        optimizer_rng=small.get("optimizer_rng", rng) or 13371337,
        loader=loader,
        shuffle=bool(shuffle),
        extra=small.get("extra", {}),
    )


class _Reader:
    """Reads a file in order; too short or too long is damage."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self._left = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise CheckpointDamaged(f"{self._path}: truncated: {count} more bytes expected, {self._left} left")
        self._left -= count
        data: bytes = self._file.read(count)
        if len(data) != count:
            raise CheckpointDamaged(f"{self._path}: cannot be read to its end")
        return data

    def fill(self, tensor: _llmc.Tensor) -> None:
        for begin in range(0, tensor.numel, _CHUNK):
            count = min(_CHUNK, tensor.numel - begin)
            tensor.write(begin, np.frombuffer(self.take(4 * count), dtype="<f4"))

    def integers(self) -> NDArray[np.int32]:
        (count,) = struct.unpack("<Q", self.take(8))
        if count > self._left // 4:
            raise CheckpointDamaged(f"{self._path}: announces {count} integers, {self._left} bytes are left")
        return np.frombuffer(self.take(4 * count), dtype="<i4")

    def end(self) -> None:
        if self._left:
            raise CheckpointDamaged(f"{self._path}: {self._left} bytes too long")


def _load_masters(reader: _Reader, model: GPT2, rows: dict[str, Any]) -> None:
    params = model.parameter_tensors()
    for name, (_, _, low) in rows.items():
        param = params[name]
        for begin in range(0, param.numel, _CHUNK):
            count = min(_CHUNK, param.numel - begin)
            weights = np.frombuffer(reader.take(4 * count), dtype="<f4")
            if model.dtype == "f32":
                param.write(begin, weights)
                continue
            high, rest = split_master(weights)
            param.write(begin, high)
            if low is not None:
                low.write(begin, rest)
    model.weights_changed()


def _masters_from_f32_model(path: Path, model: GPT2, rows: dict[str, Any]) -> None:
    """A run in f32 goes on in bf16: its weights are the masters."""
    _, file_dtype, _ = _llmc.inspect_checkpoint(path)
    if file_dtype != "f32":
        return
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        reader.take(1024)
        _load_masters(reader, model, rows)
