"""Measures whether bf16 trains as well as f32: validation losses of both after the same steps from the same weights.

    python dev/bench/bf16_loss.py tinyshakespeare.txt --steps 300

It trains a small model on the bytes of a text, the last tenth of which is for validation. Columns: the step, the validation loss in
f32 and in bf16 (nats per byte), and by how much bf16's is larger. The exit code is 1 if the last losses differ by more than --within.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from common import add_common_arguments, machine, print_table, write_json

import llmc
from llmc.optim.adamw import AdamW


def batches(tokens: NDArray[np.int32], B: int, T: int, count: int, seed: int) -> list[NDArray[np.int32]]:
    """Draw `count` batches of B rows of T + 1 tokens: the inputs, and their targets one token further."""
    starts = np.random.default_rng(seed).integers(0, tokens.size - T, (count, B))
    return [np.stack([tokens[s : s + T + 1] for s in row]) for row in starts]


def main() -> int:
    """Train both, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate after 30 steps of warm-up (default 1e-3)")
    parser.add_argument("--every", type=int, default=100, help="steps between validations")
    parser.add_argument("--within", type=float, default=0.005, help="relative difference allowed (default 0.005)")
    add_common_arguments(parser)
    args = parser.parse_args()

    text = np.frombuffer(args.text.read_bytes(), np.uint8).astype(np.int32)
    split = text.size * 9 // 10
    training = batches(text[:split], args.batch, args.seq, args.steps, seed=1)
    validation = batches(text[split:], args.batch, args.seq, 40, seed=2)
    config = llmc.GPT2Config(
        max_seq_len=args.seq, vocab_size=256, num_layers=args.layers, num_heads=args.heads, channels=args.channels
    )
    losses: dict[str, list[float]] = {}
    for dtype in ("f32", "bf16"):
        model = llmc.GPT2(config, dtype=dtype, threads=args.threads, seed=42)
        optimizer = AdamW(model, weight_decay=0.1)
        losses[dtype] = []
        for step, batch in enumerate(training, 1):
            model.zero_grad()
            model.forward(batch[:, :-1])
            model.backward(batch[:, 1:])
            optimizer.step(args.lr * min(1.0, step / 30))
            if step % args.every == 0 or step == args.steps:
                losses[dtype].append(float(np.mean([model.evaluate(b[:, :-1], b[:, 1:]) for b in validation])))
    steps = sorted({*range(args.every, args.steps + 1, args.every), args.steps})
    differences = [b / a - 1 for a, b in zip(losses["f32"], losses["bf16"], strict=True)]
    print_table(
        ["step", "f32", "bf16", "difference"],
        [
            [s, f"{a:.4f}", f"{b:.4f}", f"{d:+.3%}"]
            for s, a, b, d in zip(steps, *losses.values(), differences, strict=True)
        ],
    )
    write_json(args.json, {"machine": machine(args.threads), "steps": steps, "losses": losses})
    return int(not abs(differences[-1]) <= args.within)


if __name__ == "__main__":
    sys.exit(main())
