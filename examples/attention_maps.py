"""Draw where each head of a layer looks, from the activations of a forward pass.

    python examples/attention_maps.py --model runs/finetuned --text "The cat sat on the mat because it was tired." --layer 5

The model is a run directory, a file of llm.c's, a folder of Hugging Face's, or a name on its Hub. It takes seconds. After
`model.forward(tokens)` all that backward needs is there to be read, on the CPU as NumPy views without a copy: `model.activations`.
The attention itself is not, as no T x T matrix is ever kept; but the log-sum-exp of each row of scores is, so that
softmax(q k^T / sqrt(HS)) = exp(q k^T / sqrt(HS) - lse) for the queries and keys that are kept too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import llmc
from llmc.load import load_model, tokenizer_for


def attention(model: llmc.GPT2, layer: int) -> NDArray[np.float32]:
    """Return the attention of the last forward() of one row: (NH, T, T), each row a distribution over earlier tokens."""
    qkv = model.activations["qkv"][layer, 0].astype(np.float32)  # (T, 3C): all queries, then all keys, then all values
    lse = model.activations["lse"][layer, 0]  # (NH, T)
    T, NH, HS = len(qkv), model.config.num_heads, model.config.head_size
    q, k, _ = qkv.reshape(T, 3, NH, HS).transpose(1, 2, 0, 3)  # (NH, T, HS) each
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(HS)
    return np.tril(np.exp(np.minimum(scores - lse[:, :, None], 0)))  # what is above the diagonal has no part in lse


def residual_sizes(model: llmc.GPT2) -> list[float]:
    """Return the root mean square of the residual stream after the embeddings and after each half of each block."""
    a = model.activations
    halves = [x for l in range(model.config.num_layers) for x in (a["residual2"][l], a["residual3"][l])]
    return [float(np.sqrt(np.mean(x.astype(np.float32) ** 2))) for x in (a["encoded"], *halves)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run directory, model file, Hugging Face folder or name")
    parser.add_argument("--text", required=True)
    parser.add_argument("--layer", type=int, default=0, help="from 0 on; -1 is the last [%(default)s]")
    parser.add_argument("--output", default="attention.png", help="the picture [%(default)s]")
    args = parser.parse_args(argv)

    model = load_model(args.model)
    tokenizer = tokenizer_for(args.model, model.config.vocab_size)
    layers = model.config.num_layers
    if not -layers <= args.layer < layers:
        raise SystemExit(f"--layer is {args.layer}, but the model has {layers} layers")
    tokens = tokenizer.encode(args.text)[: model.config.max_seq_len]
    if not tokens:
        raise SystemExit("--text is empty")
    model.forward([tokens])
    maps = attention(model, args.layer)
    print("rms of the residual stream:", " ".join(f"{size:.3g}" for size in residual_sizes(model)))

    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    size = 1.5 + 0.12 * min(len(tokens), 40)
    past = np.tri(len(tokens), dtype=bool)
    fig = Figure(figsize=(columns * size, rows * size), layout="constrained")
    for head, panel in enumerate(fig.subplots(rows, columns, squeeze=False).flat):
        if head >= len(maps):
            panel.set_axis_off()
            continue
        # The first token takes what a head has no better use for. Its column would leave the rest dark.
        panel.imshow(
            np.where(past, maps[head], np.nan),
            cmap="magma",
            vmin=0,
            vmax=max(0.1, np.max(maps[head][:, 1:], initial=0)),
        )
        panel.set_title(
            f"head {head}: {maps[head][1:, 0].mean():.0%} on the first" if len(tokens) > 1 else f"head {head}"
        )
        panel.title.set_fontsize("small")
        labels = (
            [tokenizer.decode([t]).replace("\n", "\\n").replace("$", r"\$") for t in tokens]
            if len(tokens) <= 40
            else []
        )
        panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        panel.set_yticks(range(len(labels)), labels, fontsize=6)
    fig.suptitle(f"attention of layer {args.layer % layers}: rows look at columns", fontsize="medium")
    fig.savefig(args.output, dpi=150)
    print(f"{args.output} has the attention of {len(maps)} heads over {len(tokens)} tokens")


if __name__ == "__main__":
    main()
