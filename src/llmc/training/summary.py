"""The last words of a run: what was reached, what counting alone would have, where things are, and what to type next."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from llmc.checkpoint import checkpoint_files, finished_steps
from llmc.data.frequencies import FrequencyLosses, frequency_losses
from llmc.data.loader import DataLoader
from llmc.system.fs import shell_word
from llmc.training.setup import Run

_MOST_MEASURED = 1 << 22  # tokens of validation


@dataclass(frozen=True)
class Reached:
    """What a run came to.

    Attributes:
        first_step, step: updates made before this call, and now.
        seconds: that this call took.
        val_loss: of the last step, in nats per token; None if that was not validated.
        best_val_loss, best_val_step: the lowest one, and its step; the step is None if it is not known.
    """

    first_step: int
    step: int
    seconds: float
    val_loss: float | None
    best_val_loss: float
    best_val_step: int | None


def counting_losses(run: Run) -> FrequencyLosses:
    """Measure what the frequencies of the training data say about the batches that validation has, of all ranks.

    Raises:
        OSError, llmc.Error: if a file cannot be read.
        ValueError: if the run has no validation data.
    """
    if run.val_loader is None:
        raise ValueError("there are no validation data")
    B, T, vocab_size = run.val_loader.batch_size, run.val_loader.seq_len, run.model.config.vocab_size
    # run.val_loader has this rank's batches only.
    loader = DataLoader(run.val_loader.files, B, T, vocab_size=vocab_size, rows_per_sample=B)
    batches = itertools.islice(loader, min(run.num_val_batches, max(1, _MOST_MEASURED // (B * T))))
    return frequency_losses(run.train_loader.shards, batches, vocab_size)


def summary(run: Run, reached: Reached, counting: FrequencyLosses | None, launched: bool = False) -> str:
    """Return the last words of a run that came to its end.

    Args:
        run: the run; of its directory only what is there is named.
        reached: what it came to.
        counting: what to compare the validation loss with, or None.
        launched: whether `llmc train --processes N` started the ranks, so that it has to start them again.
    """
    lines = []
    steps = reached.step - reached.first_step
    if steps > 0:
        tokens = steps * run.config.total_batch_size
        plural = "s" if steps > 1 else ""
        lines.append(f"trained {steps:,} step{plural} ({tokens:,} tokens) in {duration(reached.seconds)}")
    if reached.val_loss is not None:
        lines += _losses(reached.val_loss, reached, counting)
    if run.run_dir is None:
        return "\n".join([*lines, "nothing was kept, because the run has no directory (--output-dir)"])
    directory = run.run_dir
    saved = finished_steps(directory)
    model = checkpoint_files(directory, saved[-1]).model if saved else None
    best = directory / "best.bin"
    names = [f"the checkpoint {model.name}"] if model is not None else []
    names += [name for name in ("best.bin", "loss.png", "metrics.jsonl") if (directory / name).exists()]
    lines.append(f"{directory} has {', '.join(names)}")
    lines += [
        "next:",
        *(f"  {command}" for command in _commands(run, reached.step, bool(saved), best.exists(), launched)),
    ]
    return "\n".join(lines)


def _losses(loss: float, reached: Reached, counting: FrequencyLosses | None) -> list[str]:
    """Return the validation loss, and below it those to compare it with."""
    at = "" if reached.best_val_step is None else f" at step {reached.best_val_step}"
    rows = [
        ("validation loss", loss, f"lowest {reached.best_val_loss:.4f}{at}" if reached.best_val_loss < loss else "")
    ]
    if counting is not None:
        rows += [
            ("knowing only how frequent tokens are", counting.unigram, ""),
            ("and which token follows which", counting.bigram, f"counted in {counting.counted:,} tokens"),
        ]
    return [f"{name:36} {value:8.4f}" + (f"  ({note})" if note else "") for name, value, note in rows]


def _commands(run: Run, step: int, saved: bool, best: bool, launched: bool) -> list[str]:
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
        ranks = f" --processes {run.world.size}" if launched else ""
        early = step < run.total_steps  # patience ended it
        more = f"--patience {2 * run.config.patience}" if early else f"--max-steps {2 * step}"
        commands.append(f"llmc train --resume {directory} {more}{ranks}")
    return [*commands, f"llmc plot {directory}"]


def duration(seconds: float) -> str:
    """Return a time in words: 45 s, 2 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"
