"""llm.c's state file: moments, master weights and the order of the data, beside a model file.

Header (1024 bytes), m of all parameters, v of all parameters, f32 master weights if there are any, and if the data are shuffled the
order of shards, the order of samples in the present shard, and the generator that draws the next ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.formats.stream import CheckpointDamaged, ReadableTensor, Reader, chunks, pieces

_MAGIC, _VERSION = 20240527, 1
# At offset 24, which llm.c leaves zero: a state file so tagged must have a manifest, not an empty DONE file.
_WRITER_TAG = b"llmc"
_HEADER = struct.Struct("<6i 4s 12x i 36x 2Q 24x 2Q 888x")
_GENERATOR = struct.Struct(
    "<8x i I 2496s 2I"
)  # llm.c's struct of a Mersenne Twister, whose 8 bytes of seed are not used
_GENERATOR_CONSTANTS = (0, 0x9908B0DF)


class _Header(NamedTuple):
    """The header's fields in their order."""

    magic: int
    version: int
    processes: int
    rank: int
    has_masters: int
    shuffle: int
    tag: bytes
    step: int
    rng: int
    rng_before_update: int
    shard: int
    sample: int


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


class WeightRow(NamedTuple):
    """A parameter, and the 16 bits below its bf16 weights if the optimizer keeps them."""

    parameter: _llmc.Tensor
    low: _llmc.Tensor | None


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
    """Yield the f32 weights of all parameters, which lie in one tensor, and the 16 bits below, which lie in one for each."""
    offset = 0
    for low in lows:
        for begin, count in chunks(low.numel):
            yield join_master(parameters.read(offset + begin, count), low.read(begin, count))
        offset += low.numel


def fill_weights(reader: Reader, rows: Iterable[WeightRow]) -> None:
    """Read f32 weights into parameters of either dtype."""
    for parameter, low in rows:
        for begin, count in chunks(parameter.numel):
            weights = reader.floats(count)
            if parameter.dtype == "f32":
                parameter.write(begin, weights)
                continue
            high, rest = split_master(weights)
            parameter.write(begin, high)
            if low is not None:
                low.write(begin, rest)


# ---- writing ----


def state_file_pieces(
    state: TrainState,
    moments: Iterable[ReadableTensor],
    parameters: ReadableTensor,
    lows: Sequence[ReadableTensor],
) -> Iterator[Any]:
    """Yield the bytes of a state file.

    Args:
        state: what the run consists of beside its tensors.
        moments: the first moment of every parameter, then the second, and so on, f32.
        parameters: all weights in one tensor.
        lows: the 16 bits below the bf16 weights, one tensor for each parameter; empty if there are no master weights.
    """
    loader = state.loader
    yield _HEADER.pack(
        *_Header(
            magic=_MAGIC,
            version=_VERSION,
            processes=1,
            rank=0,
            has_masters=int(bool(lows)),
            shuffle=int(state.shuffle),
            tag=_WRITER_TAG,
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


def read_state_file(path: Path, moments: Iterable[_llmc.Tensor], weights: Iterable[WeightRow]) -> StateFile:
    """Read a state file into the tensors of an optimizer and, if it has master weights, of a model.

    Args:
        path: the file.
        moments: the first moment of every parameter, then the second, and so on.
        weights: the parameters, of either dtype.

    Raises:
        CheckpointDamaged: if the file is damaged.
        llmc.Error: if several processes wrote it, each a part.
        OSError: if it cannot be opened.
    """
    with open(path, "rb") as file:
        reader = Reader(file, path)
        header = _Header(*_HEADER.unpack(reader.take(_HEADER.size)))
        if header.magic != _MAGIC or header.version != _VERSION:
            raise CheckpointDamaged(
                f"{path}: magic {header.magic} version {header.version}, expected {_MAGIC} version {_VERSION}"
            )
        if header.processes != 1:
            raise _llmc.Error(
                f"{path}: written by {header.processes} processes of llm.c, each with a part; only 1 can be read"
            )
        if max(header.shard, header.sample) >= 2**31:  # both count in int32 elsewhere in the file
            raise CheckpointDamaged(f"{path}: stands at sample {header.sample} of shard {header.shard}")
        for moment in moments:
            for begin, count in chunks(moment.numel):
                moment.write(begin, reader.floats(count))
        if header.has_masters:
            fill_weights(reader, weights)
        order = _read_order(reader) if header.shuffle else {}
        reader.end()
    return StateFile(
        has_masters=bool(header.has_masters),
        shuffle=bool(header.shuffle),
        optimizer_rng=header.rng,
        shard=header.shard,
        sample=header.sample,
        order=order,
    )


def _read_order(reader: Reader) -> dict[str, Any]:
    shards, samples = reader.integers(), reader.integers()
    left, next_, words, *_ = _GENERATOR.unpack(reader.take(_GENERATOR.size))
    return {
        "shard_indices": shards.tolist(),
        "sample_indices": samples,
        "rng": (left, next_, np.frombuffer(words, dtype="<u4")),
    }
