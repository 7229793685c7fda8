"""Evaluation: validation loss and perplexity, HellaSwag, MMLU.

The two multiple-choice evaluations score each ending by the model's cross-entropy over the ending's tokens, given the context. The
lowest sum is the choice of `acc`, the lowest mean that of `acc_norm` (the one that llm.c logs). They read llm.c's eval file
(llmc.formats.eval_file).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from llmc import _llmc
from llmc.data.bits_per_byte import bits_per_byte, byte_lengths, count_bytes
from llmc.data.files import find_shards
from llmc.data.loader import DataLoader
from llmc.data.tokenizer import Tokenizer
from llmc.formats.eval_file import Example, read_eval_file
from llmc.models.config import ModelConfig
from llmc.models.model import Model
from llmc.system.fs import StrPath
from llmc.values import counted

# ---- validation loss ----


@dataclass(frozen=True)
class LossResult:
    """The result of validation_loss.

    Attributes:
        loss: mean cross-entropy in nats per token.
        tokens: number of tokens that it is the mean of.
        bytes: of text that these tokens stand for; None if their tokenizer is not known.
    """

    loss: float
    tokens: int
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """e to the power of the loss; infinite if that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of the text, in which models of different tokenizers compare; None without a tokenizer or bytes."""
        return bits_per_byte(self.loss, self.bytes / self.tokens) if self.bytes else None


def validation_loss(
    model: Model,
    data: StrPath | Sequence[StrPath],
    *,
    batch_size: int = 4,
    seq_len: int | None = None,
    max_batches: int = -1,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
) -> LossResult:
    """Measure the mean loss over token files as llm.c does: in file order, on rows of seq_len tokens without context before them.

    Args:
        model: the model.
        data: token files, as of find_shards: those for validation, if a folder or glob has both kinds.
        batch_size: rows at a time.
        seq_len: tokens of a row; None for the model's longest context, but at most 1024.
        max_batches: number of batches; -1 for all whole batches.
        tokenizer: what the token files were made with, to count the bytes of their text; None counts none.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: if no file matches.
        llmc.Error: if a file is damaged, or holds no whole batch.
        ValueError: if max_batches is 0 or below -1, or the files hold a token outside of the model's vocabulary.
    """
    if max_batches != -1 and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}, expected 1 or more, or -1 for all")
    T = min(1024, model.config.max_seq_len) if seq_len is None else seq_len
    files = find_shards(data, validation=True)
    loader = DataLoader(files, batch_size, T, vocab_size=model.config.vocab_size)
    # num_batches() counts the shards' tails as well: with as many batches, the first ones would be measured twice.
    count = sum((shard.tokens - 1) // (batch_size * T) for shard in loader.shards)
    count = count if max_batches == -1 else min(count, max_batches)
    lengths = None if tokenizer is None else byte_lengths(tokenizer)
    losses, total = [], 0
    for _ in tqdm(range(count), unit="batch", disable=not progress):
        inputs, targets = loader.next_batch()
        losses.append(model.evaluate(inputs, targets))
        total += 0 if lengths is None else count_bytes(targets, lengths)
    tokens = count * batch_size * T
    return LossResult(math.fsum(losses) / count, tokens, None if lengths is None else total)


# ---- multiple choice ----


@dataclass(frozen=True)
class ChoiceResult:
    """How a model scored the endings of multiple-choice examples.

    Attributes:
        labels: the right ending of each example.
        losses: for each ending of each example, the sum of its tokens' losses in nats.
        lengths: for each ending of each example, the number of its tokens.
        truncated: number of rows that were longer than the model's context, and lost their first tokens.
    """

    labels: list[int]
    losses: list[list[float]]
    lengths: list[list[int]]
    truncated: int

    def __repr__(self) -> str:
        counts = f"{counted(self.total, 'example')}, {counted(self.truncated, 'row')} truncated"
        return f"ChoiceResult(acc {self.acc:.4f}, acc_norm {self.acc_norm:.4f}, {counts})"

    @property
    def choices(self) -> list[int]:
        """For each example the ending with the lowest sum of losses; the first one of equals."""
        return [int(np.argmin(sums)) for sums in self.losses]

    @property
    def choices_norm(self) -> list[int]:
        """For each example the ending with the lowest mean loss; the first one of equals."""
        return [int(np.argmin(np.divide(sums, n))) for sums, n in zip(self.losses, self.lengths)]

    @property
    def total(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def correct(self) -> int:
        """Number of examples whose right ending has the lowest sum."""
        return sum(choice == label for choice, label in zip(self.choices, self.labels))

    @property
    def correct_norm(self) -> int:
        """Number of examples whose right ending has the lowest mean."""
        return sum(choice == label for choice, label in zip(self.choices_norm, self.labels))

    @property
    def acc(self) -> float:
        """Fraction of examples whose right ending has the lowest sum."""
        return self.correct / self.total

    @property
    def acc_norm(self) -> float:
        """Fraction of examples whose right ending has the lowest mean."""
        return self.correct_norm / self.total

    def summary(self) -> dict[str, float]:
        """Return the numbers that `llmc eval` writes."""
        names = ("acc", "acc_norm", "correct", "correct_norm", "total", "truncated")
        return {name: getattr(self, name) for name in names}


def check_examples(examples: Sequence[Example], config: ModelConfig) -> None:
    """Check that a model of this shape can score the examples.

    Raises:
        ValueError: if it cannot, or if there are none.
    """
    if not examples:
        raise ValueError("there are no examples to evaluate")
    largest = max(int(part.max()) for example in examples for part in (example.context, *example.endings))
    if largest >= config.vocab_size:
        raise ValueError(
            f"the examples have token {largest}, the model a vocabulary of {config.vocab_size}: "
            "they were made with another tokenizer"
        )
    longest = max(len(ending) for example in examples for ending in example.endings)
    if longest > config.max_seq_len:
        raise ValueError(f"an ending has {longest} tokens, but the model's max_seq_len is {config.max_seq_len}")


def multiple_choice(
    model: Model,
    examples: Sequence[Example],
    *,
    batch_size: int = 4,
    progress: bool = False,
    what: str = "evaluating",
    comm: _llmc.Comm | None = None,
) -> ChoiceResult:
    """Score every ending of every example.

    Rows are sorted by length, so that those of a batch have about the same. A row that is longer than the model's context loses its
    first tokens.

    Args:
        model: the model.
        examples: at least one.
        batch_size: rows, each a context with an ending, that the model reads at a time.
        progress: whether to show a progress bar.
        what: the bar's name.
        comm: ranks that have the same model and examples, and share the work; all of them get the result, which does not depend on
            their number.

    Raises:
        ValueError: if a token is outside of the model's vocabulary, an ending is longer than the model's context, or batch_size is
            less than 1.
    """
    check_examples(examples, model.config)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    rows = [(e, n) for e, example in enumerate(examples) for n in range(len(example.endings))]
    longest = model.config.max_seq_len
    lengths = [[len(ending) for ending in example.endings] for example in examples]

    def length(row: tuple[int, int]) -> int:
        """Return how many tokens the model reads: the last one is predicted, and not read."""
        return min(len(examples[row[0]].context) + lengths[row[0]][row[1]] - 1, longest)

    truncated = sum(len(examples[e].context) + lengths[e][n] - 1 > longest for e, n in rows)
    losses = [[0.0] * len(example.endings) for example in examples]
    rows.sort(key=length, reverse=True)
    rank, ranks = (comm.rank, comm.size) if comm is not None else (0, 1)
    with tqdm(total=len(rows), unit="row", desc=what, disable=not progress) as bar:
        for begin in range(rank * batch_size, len(rows), ranks * batch_size):
            batch = rows[begin : begin + batch_size]
            T = length(batch[0])
            inputs = np.zeros((len(batch), T), np.int32)
            targets = np.full((len(batch), T), -1, np.int32)
            for i, (e, n) in enumerate(batch):
                tokens = np.concatenate([examples[e].context, examples[e].endings[n]]).astype(np.int32)[-longest - 1 :]
                used, scored = len(tokens) - 1, lengths[e][n]
                inputs[i, :used] = tokens[:-1]
                targets[i, used - scored : used] = tokens[-scored:]
            sums = model.token_losses(inputs, targets).sum(axis=1, dtype=np.float64)
            for (e, n), loss in zip(batch, sums):
                losses[e][n] = float(loss)
            bar.update(len(batch))
    if comm is not None:  # each number is 0 on all ranks but one
        total = iter(comm.sum([loss for ending in losses for loss in ending]))
        losses = [[next(total) for _ in ending] for ending in losses]
    return ChoiceResult([example.label for example in examples], losses, lengths, truncated)


def hellaswag(
    model: Model, path: StrPath, *, batch_size: int = 4, limit: int | None = None, progress: bool = False
) -> ChoiceResult:
    """Evaluate HellaSwag (Zellers et al. 2019) by completion.

    Args:
        model: the model.
        path: llm.c's eval file.
        batch_size: rows that the model reads at a time.
        limit: number of examples, the first of the file; None for all.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError, llmc.Error: as read_eval_file.
        ValueError: as multiple_choice.
    """
    return multiple_choice(
        model, read_eval_file(path)[:limit], batch_size=batch_size, progress=progress, what="HellaSwag"
    )


def mmlu(
    model: Model, path: StrPath, *, batch_size: int = 4, limit: int | None = None, progress: bool = False
) -> ChoiceResult:
    """Evaluate MMLU (Hendrycks et al. 2021) by completion, as llm.c's mmlu.py scores it. Arguments and errors as of hellaswag."""
    return multiple_choice(model, read_eval_file(path)[:limit], batch_size=batch_size, progress=progress, what="MMLU")
