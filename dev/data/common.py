"""What the scripts of this folder share: llm.c's options and output folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from llmc.arguments import Parser
from llmc.cli import report_errors


def parser(doc: str | None, tokenizer: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options that the scripts share; tokenizer: whether those of the tokenizer are among them."""
    options = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--source", help="the downloaded files, if you have them already")
    if tokenizer:
        options.add_argument("-m", "--model_desc", default="gpt-2", choices=("gpt-2", "llama-3"), help="whose tokens")
        options.add_argument("--tokenizer", help="for llama-3: the path of its tokenizer.json")
    return options


def tokenizer(args: argparse.Namespace) -> str:
    """Return the tokenizer that the options mean, as Tokenizer.from_spec takes it."""
    if args.tokenizer is None and args.model_desc == "llama-3":
        raise SystemExit(
            "Llama 3's tokenizer needs Meta's permission to download: give --tokenizer path/to/tokenizer.json"
        )
    return str(args.tokenizer or "gpt2")


def run(action: Callable[[], None]) -> None:
    """Run the action and end the script; an error is one line."""
    sys.exit(report_errors(Path(sys.argv[0]).name, action))


def output_folder(name: str) -> Path:
    """Return the folder of a data set beside the scripts."""
    return Path(__file__).parent / name
