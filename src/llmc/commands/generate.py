"""Continue a text with a trained model, token by token as they are found."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llmc.arguments import threads, whole
from llmc.load import load_model, tokenizer_for
from llmc.system.terminal import harmless


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", metavar="RUN", help="run directory, llm.c checkpoint (.bin), or Hugging Face folder")
    parser.add_argument(
        "prompt", nargs="?", default="", metavar="PROMPT", help="text to continue; none: from end-of-text"
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="the text to continue, without a last line break; - for the standard input",
    )
    parser.add_argument("-n", "--max-tokens", type=whole(0), default=256, metavar="N", help="[%(default)s]")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: the most likely token [%(default)s]"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="among the N most likely; 0: all [%(default)s]"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="among the most likely of total probability X [%(default)s]",
    )
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="[%(default)s]")
    parser.add_argument("--samples", type=whole(1), default=1, metavar="N", help="how many, in one batch [%(default)s]")
    parser.add_argument("--past-eot", action="store_true", help="go on after end-of-text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="gpt2, bytes or a tokenizer file; default: the one beside the model"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N [%(default)s]")
    parser.add_argument("--dtype", help="f32 or bf16; default: the checkpoint's")
    parser.add_argument("--threads", type=threads, default=0, metavar="N", help="0: as many as the process may use")
    parser.add_argument("--stats", action="store_true", help="print tokens per second at the end, to stderr")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    if "" in args.stop:
        raise ValueError("--stop: the text is empty")
    if args.prompt and args.prompt_file is not None:
        raise ValueError("PROMPT and --prompt-file are both given: which one?")
    if not Path(args.run).exists():
        raise FileNotFoundError(f"'{args.run}' is neither a run directory nor a checkpoint file")
    text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    model = load_model(args.run, dtype=args.dtype, device=args.device, threads=args.threads)
    tokenizer = tokenizer_for(args.run, model.config.vocab_size, args.tokenizer)
    prompt = tokenizer.encode(text) or [tokenizer.eot_token]
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop_token": None if args.past_eot else tokenizer.eot_token,
    }
    shown = harmless if sys.stdout.isatty() else str  # a file has what the model wrote
    start, count = time.perf_counter(), 0
    if args.samples == 1:
        stream = model.stream(prompt, args.max_tokens, **options)  # says what is wrong with them before the text

        def counted() -> Iterator[int]:
            nonlocal count
            for token in stream:
                count += 1
                yield token

        sys.stdout.write(text)
        for piece in before_stop(tokenizer.stream(counted()), args.stop):
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        for tokens in model.generate([prompt] * args.samples, args.max_tokens, **options):
            count += len(tokens)  # type: ignore[arg-type]
            new = "".join(before_stop(tokenizer.stream(tokens), args.stop))  # type: ignore[arg-type]
            sys.stdout.write(f"{text}{shown(new)}\n---\n")
    if args.stats:
        seconds = time.perf_counter() - start
        print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def read_prompt(path: str) -> str:
    """Return a file's text without its last line break, which editors add.

    Args:
        path: the file, in UTF-8; "-" for the standard input.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
    """
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 ({e.reason} at byte {e.start})") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def before_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield a text up to the first of the stops to be complete. It does not depend on where the text is cut into pieces.

    Args:
        pieces: the text as it comes. What could be the beginning of a stop is held back until it is known.
        stops: texts, none empty.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)[1]]
            return
        beginnings = (
            n for stop in stops for n in range(min(len(stop) - 1, len(held)), 0, -1) if held.endswith(stop[:n])
        )
        sure = len(held) - max(beginnings, default=0)
        yield held[:sure]
        held = held[sure:]
    yield held
