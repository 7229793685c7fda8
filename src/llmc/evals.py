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

from llmc.data.loader import DataLoader
from llmc.formats.eval_file import Example, read_eval_file
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.system.fs import StrPath

# ---- validation loss ----


@dataclass(frozen=True)
class LossResult:
    """loss: mean cross-entropy in nats per token."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def validation_loss(
    model: GPT2,
    data: StrPath | Sequence[StrPath],
    *,
    batch_size: int = 4,
    seq_len: int | None = None,
    max_batches: int = -1,
    progress: bool = False,
) -> LossResult:
    """Mean loss over token files, in file order, as llm.c measures it: rows of seq_len tokens without context before them.

    seq_len: by default the model's longest context, at most 1024. max_batches: -1 for all whole batches.
    ValueError where the files hold no whole batch, or a token outside of the model's vocabulary.
    """
    T = min(1024, model.config.max_seq_len) if seq_len is None else seq_len
    loader = DataLoader(data, batch_size, T, vocab_size=model.config.vocab_size)
    # Not num_batches(), which counts the shards' tails as well: the first batches would be met twice.
    count = sum((shard.tokens - 1) // (batch_size * T) for shard in loader.shards)
    count = count if max_batches < 0 else min(count, max_batches)
    if count == 0:
        raise ValueError(f"the data hold no whole batch of {batch_size} rows of {T} tokens")
    steps = tqdm(range(count), unit="batch", disable=not progress)
    loss = math.fsum(model.evaluate(*loader.next_batch()) for _ in steps) / count
    return LossResult(loss, count * batch_size * T)


# ---- multiple choice ----


@dataclass(frozen=True)
class ChoiceResult:
    """losses, lengths: of each ending of each example, the sum of its tokens' losses and their number.

    truncated: rows whose context lost tokens on the left, because they did not fit into the model's.
    """

    labels: list[int]
    losses: list[list[float]]
    lengths: list[list[int]]
    truncated: int

    @property
    def choices(self) -> list[int]:
        """The ending of the lowest loss in sum; of equals the first."""
        return [int(np.argmin(sums)) for sums in self.losses]

    @property
    def choices_norm(self) -> list[int]:
        """The ending of the lowest mean loss; of equals the first."""
        return [int(np.argmin(np.divide(sums, n))) for sums, n in zip(self.losses, self.lengths)]

    @property
    def total(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        return sum(choice == label for choice, label in zip(self.choices, self.labels))

    @property
    def correct_norm(self) -> int:
        return sum(choice == label for choice, label in zip(self.choices_norm, self.labels))

    @property
    def acc(self) -> float:
        return self.correct / self.total

    @property
    def acc_norm(self) -> float:
        return self.correct_norm / self.total

    def summary(self) -> dict[str, float]:
        names = ("acc", "acc_norm", "correct", "correct_norm", "total", "truncated")
        return {name: getattr(self, name) for name in names}


def check_examples(examples: Sequence[Example], config: GPT2Config) -> None:
    """ValueError where a model of this config cannot score the examples, or there are none."""
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
    model: GPT2, examples: Sequence[Example], *, batch_size: int = 4, progress: bool = False, what: str = "evaluating"
) -> ChoiceResult:
    """Scores every ending of every example, batch_size rows at a time; the longest first, so that rows of a batch are of a length.

    ValueError where a token is outside of the model's vocabulary, or an ending longer than the model's context.
    """
    check_examples(examples, model.config)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    rows = [(e, n) for e, example in enumerate(examples) for n in range(len(example.endings))]
    longest = model.config.max_seq_len
    lengths = [[len(ending) for ending in example.endings] for example in examples]

    def length(row: tuple[int, int]) -> int:  # of what the model reads: the last token is only predicted
        return min(len(examples[row[0]].context) + lengths[row[0]][row[1]] - 1, longest)

    truncated = sum(len(examples[e].context) + lengths[e][n] - 1 > longest for e, n in rows)
    losses = [[0.0] * len(example.endings) for example in examples]
    rows.sort(key=length, reverse=True)
    with tqdm(total=len(rows), unit="row", desc=what, disable=not progress) as bar:
        for begin in range(0, len(rows), batch_size):
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
    return ChoiceResult([example.label for example in examples], losses, lengths, truncated)


def hellaswag(
    model: GPT2, path: StrPath, *, batch_size: int = 4, limit: int | None = None, progress: bool = False
) -> ChoiceResult:
    """HellaSwag (Zellers et al. 2019) by completion, on llm.c's eval file; limit: only the first examples."""
    return multiple_choice(
        model, read_eval_file(path)[:limit], batch_size=batch_size, progress=progress, what="HellaSwag"
    )


def mmlu(
    model: GPT2, path: StrPath, *, batch_size: int = 4, limit: int | None = None, progress: bool = False
) -> ChoiceResult:
    """MMLU (Hendrycks et al. 2021) by completion, as llm.c's mmlu.py scores it, on an eval file; limit: only the first examples."""
    return multiple_choice(model, read_eval_file(path)[:limit], batch_size=batch_size, progress=progress, what="MMLU")
