"""Measures tokens per second: of tiktoken's own calls, of llmc's, and of a large file through `llmc data text`.

    python dev/bench/bench_tokenize.py                      encoding alone, on a few megabytes
    python dev/bench/bench_tokenize.py --megabytes 1000     also that much text from file to shards, with 1 worker and with 2

The text is Tiny Shakespeare if the cache has it (`llmc data tinyshakespeare`), else Python's language reference. The large file
repeats it, with one word in twenty replaced by another. Each run over it is a process of its own.

Columns of the first part: the call, millions of tokens per second, megabytes of text per second. The lines of the second part also
have the seconds of the run, its processor time and its peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken

from llmc.data.documents import Piece, language_reference
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.tinyshakespeare import REMOTE
from llmc.system.cache import cache_directory

# On Linux the peak memory is VmHWM, because ru_maxrss also counts the parent that started the process.
_CHILD = """
import os, re, resource, sys, time
from llmc.datasets import text
start = time.perf_counter()
written = text.prepare([sys.argv[1]], sys.argv[2], workers=int(sys.argv[3]))
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_SELF)
peak = usage.ru_maxrss
if os.path.exists("/proc/self/status"):
    peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)
print(seconds, usage.ru_utime + usage.ru_stime, written.train_tokens + written.val_tokens, peak)
"""


def sample_text() -> str:
    """Return the text that is encoded."""
    path = cache_directory() / REMOTE.name
    return path.read_text(encoding="utf-8") if path.is_file() else "\n\n".join(language_reference())


def best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Return the shortest time of several calls: other programs on the machine can only make a call longer."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def encoding(text: str) -> None:
    """Measure each way of encoding the text, and print a line for each."""
    encoder, tokenizer = tiktoken.get_encoding("gpt2"), Tokenizer.gpt2()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "gpt2_tokenizer.bin")
        from_file = Tokenizer.load(Path(folder) / "gpt2_tokenizer.bin")
    documents = text.split("\n\n")
    pieces = [Piece(d, True) for d in documents] * 4
    count = len(tokenizer.encode_documents(pieces[: len(documents)]))
    rows: list[tuple[str, float]] = [
        (
            "tiktoken encode_ordinary, by document",
            best_seconds(lambda: [encoder.encode_ordinary(d) for d in documents]),
        ),
        (
            "tiktoken encode_ordinary_batch, 2 threads",
            best_seconds(lambda: encoder.encode_ordinary_batch(documents, num_threads=2)),
        ),
        ("Tokenizer.encode_documents", best_seconds(lambda: tokenizer.encode_documents(pieces[: len(documents)]))),
        (
            "the same from gpt2_tokenizer.bin",
            best_seconds(lambda: from_file.encode_documents(pieces[: len(documents)])),
        ),
        ("token_stream, 1 worker", best_seconds(lambda: list(token_stream(pieces, tokenizer, 1))) / 4),
        ("token_stream, 2 workers", best_seconds(lambda: list(token_stream(pieces, tokenizer, 2))) / 4),
    ]
    size = len(text.encode())
    print(f"{len(documents)} documents, {size / 1e6:.1f} MB, {count} tokens, end-of-text tokens included")
    for name, seconds in rows:
        print(f"{name:45} {count / seconds / 1e6:6.2f} M tokens/s {size / seconds / 1e6:6.1f} MB/s")


def write_large(path: Path, text: str, size: int) -> None:
    """Write varied copies of a text to a file, until it has `size` bytes or more."""
    rng = random.Random(0)
    vocabulary = sorted(set(text.split()))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            words = text.split(" ")
            for _ in range(len(words) // 20):
                words[rng.randrange(len(words))] = rng.choice(vocabulary) + rng.choice(
                    ("", "s", str(rng.randrange(10**4)), "é")
                )
            varied = " ".join(words)
            file.write(varied)
            written += len(varied.encode())


def large(text: str, megabytes: int, workers: list[int]) -> None:
    """Measure a large file from text to shards for each number of workers; check that all write the same."""
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as folder:
        path = Path(folder) / "large.txt"
        write_large(path, text, megabytes * 10**6)
        sums = set()
        for count in workers:
            output = Path(folder) / f"out{count}"
            command = [sys.executable, "-c", _CHILD, str(path), str(output), str(count)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
            seconds, cpu, tokens, peak = (float(x) for x in done.stdout.split())
            peak_bytes = peak * (1 if sys.platform == "darwin" else 1024)
            size = path.stat().st_size
            print(
                f"{size / 1e6:.0f} MB, {count} workers: {seconds:.0f} s ({cpu:.0f} s of a core), "
                f"{tokens / seconds / 1e6:.2f} M tokens/s, "
                f"{size / seconds / 1e6:.1f} MB/s, peak memory {peak_bytes / 1e6:.0f} MB"
            )
            digest = hashlib.sha256()
            for shard in sorted(output.glob("*.bin")):
                digest.update(shard.name.encode() + shard.read_bytes())
            sums.add(digest.hexdigest())
        print("equal output" if len(sums) == 1 else "THE OUTPUTS DIFFER")


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=0, help="size of the large file; 0 leaves it out [0]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="for the large file [1 2]")
    args = parser.parse_args()
    text = sample_text()
    encoding(text)
    if args.megabytes:
        large(text, args.megabytes, args.workers)


if __name__ == "__main__":
    main()
