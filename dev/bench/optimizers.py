"""Measures how many tokens AdamW and Muon need to come to the same loss, each with its best learning rate.

    llmc data text input.txt --tokenizer bpe:1024 --output input
    python dev/bench/optimizers.py run input --out curves.jsonl --optimizer adamw --lr 1e-3 2e-3 4e-3 --seeds 1 2 3
    python dev/bench/optimizers.py run input --out curves.jsonl --optimizer muon --lr 2e-3 4e-3 8e-3 --seeds 1 2 3
    python dev/bench/optimizers.py table curves.jsonl
    python dev/bench/optimizers.py cost d12 --T 1024

A curve is the validation loss after each of several numbers of steps, for a model, an optimizer, a learning rate and a seed. It is
not that of one run as it goes, but those of as many finished runs: schedule wsd, of which all have the first part in common, so it
is computed once and each decays from a copy of it. The seed is that of the weights and of the batches, which are drawn at random
places of the text; two optimizers with one seed begin alike and see the same.

"cost" prints what an update costs beside the gradients of its tokens: by count, and in the processor time of one thread.

"run" appends a line of JSON for each curve, and leaves out those that the file has. "table" prints

- the losses: mean and standard deviation over the seeds, and the best learning rate of each optimizer, by the mean last loss;
- at these rates the tokens that AdamW needed over those that Muon needs for the same loss, seed by seed: Muon's loss is interpolated
  linearly in the logarithm of the tokens. "> x": its first point is already below; "< x": its last is not, in one seed at least;
- with more than one size of model: what that ratio, at the last point, becomes for a larger one (--extrapolate), by a straight line
  through the logarithms of ratio and weights of the blocks, with the 95 % interval of the line by Student's t. The interval says what
  scatter does, not whether the line goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from common import append_json, machine, newton_schulz_flops, print_table, timed

import llmc
from llmc.formats.shards import read_shard
from llmc.optim.optimizer import Optimizer
from llmc.optim.schedule import lr_schedule

VALIDATION_TOKENS = 32768  # at most, the first ones of the file
SIZE = ("data", "layers", "channels", "B", "T", "steps", "warmup", "weight_decay", "dtype")
KEY = (*SIZE, "optimizer", "lr", "lr_ratio", "seed")


# ---- run ----


def batch(tokens: NDArray[np.int32], B: int, T: int, seed: int, step: int) -> NDArray[np.int32]:
    """Return the B rows of T + 1 tokens of a step, which follow from seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, tokens.size - T, B)
    return np.stack([tokens[s : s + T + 1] for s in starts])


def validation_loss(model: llmc.GPT2, tokens: NDArray[np.int32], T: int) -> float:
    """Return the mean loss over rows of T tokens, in nats per token."""
    rows = (min(tokens.size, VALIDATION_TOKENS + 1) - 1) // T
    inputs, targets = tokens[: rows * T].reshape(rows, T), tokens[1 : rows * T + 1].reshape(rows, T)
    losses = [model.token_losses(inputs[i : i + 32], targets[i : i + 32]) for i in range(0, rows, 32)]
    return float(np.mean(np.concatenate(losses), dtype=np.float64))


class Snapshot:
    """A copy of a model's weights and its optimizer's state."""

    def __init__(self, model: llmc.GPT2, optimizer: Optimizer) -> None:
        self._model, self._optimizer, self._steps = model, optimizer, optimizer.step_count
        kept = [t for s in optimizer.state().values() for t in (*s.moments, s.master) if t is not None]
        self._copies = [(t, t.to_host().copy()) for t in (*model.parameter_tensors().values(), *kept)]

    def restore(self) -> None:
        """Put everything back."""
        for tensor, copy in self._copies:
            tensor.from_host(copy)
        self._model.weights_changed()
        self._optimizer.step_count = self._steps


def make_optimizer(model: llmc.GPT2, args: argparse.Namespace) -> Optimizer:
    """Return the optimizer that the command line asks for."""
    if args.optimizer == "adamw":
        return llmc.AdamW(model, weight_decay=args.weight_decay)
    return llmc.Muon(model, weight_decay=args.weight_decay, lr_ratio=args.lr_ratio)


def curve(args: argparse.Namespace, config: llmc.GPT2Config, lr: float, seed: int) -> tuple[list[float], float]:
    """Return the validation loss after each number of steps, and how many seconds of the processor all took."""
    train, val = (tokens_of(args.data, part) for part in ("train", "val"))
    model = llmc.GPT2(config, dtype=args.dtype, threads=args.threads, seed=seed)
    optimizer = make_optimizer(model, args)

    def steps(begin: int, end: int, total: int) -> None:
        rate = lr_schedule("wsd", lr, args.warmup, total, 0.0)
        for step in range(begin, end):
            rows = batch(train, args.B, args.T, seed, step)
            model.zero_grad()
            model.forward(rows[:, :-1])
            model.backward(rows[:, 1:])
            optimizer.step(rate(step))

    start, losses, done = time.process_time(), [], 0
    for total in args.steps:
        branch = int(0.8 * total)
        steps(done, branch, max(args.steps) * 10)
        before, done = Snapshot(model, optimizer), branch
        steps(branch, total, total)
        losses.append(validation_loss(model, val, args.T))
        before.restore()
    return losses, time.process_time() - start


def tokens_of(folder: Path, part: str) -> NDArray[np.int32]:
    """Return the tokens of "train" or "val" in a folder that llmc data text wrote."""
    files = sorted(folder.glob(f"*{part}*.bin"))
    if len(files) != 1:
        raise SystemExit(f"{folder}: {len(files)} files *{part}*.bin, expected one, as llmc data text writes")
    return read_shard(files[0]).astype(np.int32)


def run(args: argparse.Namespace) -> None:
    """Compute the curves that the file does not have."""
    vocab = max(int(tokens_of(args.data, part).max()) for part in ("train", "val")) + 1
    heads = max(1, args.channels // 32)
    config = llmc.GPT2Config(args.T, vocab, args.layers, heads, args.channels)
    if args.steps != sorted(set(args.steps)) or int(0.8 * args.steps[0]) < args.warmup:
        raise SystemExit("--steps are to rise, and the first to decay after --warmup")
    for seed in args.seeds:
        for lr in args.lr:
            row: dict[str, Any] = {name: value for name, value in vars(args).items() if name in KEY}
            row |= {"data": args.data.name, "lr": lr, "seed": seed}
            have = {key_of(r) for r in read(args.out)} if args.out.exists() else set()
            if key_of(row) in have:
                continue
            losses, seconds = curve(args, config, lr, seed)
            row |= {"losses": losses, "cpu_seconds": round(seconds, 1), "vocab": vocab}
            row |= {"block_weights": 12 * args.layers * args.channels**2, "machine": machine(args.threads)}
            append_json(args.out, row)
            print(
                f"{args.data.name} {args.optimizer} lr {lr:g} seed {seed}:", *(f"{x:.4f}" for x in losses), flush=True
            )


# ---- table ----


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the curves of a file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def key_of(row: dict[str, Any], names: tuple[str, ...] = KEY) -> tuple[Any, ...]:
    """Return what makes a curve another one than the rest, or a part of it."""
    return tuple(tuple(v) if isinstance(v := row[k], list) else v for k in names)


def tokens_to(loss: float, tokens: list[int], losses: list[float]) -> float:
    """Return after how many tokens a curve comes to a loss; the first number if it begins below, infinity if it does not come there."""
    if losses[0] <= loss:
        return tokens[0]
    for i in range(1, len(losses)):
        if losses[i] <= loss:
            part = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
            return float(tokens[i - 1] * (tokens[i] / tokens[i - 1]) ** part)
    return math.inf


# The 97.5th percentile of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return " ± " and the standard deviation; nothing for a single value."""
    return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""


def extrapolate(sizes: list[int], ratios: list[float], to: float) -> tuple[float, float, float]:
    """Fit log ratio = a + b log size. Return the ratio at a size, and the ends of the 95 % interval of the line there."""
    x, y = np.log(np.array(sizes, float)), np.log(np.array(ratios))
    (b, a), n = np.polyfit(x, y, 1), len(x)
    at, spread = math.log(to), float(np.sum((x - x.mean()) ** 2))
    sigma = math.sqrt(float(np.sum((y - a - b * x) ** 2)) / (n - 2))
    error = STUDENT[min(n - 3, len(STUDENT) - 1)] * sigma * math.sqrt(1 / n + (at - x.mean()) ** 2 / spread)
    middle = float(a + b * at)
    return math.exp(middle), math.exp(middle - error), math.exp(middle + error)


def table(args: argparse.Namespace) -> None:
    """Print what the curves of a file say."""
    rows = [r for path in args.curves for r in read(path)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[key_of(row, SIZE)].append(row)
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for group in groups.values():
        first = group[0]
        tokens = [s * first["B"] * first["T"] for s in first["steps"]]
        print(
            f"\n{first['data']}: {first['layers']} layers of {first['channels']} channels, {first['block_weights'] / 1e6:.2f} M "
            f"weights in them, vocabulary {first['vocab']}, B={first['B']}, T={first['T']}, {first['dtype']}\n"
        )
        best: dict[str, dict[int, list[float]]] = {}
        lines = []
        for optimizer in ("adamw", "muon"):
            by_lr: dict[tuple[float, float], dict[int, list[float]]] = defaultdict(dict)  # of embeddings, of matrices
            for row in group:
                if row["optimizer"] == optimizer:
                    by_lr[row["lr"], row["lr"] * row["lr_ratio"]][row["seed"]] = row["losses"]
            if not by_lr:
                continue
            chosen = min(by_lr, key=lambda lr: statistics.mean(c[-1] for c in by_lr[lr].values()))
            best[optimizer] = by_lr[chosen]
            for lr, curves in sorted(by_lr.items()):
                columns = list(zip(*curves.values(), strict=True))
                cells = [f"{statistics.mean(c):.3f}{spread(c, 3)}" for c in columns]
                rate = f"{lr[0]:g}" if lr[0] == lr[1] else f"{lr[0]:g}, matrices {lr[1]:g}"
                lines.append([optimizer, rate + " *" * (lr == chosen), len(curves), *cells])
        ratios: dict[int, list[float]] = {}
        if len(best) == 2:
            for seed in sorted(best["adamw"].keys() & best["muon"].keys()):
                needs = [tokens_to(loss, tokens, best["muon"][seed]) for loss in best["adamw"][seed]]
                ratios[seed] = [t / n for t, n in zip(tokens, needs, strict=True)]
                points[first["data"]].append((first["block_weights"], ratios[seed][-1]))
        if ratios:
            cells = []
            for t, column in zip(tokens, zip(*ratios.values(), strict=True), strict=True):
                bound = "> " if max(column) >= t / tokens[0] else "< " if min(column) == 0 else ""
                cells.append(f"{bound}{statistics.mean(column):.2f}{spread(column)}")
            lines.append(["tokens, AdamW's to Muon's", "", len(ratios), *cells])
        print_table(["optimizer", "rate", "seeds", *(f"{t / 1e6:.2f} M tokens" for t in tokens)], lines)
    for data, pairs in points.items():
        sizes = [p[0] for p in pairs]
        if len(set(sizes)) > 1 and len(pairs) > 2:
            ratio, low, high = extrapolate(sizes, [p[1] for p in pairs], args.extrapolate)
            print(
                f"\n{data}: at {args.extrapolate / 1e6:.0f} M weights in the blocks {ratio:.2f} times ({low:.2f} to {high:.2f})"
            )


# ---- cost ----


def cost(args: argparse.Namespace) -> None:
    """Print the cost of an update by AdamW and by Muon."""
    config = llmc.GPT2Config.from_descriptor(args.model)
    model = llmc.GPT2(config, dtype=args.dtype, threads=1)
    rows = np.random.default_rng(1).integers(0, config.vocab_size, (args.B, args.T + 1))

    def gradients() -> None:
        model.zero_grad()
        model.forward(rows[:, :-1])
        model.backward(rows[:, 1:])

    per_token = min(timed(gradients, time.process_time) for _ in range(3)) / (args.B * args.T)
    updates = {}
    for kind in (llmc.AdamW, llmc.Muon):
        optimizer = kind(model, weight_decay=0.1)
        optimizer.step(1e-4)
        updates[kind.__name__] = min(timed(partial(optimizer.step, 1e-4), time.process_time) for _ in range(3))
    flops, flops_per_token = newton_schulz_flops(config), config.flops_per_token(args.T)
    print(
        f"{args.model}, T={args.T}, {args.dtype}, one thread: gradients {1e6 * per_token:.1f} us a token, "
        f"{flops_per_token / per_token / 1e9:.0f} GFLOP/s; an update: "
        + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in updates.items())
        + f"; Newton-Schulz {flops / 1e12:.2f} TFLOP"
    )
    lines = []
    for tokens in args.tokens:
        gradients_flops, seconds = tokens * flops_per_token, tokens * per_token
        more = (updates["Muon"] - updates["AdamW"]) / (seconds + updates["AdamW"])
        lines.append([f"{tokens:,}", f"{flops / gradients_flops:.2%}", f"{more:.2%}"])
    print_table(["tokens an update", "Muon's iterations, FLOP", "Muon beside AdamW, time"], lines)


def main() -> int:
    """Read the command line, and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="compute curves")
    runner.add_argument("data", type=Path, help="folder of llmc data text: one file for training, one for validation")
    runner.add_argument("--out", type=Path, required=True, help="file to which a line is appended for each curve")
    runner.add_argument("--optimizer", choices=("adamw", "muon"), required=True)
    runner.add_argument("--lr", type=float, nargs="+", required=True, help="highest learning rates")
    runner.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    runner.add_argument("--layers", type=int, default=6)
    runner.add_argument("--channels", type=int, default=128, help="in heads of 32")
    runner.add_argument("--B", type=int, default=16)
    runner.add_argument("--T", type=int, default=128)
    runner.add_argument("--steps", type=int, nargs="+", default=[64, 128, 192, 256])
    runner.add_argument("--warmup", type=int, default=32, help="steps")
    runner.add_argument("--weight-decay", type=float, default=0.1)
    runner.add_argument("--lr-ratio", type=float, default=1.0, help="Muon's, of matrices to the rest")
    runner.add_argument("--dtype", choices=("f32", "bf16"), default="bf16")
    runner.add_argument("--threads", type=int, default=1)
    printer = commands.add_parser("table", help="print what curves say")
    printer.add_argument("curves", type=Path, nargs="+")
    printer.add_argument(
        "--extrapolate", type=float, default=85e6, help="weights of the blocks (default: those of d12)"
    )
    costs = commands.add_parser("cost", help="print what an update costs")
    costs.add_argument("model", help="descriptor, as d12")
    costs.add_argument("--B", type=int, default=1)
    costs.add_argument("--T", type=int, default=1024)
    costs.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 524288], help="of an update")
    costs.add_argument("--dtype", choices=("f32", "bf16"), default="bf16")
    args = parser.parse_args()
    {"run": run, "table": table, "cost": cost}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
