"""Build a training run from its settings. What is wrong with a run is said here, before its first step.

All ranks walk through setup() together. Rank 0 alone opens the run directory, tokenises, reads the checkpoint and draws the weights, and
tells the others what they need of it; what they must have in common is compared.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc import _llmc
from llmc.checkpoint import FoundCheckpoint, finished_steps, model_file, newest_good, receive_state
from llmc.data.bits_per_byte import bits_per_byte, bytes_per_token
from llmc.data.loader import DataLoader
from llmc.distributed.world import World
from llmc.evals import check_examples
from llmc.formats.eval_file import Example, read_eval_file
from llmc.formats.manifest import DataFile, Manifest
from llmc.formats.state_file import TrainState
from llmc.formats.stream import CheckpointDamaged
from llmc.models.config import GPT2Config, ModelConfig
from llmc.models.gpt2 import GPT2, sines
from llmc.models.model import Model, default_grad_dtype
from llmc.optim.adamw import AdamW
from llmc.optim.average import WeightAverage
from llmc.optim.muon import Muon
from llmc.optim.optimizer import Optimizer
from llmc.optim.schedule import BatchSchedule, lr_schedule, warmup_problem, wsd_decay_begin
from llmc.system.flops import peak_flops
from llmc.system.fs import shell_word
from llmc.system.gpu_info import GpuInfo
from llmc.training.memory import check_memory
from llmc.training.ranks import Notes
from llmc.training.run_dir import open_run_directory
from llmc.training.settings import BEFORE_THERE_WAS, SAME_ON_RESUME, RunConfig, TrainConfig, defaults, resolve
from llmc.training.sources import Sources, prepare, prepare_beside
from llmc.values import counted

# Without a model the run is a small one, sized for two CPU cores and two minutes.
SMALL_MODEL = {"num_layers": 4, "num_heads": 2, "channels": 128}


@dataclass
class Run:
    """What a training run is made of.

    Attributes:
        world: the ranks that train; of one process alone too.
        comm: by which their tensors travel; None for a process alone.
        reduction: sums gradients over the ranks; None for a process alone.
        notes: what the ranks tell each other by it.
        config: the settings; recompute and classifier_rows are those that were chosen.
        rows: of each rank in an update, of the first if they grow, if the settings or the run that goes on say so, so that batch_size
            must divide them; else None.
        run_dir: None if nothing is kept. Rank 0 alone reads and writes it.
        fingerprint: sizes and checksums of the data; a checkpoint remembers them.
        state: of the checkpoint that the run continues, which model and optimizer have already; None for a new run.
        weight_origin: in words.
        memory: the plan that was checked against what is free.
        memory_by_rank: what it comes to, of each rank.
        peak_flops: FLOP/s that the devices of all ranks can reach; None if that is not known.
        average: of the weights, with which the run is evaluated; None if the weights themselves are.
        val_loader: None without validation data.
        bytes_per_token: of the text, on average over the targets of a validation; None if they or the tokenizer are not known.
        lr: the learning rate of a step.
        remarks: what the run's log says of it.
        hellaswag_examples: empty if HellaSwag is not asked for, or its file is not there.
        gpu_info: None if its line is not asked for.
    """

    world: World
    comm: _llmc.Comm | None
    reduction: _llmc.Reduction | None
    notes: Notes
    config: RunConfig
    rows: int | None
    run_dir: Path | None
    sources: Sources
    fingerprint: list[DataFile]
    state: TrainState | None
    model: Model
    weight_origin: str
    memory: _llmc.MemoryPlan
    memory_by_rank: list[int]
    peak_flops: float | None
    optimizer: Optimizer
    average: WeightAverage | None
    train_loader: DataLoader
    val_loader: DataLoader | None
    bytes_per_token: float | None
    total_steps: int
    lr: Callable[[int], float]
    remarks: list[str]
    hellaswag_examples: list[Example]
    gpu_info: GpuInfo | None

    @cached_property
    def batch(self) -> BatchSchedule:
        """The tokens of each update."""
        return BatchSchedule.of(self.config.to_dict())

    def grad_accum(self, step: int) -> int:
        """Return the micro-batches of an update on each rank."""
        return self.batch.tokens(step) // (self.config.batch_size * self.config.seq_len * self.world.size)

    @property
    def num_val_batches(self) -> int:
        """Batches of one validation; 0 without validation data.

        Raises:
            ValueError: if there are data, but no whole batch of them.
        """
        if self.val_loader is None:
            return 0
        count, limit = self.val_loader.num_batches(), self.config.val_steps
        if count == 0:
            raise ValueError("the validation data hold no whole batch")
        return count if limit == -1 else min(count, limit)

    def validation_batches(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Return the batches of a validation, those of all ranks; none without validation data."""
        if (own := self.val_loader) is None:
            return iter(())
        B, T = own.batch_size, own.seq_len
        loader = DataLoader(own.files, B, T, vocab_size=self.model.config.vocab_size, rows_per_sample=B)
        return itertools.islice(loader, self.num_val_batches)

    def bits_per_byte(self, loss: float) -> float | None:
        """Return a validation loss, in nats per token, in bits per byte of the text; None without a tokenizer."""
        return None if self.bytes_per_token is None else bits_per_byte(loss, self.bytes_per_token)

    @property
    def shuffle(self) -> bool:
        """Whether training samples come in random order."""
        return self.config.shuffle and not self.config.overfit


def setup(given: TrainConfig, world: World, say: Callable[[str], None]) -> Run:
    """Find the data and the checkpoint, check that memory suffices, and build model, optimizer and loaders.

    Args:
        given: the settings as the user gave them.
        world: the ranks, all of which call this.
        say: is told, for example, that a damaged checkpoint is passed over.

    Raises:
        ValueError, FileNotFoundError, MemoryError, llmc.Error: if a setting is wrong, data are missing or damaged, or memory does
            not suffice.
    """
    device, backend = open_device(given.device, world.cpus(given.threads), world.local_rank)
    found = _find_checkpoint(given, say) if world.leads else None
    # The settings of the checkpoint, which may be empty, or None if there is no checkpoint; and its step.
    saved = _shared(world, None if found is None else {} if found.manifest is None else found.manifest.config)
    begun = _shared(world, 0 if found is None else found.step)
    config = resolve(given, device, rank=world.rank, ranks=world.size, saved=saved, begun=begun)
    if given.batch_size not in (None, config.batch_size):
        say(
            f"batch_size is {config.batch_size}, not {given.batch_size}: it divides the run's {_fewest_tokens(config, begun)} tokens of an "
            f"update among {counted(world.size, 'rank')}"
        )
    if given.sample_tokens is not None and given.sample_tokens > config.sample_tokens:
        say(
            f"sample_tokens is {config.sample_tokens}, not {given.sample_tokens}: positions from seq_len on are not trained"
        )
    world.agree("the settings", config.shared())
    ranks, threads, cpus = world.local_size, backend.info().threads, os.cpu_count() or 1
    if device == "cpu" and ranks > 1 and ranks * threads > cpus:
        say(
            f"note: {ranks} ranks compute with {counted(threads, 'thread')} each on {cpus} CPUs here: they wait for each other"
        )
    if len(sets := sorted(set(world.gather(backend.info().isa)))) > 1:
        differ = f"the ranks compute with different kernel sets ({', '.join(sets)})"
        if config.optimizer == "muon" and config.zero_stage == 0:
            # Matmuls update the weights, on every rank for itself: what they differ by would add up.
            raise ValueError(
                f"{differ}: with --optimizer muon and -z 0 their weights would drift apart: leave out -z 0"
            )
        say(f"note: {differ}: other machines give other last bits")
    _set_options(backend, config)
    comm = world.open_comm(backend) if world.size > 1 else None
    config = config.replace(output_dir=_shared(world, config.output_dir))
    run_dir = _open_run_directory(config, world)
    sources = _prepare(config, run_dir, world, say)
    fingerprint = sources.fingerprint()
    files = {f"file {i}": f"{f.name} of {f.bytes} bytes, CRC-32 {f.crc32:08x}" for i, f in enumerate(fingerprint, 1)}
    world.agree("the data", files)
    if found is not None:
        _check_same(found, config, fingerprint)
    config = _as_before(config, saved)
    told = given.total_batch_size != -1 or (saved or {}).get("total_batch_size", -1) != -1
    rows = _fewest_tokens(config, begun) // (config.seq_len * world.size) if told else None
    model, weight_origin, memory = _build_model(config, backend, sources, found, world, rows)
    if model.dtype == "bf16" and not backend.info().bf16_arithmetic:
        say(
            f"note: {backend.info().isa} has no bf16 arithmetic: bf16 saves memory, not time: --dtype f32 is about as fast or faster"
        )
    config = config.replace(recompute=model.recompute, classifier_rows=model.classifier_rows)
    optimizer = build_optimizer(config, model, comm)
    drawn = config.rows_per_sample or config.batch_size
    rows_per_sample = _shared(world, drawn if found is None else found.rows_per_sample(config.batch_size))
    train_loader, val_loader = _build_loaders(config, sources, model.config.vocab_size, rows_per_sample, world)
    if (unused := len(sources.train) - len(train_loader.files)) > 0 and not config.overfit:
        say(f"note: {unused} of {len(sources.train)} files to train on have less than one batch, and are not used")
    _check_patience(config, val_loader)
    total_steps = _total_steps(config, train_loader)
    if given.warmup_steps is None and saved is None:
        config = config.replace(warmup_steps=min(config.warmup_steps, total_steps // 2))
    remarks = []
    if saved is not None:
        remarks += _check_length(config, saved, begun, total_steps, train_loader)
    if problem := warmup_problem(*_schedule(config, total_steps)):
        remarks.append(f"warning: {problem}")
    batch = BatchSchedule.of(config.to_dict())
    if 0 < total_steps <= batch.warmup_steps:
        remarks.append(
            f"warning: batch_warmup_steps is {batch.warmup_steps} of {total_steps} steps in all: the last update has "
            f"{batch.tokens(total_steps - 1):,} of {batch.full:,} tokens"
        )
    notes = Notes(world.rank, world.size)
    run = Run(
        world=world,
        comm=comm,
        reduction=None if comm is None else _llmc.Reduction(comm, optimizer.partition, notes.count),
        notes=notes,
        config=config,
        rows=rows,
        run_dir=run_dir,
        sources=sources,
        fingerprint=fingerprint,
        state=None,
        model=model,
        weight_origin=weight_origin,
        memory=memory,
        memory_by_rank=world.gather(
            memory.parameters
            + memory.gradients
            + memory.activations
            + optimizer.bytes
            + _average_bytes(config, model.config, model.dtype)
        ),
        peak_flops=_sum_or_none(world.gather(peak_flops(backend, model.dtype))),
        optimizer=optimizer,
        average=None,
        train_loader=train_loader,
        val_loader=val_loader,
        bytes_per_token=None,
        total_steps=total_steps,
        lr=lr_schedule(*_schedule(config, total_steps)),
        remarks=remarks,
        hellaswag_examples=_read_hellaswag(config, model.config),
        gpu_info=_open_gpu_info(config, backend) if world.leads else None,
    )
    tokenizer = sources.tokenizer if world.leads else None  # another rank may not see the file
    known = None if tokenizer is None else bytes_per_token(run.validation_batches(), tokenizer)
    run.bytes_per_token = _shared(world, known)
    world.agree("HellaSwag's file", {"its number of examples": len(run.hellaswag_examples)})
    if saved is not None:
        run.state = _load_state(found, run)
    if comm is not None:
        _copy_from_rank_0(run, comm)
    if config.ema_decay:
        run.average = _average(run, found)
    return run


def _shared(world: World, value: Any) -> Any:
    """Return rank 0's value, which JSON can say. However long rank 0 works on it, the others wait."""
    world.barrier()
    return world.share_value(value)


def _sum_or_none(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def open_device(device: str, threads: int, local_rank: int = 0) -> tuple[str, _llmc.Backend]:
    """Open the device of a run.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto" for "cuda" if there is one.
        threads: CPU threads; 0 for as many as the process may use.
        local_rank: the GPU that "cuda" means.

    Returns:
        The device that was chosen, "cuda" whatever its number, and its Backend.
    """
    if device == "auto":
        if _llmc.cuda_built():
            try:
                return "cuda", _open_gpu(threads, local_rank)
            except _llmc.Error:
                pass
        device = "cpu"
    return device, _open_gpu(threads, local_rank) if device == "cuda" else _llmc.Backend(device, threads)


def _open_gpu(threads: int, index: int) -> _llmc.Backend:
    if index > 0:
        try:
            return _llmc.Backend(f"cuda:{index}", threads)
        except (
            _llmc.Error
        ):  # a launcher may show each rank its own GPU alone; if it is another rank's, open_comm() will say so
            pass
    return _llmc.Backend("cuda", threads)


def _set_options(backend: _llmc.Backend, config: RunConfig) -> None:
    if config.device == "cpu":
        return
    backend.set_option("tf32", "on" if config.tf32 else "off")
    backend.set_option("attention", config.attention)
    backend.set_option("deterministic", "on" if config.deterministic else "off")
    backend.set_option("fused_gelu", config.fused_gelu)


def _find_checkpoint(given: TrainConfig, say: Callable[[str], None]) -> FoundCheckpoint | None:
    """Find the checkpoint to continue from, if the run is to be resumed and its directory has one."""
    if not (given.resume and given.output_dir and finished_steps(given.output_dir)):
        return None
    found = newest_good(given.output_dir, warn=say)
    if found is None:
        raise CheckpointDamaged(f"{given.output_dir}: no checkpoint is whole; remove its DONE_* files to begin anew")
    return found


def _open_run_directory(config: RunConfig, world: World) -> Path | None:
    if world.leads:
        return open_run_directory(config)
    return Path(config.output_dir) if config.output_dir else None


def _prepare(config: RunConfig, run_dir: Path | None, world: World, say: Callable[[str], None]) -> Sources:
    """Find the data, rank 0 first: the others use its tokens if they see them."""
    if world.leads:
        sources = prepare(config, run_dir, say)
        _shared(world, sources.tokenized)
        return sources
    return prepare_beside(config, _shared(world, None))


def _check_same(found: FoundCheckpoint, config: RunConfig, fingerprint: list[DataFile]) -> None:
    """Check that settings and data are those of the checkpoint, and that its state is that of the run's optimizer."""
    if (optimizer := found.optimizer) != config.optimizer:
        raise ValueError(
            f"{config.output_dir}: the checkpoint of step {found.step} has the state of {optimizer}, the run's optimizer is "
            f"{config.optimizer}: give --optimizer {optimizer}, or begin another run with these weights "
            f"(--model {shell_word(config.output_dir or '')})"
        )
    differences = [] if found.manifest is None else _differences(found.manifest, config, fingerprint)
    if differences and not config.allow_changes:
        raise ValueError(
            f"{config.output_dir}: the checkpoint of step {found.step} was made with other settings: "
            + "; ".join(differences)
            + ". Give the same, or --allow-changes"
        )


def _differences(saved: Manifest, config: RunConfig, fingerprint: list[DataFile]) -> list[str]:
    """Return in words what a resumed run must share with its checkpoint and does not."""
    before = {**defaults(saved.config.get("model")), **BEFORE_THERE_WAS}
    return saved.differences(SAME_ON_RESUME, config.to_dict(), fingerprint, defaults=before)


def _as_before(config: RunConfig, saved: dict[str, Any] | None) -> RunConfig:
    """Keep what was chosen by the memory of a GPU when the run began: another choice would change the bits."""
    if saved is None or config.device == "cpu" or saved.get("device") != config.device:
        return config
    names = [n for n in ("recompute", "classifier_rows") if getattr(config, n) is None]
    return config.replace(**{n: saved.get(n) for n in names})


def _build_model(
    config: RunConfig,
    backend: _llmc.Backend,
    sources: Sources,
    found: FoundCheckpoint | None,
    world: World,
    rows: int | None,
) -> tuple[Model, str, _llmc.MemoryPlan]:
    """Return the model, on rank 0 with its first weights, in words where these come from, and its memory plan."""
    path, first = _first_weights(config, sources, found) if world.leads else (None, None)
    first = _shared(world, first)
    shape = GPT2Config(**first["shape"])
    _check_fits(config, sources, shape)
    dtype = config.dtype or first["dtype"]

    def check(recompute: int | None, classifier_rows: int | None) -> tuple[_llmc.MemoryPlan, int, int]:
        return check_memory(
            backend,
            shape,
            dtype=dtype,
            grad_dtype=config.grad_dtype,
            B=config.batch_size,
            T=config.seq_len,
            recompute=recompute,
            classifier_rows=classifier_rows,
            optimizer_bytes=lambda dtype: _optimizer_bytes(config, shape, dtype) + _average_bytes(config, shape, dtype),
            rows=rows,
            grows=rows is not None and rows * config.seq_len * world.size < config.total_batch_size,
            ranks=world.size,
            sharing=world.local_size,
            begun=first["begun"],
        )

    memory, *chosen = check(config.recompute, config.classifier_rows)
    levels, chunks = zip(*world.gather(chosen))
    memory, recompute, classifier_rows = check(max(levels), min(chunks))  # what fits on all ranks
    options: dict[str, Any] = {
        "backend": backend,
        "dtype": dtype,
        "grad_dtype": config.grad_dtype or default_grad_dtype(config.device, dtype),
        "recompute": recompute,
        "classifier_rows": classifier_rows,
    }
    if path is not None:
        model = GPT2.from_checkpoint(path, **options)
    else:
        model = GPT2(shape, seed=config.seed if world.leads else None, **options)
        if world.leads and config.position_init == "sines":
            model.parameters["wpe"] = sines(shape.max_seq_len, shape.channels)
    return model, first["origin"], memory


def _first_weights(
    config: RunConfig, sources: Sources, found: FoundCheckpoint | None
) -> tuple[Path | None, dict[str, Any]]:
    """Return the file of the first weights, or None for random ones, and what all ranks need to know of them."""
    path: Path | None = None
    if found is not None:
        path, origin = found.files.model, "intermediate checkpoint"
    elif config.model is not None and (path := model_file(config.model)) is not None:
        origin = str(path)
        for name in ("layers", "heads", "channels", "max_seq_len"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is given, but the model is the checkpoint {path}, which has its own")
    else:
        origin = config.model or "small model"
    if path is not None:
        native, file_dtype, _ = _llmc.inspect_checkpoint(path)
        shape, dtype = GPT2Config.from_native(native), str(file_dtype)
    else:
        shape, dtype = _model_shape(config, sources), "f32" if config.device == "cpu" else "bf16"
    return path, {"shape": asdict(shape), "dtype": dtype, "origin": origin, "begun": found is not None}


def build_optimizer(config: RunConfig, model: Model, comm: _llmc.Comm | None = None) -> Optimizer:
    """Return the optimizer that the settings ask for, over the parameters of a model; comm: the ranks, if there are several."""
    options: dict[str, Any] = {
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "grad_clip": config.grad_clip,
        "master_weights": config.master_weights,
        "comm": comm if config.zero_stage == 1 else None,
    }
    if config.optimizer == "muon":
        return Muon(model, momentum=config.muon_momentum, lr_ratio=config.muon_lr_ratio, **options)
    return AdamW(model, **options)


def _optimizer_bytes(config: RunConfig, shape: ModelConfig, dtype: str) -> int:
    """Return what that optimizer will keep on one rank, before there is a model."""
    kind = Muon if config.optimizer == "muon" else AdamW
    return kind.planned_bytes(shape, dtype, config.master_weights, config.processes if config.zero_stage == 1 else 1)


def _average_bytes(config: RunConfig, shape: ModelConfig, dtype: str) -> int:
    """Return what the average of the weights will take, if there is one."""
    return WeightAverage.planned_bytes(shape, dtype) if config.ema_decay else 0


def _model_shape(config: RunConfig, sources: Sources) -> GPT2Config:
    given = {
        "num_layers": config.layers,
        "num_heads": config.heads,
        "channels": config.channels,
        "max_seq_len": config.max_seq_len,
        "vocab_size": sources.vocab_size,
    }
    changes = {k: v for k, v in given.items() if v is not None}
    if config.model is not None:
        return GPT2Config.from_descriptor(config.model, **changes)
    return GPT2Config(**{**SMALL_MODEL, "max_seq_len": config.seq_len, **changes})  # what is not trained is not there


def _check_fits(config: RunConfig, sources: Sources, shape: ModelConfig) -> None:
    if sources.tokenizer is not None and sources.tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {sources.tokenizer.vocab_size} tokens, but the model's vocabulary is {shape.vocab_size}"
        )
    if config.seq_len > shape.max_seq_len:
        raise ValueError(f"seq_len is {config.seq_len}, but the model's max_seq_len is {shape.max_seq_len}")


def _build_loaders(
    config: RunConfig, sources: Sources, vocab_size: int, rows_per_sample: int, world: World
) -> tuple[DataLoader, DataLoader | None]:
    """Return the loaders of training and validation. What the ranks read in turn is what one process would read."""
    if config.overfit and not sources.val:
        raise ValueError("overfit trains on the validation data, and there are none")
    B, T = config.batch_size, config.seq_len
    train = DataLoader(
        sources.val if config.overfit else sources.train,
        B,
        T,
        shuffle=config.shuffle and not config.overfit,
        seed=config.data_seed,
        vocab_size=vocab_size,
        rows_per_sample=rows_per_sample,
        rank=world.rank,
        ranks=world.size,
    )
    if not sources.val:
        return train, None
    val = DataLoader(sources.val, B, T, vocab_size=vocab_size, rows_per_sample=B, rank=world.rank, ranks=world.size)
    return train, val


def _load_state(found: FoundCheckpoint | None, run: Run) -> TrainState:
    """Load the checkpoint's state into model and optimizer, of which each rank takes what it keeps; return the rest of it."""
    state = None
    if found is not None:
        state = found.load_state(run.model, run.optimizer, run.train_loader.state(), shuffle=run.shuffle)
    elif run.optimizer.sharded:
        receive_state(run.model, run.optimizer)
    run.world.barrier()
    return TrainState.from_bytes(run.world.share(state.to_bytes() if state is not None else None))


def _copy_from_rank_0(run: Run, comm: _llmc.Comm) -> None:
    """Give all ranks the weights of rank 0, and the optimizer's state if each is to have all of it."""
    tensors = [run.model.all_parameters()]
    if run.state is not None and not run.optimizer.sharded:
        rows = run.optimizer.state().values()
        tensors += [t for row in rows for t in (*row.moments, row.master) if t is not None]
    comm.broadcast(tensors, 0)
    comm.wait()
    run.model.weights_changed()


def _average(run: Run, found: FoundCheckpoint | None) -> WeightAverage:
    """Return the average of the weights that the checkpoint has, else one that begins as the weights are."""
    average = WeightAverage(run.model, run.config.ema_decay)
    if found is not None and found.has_average:
        found.load_average(average.tensor)
    if run.comm is not None:
        run.comm.broadcast([average.tensor], 0)
        run.comm.wait()
    return average


def _check_patience(config: RunConfig, val_loader: DataLoader | None) -> None:
    if config.patience and (val_loader is None or config.val_every <= 0):
        why = "there are no validation data (--val-data)" if val_loader is None else f"val_every is {config.val_every}"
        raise ValueError(f"patience is {config.patience}, but {why}: the run is not validated on the way")


def _fewest_tokens(config: RunConfig, begun: int) -> int:
    """Return the tokens of the smallest update from a step on; all others have a multiple of them."""
    batch = BatchSchedule.of(config.to_dict())
    return batch.first if begun < batch.warmup_steps else batch.full


def _total_steps(config: RunConfig, loader: DataLoader) -> int:
    if config.max_steps != -1:
        return config.max_steps
    batch = BatchSchedule.of(config.to_dict())
    steps = batch.steps(loader.num_tokens)
    if steps == 0:
        name = "total_batch_size" if batch.first == batch.full else "first_batch_size"
        raise ValueError(
            f"the data hold {loader.num_tokens} tokens, less than the {batch.tokens(0)} of one update "
            f"({name}); give a number of steps to go over them several times (--max-steps)"
        )
    return steps


# The settings that the learning rate of a step depends on.
_OF_SCHEDULE = ("max_steps", "schedule", "learning_rate", "warmup_steps", "final_lr_frac", "decay_frac")


def _schedule(config: RunConfig, total_steps: int) -> tuple[str, float, int, int, float, float]:
    """Return the arguments of lr_schedule()."""
    c = config
    return c.schedule, c.learning_rate, c.warmup_steps, total_steps, c.final_lr_frac, c.decay_frac


def _check_length(
    config: RunConfig, saved: dict[str, Any], step: int, total_steps: int, loader: DataLoader
) -> list[str]:
    """Check that a run that goes on from a step has not gone too far; return what happens to its learning rate if that has changed."""
    if total_steps < step:
        epoch = f" (one epoch: {counted(total_steps, 'step')})" if config.max_steps == -1 else ""
        raise ValueError(
            f"max_steps is {config.max_steps}{epoch}, but {config.output_dir} is at step {step}: expected {step} or more"
        )
    before = config.replace(**{n: saved[n] for n in _OF_SCHEDULE if n in saved})
    changed = [n for n in _OF_SCHEDULE if getattr(before, n) != getattr(config, n)]
    if not changed or step == total_steps:
        return []
    old_steps = _total_steps(before, loader)
    old, new = (lr_schedule(*_schedule(c, n))(step) for c, n in ((before, old_steps), (config, total_steps)))
    what = ", ".join(f"{n} was {getattr(before, n)}, is {getattr(config, n)}" for n in changed)
    later = wsd_decay_begin(total_steps, config.decay_frac)
    falls = f", and falls from step {later} on" if config.schedule == "wsd" and step < later else ""
    if old == new:
        return [f"{what}: the learning rate goes on at {new:.3g}{falls}"]
    there = "at its end" if step >= old_steps else "there"
    return [
        f"{what}: the learning rate is {new:.3g} from step {step} on, as {config.schedule} over {total_steps} steps has it{falls}; "
        f"over {old_steps} steps it was {old:.3g} {there}"
    ]


def _read_hellaswag(config: RunConfig, shape: ModelConfig) -> list[Example]:
    if not config.hellaswag or not Path(config.hellaswag_data).is_file():
        return []
    examples = read_eval_file(config.hellaswag_data)
    check_examples(examples, shape)
    return examples


def _open_gpu_info(config: RunConfig, backend: _llmc.Backend) -> GpuInfo | None:
    if config.gpu_info_every <= 0:
        return None
    if config.device == "cpu":
        raise ValueError(f"gpu_info_every is {config.gpu_info_every}, but the device is {config.device}")
    return GpuInfo(int(backend.info().name.partition(":")[2] or 0))
