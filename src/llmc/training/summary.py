"""The last words of a run: what was reached, what counting and xz reach, where things are, and what to type next."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from llmc.checkpoint import checkpoint_files, finished_steps
from llmc.data.bits_per_byte import nats_per_token
from llmc.data.frequencies import FrequencyLosses, frequency_losses
from llmc.data.xz import MOST, text_of, xz_bits_per_byte
from llmc.distributed.launcher import started_by_launcher
from llmc.formats.metrics import read_rows
from llmc.formats.shards import read_shard
from llmc.system.fs import shell_word
from llmc.training.best_loss import BestLoss
from llmc.training.setup import Run
from llmc.values import counted

_MOST_MEASURED = 1 << 22  # tokens of validation
_SHOWN = 100  # characters of a sample


@dataclass(frozen=True)
class Reached:
    """What a run came to.

    Attributes:
        first_step, step: updates made before this call, and now.
        seconds: that this call took.
        val_loss: of the last step, in nats per token; None if that was not validated.
        best: the lowest one.
        samples: texts after the same prompt, before the first update and after the last; None if there are not both.
    """

    first_step: int
    step: int
    seconds: float
    val_loss: float | None
    best: BestLoss
    samples: tuple[str, str] | None


@dataclass(frozen=True)
class Comparison:
    """What to compare a validation loss with, on the same batches.

    Attributes:
        frequencies: the losses of counting.
        xz: what xz needs after the training text, in bits per byte; None if that is not known (xz_bits_per_byte()).
    """

    frequencies: FrequencyLosses
    xz: float | None


def compare(run: Run) -> Comparison:
    """Measure what the training data tell of the batches that validation has, of all ranks, without a model.

    Raises:
        OSError, llmc.Error: if a file cannot be read.
    """
    assert run.val_loader is not None
    most = max(1, _MOST_MEASURED // (run.val_loader.batch_size * run.val_loader.seq_len))
    batches = itertools.islice(run.validation_batches(), most)
    losses = frequency_losses(run.train_loader.shards, batches, run.model.config.vocab_size)
    return Comparison(losses, _xz(run))


def _xz(run: Run) -> float | None:
    shards, tokenizer = run.train_loader.shards, run.sources.tokenizer
    if tokenizer is None or sum(shard.tokens for shard in shards) + _validated(run) > MOST:
        return None
    held = text_of((targets for _, targets in run.validation_batches()), tokenizer)
    return xz_bits_per_byte(held, text_of((read_shard(shard.path) for shard in shards), tokenizer))


def _validated(run: Run) -> int:
    """Return the tokens of a validation."""
    return run.num_val_batches * run.config.batch_size * run.config.seq_len


def resume_command(run: Run, change: str = "") -> str:
    """Return what to type to go on with a run, with as many ranks if `llmc train --processes N` started them.

    Args:
        run: the run.
        change: settings that are to be others, with a space before them.
    """
    ranks = f" --processes {run.world.size}" if run.world.size > 1 and started_by_launcher() else ""
    return f"llmc train --resume {shell_word(run.run_dir or '')}{change}{ranks}"


def _longer_command(run: Run, step: int) -> str:
    """Return what to type so that a run that ended at a step goes on."""
    early = step < run.total_steps  # patience ended it
    return resume_command(run, f" --patience {2 * run.config.patience}" if early else f" --max-steps {2 * step or 1}")


def stopped_early(run: Run, step: int, best: BestLoss) -> str:
    """Return what to say of a run that patience ended at a step."""
    last = f"last {best.worse} validations were" if best.worse > 1 else "last validation was"
    at = "" if best.step is None else f" of step {best.step}"
    kept = ", whose model is best.bin" if run.config.save_best and run.run_dir is not None and best.step else ""
    return (
        f"stopped early at step {step} of {run.total_steps}: the {last} not below the loss of {best.loss:.4f}{at}{kept}"
    )


def nothing_left(run: Run, best: BestLoss) -> str:
    """Return what to say of a run that is resumed after its end; empty if it has not ended, or was not validated there.

    Args:
        run: the run, as its newest checkpoint has it.
        best: the best validation that the checkpoint knows of.
    """
    assert run.state is not None
    step, patience = run.state.step, run.config.patience
    early = step < run.total_steps
    if run.run_dir is None or (early and not patience):
        return ""
    what = f"is finished: step {step} of {run.total_steps}"
    if run.val_loader is not None and run.config.val_every:
        path = run.run_dir / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row.get("kind") == "validation"] if path.is_file() else []
        if not rows or rows[-1]["step"] != step:
            return ""
        loss = float(rows[-1]["loss"])
        if not math.isnan(loss):
            bits = run.bits_per_byte(loss)
            what += f", validation loss {loss:.4f}" + ("" if bits is None else f" ({bits:.4f} bits/byte)")
        best = copy.copy(best)
        best.update(step, loss)  # the checkpoint may have been written before that validation
    if early:
        if best.worse < patience:
            return ""
        what = f"was {stopped_early(run, step, best)}"
    return f"{run.run_dir} {what}. To go on:\n  {_longer_command(run, step)}"


def summary(run: Run, reached: Reached, comparison: Comparison | None) -> str:
    """Return the last words of a run that came to its end.

    Args:
        run: the run; of its directory only what is there is named.
        reached: what it came to.
        comparison: what to compare the validation loss with, or None.
    """
    lines = []
    steps = reached.step - reached.first_step
    if steps > 0:
        begin, end = run.batch.tokens_before([reached.first_step, reached.step])
        lines.append(
            f"trained {counted(steps, 'step')} ({counted(int(end - begin), 'token')}) in {duration(reached.seconds)}"
        )
    best = _best_file(run, reached)
    if reached.val_loss is not None:
        lines += _losses(run, reached.val_loss, reached.best, best, comparison)
    if reached.samples is not None and run.sources.tokenizer is not None:
        before, after = map(_one_line, reached.samples)
        lines += ["samples after the same prompt", f"  before: {before}", f"  now:    {after}"]
    if run.run_dir is None:
        return "\n".join(
            [*lines, "nothing was kept, because the run has no directory (--output-dir; in Python output_dir)"]
        )
    directory = run.run_dir
    saved = finished_steps(directory)
    names = [f"the checkpoint {checkpoint_files(directory, saved[-1]).model.name}"] if saved else []
    names += [checkpoint_files(directory, saved[-1]).average.name] if saved and run.average is not None else []
    names += [name for name in ("best.bin", "loss.png", "metrics.jsonl") if (directory / name).exists()]
    lines.append(f"{directory} has {', '.join(names)}")
    return "\n".join([*lines, "next:", *(f"  {command}" for command in _commands(run, reached, bool(saved), best))])


def _best_file(run: Run, reached: Reached) -> Path | None:
    """Return the file of the model with the lowest validation loss, if that was before the last step and is kept."""
    best, directory = reached.best, run.run_dir
    if directory is None or best.step is None or reached.val_loss is None or not best.loss < reached.val_loss:
        return None
    if run.config.save_best and (directory / "best.bin").exists():
        return directory / "best.bin"
    if best.step not in finished_steps(directory):
        return None
    files = checkpoint_files(directory, best.step)
    return files.model if run.average is None else files.average


def _losses(run: Run, loss: float, best: BestLoss, file: Path | None, comparison: Comparison | None) -> list[str]:
    """Return the validation loss, and below it those to compare it with: in bits per byte too, if the tokenizer is known."""
    rows = [("validation loss", loss, f"of {_validated(run):,} tokens")]
    if best.loss < loss:
        kept = f", kept as {file.name}" if file is not None else "; --save-best keeps it" if run.run_dir else ""
        rows.append(("lowest validation loss", best.loss, "" if best.step is None else f"at step {best.step}{kept}"))
    if comparison is not None:
        counting = comparison.frequencies
        all_of_them = f" of {counting.total:,}" if counting.counted < counting.total else ""
        rows += [
            ("knowing only how frequent tokens are", counting.unigram, ""),
            ("and which token follows which", counting.bigram, f"counted in {counting.counted:,}{all_of_them} tokens"),
        ]
        if comparison.xz is not None and run.bytes_per_token is not None:
            rows.append(("xz -9e after the training text", nats_per_token(comparison.xz, run.bytes_per_token), ""))
    bits = [run.bits_per_byte(value) for _, value, _ in rows]
    lines = [] if None in bits else [f"{'':36} bits/byte  nats/token"]
    for (name, value, note), known in zip(rows, bits):
        numbers = f"{value:8.4f}" if known is None else f"{known:9.4f}  {value:10.4f}"
        lines.append(f"{name:36} {numbers}" + (f"  ({note})" if note else ""))
    return lines


def _one_line(text: str) -> str:
    """Return the beginning of a sample, its lines in one."""
    line = " ".join(text.split())
    return f"{line[:_SHOWN].rstrip()} ..." if len(line) > _SHOWN else line or "(blank)"


def _commands(run: Run, reached: Reached, saved: bool, best: Path | None) -> list[str]:
    """Return what may be typed next."""
    assert run.run_dir is not None
    directory = shell_word(run.run_dir)
    commands = []
    if run.sources.tokenizer is not None and (saved or best is not None):
        prompt = run.config.prompt
        if not prompt or prompt.startswith("-") or "\n" in prompt:
            prompt = "The"
        model = directory if best is None else shell_word(best)
        commands += [f"llmc generate {model} {shell_word(prompt)}", f"llmc generate {model} --interactive"]
    if saved:
        commands.append(_longer_command(run, reached.step))
    return [*commands, f"llmc plot {directory}"]


def duration(seconds: float) -> str:
    """Return a time in words: 45 s, 2 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"
