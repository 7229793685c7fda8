"""Continue a text with a trained model, token by token as they are found."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from llmc.load import load_model, tokenizer_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", metavar="RUN", help="run directory, llm.c checkpoint (.bin), or Hugging Face folder")
    parser.add_argument(
        "prompt", nargs="?", default="", metavar="PROMPT", help="text to continue; none: from end-of-text"
    )
    parser.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help="[%(default)s]")
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
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many, in one batch [%(default)s]")
    parser.add_argument("--past-eot", action="store_true", help="go on after end-of-text")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="gpt2, bytes or a tokenizer file; default: the one beside the model"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N [%(default)s]")
    parser.add_argument("--dtype", help="f32 or bf16; default: the checkpoint's")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: as many as the process may use")
    parser.add_argument("--stats", action="store_true", help="print tokens per second at the end, to stderr")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    if args.max_tokens < 0 or args.samples < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} --samples {args.samples}: expected at least 0 and 1")
    if not Path(args.run).exists():
        raise FileNotFoundError(f"'{args.run}' is neither a run directory nor a checkpoint file")
    model = load_model(args.run, dtype=args.dtype, device=args.device, threads=args.threads)
    tokenizer = tokenizer_for(args.run, model.config.vocab_size, args.tokenizer)
    prompt = tokenizer.encode(args.prompt) or [tokenizer.eot_token]
    stop = None if args.past_eot else tokenizer.eot_token
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    start, count = time.perf_counter(), 0
    if args.samples == 1:
        sys.stdout.write(args.prompt)

        def counted() -> object:
            nonlocal count
            for token in model.stream(prompt, args.max_tokens, stop_token=stop, **options):
                count += 1
                yield token

        for piece in tokenizer.stream(counted()):  # type: ignore[arg-type]
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        texts = model.generate([prompt] * args.samples, args.max_tokens, stop_token=stop, **options)
        for tokens in texts:
            count += len(tokens)  # type: ignore[arg-type]
            sys.stdout.write(f"{args.prompt}{tokenizer.decode(tokens)}\n---\n")  # type: ignore[arg-type]
    if args.stats:
        seconds = time.perf_counter() - start
        print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0
