"""A training loop of one's own: model, loader, optimizer and schedule as objects, and every step of the loop in sight.

    python examples/training_loop.py --data my.txt

What differs from `llmc-train` is meant to be changed: the learning rate falls along a cosine and starts again, each time for twice as
many steps (SGDR, Loshchilov & Hutter 2017); each update adds up micro-batches; and the loop looks at the gradients as NumPy views.
The defaults (0.9 million parameters, 280 updates of 4,096 tokens) take about a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

import llmc
from llmc.datasets.text import prepare


def warm_restarts(step: int, highest: float, first: int) -> float:
    """Return the learning rate of a step: cosines of first, 2 first, 4 first, ... steps, each from the highest rate to zero."""
    length = first
    while step >= length:
        step, length = step - length, 2 * length
    return 0.5 * highest * (1 + math.cos(math.pi * step / length))


def evaluate(model: llmc.GPT2, files: Sequence[Path], batch_size: int, seq_len: int, batches: int) -> float:
    """Return the mean loss over the same first batches each time."""
    loader = llmc.DataLoader(files, batch_size, seq_len)
    count = max(1, min(batches, loader.num_batches()))
    return sum(model.evaluate(inputs, targets) for inputs, targets in islice(loader, count)) / count


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text file, or a folder of them")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/loop"), help="folder of tokens and model [%(default)s]"
    )
    parser.add_argument("--tokenizer", default="bpe:1024", help="gpt2, bytes, bpe:N, or a file [%(default)s]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a micro-batch [%(default)s]")
    parser.add_argument("--micro-batches", type=int, default=2, help="of an update [%(default)s]")
    parser.add_argument("--max-steps", type=int, default=280)
    parser.add_argument("--first-cycle", type=int, default=40, help="updates until the first restart [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest [%(default)s]")
    args = parser.parse_args(argv)
    B, T = args.batch_size, args.seq_len

    files = prepare([args.data], args.output, tokenizer=args.tokenizer, overwrite=True)
    tokenizer = llmc.Tokenizer.beside(args.output)
    assert tokenizer is not None  # prepare() has written it
    config = llmc.GPT2Config(T, tokenizer.vocab_size, args.layers, max(1, args.channels // 64), args.channels)
    model = llmc.GPT2(config)
    optimizer = llmc.Muon(model, lr_ratio=2.5)  # or llmc.AdamW(model), with a third of the learning rate
    loader = llmc.DataLoader(files.train, B, T, shuffle=True)
    print(model, optimizer, loader, sep="\n")

    for step in range(args.max_steps):
        model.zero_grad()
        for inputs, targets in islice(loader, args.micro_batches):  # the loader has no end
            model.forward(inputs)
            model.backward(targets, scale=1 / args.micro_batches)  # losses and gradients add up to their mean
        norm = optimizer.measure()  # before clipping; step() would do both halves at once
        lr = warm_restarts(step, args.learning_rate, args.first_cycle)
        optimizer.apply(lr)
        if (step + 1) % 10 == 0 or step + 1 == args.max_steps:
            squares = {name: float(np.vdot(g, g)) for name, g in model.gradients.items()}
            largest = max(squares, key=squares.__getitem__)
            print(
                f"step {step + 1}: loss {model.mean_loss:.4f}, lr {lr:.2e}, norm {norm:.3f}, "
                f"of whose square {squares[largest] / sum(squares.values()):.0%} is {largest}'s"
            )
        if (step + 1) % 40 == 0 or step + 1 == args.max_steps:
            print(f"validation loss {evaluate(model, files.val, B, T, 20):.4f}")

    model.save(args.output / "model.bin")  # the tokenizer is beside it
    prompt = [tokenizer.eot_token]
    print(tokenizer.decode(model.generate(prompt, 100, temperature=0.8)))
    print(f"go on by: llmc generate {args.output / 'model.bin'}")


if __name__ == "__main__":
    main()
