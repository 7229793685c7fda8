"""Measures options of training that leave GPT-2 as it is: what each changes of the validation loss, beside the noise of seeds.

    python dev/bench/training_options.py train.txt val.txt --seeds 3

A small model is trained with each option in turn, by AdamW and by Muon, on the same tokens, with the same seeds for all. The optimizers
are written here, in PyTorch over llmc's gradients and f32 weights, so that an option is a line or two, whether llmc has it or not.
Columns: the option; the validation loss in nats per token, the mean over the seeds; by how much it is above that without the option, the
mean of the differences between runs of one seed, and the standard error of that mean; and the same of the runs' averages of weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from common import add_common_arguments, machine, print_table, write_json

import llmc
from llmc.data.tokenizer import Tokenizer

BATCH, SEQ = 8, 128
MATRICES = ("qkvw", "attprojw", "fcw", "fcprojw")  # Muon's; with the embeddings, those that decay
DECAYED = ("wte", "wpe", *MATRICES)
EMA_DECAYS = (0.95, 0.98)
MUON_RATIO = 2.5


@dataclass(frozen=True)
class Options:
    """What is trained with; each field's default is what the base has.

    Attributes:
        optimizer: "adamw" or "muon".
        lr: the highest rate; of Muon's matrices 2.5 times that, times 0.2 sqrt(the longer side).
        schedule: after the warm-up "linear" falls to 0, "cosine" to a tenth; "wsd" falls to 0 in the last `decay_frac` of the tokens.
        weight_decay, decay_kind: "constant"; "falling", times the rate's own fall; or "cautious", only where the update goes the same way.
        cautious: updates only where they agree with the gradient's sign (Liang et al. 2024).
        residual: a factor of the first weights of the projections into the residual stream.
        half_batch: the fraction of the tokens that come in batches of half the size.
    """

    optimizer: str = "adamw"
    lr: float = 2e-3
    schedule: str = "linear"
    decay_frac: float = 0.2
    weight_decay: float = 0.0
    decay_kind: str = "constant"
    cautious: bool = False
    residual: float = 1.0
    half_batch: float = 0.0


OPTIONS = {
    "weight decay 1": {"weight_decay": 1.0},
    "weight decay 1, falling with the rate": {"weight_decay": 1.0, "decay_kind": "falling"},
    "weight decay 1, cautious": {"weight_decay": 1.0, "decay_kind": "cautious"},
    "cautious updates": {"cautious": True},
    "residual projections begin at 0": {"residual": 0.0},
    "residual projections begin as wide as the others": {"residual": math.sqrt(8)},
    "half the batch for half the tokens": {"half_batch": 0.5},
    "cosine to a tenth": {"schedule": "cosine"},
    "wsd, the last 20 %": {"schedule": "wsd"},
    "wsd, the last 50 %": {"schedule": "wsd", "decay_frac": 0.5},
    "constant rate": {"schedule": "constant"},
}


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Return the matrices with singular values near 1: five steps of Jordan et al. (2024), in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


def rate(options: Options, done: float, warm: float) -> float:
    """Return the learning rate as a fraction of the highest, when a fraction of the tokens is done; warm: that of the warm-up."""
    if done < warm:
        return done / warm
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "wsd":
        left = (1.0 - done) / options.decay_frac
        return 1.0 if left > 1.0 else 1.0 - math.sqrt(1.0 - left)
    passed = (done - warm) / (1.0 - warm)
    return 1.0 - passed if options.schedule == "linear" else 0.1 + 0.45 * (1.0 + math.cos(math.pi * passed))


class Run:
    """One model and its optimizer: llmc computes gradients, PyTorch the updates."""

    def __init__(self, options: Options, vocab_size: int, seed: int, dtype: str, threads: int) -> None:
        config = llmc.GPT2Config(max_seq_len=SEQ, vocab_size=vocab_size, num_layers=4, num_heads=4, channels=128)
        self.model = llmc.GPT2(config, dtype=dtype, threads=threads, seed=seed, recompute=0)
        self.options, self.updates = options, 0
        self.weights = {n: torch.from_numpy(np.array(v, np.float32)) for n, v in self.model.parameters.items()}
        for name in ("attprojw", "fcprojw"):
            self.weights[name] *= options.residual
        self.first = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.averages = {d: {n: w.clone() for n, w in self.weights.items()} for d in EMA_DECAYS}
        self.put(self.weights)

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Make these the model's weights."""
        for name, w in weights.items():
            self.model.parameters[name] = w.numpy()

    def update(self, fraction: float) -> None:
        """Update the weights by the model's gradients, at a fraction of the highest learning rate."""
        o, lr = self.options, self.options.lr * fraction
        grads = {n: torch.from_numpy(np.array(g, np.float32)) for n, g in self.model.gradients.items()}
        clip = min(1.0, 1.0 / math.sqrt(sum(float(g.square().sum()) for g in grads.values())))
        self.updates += 1
        for name, w in self.weights.items():
            g = grads[name] * clip
            if o.optimizer == "muon" and name in MATRICES:
                m = self.first[name].lerp_(g, 0.05)
                C = w.shape[-1]
                matrices = g.lerp(m, 0.95).reshape(-1, *((C, C) if name == "qkvw" else w.shape[1:]))
                step = MUON_RATIO * 0.2 * math.sqrt(max(matrices.shape[1:])) * newton_schulz(matrices).reshape(w.shape)
            else:
                m, v = self.first[name].lerp_(g, 0.1), self.second[name].lerp_(g * g, 0.05)
                step = m / (1 - 0.9**self.updates) / ((v / (1 - 0.95**self.updates)).sqrt() + 1e-8)
            if o.cautious:
                agrees = (step * g > 0).float()
                step = step * agrees / (agrees.mean() + 1e-3)
            if o.weight_decay and name in DECAYED:
                decay = w * (step * w > 0) if o.decay_kind == "cautious" else w
                step = step + o.weight_decay * (fraction if o.decay_kind == "falling" else 1.0) * decay
            w.sub_(step, alpha=lr)
        self.put(self.weights)
        for decay, average in self.averages.items():
            d = min(decay, (1 + self.updates) / (10 + self.updates))
            for name, w in self.weights.items():
                average[name].lerp_(w, 1 - d)


def train(
    options: Options,
    tokens: NDArray[np.int32],
    held_out: NDArray[np.int32],
    vocab_size: int,
    seed: int,
    updates: int,
    dtype: str,
    threads: int,
) -> dict[str, float]:
    """Train one run; return the validation losses of its weights and of their averages, in nats per token."""
    run, rng = Run(options, vocab_size, seed, dtype, threads), np.random.default_rng(seed)
    total, done, rows = updates * BATCH, 0, np.empty(0, np.int64)
    while done < total:
        size = BATCH // 2 if done < options.half_batch * total else BATCH
        while rows.size < size:  # the next epoch, cut elsewhere
            begin = rng.integers(SEQ)
            rows = np.concatenate([rows, begin + SEQ * rng.permutation((tokens.size - 1 - begin) // SEQ)])
        batch, rows = np.stack([tokens[r : r + SEQ + 1] for r in rows[:size]]), rows[size:]
        run.model.zero_grad()
        run.model.forward(batch[:, :-1])
        run.model.backward(batch[:, 1:])
        done += size
        run.update(rate(options, done / (total + BATCH), warm=0.08))

    def loss(weights: dict[str, torch.Tensor]) -> float:
        run.put(weights)
        n = (held_out.size - 1) // SEQ
        inputs, targets = (held_out[i : i + n * SEQ].reshape(n, SEQ) for i in (0, 1))
        parts = [
            (run.model.evaluate(inputs[i : i + 16], targets[i : i + 16]), len(inputs[i : i + 16]))
            for i in range(0, n, 16)
        ]
        return sum(value * count for value, count in parts) / n

    return {"weights": loss(run.weights), **{f"average {d}": loss(a) for d, a in run.averages.items()}}


def main() -> int:
    """Train all, print the table of each optimizer, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--tokenizer", default="bpe:1024", help="as --tokenizer of llmc-train (default bpe:1024)")
    parser.add_argument("--updates", type=int, default=200, help=f"of {BATCH} rows of {SEQ} tokens (default 200)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each option (default 3)")
    parser.add_argument(
        "--lr", type=float, nargs=2, default=(2e-3, 3e-3), help="of AdamW and Muon (default 2e-3, 3e-3)"
    )
    parser.add_argument("--only", nargs="*", help="parts of the names of options; default: all")
    parser.add_argument("--dtype", default="f32", help="f32 or bf16, of llmc's part (default f32)")
    add_common_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())

    text, held_out = args.text.read_text(encoding="utf-8"), args.held_out.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_spec(args.tokenizer, text=text)
    tokens, held = (np.array(tokenizer.encode(t), np.int32) for t in (text, held_out))
    chosen = {k: v for k, v in OPTIONS.items() if not args.only or any(part in k for part in args.only)}
    results = {}
    for optimizer, lr in zip(("adamw", "muon"), args.lr, strict=True):
        base = Options(optimizer=optimizer, lr=lr)
        losses = {
            name: [
                train(
                    replace(base, **changes),
                    tokens,
                    held,
                    tokenizer.vocab_size,
                    seed,
                    args.updates,
                    args.dtype,
                    args.threads,
                )
                for seed in range(1, args.seeds + 1)
            ]
            for name, changes in {"nothing": {}, **chosen}.items()
        }
        before = [run["weights"] for run in losses["nothing"]]
        rows = []
        for name, runs in losses.items():
            row = [name, f"{statistics.mean(run['weights'] for run in runs):.4f}"]
            for kind in runs[0]:
                more = [run[kind] - loss for run, loss in zip(runs, before, strict=True)]
                error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
                row.append(f"{statistics.mean(more):+.4f} ±{error:.4f}")
            rows.append(row)
        print_table([f"{optimizer}, lr {lr:g}", "loss", "more", *(f"average {d}" for d in EMA_DECAYS)], rows)
        results[optimizer] = losses
    write_json(args.json, {"machine": machine(args.threads), "updates": args.updates, "losses": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
