"""Measures tokens per second: of tiktoken's own calls, of llmc's, and of large files through `llmc data text`.

    python dev/bench/bench_tokenize.py                      encoding alone, on a few megabytes
    python dev/bench/bench_tokenize.py --size 1GB           also files of that size, each from text to shards with each tokenizer

The first part encodes Tiny Shakespeare if the cache has it (`llmc data tinyshakespeare`), else Python's language reference. Its columns:
the call, millions of tokens per second, megabytes of text per second.

The files of the second part are random: words in lines, words in one line, DNA and emoji without a blank, and Chinese with commas alone.
Each run over one is a process of its own. Its lines have the seconds of the run, its processor time, the tokens per second, and the
peak memory; those of tiktoken and tokenizers encode the first 16 MB, as one string. `tokenizer.json` is GPT-2's, which the package
tokenizers encodes. The numbers in `--workers` must write the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken

from llmc.data.documents import Piece
from llmc.data.python_texts import language_reference
from llmc.data.tokenize import token_stream
from llmc.data.tokenizer import Tokenizer
from llmc.datasets.tinyshakespeare import REMOTE
from llmc.hub.tokenizer import write_tokenizer
from llmc.system.cache import cache_directory

KINDS = ["words", "line", "dna", "emoji", "chinese"]
TOKENIZERS = ["gpt2", "bytes", "bpe:4096", "tokenizer.json"]

# On Linux the peak memory is VmHWM, because ru_maxrss also counts the parent that started the process.
_USAGE = """
import os, re, resource, sys, time
def report(start, tokens):
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = usage.ru_maxrss
    if os.path.exists("/proc/self/status"):
        peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read()).group(1)
    print(seconds, usage.ru_utime + usage.ru_stime, tokens, peak)
"""
_LLMC = """
from llmc.datasets import text
start = time.perf_counter()
written = text.prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=int(sys.argv[4]))
report(start, written.train_tokens + written.val_tokens)
"""
_ALONE = """
text = open(sys.argv[1], "rb").read(16_000_000).decode(errors="ignore")
if sys.argv[3] == "tiktoken":
    import tiktoken
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
else:
    import tokenizers
    encoder = tokenizers.Tokenizer.from_file(sys.argv[3])
    encode = lambda text: encoder.encode(text).ids
start = time.perf_counter()
report(start, len(encode(text)))
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


def write_random(path: Path, kind: str, size: int) -> None:
    """Write a file of at least `size` bytes."""
    rng = np.random.default_rng(0)
    letters = {
        "dna": [ord(c) for c in "ACGT"],
        "emoji": range(0x1F600, 0x1F640),
        "chinese": range(0x4E00, 0x4E00 + 3000),
    }
    vocabulary = sorted(set(" ".join(language_reference()).split()))
    with open(path, "wb") as file:
        while file.tell() < size:
            if kind in letters:
                codes = rng.choice(np.asarray(letters[kind], dtype="<u4"), 1 << 18)
                if kind == "chinese":
                    codes[rng.random(len(codes)) < 1 / 12] = ord("\uff0c")
                text = codes.tobytes().decode("utf-32-le")
            else:
                words = [vocabulary[i] for i in rng.integers(len(vocabulary), size=1 << 16)]
                if kind == "words":
                    words[::10] = ["\n"] * len(words[::10])
                text = " ".join(words) + " "
            file.write(text.encode())


def large(kinds: list[str], tokenizers: list[str], size: int, workers: list[int]) -> None:
    """Measure a large file of each kind with each tokenizer; check that each number of workers writes the same."""
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as name:
        folder = Path(name)
        path, output, json_file = folder / "large.txt", folder / "out", folder / "tokenizer.json"
        if "tokenizer.json" in tokenizers:
            write_gpt2_json(json_file)
        print(f"{'text':8} {'tokenizer':15} workers       s   CPU s  M tokens/s  MB/s  peak MB")
        for kind in kinds:
            write_random(path, kind, size)
            for tokenizer in tokenizers:
                given = str(json_file) if tokenizer == "tokenizer.json" else tokenizer
                digests = set()
                for count in workers:
                    measure(kind, tokenizer, str(count), _LLMC, path, output, given, path.stat().st_size)
                    digest = hashlib.sha256()
                    for shard in sorted(output.glob("*_*.bin")):
                        digest.update(shard.name.encode() + shard.read_bytes())
                    digests.add(digest.hexdigest())
                    shutil.rmtree(output)
                if len(digests) > 1:
                    print("THE OUTPUTS DIFFER")
                if tokenizer in ("gpt2", "tokenizer.json"):
                    alone = "tiktoken" if tokenizer == "gpt2" else str(json_file)
                    package = "tiktoken" if tokenizer == "gpt2" else "tokenizers"
                    measure(kind, f"({package})", "", _ALONE, path, output, alone, min(path.stat().st_size, 16_000_000))


def measure(
    kind: str, label: str, workers: str, code: str, path: Path, output: Path, tokenizer: str, size: int
) -> None:
    """Run a program in a process of its own and print what it took."""
    command = [sys.executable, "-c", _USAGE + code, str(path), str(output), tokenizer, workers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{kind:8} {label:15} {done.stderr.strip().splitlines()[-1]}", flush=True)
        return
    seconds, cpu, tokens, peak = (float(x) for x in done.stdout.split())
    peak_bytes = peak * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{kind:8} {label:15} {workers:7} {seconds:7.1f} {cpu:7.1f} {tokens / seconds / 1e6:11.2f} {size / seconds / 1e6:5.1f} "
        f"{peak_bytes / 1e6:8.0f}",
        flush=True,
    )


def write_gpt2_json(path: Path) -> None:
    """Write GPT-2's tokenizer as a tokenizer.json."""
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Tokenizer.gpt2(), folder, 1024)
        model = tokenizers.models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt")
    encoder = tokenizers.Tokenizer(model)
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    encoder.add_special_tokens(["<|endoftext|>"])
    encoder.save(str(path))


def bytes_of(text: str) -> int:
    """Return the number that '100MB' or '1GB' says."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(float(text[:-2]) * units[text[-2:].upper()])


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=bytes_of, help="of each large file, as 100MB or 1GB; without it there are none")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of large files [all]")
    parser.add_argument("--tokenizers", nargs="+", default=TOKENIZERS, help=f"for them [{' '.join(TOKENIZERS)}]")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="for them [2]")
    parser.add_argument("--no-small", action="store_true", help="leave the first part out")
    args = parser.parse_args()
    if not args.no_small:
        encoding(sample_text())
    if args.size:
        large(args.kinds, args.tokenizers, args.size, args.workers)


if __name__ == "__main__":
    main()
