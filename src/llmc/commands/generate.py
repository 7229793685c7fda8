"""Continue a text with a trained model, token by token as they are found.

With --interactive the text grows turn by turn: each line that you type is appended to it, and continued. The model sees all of it, and of a
text that is longer than its context the last half. An empty line goes on where the text stands; /reset begins a new one; Ctrl-C stops a
continuation; Ctrl-D ends (on Windows Ctrl-Z and Enter). A line begins on a line of its own in the text, but after end-of-text or a --stop
text, which stay in it. If the input is no terminal, a line --- follows each continuation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llmc.arguments import threads, whole
from llmc.data.tokenizer import Tokenizer
from llmc.load import load_model, tokenizer_for
from llmc.models.generate import Session
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
    parser.add_argument("-i", "--interactive", action="store_true", help="go on with what is typed, turn by turn")
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
    if args.interactive and args.samples > 1:
        raise ValueError(f"--samples {args.samples}: --interactive continues one text")
    if args.interactive and args.prompt_file == "-":
        raise ValueError("--prompt-file -: with --interactive the standard input has the lines to continue")
    if args.interactive and sys.stdin is None:
        raise ValueError("--interactive reads the standard input, and there is none")
    if not Path(args.run).exists():
        raise FileNotFoundError(f"'{args.run}' is neither a run directory nor a checkpoint file")
    text = args.prompt if args.prompt_file is None else read_prompt(args.prompt_file)
    model = load_model(args.run, dtype=args.dtype, device=args.device, threads=args.threads)
    tokenizer = tokenizer_for(args.run, model.config.vocab_size, args.tokenizer)
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop_token": None if args.past_eot else tokenizer.eot_token,
    }
    if args.interactive:
        return _Talk(model.session(**options), tokenizer, args).run(text)
    prompt = tokenizer.encode(text) or [tokenizer.eot_token]
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
            count += len(tokens)
            new = "".join(before_stop(tokenizer.stream(tokens), args.stop))
            sys.stdout.write(f"{text}{shown(new)}\n---\n")
    if args.stats:
        _print_stats(count, time.perf_counter() - start)
    return 0


def _print_stats(count: int, seconds: float) -> None:
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)


_END_KEY = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"  # of the standard input, in a terminal


class _Talk:
    """A text that a user and a model write in turns.

    Args:
        session: the text, empty at first.
        tokenizer: the model's.
        args: the command's.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self._session, self._tokenizer, self._args = session, tokenizer, args
        self._terminal = sys.stdin.isatty()
        self._shown = harmless if sys.stdout.isatty() else str
        self._joint = ""  # between the text and the next line
        self._count, self._seconds = 0, 0.0

    def run(self, text: str) -> int:
        """Continue a text, if there is one, and then what is typed; return the exit code."""
        if self._terminal:
            print(
                f"A line is continued, an empty one goes on. /reset: a new text. Ctrl-C: stop. {_END_KEY}: end.",
                file=sys.stderr,
            )
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() lets a line be edited by it
        if text:
            sys.stdout.write(text)
            self._turn(text)
        while self._one_more():
            pass
        if self._args.stats and self._count:
            _print_stats(self._count, self._seconds)
        return 0

    def _one_more(self) -> bool:
        """Read a line and do what it says; return whether there was one."""
        try:
            if (line := self._read()) is None:
                return False
            if line.strip() == "/reset":
                self._session.clear()
                self._joint = ""
            else:
                self._turn(line)
        except KeyboardInterrupt:  # between continuations: one of two that were typed may come late
            if not self._terminal:
                raise
            print(f"\n({_END_KEY}: end)", file=sys.stderr)
        return True

    def _read(self) -> str | None:
        """Return what is typed next, without the line's end; None if there is no more."""
        if self._terminal:
            try:
                return input("> ")
            except EOFError:
                print()
                return None
        raw = sys.stdin.buffer.readline()
        return _decoded(raw, "the standard input") if raw else None

    def _turn(self, line: str) -> None:
        """Append a line to the text, and show how the model goes on."""
        session, tokenizer = self._session, self._tokenizer
        tokens = tokenizer.encode(self._joint + line) if line else []
        if not tokens and not session.tokens:
            tokens = [tokenizer.eot_token]
        forgotten, begin, last = session.forgotten, time.perf_counter(), ""
        ended = False  # by end-of-text or --max-tokens, not by a --stop text

        def new() -> Iterator[int]:
            nonlocal ended
            for token in session.stream(tokens, self._args.max_tokens):
                self._count += 1
                yield token
                if interrupted:
                    break
            ended = True

        with _interrupts(self._terminal) as interrupted:
            for piece in before_stop(tokenizer.stream(new()), self._args.stop):
                sys.stdout.write(self._shown(piece))
                sys.stdout.flush()
                last = piece or last
        self._seconds += time.perf_counter() - begin
        whole_line = last.endswith("\n")
        sys.stdout.write("" if whole_line else "\n")
        sys.stdout.write("" if self._terminal else "---\n")
        sys.stdout.flush()
        at_end = session.tokens[-1] == tokenizer.eot_token
        self._joint = "\n" if ended and not at_end and not whole_line else ""
        if at_end and self._terminal:
            print("(end of text)", file=sys.stderr)
        if session.forgotten > forgotten:
            print(
                f"(the model sees only the last {len(session.tokens) - session.forgotten} tokens of the text)",
                file=sys.stderr,
            )


@contextlib.contextmanager
def _interrupts(catch: bool) -> Iterator[list[int]]:
    """Catch Ctrl-C while the block runs; the list that it gets is then no longer empty. If not to catch, let it do what it does."""
    caught: list[int] = []
    if not catch:
        yield caught
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def read_prompt(path: str) -> str:
    """Return a file's text without its last line break, which editors add.

    Args:
        path: the file, in UTF-8; "-" for the standard input.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
    """
    return _decoded(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes(), path)


def _decoded(raw: bytes, where: str) -> str:
    """Return the text of UTF-8 without its last line break. where: what an error calls it."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: not UTF-8 ({e.reason} at byte {e.start})") from None
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
