"""Evaluate a model: validation loss, perplexity and bits per byte, HellaSwag, MMLU.

CHECKPOINT is a llm.c model file, a run directory, or a Hugging Face folder. Give what to evaluate on: --data, --hellaswag, --mmlu. For
a run, or a model file in its directory, its own validation data are taken if nothing is given. Bits per byte, in which models of
different vocabularies compare, need the tokenizer of --data: it is looked for beside the model, and beside the first file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc import _llmc
from llmc.arguments import threads, whole
from llmc.data.files import find_shards
from llmc.data.tokenizer import Tokenizer
from llmc.load import find_tokenizer, load_model, tokenizer_for
from llmc.system.fs import StrPath, write_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="model file (.bin), run directory, or Hugging Face folder"
    )
    parser.add_argument(
        "-j",
        "--data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="token files to measure the loss on [the run's own for validation]",
    )
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="gpt2, bytes or a tokenizer file, for bits per byte [that beside the model]"
    )
    parser.add_argument("--hellaswag", metavar="FILE", help="llm.c's hellaswag_val.bin")
    parser.add_argument("--mmlu", metavar="FILE", help="MMLU as an eval file")
    parser.add_argument("-b", "--batch-size", type=whole(1), default=4, help="rows at a time [4]")
    parser.add_argument(
        "-t",
        "--seq-len",
        type=whole(1),
        help="row length for --data [the run's, else the model's longest, at most 1024]",
    )
    parser.add_argument("-m", "--max-batches", type=whole(-1), default=-1, help="batches of --data; -1: all [-1]")
    parser.add_argument("--limit", type=whole(1), help="only the first N examples of HellaSwag and MMLU")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--dtype", help="f32 or bf16 [the model's]")
    parser.add_argument("--threads", type=threads, default=0, help="CPU threads; 0: as many as the process may use [0]")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results; - for the standard output, and nothing else there"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from llmc import evals
    from llmc.formats.metrics import nan_to_null
    from llmc.training.settings import load_toml
    from llmc.training.sources import validation_files

    directory = _run_of(Path(args.checkpoint))
    data, seq_len = args.data, args.seq_len
    if data is args.hellaswag is args.mmlu is None:
        if directory is None:
            raise ValueError("nothing to evaluate on: give --data, --hellaswag or --mmlu")
        data = validation_files(directory)
    if directory is not None and seq_len is None:
        seq_len = load_toml(directory / "config.toml").get("seq_len")
    model = load_model(args.checkpoint, dtype=args.dtype, device=args.device, threads=args.threads)
    tokenizer = _find_tokenizer(args.checkpoint, args.tokenizer, data, model.config.vocab_size) if data else None
    progress = sys.stderr.isatty()
    results: dict[str, Any] = {"checkpoint": args.checkpoint, "dtype": model.dtype, "device": model.device}
    lines = []
    if data:
        loss = evals.validation_loss(
            model,
            data,
            batch_size=args.batch_size,
            seq_len=seq_len,
            max_batches=args.max_batches,
            tokenizer=tokenizer,
            progress=progress,
        )
        measured = {"loss": loss.loss, "perplexity": loss.perplexity, "tokens": loss.tokens}
        line = f"validation: loss {loss.loss:.6f}, perplexity {loss.perplexity:.4f}"
        if loss.bytes and loss.bits_per_byte is not None:
            measured |= {"bits_per_byte": loss.bits_per_byte, "bytes": loss.bytes}
            line += f", {loss.bits_per_byte:.6f} bits per byte"
        results["validation"] = nan_to_null(measured)
        named = ", ".join(map(str, data[:3])) + (f" and {len(data) - 3} more" if len(data) > 3 else "")
        lines.append(f"{line}, {loss.tokens:,} tokens of {named}")
    for name, path in (("hellaswag", args.hellaswag), ("mmlu", args.mmlu)):
        if path is not None:
            choice = getattr(evals, name)(model, path, batch_size=args.batch_size, limit=args.limit, progress=progress)
            results[name] = choice.summary()
            lines.append(
                f"{name}: acc {choice.acc:.4f}, acc_norm {choice.acc_norm:.4f}, {choice.total:,} examples"
                + (f", {choice.truncated} of their rows cut to the model's context" if choice.truncated else "")
            )
    text = json.dumps(results, indent=2, allow_nan=False)
    print(text if args.json == "-" else "\n".join(lines))
    if args.json not in (None, "-"):  # after the lines, which are there if the file cannot be written
        write_atomically(args.json, [text.encode(), b"\n"])
    return 0


def _find_tokenizer(checkpoint: str, spec: str | None, data: Sequence[StrPath], vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer that a model and its data have. If there is none that can be used, there are no bits per byte."""
    if spec is not None:
        return tokenizer_for(checkpoint, vocab_size, spec)
    folder = find_shards(data, validation=True)[0].parent
    try:
        tokenizer = find_tokenizer(checkpoint) or Tokenizer.beside(folder)
        problem = ""
    except (_llmc.Error, ValueError, ImportError, ConnectionError) as e:
        tokenizer, problem = None, str(e)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        problem = f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model {vocab_size}"
        tokenizer = None
    if problem:
        print(f"note: no bits per byte: {problem}", file=sys.stderr)
    return tokenizer


def _run_of(checkpoint: Path) -> Path | None:
    """Return the run directory that a checkpoint is, or lies in; None if it is none."""
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    model = checkpoint.is_dir() or checkpoint.name == "best.bin" or checkpoint.name.startswith(("model_", "average_"))
    return directory if model and (directory / "config.toml").is_file() else None
