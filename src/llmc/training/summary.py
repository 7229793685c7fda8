"""The last words of a run: what was reached, what counting alone would have, where things are, and what to type next."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

from llmc.checkpoint import checkpoint_files, finished_steps
from llmc.data.frequencies import FrequencyLosses, frequency_losses
from llmc.data.loader import DataLoader
from llmc.distributed.launcher import started_by_launcher
from llmc.formats.metrics import read_rows
from llmc.system.fs import shell_word
from llmc.training.best_loss import BestLoss
from llmc.training.setup import Run
from llmc.values import counted

_MOST_MEASURED = 1 << 22  # tokens of validation


@dataclass(frozen=True)
class Reached:
    """What a run came to.

    Attributes:
        first_step, step: updates made before this call, and now.
        seconds: that this call took.
        val_loss: of the last step, in nats per token; None if that was not validated.
        best: the lowest one.
    """

    first_step: int
    step: int
    seconds: float
    val_loss: float | None
    best: BestLoss


def counting_losses(run: Run) -> FrequencyLosses:
    """Measure what the frequencies of the training data say about the batches that validation has, of all ranks.

    Raises:
        OSError, llmc.Error: if a file cannot be read.
    """
    assert run.val_loader is not None
    B, T, vocab_size = run.val_loader.batch_size, run.val_loader.seq_len, run.model.config.vocab_size
    # run.val_loader has this rank's batches only.
    loader = DataLoader(run.val_loader.files, B, T, vocab_size=vocab_size, rows_per_sample=B)
    batches = itertools.islice(loader, min(run.num_val_batches, max(1, _MOST_MEASURED // (B * T))))
    return frequency_losses(run.train_loader.shards, batches, vocab_size)


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
            what += f", validation loss {loss:.4f}"
        best = copy.copy(best)
        best.update(step, loss)  # the checkpoint may have been written before that validation
    if early:
        if best.worse < patience:
            return ""
        what = f"was {stopped_early(run, step, best)}"
    return f"{run.run_dir} {what}. To go on:\n  {_longer_command(run, step)}"


def summary(run: Run, reached: Reached, counting: FrequencyLosses | None) -> str:
    """Return the last words of a run that came to its end.

    Args:
        run: the run; of its directory only what is there is named.
        reached: what it came to.
        counting: what to compare the validation loss with, or None.
    """
    lines = []
    steps = reached.step - reached.first_step
    if steps > 0:
        begin, end = run.batch.tokens_before([reached.first_step, reached.step])
        lines.append(
            f"trained {counted(steps, 'step')} ({counted(int(end - begin), 'token')}) in {duration(reached.seconds)}"
        )
    if reached.val_loss is not None:
        lines += _losses(run, reached.val_loss, reached.best, counting)
    if run.run_dir is None:
        return "\n".join(
            [*lines, "nothing was kept, because the run has no directory (--output-dir; in Python output_dir)"]
        )
    directory = run.run_dir
    saved = finished_steps(directory)
    model = checkpoint_files(directory, saved[-1]).model if saved else None
    best = directory / "best.bin"
    names = [f"the checkpoint {model.name}"] if model is not None else []
    names += [checkpoint_files(directory, saved[-1]).average.name] if saved and run.average is not None else []
    names += [name for name in ("best.bin", "loss.png", "metrics.jsonl") if (directory / name).exists()]
    lines.append(f"{directory} has {', '.join(names)}")
    lines += [
        "next:",
        *(f"  {command}" for command in _commands(run, reached.step, bool(saved), best.exists())),
    ]
    return "\n".join(lines)


def _losses(run: Run, loss: float, best: BestLoss, counting: FrequencyLosses | None) -> list[str]:
    """Return the validation loss, and below it those to compare it with."""
    measured = run.num_val_batches * run.config.batch_size * run.config.seq_len
    rows = [("validation loss", loss, f"of {measured:,} tokens")]
    if best.loss < loss:
        rows.append(("lowest validation loss", best.loss, "" if best.step is None else f"at step {best.step}"))
    if counting is not None:
        all_of_them = f" of {counting.total:,}" if counting.counted < counting.total else ""
        rows += [
            ("knowing only how frequent tokens are", counting.unigram, ""),
            ("and which token follows which", counting.bigram, f"counted in {counting.counted:,}{all_of_them} tokens"),
        ]
    return [f"{name:36} {value:8.4f}" + (f"  ({note})" if note else "") for name, value, note in rows]


def _commands(run: Run, step: int, saved: bool, best: bool) -> list[str]:
    """Return what may be typed next."""
    assert run.run_dir is not None
    directory = shell_word(run.run_dir)
    commands = []
    if run.sources.tokenizer is not None and (saved or best):
        prompt = run.config.prompt
        if not prompt or prompt.startswith("-") or "\n" in prompt:
            prompt = "The"
        commands.append(
            f"llmc generate {directory if saved else shell_word(run.run_dir / 'best.bin')} {shell_word(prompt)}"
        )
    if saved:
        commands.append(_longer_command(run, step))
    return [*commands, f"llmc plot {directory}"]


def duration(seconds: float) -> str:
    """Return a time in words: 45 s, 2 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"
