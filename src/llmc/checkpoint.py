"""Checkpoints that survive.

A checkpoint of step s is llm.c's three files: model_<s>.bin, state_<s>_00000.bin (moments, master weights, data order) and DONE_<s>.
Its bytes do not depend on the number of ranks that trained: rank 0 writes it, and the others send what they have of the state.
llm.c only looks whether DONE_<s> exists; llmc writes a manifest into it: sizes and checksums of the other two, the settings and data
of the run, and the little state that llm.c does not keep. If the run averages its weights, average_<s>.bin is the model of the average, in
f32, and in the manifest too. DONE is written last and removed first, so whatever happens in between, every DONE_<s> that exists speaks of
files that were on the disk in full. llm.c reads llmc's checkpoints, but the state of Muon, which it does not have; and llmc reads llm.c's.

How the files are laid out is in llmc.formats: model_file, state_file, manifest.
"""

from __future__ import annotations

import errno
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.formats.manifest import Checksums, DataFile, LoaderPosition, Manifest, SavedState
from llmc.formats.model_file import is_pytorch_file, model_file_pieces, read_f32_weights
from llmc.formats.state_file import (
    StateSlice,
    TrainState,
    has_writer_tag,
    read_state_file,
    split_master,
    state_file_optimizer,
    state_file_parts,
    state_file_pieces,
    state_order,
)
from llmc.formats.stream import CheckpointDamaged, ReadableTensor, pieces
from llmc.models.model import Model
from llmc.optim.optimizer import Optimizer
from llmc.system.fs import SYSTEM, Fs, StrPath, publish, shell_word, stage, unstage, write_atomically
from llmc.system.memory import available_host_memory
from llmc.values import MEMORY_DTYPES, decimal_bytes

# ---- names ----


class CheckpointFiles(NamedTuple):
    """The paths of a checkpoint's files; only a run that averages its weights has an average."""

    model: Path
    state: Path
    done: Path
    average: Path


def checkpoint_files(directory: StrPath, step: int) -> CheckpointFiles:
    """Return where the checkpoint of a step is, or would be."""
    names = (f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"DONE_{step:08d}", f"average_{step:08d}.bin")
    return CheckpointFiles(*(Path(directory) / name for name in names))


def finished_steps(directory: StrPath) -> list[int]:
    """Return the steps that have a DONE file, in ascending order."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"DONE_(\d{8,})", name)))


# ---- saving ----


class Checkpointer:
    """Writes the checkpoints of one run directory, in the background if asked.

    Args:
        directory: the run directory.
        keep: how many checkpoints to keep; 0 keeps all.
        major_every: checkpoints of steps that are divisible by it are never removed; 0 for none.
        average: the average of the weights, f32, which is saved beside them; None: there is none.
        fs: the file system.
    """

    def __init__(
        self,
        directory: StrPath,
        *,
        keep: int = 0,
        major_every: int = 0,
        average: _llmc.Tensor | None = None,
        fs: Fs = SYSTEM,
    ) -> None:
        self.directory = Path(directory)
        self.keep, self.major_every, self.average, self.fs = keep, major_every, average, fs
        self._staging = _Staging()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._completed: list[int] = []

    def save(
        self,
        model: Model,
        optimizer: Optimizer,
        state: TrainState,
        *,
        config: dict[str, Any],
        data: list[DataFile],
        background: bool = False,
        begin: Callable[[], object] = lambda: None,
    ) -> None:
        """Save a checkpoint, then remove the oldest ones that are more than `keep`.

        Args:
            model: its weights are saved.
            optimizer: its moments and the lower halves of its master weights are saved. If it is sharded, this is rank 0, and the
                state is copied in memory always.
            state: the rest of what the run consists of.
            config: the run's settings, for the manifest.
            data: the run's token files, for the manifest.
            background: return as soon as everything is copied in memory. If memory does not suffice for a copy, return when the
                checkpoint is on the disk.
            begin: is called when disk and memory suffice. If the optimizer is sharded, every other rank must call send_state() then.

        Raises:
            OSError: if the checkpoint cannot be written; earlier ones are untouched. An error in the background is raised by the next
                poll(), wait() or save().
        """
        self.wait()
        layout = _Layout.of(model, optimizer)
        self.check_space(model, optimizer)
        copy_bytes = layout.copy_bytes + (0 if self.average is None else _aligned(4 * self.average.numel))
        copied = (background or optimizer.sharded) and self._staging.reserve(copy_bytes)
        if optimizer.sharded and not copied:
            raise OSError(
                errno.ENOMEM,
                f"{decimal_bytes(copy_bytes)} of memory are needed to gather the ranks' state, "
                f"{decimal_bytes(available_host_memory())} are free",
                str(self.directory),
            )
        begin()
        keep = self._staging.copy if copied else _as_it_is
        tensors = _tensors(model, optimizer, layout, keep)
        average = None if self.average is None else keep(self.average)
        record = Manifest(
            llmc=_llmc.__version__,
            step=state.step,
            files={},
            state=_saved_state(state),
            config=config,
            model=asdict(model.config),
            dtype=model.dtype,
            data=data,
        )
        if not (background and copied):
            return self._write(state, record, tensors, average)

        def write() -> None:
            try:
                self._write(state, record, tensors, average)
            except Exception as e:
                self._error = e

        self._thread = threading.Thread(target=write, name="llmc-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Block until the background save has finished.

        Raises:
            OSError: if that save failed. Earlier checkpoints are untouched.
        """
        self.join()
        self.poll()

    def poll(self) -> None:
        """Raise the error of a background save that has failed, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Block until the background save has finished, and keep its error for the next poll(), wait() or save()."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def completed(self) -> list[int]:
        """Return the steps of the checkpoints that have been finished since the last call."""
        steps, self._completed = self._completed, []
        return steps

    def check_space(self, model: Model, optimizer: Optimizer) -> tuple[int, int]:
        """Find out how many bytes a checkpoint needs, and how many are free.

        Raises:
            OSError: if that does not suffice.
        """
        averaged = 0 if self.average is None else 4 * self.average.numel
        needed, free = _Layout.of(model, optimizer).file_bytes + averaged, self.fs.free_bytes(self.directory)
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {decimal_bytes(needed)}, {decimal_bytes(free)} are free",
                str(self.directory),
            )
        return needed, free

    def most_ahead(self, step: int, total_steps: int, every: int) -> int:
        """Return how many checkpoints more than now the directory has at most, on the way from a step to the last.

        While one is written the oldest is still there.

        Args:
            step: the present one.
            total_steps: the last one, which is saved in any case.
            every: a checkpoint is saved every so many steps; 0: at the end only.
        """

        if step >= total_steps:
            return 0
        saves = -(-total_steps // every) - step // every if every else 1
        if self.keep == 0:
            return saves
        major = total_steps // m - step // m if every and (m := math.lcm(every, self.major_every)) else 0
        return min(saves, major + max(1, self.keep + 1 - len(finished_steps(self.directory))))

    def _write(self, state: TrainState, record: Manifest, tensors: _Tensors, average: ReadableTensor | None) -> None:
        files = checkpoint_files(self.directory, state.step)
        self.fs.make_directory(self.directory)
        contents: dict[Path, Iterable[Any]] = {
            files.model: model_file_pieces(tensors.config, tensors.dtype, pieces(tensors.parameters)),
            files.state: state_file_pieces(state, tensors.optimizer, tensors.moments, tensors.parameters, tensors.lows),
        }
        if average is not None:
            contents[files.average] = model_file_pieces(tensors.config, "f32", pieces(average))
        try:
            for path, content in contents.items():
                checksums = Checksums()
                stage(path, content, fs=self.fs, tap=checksums)
                record.files[path.name] = checksums.record()
            # A checkpoint of this step that is being replaced must not vouch for a mixture of old and new.
            self._remove(files.done)
            for path in contents:
                publish(path, fs=self.fs)
        except BaseException:
            for path in contents:
                unstage(path, fs=self.fs)
            raise
        write_atomically(files.done, [record.to_json().encode()], fs=self.fs)
        self._completed.append(state.step)
        self._remove_old(state.step)

    def _remove_old(self, newest: int) -> None:
        if self.keep <= 0:
            return
        steps = [s for s in finished_steps(self.directory) if not (self.major_every and s % self.major_every == 0)]
        for step in sorted((s for s in steps if s <= newest), reverse=True)[self.keep :]:
            files = checkpoint_files(self.directory, step)
            parts = self.directory.glob(files.state.name.replace("_00000.", "_*."))  # several, if llm.c wrote them
            # DONE first: what is left after a crash half-way is no checkpoint, instead of a broken one.
            for path in (files.done, files.model, files.average, *sorted(parts)):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.exists():
            self.fs.remove(path)
            self.fs.fsync_directory(path.parent)


def _saved_state(state: TrainState) -> SavedState:
    """Return the part of the state that the manifest holds."""
    loader = state.loader
    return SavedState(
        optimizer_step=state.optimizer_step,
        optimizer_rng=state.optimizer_rng,
        shuffle=state.shuffle,
        loader=LoaderPosition(loader["rows_per_sample"], loader["epoch"], loader["shard"], loader["row"]),
        extra=state.extra,
    )


# ---- what is saved: tensors of a device, or copies of them ----


class _Place(NamedTuple):
    """Of which parameter and layer a slice is, and where it begins among all parameters."""

    name: str
    layer: int
    begin: int


@dataclass(frozen=True)
class _Layout:
    """What there is of a model and its optimizer, in the order of the files.

    Attributes:
        slices: of the parameters.
        places: of the slices.
        masters: whether the optimizer keeps the 16 bits below each bf16 weight.
        weight_bytes: of one weight.
    """

    slices: list[StateSlice]
    places: list[_Place]
    masters: bool
    weight_bytes: int

    @staticmethod
    def of(model: Model, optimizer: Optimizer) -> _Layout:
        slices, places, begin = [], [], 0
        kept = optimizer.state()
        for name, tensor in model.parameter_tensors().items():
            layers = optimizer.layers(name)
            for layer in range(layers):
                slices.append(StateSlice(tensor.numel // layers, len(kept[name].moments)))
                places.append(_Place(name, layer, begin))
                begin += slices[-1].numel
        return _Layout(slices, places, optimizer.has_masters, MEMORY_DTYPES[model.dtype].itemsize)

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each slice."""
        return [piece.numel for piece in self.slices]

    @property
    def state(self) -> Iterator[tuple[str, int, int]]:
        """What Optimizer.gather() and scatter() are called with, for all of the state."""
        for kind, index in state_order(self.slices, self.masters):
            yield self.places[index].name, kind, self.places[index].layer

    @property
    def file_bytes(self) -> int:
        """What the model file and the state file take; in the latter master weights are whole, f32."""
        return sum((self.weight_bytes + 4 * s.moments + 4 * self.masters) * s.numel for s in self.slices)

    @property
    def copy_bytes(self) -> int:
        """What a copy in memory takes."""
        state = sum(s.moments * _aligned(4 * s.numel) + self.masters * _aligned(2 * s.numel) for s in self.slices)
        return _aligned(self.weight_bytes * sum(self.sizes)) + state


@dataclass
class _Tensors:
    """The tensors of a checkpoint.

    Attributes:
        config: the model's shape.
        dtype: of the parameters, 'f32' or 'bf16'.
        parameters: all of them in one tensor.
        optimizer: its name.
        moments: the first moment of every slice, then the second of every slice that has one, and so on.
        lows: the 16 bits below each bf16 weight, slice by slice; empty if there are no master weights.
    """

    config: _llmc.GPT2Config
    dtype: str
    optimizer: str
    parameters: ReadableTensor
    moments: list[ReadableTensor]
    lows: list[ReadableTensor]


def _tensors(
    model: Model, optimizer: Optimizer, layout: _Layout, keep: Callable[[_llmc.Tensor], ReadableTensor]
) -> _Tensors:
    """Take the tensors of a checkpoint, or with keep() copies of them. It gathers the state if it is sharded."""
    parameters = keep(model.all_parameters())
    state = [keep(optimizer.gather(*place)) for place in layout.state]
    moments = sum(piece.moments for piece in layout.slices)
    return _Tensors(model.config.native(), model.dtype, optimizer.name, parameters, state[:moments], state[moments:])


def send_state(model: Model, optimizer: Optimizer) -> None:
    """Take part in Checkpointer.save() of rank 0, as a rank of a sharded optimizer."""
    for place in _Layout.of(model, optimizer).state:
        optimizer.gather(*place)


def _as_it_is(tensor: _llmc.Tensor) -> ReadableTensor:
    return tensor


class _HostCopy:
    """A tensor's elements at one moment, in host memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array, self.numel = array, array.size

    def read(self, begin: int, count: int) -> NDArray[Any]:
        return self._array[begin : begin + count]


class _Staging:
    """Host memory for the copy from which a checkpoint is written while training goes on.

    It is kept from save to save: the system takes longer to hand out new pages than the copying does.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def reserve(self, needed: int) -> bool:
        """Make room for new copies in place of all former ones. Return False if memory does not suffice."""
        self._used = 0
        if self._memory.size < needed:
            try:
                if available_host_memory() < needed:
                    return False
                self._memory = np.empty(needed, np.uint8)
            except MemoryError:
                return False
        return True

    def copy(self, tensor: _llmc.Tensor) -> _HostCopy:
        """Copy a tensor into the memory that was reserved."""
        dtype = MEMORY_DTYPES[tensor.dtype]
        size = tensor.numel * dtype.itemsize
        array = self._memory[self._used : self._used + size].view(dtype)
        tensor.to_host(array)
        self._used += _aligned(size)
        return _HostCopy(array)


def _aligned(size: int) -> int:
    """Return a copy's size, rounded up so that the next copy begins at a multiple of 64 bytes."""
    return -(-size // 64) * 64


# ---- finding and loading ----

_ORDER = ("shard_indices", "sample_indices", "rng")  # what DataLoader.state() has of the order of shuffled data
_LLM_C_SEED = 13371337  # in place of the zero that llm.c may save: the optimizer's generator must not stand there


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint on the disk.

    Attributes:
        step: number of updates made.
        files: where it is.
        manifest: None for a checkpoint of llm.c, whose DONE file is empty.
    """

    step: int
    files: CheckpointFiles
    manifest: Manifest | None

    @staticmethod
    def open(directory: StrPath, step: int) -> FoundCheckpoint:
        """Read the manifest of a step that has a DONE file.

        Raises:
            CheckpointDamaged: if the manifest is damaged, or gone from beside a state file that llmc wrote.
        """
        files = checkpoint_files(directory, step)
        text = files.done.read_bytes()
        if not text:
            if has_writer_tag(files.state):
                raise CheckpointDamaged(
                    f"{files.done}: empty, expected the manifest that was saved with {files.state.name}"
                )
            return FoundCheckpoint(step, files, None)
        manifest = Manifest.from_json(text, files.done)
        if manifest.step != step:
            raise CheckpointDamaged(f"{files.done}: damaged manifest: it is of step {manifest.step}")
        return FoundCheckpoint(step, files, manifest)

    def verify(self, *, model_only: bool = False) -> None:
        """Compare sizes and checksums of the files with the manifest; look only whether they exist if there is none.

        Args:
            model_only: the state file, which only resuming needs, may be damaged or gone.

        Raises:
            CheckpointDamaged: if a file is missing or damaged; the message names file and place.
        """
        saved = [self.files.model, self.files.state, *([self.files.average] if self.has_average else [])]
        if self.manifest is not None and self.manifest.files.keys() != {path.name for path in saved}:
            raise CheckpointDamaged(
                f"{self.files.done} speaks of {sorted(self.manifest.files)}, expected {[path.name for path in saved]}"
            )
        if self.manifest is None and not model_only and self.files.state.is_file():
            saved[1:] = state_file_parts(self.files.state)
        for path in saved if not model_only else [path for path in saved if path != self.files.state]:
            if self.manifest is not None:
                self.manifest.files[path.name].verify(path)
            elif not path.is_file():
                raise CheckpointDamaged(f"{path}: missing, though {self.files.done.name} exists")

    @property
    def has_average(self) -> bool:
        """Whether it has an average of the weights."""
        return self.manifest is not None and self.files.average.name in self.manifest.files

    def load_average(self, average: _llmc.Tensor) -> None:
        """Fill a tensor with the average of the weights that the checkpoint has."""
        for values in read_f32_weights(self.files.average, [average.numel]):
            average.write(0, values)

    @property
    def optimizer(self) -> str:
        """Whose state it has: one of the names of the setting.

        Raises:
            CheckpointDamaged: if the header of the state file is damaged.
        """
        return state_file_optimizer(self.files.state)

    def rows_per_sample(self, batch_size: int) -> int:
        """Return how many rows the run shuffles together. llm.c does not say: then batch_size is taken to be as it was."""
        if self.manifest is not None:
            return self.manifest.state.loader.rows_per_sample
        return batch_size * len(state_file_parts(self.files.state))

    def load_state(
        self, model: Model, optimizer: Optimizer, loader: Mapping[str, Any], *, shuffle: bool = True
    ) -> TrainState:
        """Fill an optimizer, and a model from its master weights, from the checkpoint.

        The checkpoint may have another dtype than the model: f32 weights become master weights, and these become f32 weights. If the
        optimizer is sharded, this is rank 0, and every other rank must call receive_state().

        Args:
            model: a model into which the checkpoint's model file is loaded already.
            optimizer: its optimizer.
            loader: DataLoader.state() of a new loader of the run. It supplies what the checkpoint does not have: the number of rows in
                a sample, which llm.c does not save, and the order of data that were not shuffled.
            shuffle: whether that loader shuffles.

        Returns:
            What the run consists of beside its tensors; its loader can be given to DataLoader.set_state().

        Raises:
            CheckpointDamaged: if the state file is damaged.
            ValueError: if it is the state of another optimizer.
            llmc.Error: if it cannot be read for another reason.
        """
        layout, parameters = _Layout.of(model, optimizer), model.all_parameters()

        def put(kind: int, index: int, values: NDArray[np.float32]) -> None:
            place = layout.places[index]
            if kind < layout.slices[index].moments:
                return optimizer.scatter(place.name, kind, place.layer, values)
            if model.dtype == "f32":
                return parameters.write(place.begin, values)
            high, low = split_master(values)
            parameters.write(place.begin, high)
            if layout.masters:
                optimizer.scatter(place.name, kind, place.layer, low)

        saved = read_state_file(self.files.state, optimizer.name, layout.slices, put)
        whole = saved.has_masters
        if not saved.has_masters and model.dtype == "bf16":
            for index, values in enumerate(read_f32_weights(self.files.model, layout.sizes)):
                put(layout.slices[index].moments, index, values)
                whole = True
        if layout.masters and not whole:  # the weights are those of the bf16 file
            for place, piece in zip(layout.places, layout.slices):
                optimizer.scatter(place.name, piece.moments, place.layer, np.zeros(piece.numel, np.int16))
        model.weights_changed()
        order = saved.order if saved.shuffle and shuffle else {name: loader[name] for name in _ORDER}
        if self.manifest is None:
            rows = loader["rows_per_sample"]
            position = LoaderPosition(rows, epoch=0, shard=saved.shard, row=saved.sample * rows)
            rng = saved.optimizer_rng or _LLM_C_SEED
            kept = SavedState(self.step, rng, saved.shuffle, position, extra={})
        else:
            kept = self.manifest.state
        return TrainState(
            step=self.step,
            optimizer_step=kept.optimizer_step,
            optimizer_rng=kept.optimizer_rng,
            loader={**asdict(kept.loader), **order},
            shuffle=saved.shuffle,
            extra=kept.extra,
        )


def receive_state(model: Model, optimizer: Optimizer) -> None:
    """Take part in FoundCheckpoint.load_state() of rank 0, as a rank of a sharded optimizer."""
    for place in _Layout.of(model, optimizer).state:
        optimizer.scatter(*place, None)


def newest_good(directory: StrPath, warn: Callable[[str], None], *, model_only: bool = False) -> FoundCheckpoint | None:
    """Find the newest checkpoint that is whole.

    Args:
        directory: the run directory.
        warn: is told of every checkpoint that is passed over because it is damaged.
        model_only: the state file may be damaged or gone.

    Returns:
        The checkpoint, or None if there is none.
    """
    for step in reversed(finished_steps(directory)):
        try:
            found = FoundCheckpoint.open(directory, step)
            found.verify(model_only=model_only)
            return found
        except CheckpointDamaged as e:
            warn(f"checkpoint of step {step} is damaged and passed over: {e}")
    return None


def model_file(name: str) -> Path | None:
    """Find the file of weights that the setting `model` names.

    Args:
        name: one of llm.c's descriptors, a model file of llm.c's, or a run directory, whose newest_model() it means.

    Returns:
        The file; None if it is a descriptor.

    Raises:
        FileNotFoundError: if a run directory has no finished checkpoint.
        ValueError: if it is none of these, as a model of Hugging Face's, for which the message gives the command that converts it.
    """
    try:
        _llmc.config_from_descriptor(name)
        return None
    except ValueError as e:
        unknown = e
    path = Path(name)
    if path.is_dir() and (newest := newest_model(path)) is not None:
        return newest
    if path.suffix == ".bin" and not (path.is_file() and is_pytorch_file(path)):
        return path
    if path.exists() or re.fullmatch(r"gpt2(-\w+)?|[\w.-]+/[\w.-]+", name):
        out = f"{path.absolute().name if path.is_dir() else path.stem}-llmc.bin"
        raise ValueError(
            f"model '{name}' is not a file of llm.c's, a run directory or a descriptor (d12, ...). If it is a model of Hugging Face's or "
            f"nanoGPT's: llmc import {shell_word(name)} {shell_word(out)}, and give {out}"
        )
    raise unknown


def newest_model(directory: StrPath) -> Path | None:
    """Find the model file of a run directory's newest good checkpoint, that of the average if it has one, else its best.bin.

    Returns:
        The file; None if the folder is no run directory. Damage is warned of.

    Raises:
        FileNotFoundError: if a run directory has neither.
    """
    found = newest_good(directory, warn=lambda text: warnings.warn(text, stacklevel=2), model_only=True)
    if found is not None:
        return found.files.average if found.has_average else found.files.model
    best = Path(directory) / "best.bin"
    if best.is_file():
        return best
    if (Path(directory) / "config.toml").is_file():
        raise FileNotFoundError(f"run directory '{directory}' has no finished checkpoint")
    return None
