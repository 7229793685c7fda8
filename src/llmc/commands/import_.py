"""Turn a Hugging Face GPT-2 into a llm.c model file.

SOURCE is a folder with config.json and safetensors or PyTorch weights, a checkpoint of nanoGPT's (ckpt.pt), or a name on the Hub:
gpt2, gpt2-medium, gpt2-large, gpt2-xl. A folder of that name goes before the Hub.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("source", metavar="SOURCE", help="folder, weight file, or name on the Hub")
    parser.add_argument("output", metavar="OUT.bin", help="model file to write; its tokenizer goes beside it")
    parser.add_argument("--dtype", default="f32", help="f32 or bf16 [f32]")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from llmc.hub.reading import import_model

    def warn(text: str) -> None:
        print(f"llmc import: {text}", file=sys.stderr)

    model = import_model(args.source, args.output, dtype=args.dtype, warn=warn)
    c = model.config
    print(f"{args.output}: {c.num_parameters:,} parameters, {c.num_layers} layers of {c.channels}, from {model.folder}")
    return 0
