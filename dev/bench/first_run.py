"""Measures what the settings of the first run are worth: variations of `llmc-train` without arguments, all for the same FLOP.

    python dev/bench/first_run.py --json first_run.jsonl
    python dev/bench/first_run.py --try "wider: channels=192 heads=3" --only default

A variation is the small model's settings with some of them changed. Its number of steps follows from the budget: the seconds of a
reference machine that computes --gflops. Everything counts: forward and backward, Newton-Schulz, validations and samples. A seed is
that of the weights and of the order of data.

All are validated on the same text, whatever tokens it becomes: the last tenth of the language reference. Columns: the variation; its
steps, millions of parameters and GFLOP of an update, and how much of these Newton-Schulz takes; the bits per byte of the hold-out at
the end, mean and standard deviation over the seeds; and by how much they are above those of the first variation.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import add_common_arguments, append_json, machine, machine_line, newton_schulz_flops, print_table

import llmc
from llmc.data.holdout import hold_out
from llmc.data.python_texts import language_reference
from llmc.models.config import GPT2Config
from llmc.training.settings import SETTINGS, defaults
from llmc.training.setup import SMALL_MODEL
from llmc.training.sources import DEFAULT_TOKENIZER

# Of two cores with AVX2: with it two minutes were 400 updates of 44 GFLOP, the first run before Muon.
REFERENCE_GFLOPS = 146
BYTES_PER_TOKEN = 3  # of the hold-out, roughly: to count its validations

# Each changes one thing; "before" is the first run as it was, on the new text.
VARIATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw": {"optimizer": "adamw"},
    "normal positions": {"position_init": "normal"},
    "neighbouring rows": {"rows_per_sample": 0},
    "cosine to a tenth": {"schedule": "cosine", "final_lr_frac": 0.1},
    "vocabulary 1024": {"tokenizer": "bpe:1024"},
    "vocabulary 4096": {"tokenizer": "bpe:4096"},
    "rows of 256": {"seq_len": 256, "batch_size": 8},
    "batch of 8": {"batch_size": 8},
    "6 layers": {"layers": 6},
    "192 channels": {"channels": 192, "heads": 3},
    "matrices twice as fast": {"muon_lr_ratio": 5.0},
    "all half as fast": {"learning_rate": 1.5e-3},
    "before": {
        "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "final_lr_frac": 0.1, "warmup_steps": 100,
        "channels": 256, "heads": 4, "batch_size": 16, "tokenizer": "bpe:1024", "rows_per_sample": 0, "position_init": "normal",
    },
}  # fmt: skip


class Plan:
    """What a variation costs, and how many steps a budget of FLOP allows it.

    Args:
        changes: its settings, where they are not the small model's.
        budget: FLOP of the whole run.
    """

    def __init__(self, changes: dict[str, Any], budget: float) -> None:
        values = {**defaults(None), **changes}
        T = values["seq_len"]
        tokenizer = values.get("tokenizer") or DEFAULT_TOKENIZER
        vocab_size = 257 if tokenizer == "bytes" else int(tokenizer.removeprefix("bpe:"))
        given = {"num_layers": "layers", "num_heads": "heads", "channels": "channels"}
        shape = {field: values.get(name) or SMALL_MODEL[field] for field, name in given.items()}
        self.config = GPT2Config(max_seq_len=T, vocab_size=vocab_size, **shape)
        tokens = values["total_batch_size"]
        tokens = values["batch_size"] * T if tokens == -1 else tokens
        self.orthogonal = newton_schulz_flops(self.config) if values["optimizer"] == "muon" else 0
        self.update = tokens * self.config.flops_per_token(T) + self.orthogonal
        _, held_out = hold_out(language_reference(), "end")
        forward = self.config.flops_per_token(T) / 3
        validation = sum(len(text.encode()) for text in held_out) / BYTES_PER_TOKEN * forward
        # A sample's tokens are few beside those of a validation: 32, and T at the end.
        between = validation / values["val_every"] + (32 * forward) / values["sample_every"]
        self.steps = int((budget - 2 * validation - T * forward) / (self.update + between))


def run(changes: dict[str, Any], steps: int, seed: int, threads: int) -> list[float]:
    """Train once and return the bits per byte of all validations."""
    settings = {"holdout": "end", **changes, "seed": seed, "data_seed": seed, "threads": threads}
    quiet = {"output_dir": None, "checkpoint_every": -1, "progress": "none", "plot": False, "sample_every": 0}
    result = llmc.train(max_steps=steps, val_steps=-1, **{**settings, **quiet})
    return result.history["val_bits_per_byte"]


def parse_variation(text: str) -> tuple[str, dict[str, Any]]:
    """Read "name: setting=value setting=value"."""
    name, _, rest = text.partition(":")
    changes = {}
    for pair in rest.split():
        key, _, value = pair.partition("=")
        if key not in SETTINGS:
            raise argparse.ArgumentTypeError(f"unknown setting '{key}'")
        try:
            changes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key] = value
    return name.strip(), changes


def main() -> None:
    """Train all variations with all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="budget on the reference machine (default 120)")
    parser.add_argument(
        "--gflops",
        type=float,
        default=REFERENCE_GFLOPS,
        help=f"what that computes in a second (default {REFERENCE_GFLOPS})",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a run with each (default 1 2 3)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variations to run (default: all)")
    parser.add_argument(
        "--try", type=parse_variation, action="append", default=[], dest="more", metavar="'NAME: SETTING=VALUE ...'"
    )
    parser.add_argument("--dtype", default="f32", choices=("f32", "bf16"))
    add_common_arguments(parser)
    args = parser.parse_args()
    variations = {**VARIATIONS, **dict(args.more)}
    chosen = [*(args.only or VARIATIONS), *(name for name, _ in args.more if name not in (args.only or ()))]
    if unknown := [name for name in chosen if name not in variations]:
        parser.error(f"no variation is named {unknown[0]!r}: there are {', '.join(variations)}")
    print(machine_line(machine(args.threads)), flush=True)
    results: dict[str, list[float]] = {}
    rows = []
    for name in chosen:
        plan = Plan(variations[name], args.seconds * args.gflops * 1e9)
        results[name] = []
        for seed in args.seeds:
            begin = time.perf_counter()
            curve = run({"dtype": args.dtype, **variations[name]}, plan.steps, seed, args.threads)
            results[name].append(curve[-1])
            seconds = time.perf_counter() - begin
            row = {
                "name": name,
                "settings": variations[name],
                "seed": seed,
                "steps": plan.steps,
                "bits_per_byte": curve,
            }
            if args.json is not None:
                append_json(args.json, {**row, "seconds": round(seconds, 1)})
            print(
                f"{name}, seed {seed}: {curve[-1]:.4f} bits per byte after {seconds:.0f} s", file=sys.stderr, flush=True
            )
        mean, first = statistics.fmean(results[name]), statistics.fmean(results[chosen[0]])
        deviation = f" ± {statistics.stdev(results[name]):.3f}" if len(args.seeds) > 1 else ""
        share = plan.orthogonal / plan.update
        facts = [plan.steps, f"{plan.config.num_parameters / 1e6:.2f}", f"{plan.update / 1e9:.1f}", f"{share:.0%}"]
        rows.append([name, *facts, f"{mean:.3f}{deviation}", f"{mean - first:+.3f}"])
    print_table(["variation", "steps", "M", "GFLOP", "NS", "bits per byte", "more"], rows)


if __name__ == "__main__":
    main()
