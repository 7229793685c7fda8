"""llm.c's state file: moments, master weights and the order of the data, beside a model file.

Header (1024 bytes), m of all parameters, v of all parameters, f32 master weights if there are any, and if the data are shuffled the
order of shards, the order of samples in the present shard, and the generator that draws the next ones.

That is AdamW's. An optimizer that llm.c does not have writes version 2, which says whose state it is: the first moment of all parameters,
then the second of those that have one.

llmc writes one file, whatever the number of processes. llm.c writes one for each process; with ZeRO each has a part of every slice: a
slice is a parameter outside of the layers, or what one layer has of a parameter.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc.formats.stream import CheckpointDamaged, ReadableTensor, Reader, chunks, pieces

_MAGIC = 20240527
# Their place is the number that a header has. The first is llm.c's, whose files are version 1; those of the others are version 2,
# which llm.c refuses.
OPTIMIZERS = ("adamw", "muon")
# At offset 24, which llm.c leaves zero: a state file so tagged must have a manifest, not an empty DONE file.
_WRITER_TAG = b"llmc"
_HEADER = struct.Struct("<6i 4s i 8x i 36x 2Q 24x 2Q 888x")
_GENERATOR = struct.Struct(
    "<8x i I 2496s 2I"
)  # llm.c's struct of a Mersenne Twister, whose 8 bytes of seed are not used
_GENERATOR_CONSTANTS = (0, 0x9908B0DF)
_MOST_PROCESSES = 100_000  # a file's name has five digits for its process


class _Header(NamedTuple):
    """The header's fields in their order."""

    magic: int
    version: int
    processes: int
    rank: int
    has_masters: int
    shuffle: int
    tag: bytes
    optimizer: int
    step: int
    rng: int
    rng_before_update: int
    shard: int
    sample: int


class StateSlice(NamedTuple):
    """A parameter outside of the layers, or what one layer has of a parameter.

    Attributes:
        numel: its elements.
        moments: how many the optimizer keeps of each.
    """

    numel: int
    moments: int


def state_order(slices: Sequence[StateSlice], masters: bool) -> Iterator[tuple[int, int]]:
    """Yield (kind, slice) of all tensors of a state file, in its order.

    Each slice's first moment (kind 0), then the second of those that have one, and so on; at the end the master weights, if there are
    any, as the kind after a slice's last moment.
    """
    for kind in range(max(piece.moments for piece in slices)):
        yield from ((kind, i) for i, piece in enumerate(slices) if kind < piece.moments)
    if masters:
        yield from ((piece.moments, i) for i, piece in enumerate(slices))


@dataclass
class TrainState:
    """What a run consists of beside its weights and moments.

    Attributes:
        step: number of updates made, skipped ones included.
        optimizer_step: number of updates that the optimizer has made.
        optimizer_rng: state of the generator that rounds bf16 weights.
        loader: where the data loader stands, as of DataLoader.state().
        shuffle: whether the loader shuffles.
        extra: what else the Trainer keeps; plain JSON.
    """

    step: int
    optimizer_step: int
    optimizer_rng: int
    loader: dict[str, Any]
    shuffle: bool
    extra: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return all of it as bytes, for another process."""
        values = asdict(self)
        loader = values["loader"]
        left, next_, words = loader.pop("rng")
        shards, samples = (np.asarray(loader.pop(name), "<i4") for name in ("shard_indices", "sample_indices"))
        values["rng"] = (left, next_)
        text = np.frombuffer(json.dumps(values).encode(), np.uint8)
        packed = io.BytesIO()
        np.savez(packed, text=text, shards=shards, samples=samples, words=np.asarray(words, "<u4"))
        return packed.getvalue()

    @staticmethod
    def from_bytes(packed: bytes) -> TrainState:
        """Return what to_bytes() has packed."""
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            values = json.loads(arrays["text"].tobytes())
            order = {"shard_indices": arrays["shards"].tolist(), "sample_indices": arrays["samples"]}
            values["loader"] |= {**order, "rng": (*values.pop("rng"), arrays["words"])}
        return TrainState(**values)


@dataclass(frozen=True)
class StateFile:
    """What a state file says beside its tensors.

    Attributes:
        has_masters: whether the file has f32 master weights.
        shuffle: whether the run shuffles its data.
        optimizer_rng: state of the generator that rounds bf16 weights.
        shard, sample: position in the order of shards, and the sample in that shard that comes next.
        order: "shard_indices", "sample_indices" and "rng" as of DataLoader.state(); empty if the data are not shuffled.
    """

    has_masters: bool
    shuffle: bool
    optimizer_rng: int
    shard: int
    sample: int
    order: dict[str, Any]


# ---- master weights ----


def join_master(high: NDArray[np.uint16], low: NDArray[np.int16]) -> NDArray[np.float32]:
    """Return the f32 weights of bf16 weights and the 16 bits below them (csrc/core/master.h)."""
    return ((high.astype(np.uint32) << 16) + low.astype(np.int32).view(np.uint32)).view(np.float32)


def split_master(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Return the bf16 weights nearest to f32 ones, and the 16 bits below: the inverse of join_master()."""
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    high = ((bits + np.uint32(0x8000)) >> 16).astype(np.uint16)
    low = (bits - (high.astype(np.uint32) << 16)).astype(np.uint16).view(np.int16)
    return high, low


def _joined(parameters: ReadableTensor, lows: Sequence[ReadableTensor]) -> Iterator[NDArray[np.float32]]:
    """Yield the f32 weights of all parameters, which lie in one tensor; the 16 bits below lie in one for each slice."""
    offset = 0
    for low in lows:
        for begin, count in chunks(low.numel):
            yield join_master(parameters.read(offset + begin, count), low.read(begin, count))
        offset += low.numel


# ---- writing ----


def state_file_pieces(
    state: TrainState,
    optimizer: str,
    moments: Iterable[ReadableTensor],
    parameters: ReadableTensor,
    lows: Sequence[ReadableTensor],
) -> Iterator[Any]:
    """Yield the bytes of a state file.

    Args:
        state: what the run consists of beside its tensors.
        optimizer: one of OPTIMIZERS.
        moments: in the order of state_order(), f32.
        parameters: all weights in one tensor.
        lows: the 16 bits below the bf16 weights, one tensor for each slice; empty if there are no master weights.
    """
    loader, number = state.loader, OPTIMIZERS.index(optimizer)
    yield _HEADER.pack(
        *_Header(
            magic=_MAGIC,
            version=_version(number),
            processes=1,
            rank=0,
            has_masters=int(bool(lows)),
            shuffle=int(state.shuffle),
            tag=_WRITER_TAG,
            optimizer=number,
            step=state.step,
            rng=state.optimizer_rng,
            rng_before_update=state.optimizer_rng,  # llm.c rounds its weights anew from the masters with it
            shard=loader["shard"],
            sample=loader["row"] // loader["rows_per_sample"],
        )
    )
    for moment in moments:
        yield from pieces(moment)
    yield from _joined(parameters, lows)
    if state.shuffle:
        yield _order_bytes(loader)


def _version(optimizer: int) -> int:
    return 1 if optimizer == 0 else 2


def _order_bytes(loader: dict[str, Any]) -> bytes:
    parts = []
    for name in ("shard_indices", "sample_indices"):
        indices = np.asarray(loader[name], dtype="<i4")
        parts += [struct.pack("<Q", indices.size), indices.tobytes()]
    left, next_, words = loader["rng"]
    words = np.asarray(words, dtype="<u4").tobytes()
    return b"".join([*parts, _GENERATOR.pack(left, next_, words, *_GENERATOR_CONSTANTS)])


# ---- reading ----


def has_writer_tag(path: Path) -> bool:
    """Return whether llmc, and not llm.c, wrote a state file. False if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
    except OSError:
        return False
    return _Header(*_HEADER.unpack(raw)).tag == _WRITER_TAG


def state_file_optimizer(path: Path) -> str:
    """Return whose state a file has, one of OPTIMIZERS.

    Raises:
        CheckpointDamaged: if its header is damaged.
        OSError: if it cannot be opened.
    """
    with open(path, "rb") as file:
        return OPTIMIZERS[_read_header(Reader(file, path), path).optimizer]


def state_file_parts(path: Path) -> list[Path]:
    """Return the files that were written with a state file: itself, and if processes of llm.c wrote it those of the others.

    Args:
        path: the file of process 0, state_<step>_00000.bin.

    Raises:
        CheckpointDamaged: if its header is damaged.
        OSError: if it cannot be opened.
    """
    with open(path, "rb") as file:
        processes = _read_header(Reader(file, path), path).processes
    return [path.with_name(re.sub(r"_0+\.bin$", f"_{rank:05d}.bin", path.name)) for rank in range(processes)]


def read_state_file(
    path: Path,
    optimizer: str,
    slices: Sequence[StateSlice],
    put: Callable[[int, int, NDArray[np.float32]], object],
) -> StateFile:
    """Read a state file, and the parts beside it if processes of llm.c wrote it.

    Args:
        path: the file of process 0, state_<step>_00000.bin.
        optimizer: whose state it must be.
        slices: in the order of the file.
        put: takes (kind, slice, values) as state_order() has them; of the master weights only if the file has them.

    Raises:
        CheckpointDamaged: if a file is damaged, or a part is missing.
        ValueError: if it is the state of another optimizer.
        OSError: if it cannot be opened.
    """
    with ExitStack() as files:
        readers = [Reader(files.enter_context(open(path, "rb")), path)]
        header = _read_header(readers[0], path)
        if (other := OPTIMIZERS[header.optimizer]) != optimizer:
            raise ValueError(f"{path}: the state of {other}, expected that of {optimizer}")
        masters = bool(header.has_masters)
        # Without ZeRO every process of llm.c writes all of the state. Nothing else says so but the size.
        whole = 4 * sum(piece.numel * (piece.moments + masters) for piece in slices)
        if header.processes > 1 and path.stat().st_size < _HEADER.size + whole:
            readers += _open_parts(path, header, [piece.numel for piece in slices], files)
        for kind, i in state_order(slices, masters):
            parts = [reader.floats(slices[i].numel // len(readers)) for reader in readers]
            put(kind, i, parts[0] if len(parts) == 1 else np.concatenate(parts))
        # Each process of llm.c shuffles for itself; the order of process 0 is that of all in what follows.
        order, *_ = [_read_order(reader) if header.shuffle else {} for reader in readers]
        for reader in readers:
            reader.end()
    return StateFile(
        has_masters=bool(header.has_masters),
        shuffle=bool(header.shuffle),
        optimizer_rng=header.rng,
        shard=header.shard,
        sample=header.sample,
        order=order,
    )


def _read_header(reader: Reader, path: Path, rank: int = 0) -> _Header:
    header = _Header(*_HEADER.unpack(reader.take(_HEADER.size)))
    if header.magic != _MAGIC or header.version not in (1, 2):
        raise CheckpointDamaged(
            f"{path}: magic {header.magic} version {header.version}, expected {_MAGIC} version 1 or 2"
        )
    if not 0 <= header.optimizer < len(OPTIMIZERS) or header.version != _version(header.optimizer):
        raise CheckpointDamaged(f"{path}: version {header.version} has the state of no optimizer {header.optimizer}")
    if header.rank != rank or not rank < header.processes < _MOST_PROCESSES:
        raise CheckpointDamaged(f"{path}: written by process {header.rank} of {header.processes}, expected {rank}")
    if max(header.shard, header.sample) >= 2**31:  # both count in int32 elsewhere in the file
        raise CheckpointDamaged(f"{path}: stands at sample {header.sample} of shard {header.shard}")
    return header


def _open_parts(path: Path, header: _Header, sizes: Sequence[int], files: ExitStack) -> list[Reader]:
    """Return readers of the parts of processes 1, 2, ..., which stand behind their headers."""
    if odd := next((size for size in sizes if size % header.processes), 0):
        raise CheckpointDamaged(f"{path}: a part of {header.processes}, but {odd} weights have no such parts")
    readers = []
    for rank, part in enumerate(state_file_parts(path)[1:], 1):
        if not part.is_file():
            raise CheckpointDamaged(f"{part}: missing, though {path.name} is a part of {header.processes}")
        readers.append(Reader(files.enter_context(open(part, "rb")), part))
        other = _read_header(readers[-1], part, rank)
        alike = (
            "processes",
            "has_masters",
            "shuffle",
            "step",
        )  # where it stands in the data each process counts by itself
        if any(getattr(other, name) != getattr(header, name) for name in alike):
            raise CheckpointDamaged(f"{part}: does not belong to {path.name}")
    return readers


def _read_order(reader: Reader) -> dict[str, Any]:
    shards, samples = reader.integers(), reader.integers()
    left, next_, words, *_ = _GENERATOR.unpack(reader.take(_GENERATOR.size))
    return {
        "shard_indices": shards.tolist(),
        "sample_indices": samples,
        "rng": (left, next_, np.frombuffer(words, dtype="<u4")),
    }
