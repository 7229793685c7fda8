"""Show how well a model foresees each token of a text, as a coloured page.

    python examples/token_loss.py --model runs/finetuned --data my.txt --output loss.html

The redder a token, the larger its loss. Point at one (or go there with the tab key) to see its loss, its probability, and what the
model held to be more likely. The page is one file without scripts, for light and dark screens. The model is a run directory, a file
of llm.c's, a folder of Hugging Face's, or a name on its Hub. A forward pass per half context: seconds to minutes on a CPU.
"""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import llmc
from llmc.load import load_model, tokenizer_for

PAGE = """<!doctype html>
<html lang="und"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 46em; margin: 2em auto 9em; padding: 0 1em }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere }}
pre span {{ background: rgb(230 60 30 / calc(var(--loss) * 7%)); border-radius: 3px }}
pre span:hover, pre span:focus {{ outline: 2px solid }}
pre i {{ display: none; position: fixed; inset: auto 0 0; padding: .6em 1em; font-style: normal }}
pre i {{ background: Canvas; border-top: 1px solid }}
span:hover > i, span:focus > i {{ display: block }}
pre:hover span:not(:hover):focus > i {{ display: none }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<pre>{text}</pre>
</html>
"""


class Token(NamedTuple):
    """A token, the loss that it cost in nats, and the most likely tokens in its place with their probabilities."""

    id: int
    loss: float
    likely: list[tuple[int, float]]


def token_losses(model: llmc.GPT2, ids: Sequence[int], alternatives: int) -> Iterator[Token]:
    """Yield every token of a text but the first. Windows overlap by half, so that each token has at least half a context before it."""
    T = model.config.max_seq_len
    begin = known = 0
    while known < len(ids) - 1:
        window = ids[begin : begin + T + 1]
        inputs, targets = window[:-1], window[1:]
        logits = model.logits([inputs])[0].astype(np.float64)  # (n, V)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for i in range(known - begin, len(targets)):
            top = np.argsort(-log_p[i])[:alternatives]
            yield Token(targets[i], -log_p[i, targets[i]], [(int(t), float(np.exp(log_p[i, t]))) for t in top])
        known = begin + len(targets)
        begin += max(1, T // 2)


def spans(tokens: Sequence[Token], tokenizer: llmc.Tokenizer) -> Iterator[str]:
    """Yield a piece of HTML for each token, or for several that have one character among them."""
    start = 0
    for end in range(1, len(tokens) + 1):
        group = tokens[start:end]
        text = tokenizer.decode(t.id for t in group)
        if text.endswith("\ufffd") and len(group) < 4 and end < len(tokens):
            continue  # a character that goes on in the next token
        start = end
        loss = sum(t.loss for t in group)
        likely = "  ".join(f"{tokenizer.decode([t])!r} {p:.1%}" for t, p in group[0].likely)
        note = f"{text!r}: loss {loss:.2f}, probability {np.exp(-loss):.2%}; most likely were {likely}"
        shown = html.escape(text.replace("\n", "\u23ce\n"))
        yield f'<span tabindex="0" style="--loss:{min(loss, 12):.2f}">{shown}<i>{html.escape(note)}</i></span>'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run directory, model file, Hugging Face folder or name")
    parser.add_argument("--data", type=Path, required=True, help="the text file")
    parser.add_argument("--output", type=Path, default=Path("loss.html"), help="the page [%(default)s]")
    parser.add_argument("--alternatives", type=int, default=5, help="likely tokens shown for each [%(default)s]")
    args = parser.parse_args(argv)

    model = load_model(args.model)
    tokenizer = tokenizer_for(args.model, model.config.vocab_size)
    text = args.data.read_text(encoding="utf-8")
    tokens = list(token_losses(model, [tokenizer.eot_token, *tokenizer.encode(text)], args.alternatives))
    if not tokens:
        raise SystemExit(f"{args.data} is empty")
    total, size = sum(t.loss for t in tokens), len(text.encode())
    losses = f"{total / len(tokens):.4f} nats per token, {total / size / np.log(2):.4f} bits per byte"
    summary = f"{len(tokens):,} tokens of {args.model}: {losses}"
    page = PAGE.format(
        title=html.escape(args.data.name), summary=html.escape(summary), text="".join(spans(tokens, tokenizer))
    )
    args.output.write_text(page, encoding="utf-8")
    print(f"{args.output}: {summary}")


if __name__ == "__main__":
    main()
