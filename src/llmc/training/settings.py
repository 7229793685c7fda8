"""Every setting of a training run, once: its default, its flags, its help. The command line, TOML files, `llmc.train(...)` and the
run directory's config.toml all follow from this dataclass.

llm.c's short flags keep llm.c's meaning. Where a default depends on another choice it is None here, and resolve() fills it in.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmc.optim.schedule import SCHEDULES
from llmc.system.toml import load_toml_file
from llmc.values import canonical_dtype


def _setting(
    default: Any, group: str, help: str, short: str = "", kind: type = str, choices: tuple[str, ...] = ()
) -> Any:
    """kind: the type of one value on the command line. A tuple default means a list of them."""
    metadata = {"group": group, "help": help, "short": short, "kind": kind, "choices": choices}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; see `llmc-train --help` for the same list by flags."""

    # fmt: off
    data: tuple[str, ...] = _setting((), "data", "text files, folders, or globs of .bin token files; none: the language reference that every Python carries", "-i")
    val_data: tuple[str, ...] = _setting((), "data", "the same for validation; none: the last tenth of text, or no validation for .bin", "-j")
    tokenizer: str | None = _setting(None, "data", "gpt2, bytes, bpe:N (trained on the data), or a tokenizer file; default: bpe:1024 for text, found beside .bin files")
    shuffle: bool = _setting(True, "data", "draw samples in random order", "", bool)
    data_seed: int = _setting(42, "data", "seed of that order", "", int)

    model: str | None = _setting(None, "model", "d12, gpt3:c768, ..., or a checkpoint (.bin); default: a small model", "-e")
    layers: int | None = _setting(None, "model", "transformer blocks, in place of the model's", "", int)
    heads: int | None = _setting(None, "model", "attention heads, in place of the model's", "", int)
    channels: int | None = _setting(None, "model", "width, in place of the model's", "", int)
    max_seq_len: int | None = _setting(None, "model", "longest context, in place of the model's", "", int)
    vocab_size: int | None = _setting(None, "model", "vocabulary, in place of the tokenizer's", "", int)
    seed: int = _setting(42, "model", "seed of the random weights", "", int)

    batch_size: int | None = _setting(None, "batch", "rows per micro-batch, B [small model 16, else 4]", "-b", int)
    seq_len: int | None = _setting(None, "batch", "tokens per row, T [small model 128, else 1024]", "-t", int)
    total_batch_size: int = _setting(-1, "batch", "tokens per update; a multiple of B*T*processes; -1: that product", "-d", int)
    max_steps: int | None = _setting(None, "batch", "updates; -1: one epoch [small model 400, else -1]", "-x", int)
    overfit: bool = _setting(False, "batch", "train on the first batch of the validation data, over and over", "-a", bool)

    learning_rate: float | None = _setting(None, "optimizer", "highest learning rate [small model 1e-3, else 3e-4]", "-l", float)
    schedule: str = _setting("cosine", "optimizer", "learning rate schedule", "-k", str, SCHEDULES)
    warmup_steps: int | None = _setting(None, "optimizer", "steps of linear warm-up [small model 40, else 0]", "-u", int)
    final_lr_frac: float | None = _setting(None, "optimizer", "last learning rate, as a fraction of the highest [small model 0.1, else 1]", "-q", float)
    weight_decay: float = _setting(0.0, "optimizer", "decay of matrices and embeddings", "-c", float)
    beta1: float = _setting(0.9, "optimizer", "AdamW's first decay", "", float)
    beta2: float = _setting(0.95, "optimizer", "AdamW's second decay", "", float)
    eps: float = _setting(1e-8, "optimizer", "AdamW's epsilon", "", float)
    grad_clip: float = _setting(1.0, "optimizer", "largest global gradient norm; 0: no clipping", "", float)
    skip_loss_z: float = _setting(0.0, "optimizer", "skip an update whose loss is more than this many standard deviations above its recent mean; 0: never", "-sl", float)
    skip_grad_z: float = _setting(0.0, "optimizer", "the same by gradient norm", "-sg", float)
    max_bad_steps: int = _setting(10, "optimizer", "stop after this many updates in a row with a NaN or infinite loss or gradient; 0: never", "", int)

    output_dir: str | None = _setting(None, "output", "run directory; default: runs/<time> where no model is named, else none: nothing is kept", "-o")
    checkpoint_every: int = _setting(0, "output", "checkpoint every n steps, and at the end; 0: at the end only; -1: never", "-n", int)
    keep_checkpoints: int = _setting(0, "output", "keep this many of them; 0: all", "-nk", int)
    major_every: int = _setting(0, "output", "never delete those of steps divisible by this; 0: none is kept for ever", "-nm", int)
    save_best: bool = _setting(False, "output", "keep the model of the lowest validation loss as best.bin", "", bool)
    async_save: bool = _setting(True, "output", "write checkpoints in the background, from a copy in memory", "", bool)
    on_save_error: str = _setting("continue", "output", "when a checkpoint cannot be written", "", str, ("continue", "stop"))
    resume: bool = _setting(False, "output", "continue from the newest good checkpoint of the run directory, if it has one", "-y", bool)
    allow_changes: bool = _setting(False, "output", "resume although settings or data differ from the checkpoint's", "", bool)

    val_every: int | None = _setting(None, "evaluation", "validate every n steps, and at the end; 0: never [small model 50, else 20]", "-v", int)
    val_steps: int = _setting(20, "evaluation", "validation batches; -1: all", "-m", int)
    hellaswag: bool = _setting(False, "evaluation", "evaluate HellaSwag with validation (-h 1)", "-h", bool)
    hellaswag_data: str = _setting("dev/data/hellaswag/hellaswag_val.bin", "evaluation", "llm.c's HellaSwag file")
    sample_every: int | None = _setting(None, "evaluation", "print a sample every n steps, and at the end; 0: never [small model 200, else 20]", "-s", int)
    sample_tokens: int | None = _setting(None, "evaluation", "its length, the first token of the prompt included [small model 256, else 64]", "-g", int)
    prompt: str = _setting("", "evaluation", "text that samples begin with; default: end-of-text")
    temperature: float | None = _setting(None, "evaluation", "of samples; 0: the most likely token [small model 0.8, else 1]", "", float)
    top_k: int = _setting(0, "evaluation", "sample among this many most likely tokens; 0: all", "", int)
    top_p: float = _setting(1.0, "evaluation", "sample among the most likely tokens of this total probability", "", float)

    device: str = _setting("auto", "machine", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    dtype: str | None = _setting(None, "machine", "f32 or bf16 [bf16 on cuda, else f32; a checkpoint's own]", "-p")
    grad_dtype: str | None = _setting(None, "machine", "dtype of gradients: f32 with bf16 adds micro-batches up exactly [f32 on cuda, else dtype]")
    threads: int = _setting(0, "machine", "CPU threads; 0: as many as the process may use", "", int)
    recompute: int | None = _setting(None, "machine", "recompute in backward: 0 nothing, 1 GELU, 2 GELU and layernorm [on cuda the least that fits, else 1]", "-r", int)
    master_weights: bool = _setting(True, "machine", "keep f32 weights beside bf16 ones", "-w", bool)
    classifier_rows: int | None = _setting(None, "machine", "rows of logits that exist at a time [on cuda up to 16384, as memory allows, else 1024]", "", int)
    gelu_fusion: int = _setting(0, "machine", "llm.c's -ge; accepted, and without effect: see fused_gelu", "-ge", int)
    tf32: bool = _setting(True, "machine", "TF32 for f32 matmuls on GPUs that have it", "-f", bool)
    attention: str = _setting("auto", "machine", "attention on GPUs: auto takes the first of the others that there is and that fits the model (the CPU has one kind)", "", str, ("auto", "cudnn", "flash", "simple"))
    deterministic: bool = _setting(True, "machine", "the same bits on every run; on GPUs it costs cuDNN's attention time and memory (the CPU always is)", "", bool)
    fused_gelu: str = _setting("auto", "machine", "GELU inside of matmuls on GPUs: auto in bf16 from Hopper on (no effect on the CPU)", "", str, ("auto", "off", "on"))
    zero_stage: int = _setting(0, "machine", "llm.c's -z; with one process there is nothing to shard", "-z", int)

    processes: int = _setting(1, "processes", "number of processes", "-pn", int)
    rank: int = _setting(0, "processes", "this process's number", "-pr", int)
    gpus_per_node: int = _setting(8, "processes", "GPUs per machine", "-pg", int)
    dist_init: str = _setting("mpi", "processes", "how processes find each other", "-pi", str, ("mpi", "tcp", "fs"))
    dist_dir: str = _setting("", "processes", "fs: the shared directory", "-pf")
    dist_host: str = _setting("", "processes", "tcp: the server's address", "-ps")

    gpu_info_every: int = _setting(-1, "logs", "print the GPU's clocks, power and temperature every n steps; -1: never", "-lg", int)
    progress: str = _setting("auto", "logs", "a bar, llm.c's lines, or nothing; auto: a bar in a terminal", "", str, ("auto", "bar", "lines", "none"))
    tensorboard: bool = _setting(False, "logs", "write TensorBoard events into the run directory", "", bool)
    wandb: str = _setting("", "logs", "Weights & Biases project to log to")
    plot: bool = _setting(True, "logs", "write loss.png into the run directory at the end", "", bool)
    # fmt: on

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            kind = f.metadata["kind"]
            if f.name in ("data", "val_data") and isinstance(value, (list, tuple)):
                object.__setattr__(self, f.name, tuple(str(v) for v in value))
            elif kind is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, f.name, float(value))
            elif kind is bool and isinstance(value, int):
                object.__setattr__(self, f.name, bool(value))
            elif f.name in ("data", "val_data"):
                object.__setattr__(self, f.name, (str(value),))
            elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{f.name} is {value!r}, expected {kind.__name__}")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ValueError(f"{f.name} is '{value}', expected one of {', '.join(f.metadata['choices'])}")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", canonical_dtype(self.dtype))
        if self.grad_dtype is not None:
            object.__setattr__(self, "grad_dtype", canonical_dtype(self.grad_dtype))
        self._check()

    def _check(self) -> None:
        for name in (
            "batch_size",
            "seq_len",
            "layers",
            "heads",
            "channels",
            "max_seq_len",
            "vocab_size",
            "classifier_rows",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, expected a positive number")
        for name in (
            *(
                "keep_checkpoints",
                "major_every",
                "warmup_steps",
                "max_bad_steps",
                "threads",
                "top_k",
                "seed",
                "data_seed",
            ),
            *(
                "temperature",
                "learning_rate",
                "final_lr_frac",
                "weight_decay",
                "grad_clip",
                "skip_loss_z",
                "skip_grad_z",
            ),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value:  # NaN is not either
                raise ValueError(f"{name} is {value}, expected 0 or more")
        for name, value in (("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay)):
            if value is not None and math.isinf(value):
                raise ValueError(f"{name} is {value}, expected a finite number")
        for name, value in (("seed", self.seed), ("data_seed", self.data_seed)):
            if value >= 2**32:
                raise ValueError(f"{name} is {value}, expected less than 2**32")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected 0 <= {name} < 1")
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}, expected a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.val_steps != -1 and self.val_steps <= 0:
            raise ValueError(f"val_steps is {self.val_steps}, expected -1 (all) or a positive number")
        if self.checkpoint_every < -1:
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every}, expected -1 (never), 0 (at the end) or more"
            )
        if self.recompute not in (None, 0, 1, 2):
            raise ValueError(f"recompute is {self.recompute}, expected 0, 1 or 2")
        if self.max_steps is not None and self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}, expected -1 (one epoch) or more")
        if self.zero_stage not in (0, 1):
            raise ValueError(f"zero_stage is {self.zero_stage}; stages 0 and 1 exist")

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    # ---- TOML ----

    def to_dict(self) -> dict[str, Any]:
        """Plain values, None left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    def to_toml(self) -> str:
        """Flat TOML, grouped by comments; TOML's strings, numbers, booleans and lists are JSON's."""
        lines: list[str] = []
        group = None
        values = self.to_dict()
        for f in fields(self):
            if f.name not in values:
                continue
            if f.metadata["group"] != group:
                group = f.metadata["group"]
                lines.append(f"\n# {group}" if lines else f"# {group}")
            value = values[f.name]
            special = isinstance(value, float) and not math.isfinite(value)  # TOML has inf and nan, in Python's words
            lines.append(f"{f.name} = {value if special else json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"

    @staticmethod
    def check_names(values: Mapping[str, Any], where: str) -> None:
        known = {f.name for f in fields(TrainConfig)}
        for name in values:
            if name not in known:
                import difflib

                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"{where}: unknown setting '{name}'{hint}")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Settings of a TOML file, by name. ValueError naming the file, and the line or the unknown setting."""
    values = load_toml_file(path)
    TrainConfig.check_names(values, str(path))
    return values
