"""Turn a model into a folder that Hugging Face's transformers loads, or a GGUF file for llama.cpp.

CHECKPOINT is a llm.c model file or a run directory. A folder gets safetensors, config.json and the tokenizer. A GGUF file has all of it
(llmc export RUN model.gguf), if the tokenizer splits and merges text as GPT-2's does: gpt2, bytes, bpe:N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.arguments import above_zero


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model file (.bin), or run directory")
    parser.add_argument("output", metavar="OUT", help="folder or file to write")
    parser.add_argument(
        "--format", choices=("hf", "gguf"), help="hf: the folder; gguf: the file [gguf if OUT ends with .gguf, else hf]"
    )
    parser.add_argument("--dtype", help="f32 or bf16 [the model's]")
    parser.add_argument("--tokenizer", help="gpt2, bytes, or a tokenizer file [the one beside the model]")
    parser.add_argument(
        "--max-shard-size",
        type=above_zero,
        metavar="GB",
        help="split larger models into files of this size, in a folder [5]",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from llmc.data.tokenizer import Tokenizer
    from llmc.load import find_tokenizer, load_model, tokenizer_for

    file_format = args.format or ("gguf" if Path(args.output).suffix == ".gguf" else "hf")
    if file_format == "gguf":
        from llmc.hub.gguf import export_gguf

        if args.max_shard_size is not None:
            raise ValueError("--max-shard-size is for a folder: GGUF is one file")
        model = load_model(args.checkpoint)
        needed = tokenizer_for(args.checkpoint, model.config.vocab_size, args.tokenizer)
        export_gguf(model, args.output, needed, dtype=args.dtype)
        print(f"{args.output}: with its tokenizer")
        return 0
    from llmc.hub.writing import export_model

    tokenizer = find_tokenizer(args.checkpoint) if args.tokenizer is None else Tokenizer.from_spec(args.tokenizer)
    shard_bytes = int((args.max_shard_size or 5) * 1e9)
    model = load_model(args.checkpoint)
    export_model(model, args.output, dtype=args.dtype, tokenizer=tokenizer, max_shard_bytes=shard_bytes)
    print(f"{args.output}: {'with its tokenizer' if tokenizer else 'without a tokenizer: give --tokenizer to add one'}")
    return 0
