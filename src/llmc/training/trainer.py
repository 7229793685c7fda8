"""The training loop: llm.c's, with the guards and the saving that a long run needs.

setup() builds what a run is made of; here is one update (train_step), what happens between updates (_between_steps), and the loop
over both (fit).

All ranks walk through the loop together. What they decide by is the same on all of them: loss and norm, settings, and who was asked to
stop. What rank 0 alone knows, as whether a checkpoint can be written, it tells the others.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.checkpoint import Checkpointer, finished_steps, send_state
from llmc.distributed.world import open_world
from llmc.evals import multiple_choice
from llmc.formats.state_file import TrainState
from llmc.system.fs import SYSTEM, Fs, write_atomically
from llmc.system.signals import StopRequested, StopSignals, pass_on, signal_name
from llmc.training.best_loss import BestLoss
from llmc.training.callbacks import checked_callbacks, hooks_of
from llmc.training.history import History, Throughput
from llmc.training.logs import Console, Log, StepInfo, check_packages, open_logs
from llmc.training.outliers import OutlierDetector
from llmc.training.ranks import SlowRanks
from llmc.training.report import short_report, startup_report
from llmc.training.result import TrainResult
from llmc.training.run_dir import locked, used_directory
from llmc.training.settings import TrainConfig, check_names
from llmc.training.setup import setup
from llmc.training.slowness import Slowness
from llmc.training.summary import Reached, compare, nothing_left, resume_command, stopped_early, summary
from llmc.values import decimal_bytes

_SHORT_SAMPLE = 32  # tokens


class Callback:
    """What a caller may hook into a run. Override the methods that you want.

    Of another class any object that has some of these methods will do, and a function f(trainer, info) is called as on_step().

    Every rank calls its callbacks (trainer.world says which it is), but on_save(), which is rank 0's. What a rank does in one the others
    wait for, for as long as dist_timeout allows.
    """

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        """Do something after each update."""

    def on_eval(self, trainer: Trainer, step: int, loss: float) -> None:
        """Do something after each validation; loss is its mean loss in nats per token."""

    def on_save(self, trainer: Trainer, step: int, directory: Path) -> None:
        """Do something when the checkpoint of a step is on the disk, in directory."""


# What may be given as a callback.
Hook = Callback | Callable[["Trainer", StepInfo], object]


class TrainingStopped(_llmc.Error):
    """A run that cannot go on: too many updates in a row were not finite, or a checkpoint that it needs cannot be written."""


class Trainer:
    """A training run: model, data, optimizer and schedule, and the loop over them.

    Under a launcher of several processes (mpirun, srun, torchrun) it is one rank's part of a run, and every rank makes one. All of them
    then call fit(), train_step(), validate(), evaluate_hellaswag() and save() together; rank 0 alone logs and saves.

    Args:
        config: settings; defaults that are open are chosen.
        callbacks: a list of them; see Callback.
        fs: what writes checkpoints, for tests that let it fail.

    Raises:
        TypeError: if a callback cannot be called, before anything else is done.
        ValueError, FileNotFoundError, MemoryError, llmc.Error: if a setting is wrong, data are missing or damaged, or memory does
            not suffice: before the first step, and with the numbers.
    """

    def __init__(self, config: TrainConfig, *, callbacks: Iterable[Hook] = (), fs: Fs = SYSTEM) -> None:
        self.callbacks = checked_callbacks(callbacks, Callback)
        self.world = open_world(config)
        self.log = self._console()
        used = used_directory(config) if self.world.leads else None
        with self.world.failure_told(), locked(used, self.log.text):  # setup writes to the run directory
            self._set_up(config, fs)

    def __repr__(self) -> str:
        kept = f", run_dir={str(self.run_dir)!r}" if self.run_dir else ""
        return f"Trainer(step {self.step} of {self.total_steps}{kept}, {self.model})"

    def _set_up(self, config: TrainConfig, fs: Fs) -> None:
        if self.world.leads:
            check_packages(config)
        self.run = run = setup(config, self.world, say=self.log.text)
        self.config, self.run_dir, self.sources = run.config, run.run_dir, run.sources
        self.model, self.optimizer, self.lr = run.model, run.optimizer, run.lr
        self.train_loader, self.val_loader = run.train_loader, run.val_loader
        self.total_steps = run.total_steps
        self.tokenizer = self.sources.tokenizer
        self.fs = fs

        self.step = 0
        self.bad_steps = 0  # in a row
        self.skipped_steps = 0
        self.best = BestLoss()
        self.loss_outliers, self.grad_outliers = OutlierDetector(), OutlierDetector()
        self._history, self._throughput = History(), Throughput()
        self._signals = StopSignals()
        self._agreed_stop = 0  # a signal that one of several ranks received
        self._slow_ranks, self._own_seconds = SlowRanks(self.world.hosts), 0.0
        alone_on_cpu = self.config.device == "cpu" and self.world.size == 1  # else ranks are programs to each other
        self._slowness = Slowness(self.model.backend.info().threads if alone_on_cpu else None)
        self._samples: dict[int, str] = {}  # by step: of the start and the newest
        self._step_begin: float | None = None  # of the update that comes next, if it followed the last one at once
        self._saved_step = -1  # of the newest checkpoint on the disk, as far as rank 0 knows
        if run.state is not None:
            self._restore(run.state)
        self._checkpointer: Checkpointer | None = None
        self._space = ""
        if self.run_dir is not None and self.world.leads:
            self._checkpointer = Checkpointer(
                self.run_dir,
                keep=self.config.keep_checkpoints,
                major_every=self.config.major_every,
                average=None if run.average is None else run.average.tensor,
                fs=fs,
            )
            self._space = self._check_space(self._checkpointer)
            # If the ranks needed a smaller batch size, another number of them may have the one that was given.
            kept = self.config.replace(batch_size=config.batch_size or self.config.batch_size)
            write_atomically(self.run_dir / "config.toml", [kept.to_toml(os.getcwd()).encode()])
            if self.tokenizer is not None and not (self.run_dir / self.tokenizer.file_name).exists():
                self.tokenizer.save(self.run_dir / self.tokenizer.file_name)

    def _check_space(self, checkpointer: Checkpointer) -> str:
        """Return in words what the run's checkpoints need and what is free. If not all of them have room, that is a remark instead.

        Raises:
            OSError: if there is no room for the next one, so that the end of the run could not be saved, or for one of them and the
                run is to stop if one cannot be written.
        """
        every = self.config.checkpoint_every
        count = checkpointer.most_ahead(self.step, self.total_steps, every) if every >= 0 else 0
        if count == 0:
            return ""
        try:
            one, free = checkpointer.check_space(self.model, self.optimizer)
        except OSError as e:
            e.strerror = (
                f"{e.strerror}: make room, choose another --output-dir, or keep nothing (--checkpoint-every -1)"
            )
            raise
        all_of_them = f", {count} of them {decimal_bytes(count * one)}" if count > 1 else ""
        room = f"a checkpoint needs {decimal_bytes(one)}{all_of_them}; {decimal_bytes(free)} are free"
        if count * one <= free:
            return room
        advice = "--keep-checkpoints N keeps the newest N"
        if self.config.on_save_error == "stop":
            raise OSError(errno.ENOSPC, f"{room}: {advice}", str(self.run_dir))
        self.run.remarks.append(f"warning: {room}, so that not all can be saved: {advice}")
        return ""

    @property
    def history(self) -> dict[str, list[float]]:
        """The curves so far; see TrainResult."""
        return self._history.lists()

    # ---- the loop ----

    def fit(self, *, pass_on_signal: bool = True) -> TrainResult:
        """Train to the last step. May be called again.

        A signal (Ctrl-C, SIGTERM) ends it after the update that is under way, with a checkpoint, and then does what it would have done.

        Args:
            pass_on_signal: False returns instead; stopped_by says which signal it was.

        Raises:
            TrainingStopped: if the run cannot go on. What was saved stays.
            KeyboardInterrupt: after Ctrl-C, when everything is saved.
            SystemExit: with 128 + n, the same after another signal n for which the program has no handler of its own.
        """
        result = self._fit()
        if result.stopped_by and pass_on_signal:
            pass_on(result.stopped_by)
        return result

    def _fit(self) -> TrainResult:
        with self.world.failure_told(), locked(self.run_dir if self.world.leads else None, self.log.text):
            if self.run.state is not None and self.step == self.run.state.step:
                if ended := self.world.share_value(nothing_left(self.run, self.best) if self.world.leads else None):
                    self.log.text(ended)
                    return self._result(0)
            if self.world.leads:
                self.log = open_logs(self.config, self.run_dir, self.step)
            self._agreed_stop = 0
            first_step, start = self.step, time.perf_counter()
            try:
                with StopSignals() as self._signals:
                    self._loop()
                    stopped_by = self._stopped_by
                self._signals = StopSignals()
                self._finish(stopped_by)
                if not stopped_by and self.world.leads:
                    self._summarize(first_step, time.perf_counter() - start)
            finally:
                if self._checkpointer is not None:
                    self._checkpointer.join()  # whatever ends the run, a save that has begun is finished
                self.log.close()
                self.log = self._console()
            self.world.barrier()  # until rank 0 has written everything
        return self._result(stopped_by)

    def _result(self, stopped_by: int) -> TrainResult:
        early = not stopped_by and self.step < self.total_steps
        return TrainResult(self.history, self.run_dir, self.model, self.tokenizer, self.step, stopped_by, early)

    def _console(self) -> Log:
        return Console() if self.world.leads else Log()

    @property
    def _stopped_by(self) -> int:
        """The signal that ends the run, or 0. Several ranks stop when all of them know of it."""
        return self._signals.received if self.world.size == 1 else self._agreed_stop

    def _evaluated(self) -> AbstractContextManager[None]:
        """Put the average of the weights, if there is one, in their place within a block that evaluates the model.

        It comes before _interruptible(): a signal that broke off the exchange would leave neither weights nor average.
        """
        return nullcontext() if self.run.average is None else self.run.average.in_place()

    def _interruptible(self) -> AbstractContextManager[None]:
        """Let a signal break off a block, if nobody would wait for the rest of it."""
        return self._signals.interruptible() if self.world.size == 1 else nullcontext()

    def _loop(self) -> None:
        self._begin()
        self._step_begin = None
        while not self._stopped_by:
            try:
                if self._between_steps(last=self.step >= self.total_steps):
                    break
            except StopRequested:
                break
            self._after_step(self.train_step())
        if self._stopped_by:
            self._save(background=False, final=True)

    def _between_steps(self, last: bool) -> bool:
        """Do what llm.c does before an update: checkpoint, validation, HellaSwag, sample.

        The checkpoint comes first, so that none of the others can cost it.

        Args:
            last: whether all updates are made.

        Returns:
            Whether the run ends here, because all updates are made or patience is at its end.
        """
        config, step = self.config, self.step

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        if (step > 0 and due(config.checkpoint_every)) or (last and config.checkpoint_every >= 0):
            if self.bad_steps and not last:
                self.log.text(f"no checkpoint at step {step}: the last loss or gradient was not finite")
            else:
                self._save(background=config.async_save and not last, final=last)
        if self.val_loader is not None and config.val_every and (due(config.val_every) or last):
            self.validate()
            if 0 < config.patience <= self.best.worse and not last:
                last = True
                self.log.text(stopped_early(self.run, step, self.best))
                if config.checkpoint_every >= 0:
                    self._save(background=False, final=True)
        if self.run.hellaswag_examples and config.val_every and ((step > 0 and due(config.val_every)) or last):
            self.evaluate_hellaswag()
        small = config.model is None  # samples of other models come when llm.c's do
        if config.sample_every > 0 and (((step > 0 or small) and due(config.sample_every)) or last):
            self._sample_on_rank_0(short=small and not last)
        return last

    def _sample_on_rank_0(self, short: bool) -> None:
        self._at("sampling")
        if self.world.leads:
            tokens = min(_SHORT_SAMPLE, self.config.sample_tokens) - 1 if short else None
            with self._evaluated(), self._interruptible():
                text = self.sample(max_tokens=tokens)
            self._samples = {step: old for step, old in self._samples.items() if step == 0} | {self.step: text}
            self.log.text(f"generating:\n---\n{text}\n---")
        self.world.barrier()

    def _at(self, what: str) -> None:
        """Note where this rank is, for the others' messages if it is lost; what comes next is no update."""
        self.world.at(f"{what} at step {self.step}", self.step)
        self._step_begin = None

    def train_step(self) -> StepInfo:
        """Make one update: as many micro-batches as it has, then the optimizer, unless loss or gradients forbid it."""
        # A process alone waits for the update to end, so that its time is that of the whole. Ranks do not: what is left of an update
        # runs beside the next one's begin, so that time is measured from end to end.
        start = self._step_begin or time.perf_counter()
        self.world.at(f"step {self.step}", self.step)
        model, optimizer, reduction = self.model, self.optimizer, self.run.reduction
        if self.config.overfit:
            self.train_loader.reset()
        model.zero_grad()
        if reduction is not None:
            reduction.begin(self.run.notes.written(self._signals.received, self._own_seconds))
        grad_accum = self.run.grad_accum(self.step)
        for micro in range(grad_accum):
            inputs, targets = self.train_loader.next_batch()
            model.forward(inputs)
            last = micro == grad_accum - 1
            model.backward(targets, 1.0 / (grad_accum * self.world.size), reduction if last else None)
        norm, loss = optimizer.measure(), model.mean_loss  # here the host waits for the device
        if reduction is not None:
            self._read_notes(reduction)
        loss_z, grad_z = self.loss_outliers.update(loss), self.grad_outliers.update(norm)
        skipped = self._reason_to_skip(loss, norm, loss_z, grad_z)
        lr = self.lr(self.step)
        if not skipped:
            optimizer.apply(lr)
            if self.run.average is not None:
                self.run.average.update(optimizer.step_count)
        if reduction is None:
            model.backend.synchronize()
        end = time.perf_counter()
        self._step_begin = None if reduction is None else end

        self._count_bad(bool(skipped), loss, norm)
        info = self._info(loss, norm, lr, loss_z, grad_z, skipped, end - start)
        self._history.add(step=self.step, train_loss=loss, norm=norm, lr=lr, tokens_per_second=info.tokens_per_second)
        self.step += 1
        return info

    def _read_notes(self, reduction: _llmc.Reduction) -> None:
        """Take in what the ranks told each other in this update."""
        self._own_seconds = reduction.own_seconds()
        stop, seconds = self.run.notes.read(reduction.notes())
        self._agreed_stop = self._agreed_stop or stop
        for line in self._slow_ranks.update(seconds):
            self.log.text(line)

    def _begin(self) -> None:
        config = self.config
        if self.run.state is not None:
            self.log.text(f"continuing {self.run_dir} from step {self.step}")
        table, short = startup_report(self.run, self.total_steps), short_report(self.run, self.total_steps)
        self.log.start(self.step, self.total_steps, f"{table}\n{self._space}".rstrip(), short)
        for remark in self.run.remarks:
            self.log.text(remark)
        if config.hellaswag and not self.run.hellaswag_examples:
            self.log.text(
                f"{config.hellaswag_data} does not exist: HellaSwag is left out. `llmc data hellaswag` writes it"
            )

    def _after_step(self, info: StepInfo) -> None:
        self.log.step(info)
        # While the batch warms up, steps take longer and longer by themselves.
        full = info.step >= self.run.batch.warmup_steps
        if full and self.world.leads and (line := self._slowness.update(info.seconds, self.total_steps - self.step)):
            self.log.text(line)
        if self.run.gpu_info is not None and self.step % self.config.gpu_info_every == 0:
            self.log.text(self.run.gpu_info.line())
        for callback in self.callbacks:
            callback.on_step(self, info)
        if self._checkpointer is not None:
            self._finish_saving(self._checkpointer.poll)

    def _finish(self, stopped_by: int) -> None:
        if self._checkpointer is not None:
            self._finish_saving(self._checkpointer.wait)
        self.log.finish(self._throughput.mean_milliseconds)
        if stopped_by:
            again = f"; continue with:\n  {resume_command(self.run)}" if self.run_dir else ""
            saved = "saved" if self.run_dir else "not saved (no run directory)"
            self.log.text(f"stopped by {signal_name(stopped_by)} after step {self.step}, {saved}{again}")
        fallbacks = self.model.backend.info().fallbacks
        if fallbacks:
            self.log.text(f"note: {fallbacks}")
        self._write_plot()

    def _summarize(self, first_step: int, seconds: float) -> None:
        if self.config.progress == "none" and self.run_dir is None:
            return  # nobody would read it
        history, comparison = self._history.lists(), None
        validated = history["val_step"][-1:] == [self.step]
        if validated and not self.config.overfit:
            try:
                comparison = compare(self.run)
            except (OSError, _llmc.Error) as e:
                self.log.text(f"warning: nothing to compare the loss with: {e}")
        loss = history["val_loss"][-1] if validated else None
        before, after = self._samples.get(0), self._samples.get(self.step)
        samples = (before, after) if before is not None and after is not None and self.step > 0 else None
        reached = Reached(first_step, self.step, seconds, loss, self.best, samples)
        self.log.text(summary(self.run, reached, comparison))

    def _info(
        self, loss: float, norm: float, lr: float, loss_z: float, grad_z: float, skipped: str, seconds: float
    ) -> StepInfo:
        tokens = self.run.batch.tokens(self.step)
        flops = self.model.config.flops_per_token(self.config.seq_len) * tokens / seconds
        return StepInfo(
            step=self.step,
            total_steps=self.total_steps,
            loss=loss,
            norm=norm,
            lr=lr,
            seconds=seconds,
            tokens_per_second=self._throughput.update(tokens / seconds, seconds),
            flops_per_second=flops,
            mfu=100.0 * flops / self.run.peak_flops if self.run.peak_flops else None,
            dtype=self.model.dtype,
            loss_z=loss_z,
            grad_z=grad_z,
            skipped=skipped,
        )

    def _reason_to_skip(self, loss: float, norm: float, loss_z: float, grad_z: float) -> str:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss}, gradient norm {norm}"
        if self.config.skip_loss_z > 0 and loss_z > self.config.skip_loss_z:
            return f"loss z-score of {loss_z:f}"
        if self.config.skip_grad_z > 0 and grad_z > self.config.skip_grad_z:
            return f"grad z-score of {grad_z:f}"
        return ""

    def _count_bad(self, skipped: bool, loss: float, norm: float) -> None:
        self.skipped_steps += skipped
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if 0 < self.config.max_bad_steps <= self.bad_steps:
            steps = finished_steps(self.run_dir) if self.run_dir else []
            last = f"; the last checkpoint is of step {steps[-1]} in {self.run_dir}" if steps else ""
            raise TrainingStopped(
                f"loss or gradient was not finite in {self.bad_steps} updates in a row (at step {self.step}: loss {loss}, norm "
                f"{norm}); no update was made with them. A smaller learning rate or longer warm-up may help{last}"
            )

    def validate(self) -> float:
        """Compute the mean loss over val_steps batches from the start of the validation data, in nats per token.

        Raises:
            ValueError: if the run has no validation data.
        """
        if self.val_loader is None:
            raise ValueError("there are no validation data")
        self._at("validation")
        config, world = self.config, self.world
        self.val_loader.reset()
        count = self.run.num_val_batches
        losses = [0.0] * count  # of batches; each rank knows its own
        with self._evaluated(), self._interruptible():
            for batch in range(world.rank, count, world.size):
                losses[batch] = self.model.evaluate(*self.val_loader.next_batch())
        if self.run.comm is not None:
            losses = self.run.comm.sum(losses)
        loss = math.fsum(losses) / count
        bits = self.run.bits_per_byte(loss)
        self.log.validation(self.step, loss, bits)
        self._history.add(val_step=self.step, val_loss=loss, **({} if bits is None else {"val_bits_per_byte": bits}))
        for callback in self.callbacks:
            callback.on_eval(self, self.step, loss)
        if self.best.update(self.step, loss) and config.save_best and self.run_dir is not None and self.step > 0:
            if world.leads:
                path = self.run_dir / "best.bin"
                with self._evaluated():
                    self._finish_saving(lambda: self.model.save(path, fs=self.fs))
            world.barrier()
        return loss

    def evaluate_hellaswag(self) -> float:
        """Compute acc_norm, from 0 to 1, on llm.c's HellaSwag file."""
        self._at("HellaSwag")
        with self._evaluated(), self._interruptible():
            result = multiple_choice(
                self.model, self.run.hellaswag_examples, batch_size=self.config.batch_size, comm=self.run.comm
            )
        self.log.hellaswag(self.step, result.correct_norm, result.total)
        return result.correct_norm / result.total

    def sample(self, prompt: str | None = None, max_tokens: int | None = None) -> str:
        """Generate text with the model as it is now. The random generator is llm.c's, and begins anew at every call.

        Args:
            prompt: what the text begins with; by default the setting's. Empty: an end-of-text token.
            max_tokens: new tokens; by default one less than the setting sample_tokens, which counts the prompt's first, but not more
                than the prompt leaves of the positions that are trained.

        Returns:
            The prompt and its continuation; ids of tokens if the run has no tokenizer.
        """
        config = self.config
        text = config.prompt if prompt is None else prompt
        if self.tokenizer is None:
            eot = min(50256, self.model.config.vocab_size - 1)
            tokens = self._generate([eot], max_tokens)
            return " ".join(str(t) for t in tokens)
        start = self.tokenizer.encode(text) if text else []
        new = self._generate(start or [self.tokenizer.eot_token], max_tokens)
        return text + "".join(self.tokenizer.stream(new))

    def _generate(self, prompt: list[int], max_tokens: int | None) -> list[int]:
        config = self.config
        if max_tokens is None:
            room = config.seq_len - len(prompt)
            max_tokens = min(config.sample_tokens - 1, room) if room > 0 else config.sample_tokens - 1
        with self._evaluated():
            tokens = self.model.generate(
                prompt, max(0, max_tokens), temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
            )
        return tokens

    # ---- saving ----

    def save(self) -> None:
        """Write a checkpoint of the present step into the run directory; return when it is on the disk.

        Raises:
            ValueError: if the run has no directory.
            OSError: if the checkpoint cannot be written. Earlier ones are untouched.
        """
        if self.run_dir is None:
            raise ValueError("the run has no run directory to save into")
        try:
            if self._checkpointer is not None:
                self._write_checkpoint(background=False)
                self._tell_saved()
            else:
                self._help_to_save()
        finally:
            self.world.barrier()

    def _save(self, background: bool, final: bool = False) -> None:
        """Save, unless this step is saved already. Ranks that have no part in it wait if it is not in the background."""
        if self.run_dir is None:
            return
        self._at("saving")
        if self._checkpointer is None:
            self._help_to_save()
        else:
            self._finish_saving(self._checkpointer.wait)  # an earlier save that failed is dealt with by itself
            if self.step != self._saved_step:
                self._finish_saving(lambda: self._write_checkpoint(background), final)
            else:
                self._tell_of_save(False)
        if not background:
            self.world.barrier()

    def _tell_of_save(self, begins: bool) -> None:
        """Let the other ranks know whether rank 0 now gathers the state, for which _help_to_save() waits."""
        self.world.barrier()
        self.world.share_value(begins)

    def _help_to_save(self) -> None:
        self.world.barrier()  # rank 0 may wait for an earlier save
        if self.world.share_value() and self.optimizer.sharded:
            send_state(self.model, self.optimizer)

    def _write_checkpoint(self, background: bool) -> None:
        assert self._checkpointer is not None
        begun = False

        def begin() -> None:
            nonlocal begun
            begun = True
            self._tell_of_save(True)

        state = TrainState(
            step=self.step,
            optimizer_step=self.optimizer.step_count,
            optimizer_rng=self.optimizer.rng_state,
            loader=self.train_loader.state(),
            shuffle=self.run.shuffle,
            extra={
                "loss_window": self.loss_outliers.state(),
                "grad_window": self.grad_outliers.state(),
                "bad_steps": self.bad_steps,
                "skipped_steps": self.skipped_steps,
                **self.best.state(),
            },
        )
        try:
            self._checkpointer.save(
                self.model,
                self.optimizer,
                state,
                config=self.config.to_dict(),
                data=self.run.fingerprint,
                background=background,
                begin=begin,
            )
        except OSError:
            if not begun:
                self._tell_of_save(False)
            raise

    def _finish_saving(self, save: Callable[[], Any], final: bool = False) -> None:
        """Call a function that saves. If it fails, warn and go on, or stop, as on_save_error says; after a final save, stop."""
        try:
            save()
        except OSError as e:
            steps = finished_steps(self.run_dir or "")
            kept = f"that of step {steps[-1]} is untouched" if steps else "there is no earlier one"
            message = f"checkpoint could not be written: {e}; {kept}"
            if final or self.config.on_save_error == "stop":
                raise TrainingStopped(message) from e
            self.log.text(f"warning: {message}; training goes on")
        self._tell_saved()

    def _tell_saved(self) -> None:
        """Tell the callbacks of checkpoints that are on the disk."""
        assert self._checkpointer is not None and self.run_dir is not None
        for step in self._checkpointer.completed():
            self._saved_step = step
            for callback in self.callbacks:
                callback.on_save(self, step, self.run_dir)

    def _restore(self, state: TrainState) -> None:
        self.step = self._saved_step = state.step
        self.optimizer.step_count = state.optimizer_step
        self.optimizer.rng_state = state.optimizer_rng
        try:
            self.train_loader.set_state(state.loader)
        except ValueError as e:
            if not self.config.allow_changes:
                raise
            self.log.text(f"the data are read from their beginning: {e}")
        extra = state.extra
        self.loss_outliers.set_state(extra.get("loss_window", []))
        self.grad_outliers.set_state(extra.get("grad_window", []))
        self.bad_steps = extra.get("bad_steps", 0)
        self.skipped_steps = extra.get("skipped_steps", 0)
        self.best.set_state(extra)

    def _write_plot(self) -> None:
        if self.config.plot and self.run_dir is not None and self.world.leads and self.history["step"]:
            from llmc.plot import plot_runs

            try:
                note = plot_runs([self.run_dir], self.run_dir / "loss.png")
                if note:
                    self.log.text(f"note: loss.png: {note}")
            except (OSError, ValueError) as e:
                self.log.text(f"warning: loss.png could not be drawn: {e}")


def train(*, callbacks: Iterable[Hook] = (), **settings: Any) -> TrainResult:
    """Train a model: everything that `llmc-train` can do, as keywords.

    >>> result = llmc.train(data="my.txt", model="d6", max_steps=1000, output_dir="runs/mine")
    >>> print(result.history["val_loss"][-1], result.model.num_parameters)

    Args:
        callbacks: a list of functions f(trainer, info), called after each update, or of Callbacks.
        settings: fields of TrainConfig, by name.

    Returns:
        What Trainer.fit() returns.

    Raises:
        ValueError: if a setting is unknown or impossible. Other errors are those of Trainer and Trainer.fit().
    """
    for name in settings:
        if name in ("callback", *hooks_of(Callback)):
            raise ValueError(
                f"llmc.train: '{name}' is no setting: callbacks=[f] calls f(trainer, info) after each update; an llmc.Callback has "
                f"{', '.join(hooks_of(Callback))}"
            )
    check_names(settings, "llmc.train")
    return Trainer(TrainConfig(**settings), callbacks=callbacks).fit()
