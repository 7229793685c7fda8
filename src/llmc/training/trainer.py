"""The training loop: llm.c's, with the guards and the saving that a long run needs."""

from __future__ import annotations

import math
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc import _llmc
from llmc import checkpoint as ckpt
from llmc.data.loader import DataLoader
from llmc.data.tokenizer import Tokenizer
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2, default_grad_dtype
from llmc.optim.adamw import AdamW
from llmc.optim.schedule import lr_schedule
from llmc.system.flops import peak_flops
from llmc.system.fs import SYSTEM, Fs, remove_temporaries, write_atomically
from llmc.system.gpu_info import GpuInfo
from llmc.system.signals import StopRequested, StopSignals
from llmc.training.logs import (
    BarConsole,
    LineConsole,
    Log,
    Logs,
    MainLog,
    MetricsLog,
    StepInfo,
    TensorBoardLog,
    WandbLog,
)
from llmc.training.memory import check_memory
from llmc.training.outliers import OutlierDetector
from llmc.training.report import short_report, startup_report
from llmc.training.settings import TrainConfig
from llmc.training.sources import Sources, prepare

# Without a model the run is a small one, sized for two CPU cores and two minutes.
SMALL_MODEL = {"num_layers": 4, "num_heads": 4, "channels": 256, "max_seq_len": 256}
_SMALL = {
    "batch_size": 16,
    "seq_len": 128,
    "max_steps": 400,
    "learning_rate": 1e-3,
    "warmup_steps": 40,
    "final_lr_frac": 0.1,
    "val_every": 50,
    "sample_every": 200,
    "sample_tokens": 256,
    "temperature": 0.8,
}
# llm.c's defaults.
_LLMC = {
    "batch_size": 4,
    "seq_len": 1024,
    "max_steps": -1,
    "learning_rate": 3e-4,
    "warmup_steps": 0,
    "final_lr_frac": 1.0,
    "val_every": 20,
    "sample_every": 20,
    "sample_tokens": 64,
    "temperature": 1.0,
}

# Settings that a resumed run must share with its checkpoint. The others change how it is computed, watched or kept.
# (batch_size is free because total_batch_size is not; the data are compared by their content.)
_FIXED = (
    *(
        "tokenizer",
        "model",
        "layers",
        "heads",
        "channels",
        "max_seq_len",
        "vocab_size",
        "seed",
        "shuffle",
        "data_seed",
        "seq_len",
    ),
    *(
        "total_batch_size",
        "max_steps",
        "overfit",
        "learning_rate",
        "schedule",
        "warmup_steps",
        "final_lr_frac",
        "weight_decay",
    ),
    *("beta1", "beta2", "eps", "grad_clip", "skip_loss_z", "skip_grad_z"),
)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills in the defaults that depend on other settings."""
    defaults = _SMALL if config.model is None else _LLMC
    changes: dict[str, Any] = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    if config.device == "auto":
        changes["device"] = "cuda" if _llmc.cuda_built() and _cuda_works() else "cpu"
    config = config.replace(**changes)
    B, T = config.batch_size, config.seq_len
    assert B is not None and T is not None
    if config.total_batch_size == -1:
        config = config.replace(total_batch_size=B * T)
    if config.total_batch_size <= 0 or config.total_batch_size % (B * T):
        raise ValueError(
            f"total_batch_size is {config.total_batch_size}, expected a multiple of batch_size * seq_len = {B} * {T} = {B * T}"
        )
    if config.processes != 1 or config.rank != 0:
        raise ValueError(f"processes is {config.processes} and rank is {config.rank}: this build trains in one process")
    return config


def _cuda_works() -> bool:
    try:
        _llmc.Backend("cuda")
    except _llmc.Error:
        return False
    return True


class Callback:
    """What a caller may hook into; override what is wanted."""

    def on_step(self, trainer: Trainer, info: StepInfo) -> None: ...
    def on_eval(self, trainer: Trainer, step: int, loss: float) -> None: ...
    def on_save(self, trainer: Trainer, step: int, directory: Path) -> None: ...


@dataclass
class TrainResult:
    """What a run leaves behind.

    history: "step", "train_loss", "norm", "lr", "tokens_per_second" by training step; "val_step", "val_loss" by validation.
    run_dir: None where nothing was kept. stopped_by: the number of the signal that ended the run, or 0.
    """

    history: dict[str, list[float]]
    run_dir: Path | None
    model: GPT2
    tokenizer: Tokenizer | None
    step: int
    stopped_by: int = 0


class TrainingStopped(_llmc.Error):
    """The run cannot go on: too many updates in a row were not finite, or a checkpoint could not be written and was asked for."""


@dataclass
class _Timing:
    """Tokens per second as llm.c's: an exponential average, corrected for its start, without the first step."""

    average: float = 0.0
    weight: float = 0.0
    total_seconds: float = 0.0
    count: int = 0

    def update(self, tokens_per_second: float, seconds: float) -> float:
        self.count += 1
        if self.count == 1:
            return tokens_per_second
        self.total_seconds += seconds
        self.average = 0.95 * self.average + 0.05 * tokens_per_second
        self.weight = 0.95 * self.weight + 0.05
        return self.average / self.weight


class Trainer:
    """A training run: model, data, optimizer and schedule, and the loop over them.

    config: settings; what is None is filled in (resolve). callbacks: see Callback. fs: for tests.

    ValueError, FileNotFoundError, MemoryError or llmc.Error where a setting is wrong, data are missing or damaged, memory does not
    suffice: before the first step, and with the numbers.
    """

    def __init__(self, config: TrainConfig, *, callbacks: Sequence[Callback] = (), fs: Fs = SYSTEM) -> None:
        self.config = config = resolve(config)
        self.callbacks = list(callbacks)
        self.fs = fs
        self.run_dir = Path(config.output_dir) if config.output_dir else None
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _check_writable(self.run_dir)
            remove_temporaries(self.run_dir)
            steps = ckpt.finished_steps(self.run_dir)
            if steps and not config.resume:
                raise ValueError(
                    f"{self.run_dir} has checkpoints of an earlier run (step {steps[-1]}): continue it with --resume (-y 1), or "
                    "choose another run directory"
                )
        self.log: Log = LineConsole()
        self._signals = StopSignals()
        self.sources: Sources = prepare(config, self.run_dir)
        self._fingerprint = self.sources.fingerprint()
        self.tokenizer = self.sources.tokenizer

        resumed = self._find_checkpoint()
        self.model = self._build_model(resumed)
        assert config.batch_size is not None and config.seq_len is not None and config.max_steps is not None
        self.grad_accum = config.total_batch_size // (config.batch_size * config.seq_len)
        self.optimizer = AdamW(
            self.model,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            master_weights=config.master_weights,
        )
        self.train_loader, self.val_loader = self._build_loaders(resumed)
        self.total_steps = config.max_steps
        if config.max_steps == -1:
            self.total_steps = self.train_loader.num_tokens // config.total_batch_size
            if self.total_steps == 0:
                raise ValueError(
                    f"the data hold {self.train_loader.num_tokens} tokens, less than the {config.total_batch_size} of one update "
                    "(total_batch_size); give a number of steps to go over them several times (--max-steps)"
                )
        assert config.learning_rate is not None and config.warmup_steps is not None and config.final_lr_frac is not None
        self.lr = lr_schedule(
            config.schedule, config.learning_rate, config.warmup_steps, self.total_steps, config.final_lr_frac
        )
        self.step = 0
        self.bad_steps = 0
        self.skipped_steps = 0
        self.best_val_loss = math.inf
        self.loss_outliers, self.grad_outliers = OutlierDetector(), OutlierDetector()
        self._timing = _Timing()
        # Packed: a run of a million steps keeps 40 MB of numbers.
        self._history: dict[str, array[Any]] = {k: array("q") for k in ("step", "val_step")}
        self._history |= {k: array("d") for k in ("train_loss", "norm", "lr", "tokens_per_second", "val_loss")}
        self._saved_step = -1  # of the newest checkpoint on the disk, as far as this run knows
        self._resumed = False
        if resumed is not None:
            self._restore(*resumed)
        self._checkpointer = None
        if self.run_dir is not None:
            self._checkpointer = ckpt.Checkpointer(
                self.run_dir, keep=config.keep_checkpoints, major_every=config.major_every, fs=fs
            )
            self._prepare_run_dir(resumed is not None)
        self.peak_flops = peak_flops(self.model.backend, self.model.dtype)
        self.hellaswag_examples = self._read_hellaswag()
        self._gpu_info = None
        if config.gpu_info_every > 0:
            if not config.device.startswith("cuda"):
                raise ValueError(f"gpu_info_every is {config.gpu_info_every}, but the device is {config.device}")
            self._gpu_info = GpuInfo(int(config.device.partition(":")[2] or 0))

    @property
    def history(self) -> dict[str, list[float]]:
        """As of TrainResult."""
        return {name: list(values) for name, values in self._history.items()}

    # ---- construction ----

    def _find_checkpoint(self) -> tuple[int, dict[str, Any] | None] | None:
        config = self.config
        if self.run_dir is None or not ckpt.finished_steps(self.run_dir):
            return None
        found = ckpt.newest_good(self.run_dir, warn=self.log.text)
        if found is None:
            raise ckpt.CheckpointDamaged(
                f"{self.run_dir}: no checkpoint is whole; remove its DONE_* files to begin anew"
            )
        step, manifest = found
        if manifest is not None:
            differences = self._differences(manifest)
            if differences and not config.allow_changes:
                raise ValueError(
                    f"{self.run_dir}: the checkpoint of step {step} was made with other settings: "
                    + "; ".join(differences)
                    + ". Give the same, or --allow-changes"
                )
        return step, manifest

    def _differences(self, manifest: dict[str, Any]) -> list[str]:
        then, now = manifest["config"], self.config.to_dict()
        out = [f"{n} was {then.get(n)}, is {now.get(n)}" for n in _FIXED if then.get(n) != now.get(n)]
        if manifest["data"] != self._fingerprint:
            old = {row["name"]: (row["bytes"], row["crc32"]) for row in manifest["data"]}
            new = {str(row["name"]): (row["bytes"], row["crc32"]) for row in self._fingerprint}
            changed = sorted(n for n in set(old) | set(new) if old.get(n) != new.get(n))
            out.append(f"the data changed ({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''})")
        return out

    def _model_config(self) -> GPT2Config:
        config = self.config
        changes = {
            "num_layers": config.layers,
            "num_heads": config.heads,
            "channels": config.channels,
            "max_seq_len": config.max_seq_len,
            "vocab_size": self.sources.vocab_size,
        }
        given = {k: v for k, v in changes.items() if v is not None}
        if config.model is None:
            assert config.seq_len is not None
            longest = max(SMALL_MODEL["max_seq_len"], config.seq_len)
            return GPT2Config(**{**SMALL_MODEL, "max_seq_len": longest, **given})
        return GPT2Config.from_descriptor(config.model, **given)

    def _build_model(self, resumed: tuple[int, dict[str, Any] | None] | None) -> GPT2:
        config = self.config
        path: Path | None = None
        if resumed is not None:
            assert self.run_dir is not None
            path = self.run_dir / ckpt.checkpoint_names(resumed[0])[0]
        elif config.model is not None and config.model.endswith(".bin"):
            path = Path(config.model)
            for name in ("layers", "heads", "channels", "max_seq_len"):
                if getattr(config, name) is not None:
                    raise ValueError(f"{name} is given, but the model is the checkpoint {path}, which has its own")
        if path is not None:
            native, file_dtype, _ = _llmc.inspect_checkpoint(path)
            shape, default_dtype = GPT2Config.from_native(native), str(file_dtype)
            self.weight_origin = "intermediate checkpoint" if resumed is not None else str(path)
        else:
            shape, default_dtype = self._model_config(), "f32" if config.device == "cpu" else "bf16"
            self.weight_origin = config.model or "small model"
        if self.tokenizer is not None and self.tokenizer.vocab_size > shape.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, but the model's vocabulary is {shape.vocab_size}"
            )
        if resumed is not None and resumed[1] is not None and config.device != "cpu":
            # What the memory of then chose stays chosen: other sums would be other bits.
            then = resumed[1]["config"]
            if then.get("device") == config.device:
                kept = {n: then.get(n) for n in ("recompute", "classifier_rows") if getattr(config, n) is None}
                self.config = config = config.replace(**kept)
        assert config.seq_len is not None and config.batch_size is not None
        if config.seq_len > shape.max_seq_len:
            raise ValueError(f"seq_len is {config.seq_len}, but the model's max_seq_len is {shape.max_seq_len}")
        dtype = config.dtype or default_dtype
        grad_dtype = config.grad_dtype or default_grad_dtype(config.device, dtype)
        backend = _llmc.Backend(config.device, config.threads)
        self._set_options(backend)
        self.memory, recompute, classifier_rows = check_memory(
            backend,
            shape,
            dtype=dtype,
            grad_dtype=grad_dtype,
            B=config.batch_size,
            T=config.seq_len,
            recompute=config.recompute,
            classifier_rows=config.classifier_rows,
            master_weights=config.master_weights,
        )
        del backend
        # What was chosen here belongs to the run: config.toml keeps it.
        self.config = config = config.replace(recompute=recompute, classifier_rows=classifier_rows)
        options: dict[str, Any] = {
            "device": config.device,
            "dtype": dtype,
            "grad_dtype": grad_dtype,
            "recompute": recompute,
            "classifier_rows": classifier_rows,
            "threads": config.threads,
        }
        model = GPT2.from_checkpoint(path, **options) if path else GPT2(shape, seed=config.seed, **options)
        self._set_options(model.backend)
        return model

    def _set_options(self, backend: _llmc.Backend) -> None:
        config = self.config
        if config.device == "cpu":
            return
        backend.set_option("tf32", "on" if config.tf32 else "off")
        backend.set_option("attention", config.attention)
        backend.set_option("deterministic", "on" if config.deterministic else "off")
        backend.set_option("fused_gelu", config.fused_gelu)

    def _build_loaders(self, resumed: tuple[int, dict[str, Any] | None] | None) -> tuple[DataLoader, DataLoader | None]:
        config = self.config
        assert config.batch_size is not None and config.seq_len is not None
        rows = 0
        if resumed is not None and resumed[1] is not None:
            rows = resumed[1]["state"]["loader"]["rows_per_sample"]
        files = self.sources.val if config.overfit else self.sources.train
        if config.overfit and not files:
            raise ValueError("overfit trains on the validation data, and there are none")
        B, T, V = config.batch_size, config.seq_len, self.model.config.vocab_size
        train = DataLoader(
            files, B, T, shuffle=self._shuffle, seed=config.data_seed, vocab_size=V, rows_per_sample=rows
        )
        val = DataLoader(self.sources.val, B, T, vocab_size=V) if self.sources.val else None
        return train, val

    def _read_hellaswag(self) -> list[Any]:
        """What is wrong with the file is said before the first step, not after the last."""
        config = self.config
        if not config.hellaswag or not Path(config.hellaswag_data).is_file():
            return []
        from llmc.evals import check_examples, read_eval_file

        examples = read_eval_file(config.hellaswag_data)
        check_examples(examples, self.model.config)
        return examples

    @property
    def _shuffle(self) -> bool:
        return self.config.shuffle and not self.config.overfit

    def _prepare_run_dir(self, resumed: bool) -> None:
        assert self.run_dir is not None
        write_atomically(self.run_dir / "config.toml", [self.config.to_toml().encode()])
        if self.tokenizer is not None and not (self.run_dir / self.tokenizer.file_name).exists():
            self.tokenizer.save(self.run_dir / self.tokenizer.file_name)

    def _restore(self, step: int, manifest: dict[str, Any] | None) -> None:
        assert self.run_dir is not None
        state = ckpt.load_state(self.run_dir, step, manifest, self.model, self.optimizer)
        self.step = self._saved_step = state.step
        self._resumed = True
        self.optimizer.step_count = state.optimizer_step
        self.optimizer.rng_state = state.optimizer_rng
        loader, ours = state.loader, self.train_loader.state()
        if "row" not in loader:  # llm.c's own checkpoint: whole samples
            loader.update(
                rows_per_sample=ours["rows_per_sample"], row=loader["sample"] * ours["rows_per_sample"], epoch=0
            )
        if not state.shuffle or not self._shuffle:
            loader.update(shard_indices=ours["shard_indices"], sample_indices=ours["sample_indices"], rng=ours["rng"])
        try:
            self.train_loader.set_state(loader)
        except ValueError as e:
            if not self.config.allow_changes:
                raise
            self.log.text(f"the data are read from their beginning: {e}")
        extra = state.extra
        self.loss_outliers.set_state(extra.get("loss_window", []))
        self.grad_outliers.set_state(extra.get("grad_window", []))
        self.bad_steps = extra.get("bad_steps", 0)
        self.skipped_steps = extra.get("skipped_steps", 0)
        self.best_val_loss = float(extra.get("best_val_loss", math.inf))

    # ---- the loop ----

    def fit(self) -> TrainResult:
        """Trains to the last step; may be called again. A signal (Ctrl-C, SIGTERM) ends it after the step, saved."""
        with self._lock():
            logs = self._open_logs()
            self.log = logs
            try:
                with StopSignals() as self._signals:
                    self._loop()
                stopped_by, self._signals = self._signals.received, StopSignals()
                self._finish(stopped_by)
            finally:
                if self._checkpointer is not None:
                    self._checkpointer.join()  # whatever ends the run, a save that has begun is finished
                logs.close()
                self.log = LineConsole()
        return TrainResult(self.history, self.run_dir, self.model, self.tokenizer, self.step, stopped_by)

    def _loop(self) -> None:
        config, logs = self.config, self.log
        if self._resumed:
            logs.text(f"continuing {self.run_dir} from step {self.step}")
        logs.start(startup_report(self), short_report(self))
        if config.hellaswag and not self.hellaswag_examples:
            logs.text(f"{config.hellaswag_data} does not exist: HellaSwag is left out. `llmc data hellaswag` writes it")
        while not self._signals.received:
            last = self.step >= self.total_steps
            try:
                self._periodic(last)
            except StopRequested:
                break
            if last:
                break
            info = self.train_step()
            logs.step(info)
            if self._gpu_info is not None and self.step % config.gpu_info_every == 0:
                logs.text(self._gpu_info.line())
            for callback in self.callbacks:
                callback.on_step(self, info)
            if self._checkpointer is not None:
                self._finish_saving(self._checkpointer.poll)
        if self._signals.received:
            self._save(background=False, final=True)

    def _finish(self, stopped_by: int) -> None:
        if self._checkpointer is not None:
            self._finish_saving(self._checkpointer.wait)
        if stopped_by:
            folder = f'"{self.run_dir}"' if " " in str(self.run_dir) else self.run_dir
            again = f"; continue with: llmc train --resume {folder}" if self.run_dir else ""
            saved = "saved" if self.run_dir else "not saved (no run directory)"
            self.log.text(f"stopped by signal {stopped_by} after step {self.step}, {saved}{again}")
        elif self._timing.count > 1:
            average = 1000 * self._timing.total_seconds / (self._timing.count - 1)
            self.log.text(f"total average iteration time: {average:f} ms")
        fallbacks = self.model.backend.info().fallbacks
        if fallbacks:
            self.log.text(f"note: {fallbacks}")
        self._write_plot()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time trains in a run directory."""
        if self.run_dir is None:
            yield
            return
        import filelock

        lock = filelock.FileLock(self.run_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise _llmc.Error(f"{self.run_dir}: another process trains in this run directory") from None
        except NotImplementedError:
            self.log.text(f"warning: the file system of {self.run_dir} has no locks: let no other process train there")
        try:
            yield
        finally:
            lock.release()

    def _periodic(self, last: bool) -> None:
        """What llm.c does between updates: checkpoint, validation, HellaSwag, samples. The checkpoint comes first, so that none of
        the others can cost it."""
        config, step = self.config, self.step

        def due(every: int | None) -> bool:
            return bool(every and every > 0 and step % every == 0)

        if (step > 0 and due(config.checkpoint_every)) or (last and config.checkpoint_every >= 0):
            if self.bad_steps and not last:
                self.log.text(f"no checkpoint at step {step}: the last loss or gradient was not finite")
            else:
                self._save(background=config.async_save and not last, final=last)
        if self.val_loader is not None and config.val_every and (due(config.val_every) or last):
            self.validate()
        if self.hellaswag_examples and config.val_every and ((step > 0 and due(config.val_every)) or last):
            self.evaluate_hellaswag()
        if config.sample_every and config.sample_every > 0 and ((step > 0 and due(config.sample_every)) or last):
            with self._signals.interruptible():
                text = self.sample()
            self.log.text(f"generating:\n---\n{text}\n---")

    def train_step(self) -> StepInfo:
        """One update: grad_accum micro-batches, then the optimizer. The one wait is for loss and norm, before the update."""
        start = time.perf_counter()
        model, optimizer, config = self.model, self.optimizer, self.config
        if config.overfit:
            self.train_loader.reset()
        model.zero_grad()
        for _ in range(self.grad_accum):
            inputs, targets = self.train_loader.next_batch()
            model.forward(inputs)
            model.backward(targets, 1.0 / self.grad_accum)
        norm, loss = optimizer.measure(), model.mean_loss
        loss_z, grad_z = self.loss_outliers.update(loss), self.grad_outliers.update(norm)
        skipped = self._reason_to_skip(loss, norm, loss_z, grad_z)
        lr = self.lr(self.step)
        if not skipped:
            optimizer.apply(lr)
        model.backend.synchronize()
        seconds = time.perf_counter() - start
        self._count_bad(skipped, loss, norm)

        tokens = config.total_batch_size
        assert config.seq_len is not None
        flops = model.config.flops_per_token(config.seq_len) * tokens / seconds
        info = StepInfo(
            step=self.step,
            total_steps=self.total_steps,
            loss=loss,
            norm=norm,
            lr=lr,
            seconds=seconds,
            tokens_per_second=self._timing.update(tokens / seconds, seconds),
            flops_per_second=flops,
            mfu=100.0 * flops / self.peak_flops if self.peak_flops else None,
            dtype=model.dtype,
            loss_z=loss_z,
            grad_z=grad_z,
            skipped=skipped,
        )
        for name, value in (("step", self.step), ("train_loss", loss), ("norm", norm), ("lr", lr)):
            self._history[name].append(value)
        self._history["tokens_per_second"].append(info.tokens_per_second)
        self.step += 1
        return info

    def _reason_to_skip(self, loss: float, norm: float, loss_z: float, grad_z: float) -> str:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss}, gradient norm {norm}"
        if self.config.skip_loss_z > 0 and loss_z > self.config.skip_loss_z:
            return f"loss z-score of {loss_z:f}"
        if self.config.skip_grad_z > 0 and grad_z > self.config.skip_grad_z:
            return f"grad z-score of {grad_z:f}"
        return ""

    def _count_bad(self, skipped: str, loss: float, norm: float) -> None:
        self.skipped_steps += bool(skipped)
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if 0 < self.config.max_bad_steps <= self.bad_steps:
            good = ckpt.finished_steps(self.run_dir) if self.run_dir else []
            where = f"; the last checkpoint is of step {good[-1]} in {self.run_dir}" if good else ""
            raise TrainingStopped(
                f"loss or gradient was not finite in {self.bad_steps} updates in a row (at step {self.step}: loss {loss}, norm "
                f"{norm}); no update was made with them. A smaller learning rate or longer warm-up may help{where}"
            )

    def validate(self) -> float:
        """Mean loss over val_steps batches from the start of the validation data."""
        if self.val_loader is None:
            raise ValueError("there are no validation data")
        config = self.config
        self.val_loader.reset()
        count = self.num_val_batches
        with self._signals.interruptible():
            loss = math.fsum(self.model.evaluate(*self.val_loader.next_batch()) for _ in range(count)) / count
        self.log.validation(self.step, loss)
        self._history["val_step"].append(self.step)
        self._history["val_loss"].append(loss)
        for callback in self.callbacks:
            callback.on_eval(self, self.step, loss)
        if loss < self.best_val_loss:
            self.best_val_loss = loss
            if config.save_best and self.run_dir is not None and self.step > 0:
                path = self.run_dir / "best.bin"
                self._finish_saving(lambda: ckpt.save_model(self.model, path, fs=self.fs))
        return loss

    @property
    def num_val_batches(self) -> int:
        """Batches of one validation. ValueError where the data hold none."""
        assert self.val_loader is not None
        count, limit = self.val_loader.num_batches(), self.config.val_steps
        if count == 0:
            raise ValueError("the validation data hold no whole batch")
        return count if limit == -1 else min(count, limit)

    def evaluate_hellaswag(self) -> float:
        """acc_norm on llm.c's HellaSwag file."""
        from llmc.evals import multiple_choice

        with self._signals.interruptible():
            result = multiple_choice(self.model, self.hellaswag_examples, batch_size=self.config.batch_size or 4)
        self.log.hellaswag(self.step, result.correct_norm, result.total)
        return result.correct_norm / result.total

    def sample(self, prompt: str | None = None, max_tokens: int | None = None) -> str:
        """Text from the model as it is. The coin is llm.c's, the same at every call."""
        config = self.config
        text = config.prompt if prompt is None else prompt
        if self.tokenizer is None:
            eot = min(50256, self.model.config.vocab_size - 1)
            tokens = self._generate([eot], max_tokens)
            return " ".join(str(t) for t in tokens)
        start = self.tokenizer.encode(text) if text else []
        return text + self.tokenizer.decode(self._generate(start or [self.tokenizer.eot_token], max_tokens))

    def _generate(self, prompt: list[int], max_tokens: int | None) -> list[int]:
        config = self.config
        assert config.sample_tokens is not None and config.temperature is not None
        count = config.sample_tokens - 1 if max_tokens is None else max_tokens
        tokens = self.model.generate(
            prompt, max(0, count), temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        return tokens  # type: ignore[return-value]

    # ---- saving ----

    def save(self) -> None:
        """Writes a checkpoint of the present step into the run directory; returns when it is on the disk."""
        if self._checkpointer is None:
            raise ValueError("the run has no run directory to save into")
        self._write_checkpoint(background=False)
        self._tell_saved()

    def _save(self, background: bool, final: bool = False) -> None:
        if self._checkpointer is None:
            return
        self._finish_saving(self._checkpointer.wait)  # the one before may have failed: that is another matter
        if self.step != self._saved_step:
            self._finish_saving(lambda: self._write_checkpoint(background), final)

    def _write_checkpoint(self, background: bool) -> None:
        assert self._checkpointer is not None and self.run_dir is not None
        step = self.step
        state = ckpt.TrainState(
            step=step,
            optimizer_step=self.optimizer.step_count,
            optimizer_rng=self.optimizer.rng_state,
            loader=self.train_loader.state(),
            shuffle=self._shuffle,
            extra={
                "loss_window": self.loss_outliers.state(),
                "grad_window": self.grad_outliers.state(),
                "bad_steps": self.bad_steps,
                "skipped_steps": self.skipped_steps,
                "best_val_loss": str(self.best_val_loss),
            },
        )
        manifest = {
            "llmc": _llmc.__version__,
            "config": self.config.to_dict(),
            "model": {k: getattr(self.model.config, k) for k in self.model.config.__dataclass_fields__},
            "dtype": self.model.dtype,
            "data": self._fingerprint,
        }
        self._checkpointer.save(self.model, self.optimizer, state, manifest, background=background)

    def _finish_saving(self, save: Callable[[], Any], final: bool = False) -> None:
        """Runs a save; where it fails, says so and goes on, or stops, as asked. There is no going on from the final one."""
        try:
            save()
        except OSError as e:
            message = f"checkpoint could not be written: {e}; earlier ones are untouched"
            if final or self.config.on_save_error == "stop":
                raise TrainingStopped(message) from e
            self.log.text(f"warning: {message}; training goes on")
        self._tell_saved()

    def _tell_saved(self) -> None:
        assert self._checkpointer is not None and self.run_dir is not None
        for step in self._checkpointer.completed():
            self._saved_step = step
            for callback in self.callbacks:
                callback.on_save(self, step, self.run_dir)

    # ---- logs ----

    def _open_logs(self) -> Logs:
        config = self.config
        mode = config.progress
        if mode == "auto":
            mode = "bar" if sys.stdout.isatty() else "lines"
        logs: list[Log] = []
        if mode == "bar":
            logs.append(BarConsole(self.total_steps, self.step))
        elif mode == "lines":
            logs.append(LineConsole())
        if self.run_dir is not None:
            append = self.step > 0
            logs += [MainLog(self.run_dir / "main.log", append), MetricsLog(self.run_dir / "metrics.jsonl", append)]
            if config.tensorboard:
                logs.append(TensorBoardLog(self.run_dir))
        if config.wandb:
            logs.append(WandbLog(config.wandb, self.run_dir, config.to_dict()))
        return Logs(logs)

    def _write_plot(self) -> None:
        if self.config.plot and self.run_dir is not None and self._history["step"]:
            from llmc.plot import plot_runs

            try:
                plot_runs([self.run_dir], self.run_dir / "loss.png")
            except (OSError, ValueError) as e:
                self.log.text(f"warning: loss.png could not be drawn: {e}")


def _check_writable(directory: Path) -> None:
    probe = directory / f".tmp-probe-{np.random.default_rng().integers(1 << 30)}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise PermissionError(f"run directory '{directory}' cannot be written to: {e}") from e


def train(*, callbacks: Sequence[Callback] = (), **settings: Any) -> TrainResult:
    """Trains a model: everything that `llmc-train` can do, as keywords (the fields of TrainConfig).

    >>> result = llmc.train(data="my.txt", model="d6", seq_len=256, max_steps=1000, output_dir="runs/mine")
    >>> print(result.history["val_loss"][-1], result.model.num_parameters)

    ValueError for an unknown or impossible setting; else see Trainer.
    """
    TrainConfig.check_names(settings, "llmc.train")
    return Trainer(TrainConfig(**settings), callbacks=callbacks).fit()
