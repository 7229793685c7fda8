"""Download or tokenise a data set into llm.c's files.

Named data sets are downloaded once into a cache (LLMC_CACHE, or the system's place for caches) and checked. A download that broke off
is continued. `llmc data text` takes your own text, JSON lines, JSON, CSV or Parquet; `llmc data tokens` token ids that another program
has written.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from pathlib import Path

from llmc.arguments import threads, whole
from llmc.datasets.common import TokenFiles
from llmc.system.fs import shell_word

DTYPES = ("uint16", "uint32", "int32", "int64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)

    def add(
        name: str, help: str, tokenizer: bool = True, workers: bool = True, source: str = ""
    ) -> argparse.ArgumentParser:
        sub = names.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        # --debug is the command's; after NAME it is the same.
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        sub.add_argument("-o", "--output", metavar="DIR", help=f"output folder [{_default_output(name, '10B')}]")
        if source:
            sub.add_argument(
                "--source", metavar="PATH", help=f"{source}, if you have it already: nothing is downloaded"
            )
        if tokenizer:
            sub.add_argument(
                "-tk",
                "--tokenizer",
                default="gpt2",
                metavar="SPEC",
                help=(
                    "gpt2, bytes, a llm.c tokenizer file, or a tokenizer.json [gpt2]"
                    if name not in ("text", "tinyshakespeare")
                    else "gpt2, bytes, bpe:N (trained on the text), a llm.c tokenizer file, or a tokenizer.json [gpt2]"
                ),
            )
        if workers:
            sub.add_argument(
                "--workers", type=threads, default=0, metavar="N", help="threads that tokenise; 0: all cores [0]"
            )
        return sub

    add("tinyshakespeare", "1 MB of plays", source="input.txt")
    add("tinystories", "2 GB of short stories", source="the archive, or the folder of its JSON files")
    for name, text in (
        ("fineweb", "10 or 100 billion tokens of the web"),
        ("fineweb-edu", "the same, its educational part"),
    ):
        sub = add(name, text, source="Parquet files or their folder")
        sub.add_argument(
            "-v", "--version", default="10B", choices=("10B", "100B"), help="size of the sample, in tokens [10B]"
        )
        sub.add_argument(
            "-n",
            "--shards",
            type=whole(1),
            metavar="N",
            help="only the first N files (with --tokenized: N for training)",
        )
        sub.add_argument(
            "--tokenized", action="store_true", help="download files of the 100B sample that are tokenised already"
        )
        _add_record_options(sub)
        _add_shard_options(sub)
    add("hellaswag", "10,042 scenes to continue, for evaluation", workers=False, source="hellaswag_val.jsonl")
    add("mmlu", "14,042 questions, for evaluation", workers=False, source="data.tar, or the folder of the CSV files")

    sub = add("text", "your own text, JSON lines, JSON, CSV, TSV or Parquet")
    sub.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="files, folders, globs, or - for standard input; a text file is one document",
    )
    _add_record_options(sub)
    sub.add_argument(
        "--document-separator",
        default="",
        metavar="TEXT",
        help="mark between the documents of a text file, as '<|endoftext|>' [none: a file is one document]",
    )
    sub.add_argument(
        "--val", type=float, default=0.1, metavar="X", help="last part of the tokens, for validation; 0: none [0.1]"
    )
    sub.add_argument(
        "--val-files", nargs="+", action="extend", default=[], metavar="FILE", help="files for validation instead"
    )
    sub.add_argument("--prefix", default="text", metavar="NAME", help="what file names begin with [text]")
    _add_shard_options(sub)

    sub = add(
        "tokens", "convert token ids of other programs (nanoGPT's train.bin, .npy)", tokenizer=False, workers=False
    )
    sub.add_argument("files", nargs="+", metavar="FILE", help="files or globs; `val` in a name: for validation")
    sub.add_argument("--dtype", choices=DTYPES, help="type of the ids in a file without a header; nanoGPT's: uint16")
    sub.add_argument("--vocab-size", type=whole(1), default=50257, metavar="N", help="ids must be below [50257]")
    sub.add_argument("--prefix", default="text", metavar="NAME", help="what file names begin with [text]")
    _add_shard_options(sub)


def _add_shard_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-s", "--shard-size", type=whole(2), default=10**8, metavar="N", help="tokens in a file [10^8]")
    sub.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")


def _add_record_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--column",
        default="text",
        metavar="NAME",
        help="field that has the text or the chat, in files of records; a dot leads into a nested one [text]",
    )
    sub.add_argument(
        "--on-bad-record", default="stop", choices=("stop", "skip"), help="when a record has no text [stop]"
    )


def _default_output(name: str, version: str) -> str:
    """Return the folder to write by default: for llm.c's data sets the one that its command lines read, else one in data/."""
    if name.startswith("fineweb"):
        return f"dev/data/{'edu_' if name == 'fineweb-edu' else ''}fineweb{version}"
    return f"data/{name}" if name in ("text", "tokens") else f"dev/data/{name}"


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    name: str = args.name
    version = "100B" if getattr(args, "tokenized", False) else getattr(args, "version", "")
    output = Path(args.output or _default_output(name, version))
    if name in ("hellaswag", "mmlu"):
        from llmc.datasets import hellaswag, mmlu

        write = hellaswag.prepare if name == "hellaswag" else mmlu.prepare
        sys.stdout.write(f"wrote {write(output, source=args.source, tokenizer=args.tokenizer)}\n")
        return 0
    print_token_files(_write_tokens(name, output, args))
    return 0


def _write_tokens(name: str, output: Path, args: argparse.Namespace) -> TokenFiles:
    if name == "text":
        from llmc.datasets import text

        return text.prepare(
            args.files,
            output,
            tokenizer=args.tokenizer,
            column=args.column,
            on_bad_record=args.on_bad_record,
            separator=args.document_separator,
            val=args.val,
            val_inputs=args.val_files,
            shard_size=args.shard_size,
            name=args.prefix,
            workers=args.workers,
            overwrite=args.overwrite,
        )
    if name == "tokens":
        from llmc.datasets import tokens

        return tokens.prepare(
            args.files,
            output,
            dtype=args.dtype,
            vocab_size=args.vocab_size,
            shard_size=args.shard_size,
            name=args.prefix,
            overwrite=args.overwrite,
        )
    if name in ("tinyshakespeare", "tinystories"):
        from llmc.datasets import tinyshakespeare, tinystories

        write = tinyshakespeare.prepare if name == "tinyshakespeare" else tinystories.prepare
        return write(output, source=args.source, tokenizer=args.tokenizer, workers=args.workers)
    from llmc.datasets import fineweb

    kind = "edu" if name == "fineweb-edu" else "classic"
    if args.tokenized:
        return fineweb.prepare_mirror(output, kind=kind, shards=args.shards)
    return fineweb.prepare(
        output,
        kind=kind,
        version=args.version,
        shard_size=args.shard_size,
        shards=args.shards,
        source=args.source,
        column=args.column,
        on_bad_record=args.on_bad_record,
        tokenizer=args.tokenizer,
        workers=args.workers,
        overwrite=args.overwrite,
    )


def print_token_files(files: TokenFiles) -> None:
    """Print what was written, and the options of llmc-train that take it."""
    for split, paths, tokens in (
        ("train", files.train, files.train_tokens),
        ("val", files.val, files.val_tokens),
    ):
        if paths:
            where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1].name}"
            sys.stdout.write(f"{split}: {tokens:,} tokens in {where}\n")
    if not files.train:
        sys.stdout.write("no file to train on: name other input, or give a smaller --shard-size\n")
        return
    options = [
        f"{flag} {shell_word(_pattern(paths))}" for flag, paths in (("-i", files.train), ("-j", files.val)) if paths
    ]
    sys.stdout.write(f"train on them: llmc-train {' '.join(options)}\n")


def _pattern(paths: list[Path]) -> str:
    if len(paths) == 1:
        return str(paths[0])
    return os.path.join(glob.escape(str(paths[0].parent)), paths[0].stem[:-6] + "*.bin")
