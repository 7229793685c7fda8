"""llmc in EleutherAI's lm-evaluation-harness.

    python -m llmc.lm_eval --model llmc --model_args pretrained=gpt2_124M.bin --tasks hellaswag,arc_easy

is `lm_eval` with one more model, and takes all of its options. (The harness has no other way for a package to add a model to its
command.) From Python, importing this module is enough: then lm_eval.simple_evaluate(model="llmc", model_args=...) knows it.

model_args:
    pretrained: a model file of llm.c's, a run directory, a Hugging Face folder or name.
    tokenizer: gpt2, bytes or a tokenizer file; by default the one beside the model, or GPT-2's if there is none and the vocabulary has
        GPT-2's size.
    dtype: f32 or bf16; by default the model's.
    threads: CPU threads; by default as many as the process may use.
    max_length: tokens of context to use; by default the model's.
    max_gen_toks: tokens to generate if a task does not say how many, by default 256. Of a prompt the last max_length - max_gen_toks
        tokens are used.

The harness's --device is cuda:0 unless another is given, which means the CPU to llmc if there is no GPU, or the build is for CPUs alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmc import _llmc
from llmc.cli import show_any_text
from llmc.load import load_model, tokenizer_for

try:
    import lm_eval.models  # noqa: F401  (registers the harness's own models; the harness does so itself only while none is registered)
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as e:
    message = f"the lm-evaluation-harness is not installed: pip install lm-eval ({e})"
    if __name__ == "__main__":
        sys.exit(f"python -m llmc.lm_eval: error: {message}")
    raise ImportError(message) from e

Scored = tuple[float, bool]  # log-probability, whether each token is the most likely one
Request = tuple[Any, list[int], list[int]]  # key in the harness's cache, context, continuation


@register_model("llmc")
class LlmcLM(TemplateLM):  # type: ignore[misc]
    """A model of llmc's behind the harness's interface. For the arguments see the module."""

    def __init__(
        self,
        pretrained: str | os.PathLike[str],
        tokenizer: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 4,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        threads: int = 0,
    ) -> None:
        super().__init__()
        self.model = load_model(pretrained, dtype=dtype, backend=_open_device(device, int(threads)))
        self.llmc_tokenizer = tokenizer_for(pretrained, self.model.config.vocab_size, tokenizer)
        # "auto" asks the harness's models to search for the largest batch that fits; a CPU would gain nothing by it.
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = min(int(max_length or self.model.config.max_seq_len), self.model.config.max_seq_len)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self.llmc_tokenizer.eot_token

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's cache."""
        return f"llmc-{self.llmc_tokenizer.name}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text, without special tokens."""
        return self.llmc_tokenizer.encode(string)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """Decode token ids."""
        return self.llmc_tokenizer.decode(tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any) -> list[Scored]:
        """Score continuations.

        Returns:
            For each request the sum of the log-probabilities of the continuation's tokens, and whether each of them is the most
            likely one.

        Raises:
            ValueError: if a continuation is empty or longer than the context.
        """
        out: list[Scored] = [(0.0, False)] * len(requests)
        rows = []
        for i, (_key, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length}")
            rows.append((i, (context + continuation)[-(self.max_length + 1) :], len(continuation)))
        rows.sort(key=lambda row: -len(row[1]))  # rows of a batch have about the same length
        with tqdm(total=len(rows), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for begin in range(0, len(rows), self.batch_size):
                batch = rows[begin : begin + self.batch_size]
                inputs = np.zeros((len(batch), len(batch[0][1]) - 1), np.int32)
                for j, (_i, tokens, _n) in enumerate(batch):
                    inputs[j, : len(tokens) - 1] = tokens[:-1]
                logits = self.model.logits(inputs)
                for j, (i, tokens, n) in enumerate(batch):
                    out[i] = _score(logits[j, len(tokens) - 1 - n : len(tokens) - 1], tokens[-n:])
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
                bar.update(len(batch))
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each request's text, which is read in windows of the context's length."""
        out = []
        for (text,) in (request.args for request in tqdm(requests, disable=disable_tqdm)):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces = [(None, *utils.make_disjoint_window(window)) for window in windows]
            out.append(sum(score for score, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), out[-1])
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each request's prompt up to one of its stop strings.

        Raises:
            ValueError: if so many tokens are to be generated that no room is left for a prompt.
        """
        out = []
        for context, options in (request.args for request in tqdm(requests, disable=disable_tqdm)):
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            count = int(options.get("max_gen_toks", self.max_gen_toks))
            if count >= self.max_length:  # as the harness's own models do
                raise ValueError(
                    f"{count} tokens are to be generated, which leaves no room for a prompt in a context of {self.max_length}: give a "
                    "smaller max_gen_toks, in the task or in --model_args"
                )
            prompt = (self.tok_encode(context) or [self.eot_token_id])[-(self.max_length - count) :]
            sampled = bool(options.get("do_sample", False))
            tokens = self.model.stream(
                prompt,
                count,
                temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                top_k=int(options.get("top_k", 0)),
                top_p=float(options.get("top_p", 1.0)),
                stop_token=self.eot_token_id,
            )
            text = ""
            for piece in self.llmc_tokenizer.stream(tokens):
                text += piece
                if any(stop in text for stop in until if stop):
                    break
            for stop in until:
                text = text.split(stop)[0] if stop else text
            out.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return out


def _open_device(device: str | None, threads: int) -> _llmc.Backend:
    """Open the device. The harness says cuda:0 if its user says nothing, so that one means a GPU if there is one."""
    if device == "cuda:0":
        try:
            return _llmc.Backend(device, threads)
        except _llmc.Error as e:
            print(
                f"llmc: the CPU computes, as there is no GPU for --device cuda:0, the harness's default ({e})",
                file=sys.stderr,
            )
            device = None
    return _llmc.Backend(device or "cpu", threads)


def _score(logits: NDArray[np.float32], targets: Sequence[int]) -> Scored:
    """Score n tokens, the targets, under logits (n, V)."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    chosen = wide[np.arange(len(targets)), targets]
    normalizer = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float((chosen - normalizer).sum()), bool((wide.argmax(axis=1) == targets).all())


def main() -> None:
    """Run the harness's own command, which knows the model from now on."""
    from lm_eval.__main__ import cli_evaluate

    show_any_text()  # its tables have arrows
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
