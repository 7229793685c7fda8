"""Every setting of a training run, once: its type, default, bounds, flag and help, and whether a resumed run may change it.

The command line, TOML files, `llmc.train(...)`, the run directory's config.toml and the comparison at resume all follow from the
fields of TrainConfig. llm.c's short flags keep llm.c's meaning.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmc.data.holdout import HOLDOUTS
from llmc.optim.schedule import SCHEDULES
from llmc.system.toml import load_toml_file
from llmc.values import canonical_dtype, did_you_mean

T = typing.TypeVar("T", bound="TrainConfig")


@dataclass(frozen=True)
class Setting:
    """What is known of one setting.

    Attributes:
        kind, many, default: from the field's annotation and default: the type of one value, and whether it is a list of them.
        group, text: heading and line of the help.
        flag: llm.c's short flag.
        small, llm_c: the default if no model is named, which makes a small run of two minutes, and llm.c's default otherwise.
            The field itself is then None, for "not given".
        choices: the values that it may have.
        least, most: bounds that are allowed values; above, below: bounds that are not. None: no bound.
        also: a value outside of the bounds that has a meaning of its own, named in text.
        only_with: another setting, and the value of it without which this one has no effect.
        on_resume: what a resumed run has: the value that it began with ("same"), that unless this call gives another ("may change"), or
            what this call gives, else the default ("given anew"). What holds for one call is kept in no file of the run, and read from none.
        by_rank: whether each rank may have its own value. Of the others all must have the same.
        paths: whether it holds paths and globs of what a run reads again if it is resumed.
    """

    group: str
    text: str
    flag: str = ""
    small: Any = None
    llm_c: Any = None
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None
    only_with: tuple[str, Any] | None = None
    on_resume: str = "may change"
    by_rank: bool = False
    paths: bool = False
    kind: type = str
    many: bool = False
    default: Any = None

    def allows(self, value: float) -> bool:
        """Whether a number is within the bounds. A NaN is within no bound."""
        return value == self.also or (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def bounds(self) -> str:
        """The bounds in words: "0 or more", "at least 0 and below 1"."""
        lower = f"{self.least} or more" if self.least is not None else f"above {self.above}"
        if self.below == math.inf:
            lower += " and finite"
        elif self.below is not None:
            lower = f"at least {self.least} and below {self.below}"
        elif self.most is not None:
            lower = f"{self.least} to {self.most}" if self.least is not None else f"{lower} and at most {self.most}"
        return lower if self.also is None else f"{self.also}, or {lower}"

    @property
    def help(self) -> str:
        """The line of the help, with the default."""

        def shown(value: Any) -> str:
            if isinstance(value, bool):
                return "on" if value else "off"
            return f"{value:g}" if isinstance(value, float) else str(value)

        if self.small is not None:
            return f"{self.text} [small model {shown(self.small)}, else {shown(self.llm_c)}]"
        if self.default in (None, "", ()) or "[" in self.text:
            return self.text
        return f"{self.text} [{shown(self.default)}]"

    def checked(self, name: str, value: Any) -> Any:
        """Return value as this setting's type.

        Raises:
            ValueError: if it has another type, or is out of bounds.
        """
        if value is None and self.default in (None, ()):
            return self.default
        if self.many:
            return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError as e:
                raise ValueError(f"{name} has {value.bit_length()} bits, expected {self.bounds} ({self.text})") from e
        elif self.kind is bool and isinstance(value, int):
            value = bool(value)
        elif not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} is {value!r}, expected {self.kind.__name__}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, self.choices))}")
        if self.kind in (int, float) and not self.allows(value):
            raise ValueError(f"{name} is {value}, expected {self.bounds} ({self.text})")
        return value


def _setting(default: Any, group: str, text: str, flag: str = "", **known: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(group, text, flag, **known)})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; see `llmc-train --help` for the same list by flags."""

    # fmt: off
    data: tuple[str, ...] = _setting((), "data", "texts or token files, their folders, or globs; given again it adds; none: the language reference and the library's docstrings that every Python carries", "-i", by_rank=True, paths=True)
    val_data: tuple[str, ...] = _setting((), "data", "the same for validation; none: a tenth of text (see holdout); of a folder or glob of token files those with val in their names", "-j", by_rank=True, paths=True)
    tokenizer: str | None = _setting(None, "data", "gpt2, bytes, bpe:N (trained on the data), or a tokenizer file; default: bpe:2048 for text, found beside .bin files", on_resume="same")
    holdout: str = _setting("end", "data", "the tenth of a text that is held out for validation, if val_data names none: its end, or pieces from all over it", choices=HOLDOUTS, on_resume="same")
    column: str = _setting("text", "data", "field that has the text or the chat, in files of records; a dot leads into a nested one", on_resume="same")
    on_bad_record: str = _setting("stop", "data", "when a record has no text", choices=("stop", "skip"))
    document_separator: str = _setting("", "data", "mark between the documents of a text file, as '<|endoftext|>'; default: a file is one document", on_resume="same")
    shuffle: bool = _setting(True, "data", "draw samples in random order", on_resume="same")
    rows_per_sample: int | None = _setting(None, "data", "rows of T tokens that are drawn together, as they follow each other in the text; 0: all B of a micro-batch, as llm.c", small=1, llm_c=0, least=0, on_resume="same")
    data_seed: int = _setting(42, "data", "seed of that order", least=0, most=2**32 - 1, on_resume="same")

    model: str | None = _setting(None, "model", "d12 (any dN, N layers), gpt3:c768, ..., a checkpoint (.bin), or a run directory; default: a small model", "-e", on_resume="same")
    layers: int | None = _setting(None, "model", "transformer blocks, in place of the model's", least=1, on_resume="same")
    heads: int | None = _setting(None, "model", "attention heads, in place of the model's", least=1, on_resume="same")
    channels: int | None = _setting(None, "model", "width, in place of the model's", least=1, on_resume="same")
    max_seq_len: int | None = _setting(None, "model", "longest context, in place of the model's [seq_len, if no model is named]", least=1, on_resume="same")
    vocab_size: int | None = _setting(None, "model", "vocabulary, in place of the tokenizer's", least=1, on_resume="same")
    position_init: str | None = _setting(None, "model", "what the embeddings of positions begin as: normal (random, as GPT-2's), or sines of the Transformer's", small="sines", llm_c="normal", choices=("normal", "sines"), on_resume="same")
    seed: int = _setting(42, "model", "seed of the random weights", least=0, most=2**32 - 1, on_resume="same")

    batch_size: int | None = _setting(None, "batch", "rows per micro-batch, B", "-b", small=16, llm_c=4, least=1)
    seq_len: int | None = _setting(None, "batch", "tokens per row, T", "-t", small=128, llm_c=1024, least=1, on_resume="same")
    total_batch_size: int = _setting(-1, "batch", "tokens per update; a multiple of B*T*processes; -1: that product, or what a resumed run had", "-d", least=1, also=-1, on_resume="same")
    batch_warmup_steps: int = _setting(0, "batch", "updates in which their tokens grow from first_batch_size to total_batch_size; 0: none", least=0, on_resume="same")
    first_batch_size: int = _setting(-1, "batch", "tokens of the first of these, which total_batch_size is a multiple of; -1: B*T*processes, or what a resumed run had", least=1, also=-1, on_resume="same")
    max_steps: int | None = _setting(None, "batch", "updates; -1: one epoch", "-x", small=900, llm_c=-1, least=-1)
    overfit: bool = _setting(False, "batch", "train on the first batch of the validation data, over and over", "-a", on_resume="same")

    learning_rate: float | None = _setting(None, "optimizer", "highest learning rate", "-l", small=3e-3, llm_c=3e-4, least=0, below=math.inf, on_resume="same")
    schedule: str | None = _setting(None, "optimizer", "learning rate schedule", "-k", small="linear", llm_c="cosine", choices=SCHEDULES, on_resume="same")
    warmup_steps: int | None = _setting(None, "optimizer", "steps of linear warm-up; by default no more than half of all", "-u", small=90, llm_c=0, least=0, on_resume="same")
    final_lr_frac: float | None = _setting(None, "optimizer", "last learning rate, as a fraction of the highest", "-q", small=0.0, llm_c=1.0, least=0, below=math.inf, on_resume="same")
    decay_frac: float = _setting(0.2, "optimizer", "wsd: the last part of the steps, in which the rate falls", least=0, most=1, only_with=("schedule", "wsd"), on_resume="same")
    weight_decay: float = _setting(0.0, "optimizer", "decay of matrices and embeddings", "-c", least=0, below=math.inf, on_resume="same")
    optimizer: str | None = _setting(None, "optimizer", "adamw, or muon for the matrices of the layers and AdamW for the rest", small="muon", llm_c="adamw", choices=("adamw", "muon"), on_resume="same")
    muon_momentum: float = _setting(0.95, "optimizer", "Muon's decay of the momentum", least=0, below=1, only_with=("optimizer", "muon"), on_resume="same")
    muon_lr_ratio: float | None = _setting(None, "optimizer", "Muon: learning rate of matrices, as a multiple of that of the rest", small=2.5, llm_c=1.0, above=0, below=math.inf, only_with=("optimizer", "muon"), on_resume="same")
    beta1: float = _setting(0.9, "optimizer", "AdamW's first decay", least=0, below=1, on_resume="same")
    beta2: float = _setting(0.95, "optimizer", "AdamW's second decay", least=0, below=1, on_resume="same")
    eps: float = _setting(1e-8, "optimizer", "AdamW's epsilon", above=0, below=math.inf, on_resume="same")
    grad_clip: float = _setting(1.0, "optimizer", "largest global gradient norm; 0: no clipping", least=0, on_resume="same")
    ema_decay: float = _setting(0.0, "optimizer", "evaluate, sample and keep (average_*.bin) an average of the weights, of which each update leaves this part; 0: none", least=0, below=1, on_resume="same")
    skip_loss_z: float = _setting(0.0, "optimizer", "skip an update whose loss is more than this many standard deviations above its recent mean; 0: never", "-sl", least=0, on_resume="same")
    skip_grad_z: float = _setting(0.0, "optimizer", "the same by gradient norm", "-sg", least=0, on_resume="same")
    max_bad_steps: int = _setting(10, "optimizer", "stop after this many updates in a row with a NaN or infinite loss or gradient; 0: never", least=0)

    output_dir: str | None = _setting(None, "output", "run directory; default: runs/<time> if no model is named, else none: nothing is kept", "-o", by_rank=True, on_resume="given anew")
    checkpoint_every: int = _setting(0, "output", "checkpoint every n steps, and at the end; 0: at the end only; -1: never", "-n", least=-1)
    keep_checkpoints: int = _setting(0, "output", "keep this many of them; 0: all", "-nk", least=0)
    major_every: int = _setting(0, "output", "never delete those of steps divisible by this; 0: none is kept for ever", "-nm", least=0)
    save_best: bool = _setting(False, "output", "keep the model of the lowest validation loss as best.bin")
    async_save: bool = _setting(True, "output", "write checkpoints in the background, from a copy in memory")
    on_save_error: str = _setting("continue", "output", "when a checkpoint cannot be written", choices=("continue", "stop"))
    resume: bool = _setting(False, "output", "continue from the newest good checkpoint of the run directory, if it has one", "-y", on_resume="given anew")
    allow_changes: bool = _setting(False, "output", "resume although settings or data differ from the checkpoint's", on_resume="given anew")

    val_every: int | None = _setting(None, "evaluation", "validate every n steps, and at the end; 0: never", "-v", small=50, llm_c=20, least=-1)
    val_steps: int = _setting(20, "evaluation", "validation batches; -1: all", "-m", least=1, also=-1)
    patience: int = _setting(0, "evaluation", "stop after this many validations in a row without a new lowest loss; 0: never", least=0)
    hellaswag: bool = _setting(False, "evaluation", "evaluate HellaSwag with validation (-h 1)", "-h")
    hellaswag_data: str = _setting("dev/data/hellaswag/hellaswag_val.bin", "evaluation", "llm.c's HellaSwag file", by_rank=True, paths=True)
    sample_every: int | None = _setting(None, "evaluation", "print a sample every n steps, and at the end, of the small model at the start too; 0: never", "-s", small=300, llm_c=20, least=-1)
    sample_tokens: int | None = _setting(None, "evaluation", "its length, the first token of the prompt included, T at most; the small model writes 32 before the end", "-g", small=256, llm_c=64, least=1)
    prompt: str = _setting("", "evaluation", "text that samples begin with; default: end-of-text")
    temperature: float | None = _setting(None, "evaluation", "of samples; 0: the most likely token", small=0.5, llm_c=1.0, least=0, below=math.inf)
    top_k: int = _setting(0, "evaluation", "sample among this many most likely tokens; 0: all", least=0)
    top_p: float = _setting(1.0, "evaluation", "sample among the most likely tokens of this total probability", above=0, most=1)

    device: str = _setting("auto", "machine", "cpu, cuda, cuda:N, or auto: cuda if there is one", by_rank=True)
    dtype: str | None = _setting(None, "machine", "f32 or bf16 [bf16 on cuda, else f32; a checkpoint's own]", "-p")
    grad_dtype: str | None = _setting(None, "machine", "dtype of gradients: f32 with bf16 adds micro-batches up exactly [f32 on cuda, else dtype]")
    threads: int = _setting(0, "machine", "CPU threads; 0: as many as the process may use", least=0, by_rank=True)
    recompute: int | None = _setting(None, "machine", "recompute in backward: 0 nothing, 1 GELU, 2 GELU and layernorm [on cuda the least that fits, else 1]", "-r", choices=(0, 1, 2))
    master_weights: bool = _setting(True, "machine", "keep f32 weights beside bf16 ones", "-w")
    classifier_rows: int | None = _setting(None, "machine", "rows of logits that exist at a time [on cuda up to 16384, as memory allows, else 1024]", least=1)
    gelu_fusion: int = _setting(0, "machine", "llm.c's -ge; accepted, and without effect: see fused_gelu", "-ge", least=0)
    tf32: bool = _setting(True, "machine", "TF32 for f32 matmuls on GPUs that have it", "-f")
    attention: str = _setting("auto", "machine", "attention on GPUs: auto takes the fastest that there is and that fits the model (the CPU has one kind)", choices=("auto", "cudnn", "wgmma", "flash", "simple"))
    deterministic: bool = _setting(True, "machine", "the same bits on every run; on GPUs it costs cuDNN's attention time and memory (the CPU always is)")
    fused_gelu: str = _setting("auto", "machine", "GELU inside of matmuls on GPUs: auto in bf16 from Hopper on (no effect on the CPU)", choices=("auto", "off", "on"))
    zero_stage: int | None = _setting(None, "machine", "1: each rank keeps a part of the optimizer's state (ZeRO-1); 0: all of it [1 if there are several ranks]", "-z", choices=(0, 1), on_resume="given anew")

    processes: int = _setting(1, "processes", "number of processes; `llmc-train --processes N` starts them on this machine; mpirun, srun and torchrun tell it themselves", "-pn", least=1, on_resume="given anew")
    rank: int = _setting(0, "processes", "this process's number, if it was started by hand (--dist-init tcp or fs)", "-pr", least=0, by_rank=True, on_resume="given anew")
    gpus_per_node: int = _setting(8, "processes", "llm.c's -pg; accepted, and without effect: each process takes the GPU of its number on its host", "-pg", least=1, by_rank=True, on_resume="given anew")
    dist_init: str | None = _setting(None, "processes", "how processes find each other [as what started them offers: mpi under mpirun, tcp under torchrun]", "-pi", choices=("mpi", "tcp", "fs"), on_resume="given anew")
    dist_dir: str = _setting("", "processes", "fs: a folder that all hosts share", "-pf", by_rank=True, on_resume="given anew")
    dist_host: str = _setting("", "processes", "tcp: name or address of the host of rank 0 [MASTER_ADDR]; mpi, fs: where rank 0 listens [all its addresses]", "-ps", by_rank=True, on_resume="given anew")
    dist_port: int | None = _setting(None, "processes", "tcp: the port on which rank 0 listens [LLMC_PORT, MASTER_PORT + 1, or 12345]", least=1, most=65535, by_rank=True, on_resume="given anew")
    dist_timeout: float = _setting(600.0, "processes", "seconds that processes wait for each other, at the start and in each exchange", above=0, below=math.inf, on_resume="given anew")
    max_restarts: int = _setting(0, "processes", "begin anew from the newest checkpoint, up to n times, if the processes that llmc-train started end badly", least=0, on_resume="given anew")

    gpu_info_every: int = _setting(-1, "logs", "print the GPU's clocks, power and temperature every n steps; -1: never", "-lg", least=-1)
    progress: str = _setting("auto", "logs", "a bar, a line at each validation, llm.c's lines, or nothing; auto: a bar in a terminal or notebook, else brief", choices=("auto", "bar", "brief", "lines", "none"), by_rank=True, on_resume="given anew")
    tensorboard: bool = _setting(False, "logs", "write TensorBoard events into the run directory")
    wandb: str = _setting("", "logs", "Weights & Biases project to log to")
    plot: bool = _setting(True, "logs", "write loss.png into the run directory at the end")
    # fmt: on

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, setting.checked(name, getattr(self, name)))
        for name in ("dtype", "grad_dtype"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, canonical_dtype(value))

    def __repr__(self) -> str:
        """Return what differs from the defaults."""
        values = {name: getattr(self, name) for name in SETTINGS}
        changed = [f"{name}={value!r}" for name, value in values.items() if value != SETTINGS[name].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    def replace(self: T, **changes: Any) -> T:
        """Return a copy with other values for some settings."""
        return dataclasses.replace(self, **changes)

    # ---- TOML ----

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values of JSON and TOML. Those that are None are left out."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

    def to_toml(self, directory: str | None = None) -> str:
        """Return the settings as flat TOML, a comment above each group.

        Args:
            directory: where the relative paths among them are to be looked for, wherever the file is read; None does not say.
        """
        lines = [] if directory is None else ["# where relative paths were given", _toml_line("directory", directory)]
        group = None
        for name, value in self.to_dict().items():
            if SETTINGS[name].group != group:
                group = SETTINGS[name].group
                lines.append(f"\n# {group}" if lines else f"# {group}")
            lines.append(_toml_line(name, value))
        return "\n".join(lines) + "\n"


def _toml_line(name: str, value: Any) -> str:
    """Return a value of JSON as a line of TOML."""
    # TOML's strings, numbers, booleans and lists are JSON's, but it writes inf and nan as Python does, and takes neither a bare DEL nor
    # what is no Unicode: the bytes of a file's name, which are then told by "?".
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} = {value}"
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{name} = {text.encode(errors='replace').decode()}"


def _known_settings() -> dict[str, Setting]:
    known = {}
    hints = typing.get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        hint = hints[f.name]
        many = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if typing.get_args(hint) else hint  # of tuple[str, ...] and of "int | None"
        setting: Setting = f.metadata["setting"]
        most = 2**31 - 1 if kind is int and setting.most is None else setting.most  # that of C++'s int
        known[f.name] = dataclasses.replace(setting, kind=kind, many=many, default=f.default, most=most)
    return known


SETTINGS = _known_settings()
# The settings that a resumed run must share with its checkpoint. The others change how it is computed, watched or kept. (batch_size
# is free because total_batch_size is not; the data are compared by their content.)
SAME_ON_RESUME = tuple(name for name, setting in SETTINGS.items() if setting.on_resume == "same")


# What runs of the small model did before there was the setting: their checkpoints do not say it.
BEFORE_THERE_WAS = {"optimizer": "adamw", "muon_lr_ratio": 1.0, "rows_per_sample": 0, "position_init": "normal"}


def of_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of settings by name, those that a run keeps. The others hold for the call that gave them."""
    return {name: value for name, value in values.items() if SETTINGS[name].on_resume != "given anew"}


class RunConfig(TrainConfig):
    """A TrainConfig whose every default is chosen: what a run is built from.

    None is left only if it means "as the model, the checkpoint or the tokenizer has it", or "none".
    """

    batch_size: int
    seq_len: int
    rows_per_sample: int
    position_init: str
    max_steps: int
    learning_rate: float
    schedule: str
    optimizer: str
    muon_lr_ratio: float
    warmup_steps: int
    final_lr_frac: float
    val_every: int
    sample_every: int
    sample_tokens: int
    temperature: float
    zero_stage: int

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that the run keeps; those that hold for one call are left out."""
        return of_run(super().to_dict())

    def shared(self) -> dict[str, Any]:
        """Return the settings that all ranks must share."""
        return {k: v for k, v in TrainConfig.to_dict(self).items() if not SETTINGS[k].by_rank}


def resolve(
    config: TrainConfig,
    device: str,
    *,
    rank: int = 0,
    ranks: int = 1,
    saved: Mapping[str, Any] | None = None,
    begun: int = 0,
) -> RunConfig:
    """Choose the defaults that depend on other settings.

    Args:
        config: settings as they were given.
        device: in place of "auto".
        rank, ranks: which of so many processes this is.
        saved: settings of the checkpoint from which the run is resumed. It keeps its total_batch_size, first_batch_size, max_steps
            and warmup_steps if none are given, and does without what its llmc did not have yet; if the ranks cannot share the tokens of
            an update evenly, batch_size becomes the next smaller one with which they can.
        begun: that checkpoint's step.

    Raises:
        ValueError: if settings contradict each other.
    """
    values = {**_chosen(config), "device": device, "processes": ranks, "rank": rank}
    if saved is None:
        check_effects(config)
    if config.processes not in (1, ranks):
        raise ValueError(f"processes is {config.processes}, but {ranks} met")
    for name in ("max_steps", "warmup_steps"):
        if getattr(config, name) is None and saved and name in saved:
            values[name] = saved[name]
    for name, value in BEFORE_THERE_WAS.items():
        if getattr(config, name) is None and saved is not None and name not in saved:
            values[name] = value
    if config.zero_stage is None:
        values["zero_stage"] = int(ranks > 1)
    values["sample_tokens"] = min(values["sample_tokens"], values["seq_len"])  # later positions are not trained
    _choose_batch(values, saved or {}, begun, ranks)
    return RunConfig(**values)


def check_effects(config: TrainConfig) -> None:
    """Refuse a setting that has no effect with the others, unless it is one of its defaults.

    Raises:
        ValueError: naming both.
    """
    values = _chosen(config)
    for name, setting in SETTINGS.items():
        if setting.only_with is None or values[name] in (setting.default, setting.small, setting.llm_c):
            continue
        other, needed = setting.only_with
        if values[other] != needed:
            raise ValueError(f"{name} is {values[name]:g}, but {other} is {values[other]}: only {needed} has it")


def _choose_batch(values: dict[str, Any], saved: Mapping[str, Any], begun: int, ranks: int) -> None:
    """Choose the tokens of an update and of the first, and a batch_size that divides them among the ranks; see resolve()."""
    B, T = values["batch_size"], values["seq_len"]
    warmup = values["batch_warmup_steps"]
    before = {name: saved.get(name, -1) for name in ("total_batch_size", "first_batch_size")}
    for name in ("total_batch_size", "first_batch_size") if warmup else ("total_batch_size",):
        if values[name] == -1:
            values[name] = B * T * ranks if before[name] == -1 else before[name]
    total, first = values["total_batch_size"], values["first_batch_size"]
    if first not in (-1, before["first_batch_size"]) and not warmup:
        raise ValueError(
            f"first_batch_size is {first}, but batch_warmup_steps is 0: expected the number of updates in which the batch grows"
        )
    name = "first_batch_size" if begun < warmup else "total_batch_size"
    even = values[name]  # all updates that are to come have a multiple of these tokens
    if even == before[name] and even % (T * ranks) == 0:
        B = values["batch_size"] = largest_divisor(even // (T * ranks), B)
    if even % (B * T * ranks):
        among, times = (f" * {ranks} processes", f" * {ranks}") if ranks > 1 else ("", "")
        unit = B * T * ranks
        if even == before[name]:
            fit = next((n for n in range(ranks, 0, -1) if even % (T * n) == 0), 0)
            works = "the run has it from its beginning"
            works += f"; continue with {fit} process{'es' * (fit > 1)}" if fit else ""
        else:
            nearest = min(max(unit, (even + unit // 2) // unit * unit), (2**31 - 1) // unit * unit)
            works = f"{nearest} is the nearest" if nearest else "choose a smaller batch_size"
            if even % (T * ranks) == 0:
                works += f"; or give --batch-size {largest_divisor(even // (T * ranks), B)}"
        raise ValueError(
            f"{name} is {even}, expected a multiple of batch_size * seq_len{among} = {B} * {T}{times} = {unit}: {works}"
        )
    if warmup and (total % first or total == first):
        raise ValueError(
            f"batch_warmup_steps is {warmup}: expected a total_batch_size (it is {total}) that is a multiple of first_batch_size ({first}) "
            "and greater: give a larger --total-batch-size, or a smaller --first-batch-size or --batch-size"
        )


def largest_divisor(number: int, most: int) -> int:
    """Return the largest number, not above most, that divides another."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _chosen(config: TrainConfig) -> dict[str, Any]:
    """Return all settings by name, with the small run's default or llm.c's for those that are not given."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    for name, setting in SETTINGS.items():
        if values[name] is None:
            values[name] = setting.small if config.model is None else setting.llm_c
    return values


def defaults(model: str | None) -> dict[str, Any]:
    """Return, as to_dict() does, the settings of a run of which only the model was given."""
    return TrainConfig(**_chosen(TrainConfig(model=model))).to_dict()


def check_names(values: Mapping[str, Any], place: str) -> None:
    """Refuse names that are no settings.

    Args:
        values: settings by name.
        place: where they were given, for the message.

    Raises:
        ValueError: naming the first unknown one, and the setting that it may have meant.
    """
    for name in values:
        if name not in SETTINGS:
            raise ValueError(f"{place}: unknown setting '{name}'{did_you_mean(name, SETTINGS)}")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read settings, by name, from a TOML file. If it says a directory, as a run's config.toml does, paths are looked for there first.

    Raises:
        ValueError: naming the file, and the line or the setting that is unknown or wrong.
    """
    values = load_toml_file(path)
    directory = values.pop("directory", "")
    check_names(values, str(path))
    for name, value in values.items():
        try:
            value = SETTINGS[name].checked(name, value)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
        if SETTINGS[name].paths:
            values[name] = [_found(v, directory) for v in value] if SETTINGS[name].many else _found(value, directory)
    return values


def _found(pattern: str, directory: str) -> str:
    """Return a relative path or glob with the directory before it, if that is another than the present one and has it."""
    if os.path.isabs(pattern) or not os.path.isabs(directory) or directory == os.getcwd():
        return pattern
    there, escaped = os.path.join(directory, pattern), os.path.join(glob.escape(directory), pattern)
    return there if os.path.exists(there) else escaped if glob.glob(escaped) else pattern
