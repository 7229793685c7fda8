"""Turn a model into a folder that Hugging Face's transformers loads.

CHECKPOINT is a llm.c model file or a run directory. The folder gets safetensors, config.json and the tokenizer.
"""

from __future__ import annotations

import argparse

from llmc.arguments import above_zero


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model file (.bin), or run directory")
    parser.add_argument("folder", metavar="FOLDER", help="folder to write")
    parser.add_argument("--dtype", help="f32 or bf16 [the model's]")
    parser.add_argument("--tokenizer", help="gpt2, bytes, or a tokenizer file [the one beside the model]")
    parser.add_argument(
        "--max-shard-size",
        type=above_zero,
        default=5.0,
        metavar="GB",
        help="split larger models into files of this size [5]",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from llmc.data.tokenizer import Tokenizer
    from llmc.hub.writing import export_model
    from llmc.load import find_tokenizer, load_model

    tokenizer = find_tokenizer(args.checkpoint) if args.tokenizer is None else Tokenizer.from_spec(args.tokenizer)
    export_model(
        load_model(args.checkpoint),
        args.folder,
        dtype=args.dtype,
        tokenizer=tokenizer,
        max_shard_bytes=int(args.max_shard_size * 1e9),
    )
    print(f"{args.folder}: {'with its tokenizer' if tokenizer else 'without a tokenizer: give --tokenizer to add one'}")
    return 0
