"""Build a training run from its settings. What is wrong with a run is said here, before its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.checkpoint import FoundCheckpoint, finished_steps, newest_good
from llmc.data.loader import DataLoader
from llmc.evals import check_examples
from llmc.formats.eval_file import Example, read_eval_file
from llmc.formats.manifest import DataFile, Manifest
from llmc.formats.stream import CheckpointDamaged
from llmc.models.config import GPT2Config, ModelConfig
from llmc.models.gpt2 import GPT2
from llmc.models.model import Model, default_grad_dtype
from llmc.optim.adamw import AdamW
from llmc.optim.optimizer import Optimizer
from llmc.optim.schedule import lr_schedule
from llmc.system.flops import peak_flops
from llmc.system.gpu_info import GpuInfo
from llmc.training.memory import check_memory
from llmc.training.run_dir import open_run_directory
from llmc.training.settings import SAME_ON_RESUME, RunConfig, TrainConfig, defaults, resolve
from llmc.training.sources import Sources, prepare

# Without a model the run is a small one, sized for two CPU cores and two minutes.
SMALL_MODEL = {"num_layers": 4, "num_heads": 4, "channels": 256, "max_seq_len": 256}


@dataclass
class Run:
    """What a training run is made of.

    Attributes:
        config: the settings; recompute and classifier_rows are those that were chosen.
        run_dir: None if nothing is kept.
        fingerprint: sizes and checksums of the data; a checkpoint remembers them.
        found: the checkpoint that the run continues, whose weights the model has already; None for a new run.
        weight_origin: in words.
        memory: the plan that was checked against what is free.
        peak_flops: FLOP/s that the device can reach; None if that is not known.
        val_loader: None without validation data.
        lr: the learning rate of a step.
        hellaswag_examples: empty if HellaSwag is not asked for, or its file is not there.
        gpu_info: None if its line is not asked for.
    """

    config: RunConfig
    run_dir: Path | None
    sources: Sources
    fingerprint: list[DataFile]
    found: FoundCheckpoint | None
    model: Model
    weight_origin: str
    memory: _llmc.MemoryPlan
    peak_flops: float | None
    optimizer: Optimizer
    train_loader: DataLoader
    val_loader: DataLoader | None
    total_steps: int
    lr: Callable[[int], float]
    hellaswag_examples: list[Example]
    gpu_info: GpuInfo | None

    @property
    def grad_accum(self) -> int:
        """Micro-batches of an update."""
        return self.config.total_batch_size // (self.config.batch_size * self.config.seq_len)

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

    @property
    def shuffle(self) -> bool:
        """Whether training samples come in random order."""
        return self.config.shuffle and not self.config.overfit


def setup(given: TrainConfig, say: Callable[[str], None]) -> Run:
    """Find the data and the checkpoint, check that memory suffices, and build model, optimizer and loaders.

    Args:
        given: the settings as the user gave them.
        say: is told, for example, that a damaged checkpoint is passed over.

    Raises:
        ValueError, FileNotFoundError, MemoryError, llmc.Error: if a setting is wrong, data are missing or damaged, or memory does
            not suffice.
    """
    device, backend = open_device(given.device, given.threads)
    config = resolve(given, device)
    _set_options(backend, config)
    run_dir = open_run_directory(config)
    sources = prepare(config, run_dir)
    fingerprint = sources.fingerprint()
    found = _find_checkpoint(config, run_dir, fingerprint, say)
    config = _as_before(config, found)
    model, weight_origin, memory = _build_model(config, backend, sources, found)
    config = config.replace(recompute=model.recompute, classifier_rows=model.classifier_rows)
    optimizer = build_optimizer(config, model)
    train_loader, val_loader = _build_loaders(config, sources, model.config.vocab_size, found)
    total_steps = _total_steps(config, train_loader)
    lr = lr_schedule(config.schedule, config.learning_rate, config.warmup_steps, total_steps, config.final_lr_frac)
    return Run(
        config=config,
        run_dir=run_dir,
        sources=sources,
        fingerprint=fingerprint,
        found=found,
        model=model,
        weight_origin=weight_origin,
        memory=memory,
        peak_flops=peak_flops(backend, model.dtype),
        optimizer=optimizer,
        train_loader=train_loader,
        val_loader=val_loader,
        total_steps=total_steps,
        lr=lr,
        hellaswag_examples=_read_hellaswag(config, model.config),
        gpu_info=_open_gpu_info(config),
    )


def open_device(device: str, threads: int) -> tuple[str, _llmc.Backend]:
    """Open the device of a run.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto" for "cuda" if there is one.
        threads: CPU threads; 0 for as many as the process may use.

    Returns:
        The device that was chosen, and its only Backend.
    """
    if device == "auto":
        if _llmc.cuda_built():
            try:
                return "cuda", _llmc.Backend("cuda", threads)
            except _llmc.Error:
                pass
        device = "cpu"
    return device, _llmc.Backend(device, threads)


def _set_options(backend: _llmc.Backend, config: RunConfig) -> None:
    if config.device == "cpu":
        return
    backend.set_option("tf32", "on" if config.tf32 else "off")
    backend.set_option("attention", config.attention)
    backend.set_option("deterministic", "on" if config.deterministic else "off")
    backend.set_option("fused_gelu", config.fused_gelu)


def _find_checkpoint(
    config: RunConfig, run_dir: Path | None, fingerprint: list[DataFile], say: Callable[[str], None]
) -> FoundCheckpoint | None:
    """Find the checkpoint to continue from, if the run directory has one, and check that settings and data are its own."""
    if run_dir is None or not finished_steps(run_dir):
        return None
    found = newest_good(run_dir, warn=say)
    if found is None:
        raise CheckpointDamaged(f"{run_dir}: no checkpoint is whole; remove its DONE_* files to begin anew")
    differences = [] if found.manifest is None else _differences(found.manifest, config, fingerprint)
    if differences and not config.allow_changes:
        raise ValueError(
            f"{run_dir}: the checkpoint of step {found.step} was made with other settings: "
            + "; ".join(differences)
            + ". Give the same, or --allow-changes"
        )
    return found


def _differences(saved: Manifest, config: RunConfig, fingerprint: list[DataFile]) -> list[str]:
    """Return in words what a resumed run must share with its checkpoint and does not."""
    before = defaults(saved.config.get("model"))
    return saved.differences(SAME_ON_RESUME, config.to_dict(), fingerprint, defaults=before)


def _as_before(config: RunConfig, found: FoundCheckpoint | None) -> RunConfig:
    """Keep what was chosen by the memory of a GPU when the run began: another choice would change the bits."""
    if found is None or found.manifest is None or config.device == "cpu":
        return config
    before = found.manifest.config
    if before.get("device") != config.device:
        return config
    names = [n for n in ("recompute", "classifier_rows") if getattr(config, n) is None]
    return config.replace(**{n: before.get(n) for n in names})


def _build_model(
    config: RunConfig,
    backend: _llmc.Backend,
    sources: Sources,
    found: FoundCheckpoint | None,
) -> tuple[Model, str, _llmc.MemoryPlan]:
    """Return the model with its first weights, in words where these come from, and its memory plan."""
    path: Path | None = None
    if found is not None:
        path, origin = found.files.model, "intermediate checkpoint"
    elif config.model is not None and config.model.endswith(".bin"):
        path, origin = Path(config.model), config.model
        for name in ("layers", "heads", "channels", "max_seq_len"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is given, but the model is the checkpoint {path}, which has its own")
    else:
        origin = config.model or "small model"
    if path is not None:
        native, file_dtype, _ = _llmc.inspect_checkpoint(path)
        shape, default_dtype = GPT2Config.from_native(native), str(file_dtype)
    else:
        shape, default_dtype = _model_shape(config, sources), "f32" if config.device == "cpu" else "bf16"
    _check_fits(config, sources, shape)
    dtype = config.dtype or default_dtype
    grad_dtype = config.grad_dtype or default_grad_dtype(config.device, dtype)
    memory, recompute, classifier_rows = check_memory(
        backend,
        shape,
        dtype=dtype,
        grad_dtype=grad_dtype,
        B=config.batch_size,
        T=config.seq_len,
        recompute=config.recompute,
        classifier_rows=config.classifier_rows,
        optimizer_bytes=_optimizer_bytes(config, dtype),
    )
    options: dict[str, Any] = {
        "backend": backend,
        "dtype": dtype,
        "grad_dtype": grad_dtype,
        "recompute": recompute,
        "classifier_rows": classifier_rows,
    }
    model = GPT2.from_checkpoint(path, **options) if path else GPT2(shape, seed=config.seed, **options)
    return model, origin, memory


def build_optimizer(config: RunConfig, model: Model) -> Optimizer:
    """Return the optimizer that the settings ask for, over the parameters of a model."""
    return AdamW(
        model,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        master_weights=config.master_weights,
    )


def _optimizer_bytes(config: RunConfig, dtype: str) -> int:
    """Return what that optimizer will keep of each parameter, before there is a model."""
    return AdamW.bytes_per_parameter(dtype, config.master_weights)


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
    longest = max(SMALL_MODEL["max_seq_len"], config.seq_len)
    return GPT2Config(**{**SMALL_MODEL, "max_seq_len": longest, **changes})


def _check_fits(config: RunConfig, sources: Sources, shape: ModelConfig) -> None:
    if sources.tokenizer is not None and sources.tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {sources.tokenizer.vocab_size} tokens, but the model's vocabulary is {shape.vocab_size}"
        )
    if config.seq_len > shape.max_seq_len:
        raise ValueError(f"seq_len is {config.seq_len}, but the model's max_seq_len is {shape.max_seq_len}")


def _build_loaders(
    config: RunConfig, sources: Sources, vocab_size: int, found: FoundCheckpoint | None
) -> tuple[DataLoader, DataLoader | None]:
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
        rows_per_sample=found.rows_per_sample if found is not None else 0,
    )
    return train, DataLoader(sources.val, B, T, vocab_size=vocab_size) if sources.val else None


def _total_steps(config: RunConfig, loader: DataLoader) -> int:
    if config.max_steps != -1:
        return config.max_steps
    steps = loader.num_tokens // config.total_batch_size
    if steps == 0:
        raise ValueError(
            f"the data hold {loader.num_tokens} tokens, less than the {config.total_batch_size} of one update "
            "(total_batch_size); give a number of steps to go over them several times (--max-steps)"
        )
    return steps


def _read_hellaswag(config: RunConfig, shape: ModelConfig) -> list[Example]:
    if not config.hellaswag or not Path(config.hellaswag_data).is_file():
        return []
    examples = read_eval_file(config.hellaswag_data)
    check_examples(examples, shape)
    return examples


def _open_gpu_info(config: RunConfig) -> GpuInfo | None:
    if config.gpu_info_every <= 0:
        return None
    if not config.device.startswith("cuda"):
        raise ValueError(f"gpu_info_every is {config.gpu_info_every}, but the device is {config.device}")
    return GpuInfo(int(config.device.partition(":")[2] or 0))
