"""Damages files and reads them: every reader must return a result or raise one clear error, soon, and in little memory.

    python dev/stress/fuzz.py                          10,000 mutations of each kind of file
    python dev/stress/fuzz.py shard --count 200
    python dev/stress/fuzz.py state --only 1234        one mutation again, in this process, with its traceback

Mutations depend on the kind, the seed and their number alone. A child process reads them, with a limit on its address space, and
prints a line before and after each; its parent notices crashes and hangs, and continues after them with another child.
A kind is a row of TARGETS: a function that writes whole files, and one that reads a folder of them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmc import _llmc
from llmc.checkpoint import Checkpointer, checkpoint_files, newest_good
from llmc.data.loader import DataLoader
from llmc.data.tokenizer import Tokenizer
from llmc.formats.debug_state import DebugState, read_debug_state, write_debug_state
from llmc.formats.eval_file import Example, read_eval_file, write_eval_file
from llmc.formats.manifest import DataFile, signed
from llmc.formats.shards import write_shard
from llmc.formats.state_file import TrainState
from llmc.hub import tokenizer as hub_tokenizer
from llmc.hub.writing import export_model
from llmc.load import load_model
from llmc.models.config import GPT2Config
from llmc.models.gpt2 import GPT2
from llmc.optim.adamw import AdamW
from llmc.optim.muon import Muon

# The errors that readers document for damaged files.
CLEAR_ERRORS = (_llmc.Error, ValueError, OSError)
MEMORY = 512 << 20  # bytes that reading a file of some kilobytes may take
SECONDS = 10.0  # the time that it may take

Files = dict[str, bytes]
CONFIG = GPT2Config(max_seq_len=8, vocab_size=40, num_layers=2, num_heads=2, channels=8)


@dataclasses.dataclass(frozen=True)
class Target:
    """write: writes whole files into an empty folder; other numbers may give other files. read: the reader that is tested.

    repair: changes damaged files so that they pass their own checksums, to test the checks that come after those.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], object]
    repair: Callable[[Files, random.Random], None] | None = None


# ---- mutations ----

_ODD = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    -(2**31),
)


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a position, more often than not in the head."""
    return rng.randrange(min(len(data), rng.choice((16, 64, 256, 1024, 2048))) if rng.random() < 0.6 else len(data))


def _number(data: bytearray, rng: random.Random) -> None:
    """Overwrite an aligned integer by an unusual value, or one near its own."""
    size = rng.choice((2, 4, 4, 4, 8))
    at = _place(data, rng) // size * size
    old = int.from_bytes(data[at : at + size], "little")
    value = rng.choice((rng.choice(_ODD), old + rng.choice((-1, 1)), old * 2, old // 2, rng.getrandbits(8 * size)))
    data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 4, 64))):
        data[_place(data, rng)] = rng.randrange(256)


def _bit(data: bytearray, rng: random.Random) -> None:
    data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice((_place(data, rng), len(data) - 1, 0, 1023, 1024)) :]


def _extend(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 2, 4, 100, 5000)))


def _remove(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    del data[at : at + rng.choice((1, 2, 4, 100))]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 100)))


def _copy(data: bytearray, rng: random.Random) -> None:
    start, at, length = _place(data, rng), _place(data, rng), rng.choice((4, 16, 256))
    data[at : at + length] = data[start : start + length]


def _fill(data: bytearray, rng: random.Random) -> None:
    at = _place(data, rng)
    length = min(rng.choice((4, 16, 256, 4096)), len(data) - at)
    data[at : at + length] = bytes([rng.choice((0, 0xFF, 0x7F, 0x30))]) * length


def _digits(data: bytearray, rng: random.Random) -> None:
    """Change a number in a text."""
    places = [i for i, b in enumerate(data) if 0x30 <= b <= 0x39]
    if places:
        at = rng.choice(places)
        data[at : at + 1] = (
            rng.choice((b"-1", b"9" * 20, b"1e400", b"null", b"NaN", b"[]", b"0")) if rng.random() < 0.7 else b""
        )


_MUTATIONS = (_number, _number, _number, _bytes, _bit, _truncate, _extend, _remove, _insert, _copy, _fill, _digits)


def mutated(files: Files, rng: random.Random) -> Files:
    out = dict(files)
    name = rng.choice(sorted(out))
    if rng.random() < 0.01 and len(out) > 1:
        del out[name]
        return out
    data = bytearray(out[name])
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        if data:
            rng.choice(_MUTATIONS)(data, rng)
    out[name] = bytes(data)
    return out


# ---- the kinds of file ----


def write_shards(folder: Path, number: int) -> None:
    write_shard(folder / "a.bin", np.arange(300) % 40, vocab_size=70000 if number % 2 else 40)
    if number % 3 == 0:
        write_shard(folder / "b.bin", np.arange(200) % 40, vocab_size=40)


def read_shards(folder: Path) -> None:
    loader = DataLoader(folder / "*.bin", 2, 8, shuffle=True, vocab_size=40)
    for _ in range(30):
        inputs, targets = loader.next_batch()
        assert inputs.max() < 40 and targets.max() < 40 and inputs.min() >= 0


def write_tokenizer(folder: Path, number: int) -> None:
    Tokenizer.train_bpe("low lower lowest newer wider " * 9, 257 + number % 30).save(folder / "t.bin")


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "t.bin")
    text = "newest <|endoftext|> widest é"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def write_eval(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    tokens = [rng.integers(0, 40, rng.integers(1, 9), dtype=np.uint16) for _ in range(50)]
    write_eval_file(folder / "e.bin", [Example(i % 4, tokens[5 * i], tokens[5 * i + 1 : 5 * i + 5]) for i in range(10)])


def read_eval(folder: Path) -> None:
    for example in read_eval_file(folder / "e.bin"):
        assert 0 <= example.label < len(example.endings) and all(map(len, (example.context, *example.endings)))


def write_model(folder: Path, number: int) -> None:
    GPT2(CONFIG, dtype="bf16" if number % 2 else "f32", threads=1).save(folder / "m.bin")


def read_model(folder: Path) -> None:
    model = GPT2.from_checkpoint(folder / "m.bin", threads=1)
    if model.config == CONFIG:
        model.logits(np.arange(8).reshape(1, 8))


def write_run(folder: Path, number: int) -> None:
    """Write a checkpoint of step 3 and an older one; for odd numbers as llm.c does, without checksums; for some of Muon."""
    write_shard(folder / "data.bin", np.arange(300) % 40, vocab_size=40)
    model = GPT2(CONFIG, dtype="bf16" if number % 4 < 2 else "f32", threads=1)
    optimizer = Muon(model) if number % 5 == 0 else AdamW(model)
    loader = DataLoader(folder / "data.bin", 2, 8, shuffle=number % 3 > 0)
    saver = Checkpointer(folder)
    data = [DataFile("data.bin", 1624, 5)]
    for step in (2, 3):
        inputs, targets = loader.next_batch()
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        optimizer.step(1e-3)
        state = TrainState(step, step, optimizer.rng_state, loader.state(), number % 3 > 0, {"loss_window": [1.5, 2.5]})
        saver.save(model, optimizer, state, config={}, data=data)
        if number % 2:
            checkpoint_files(folder, step).done.write_bytes(b"")


def read_run(folder: Path) -> None:
    found = newest_good(folder, warn=lambda text: None)
    if found is None:
        return
    model = GPT2.from_checkpoint(found.files.model, threads=1)
    optimizer = Muon(model) if found.optimizer == "muon" else AdamW(model)
    shuffle = found.manifest is None or found.manifest.state.shuffle
    loader = DataLoader(folder / "data.bin", 2, 8, shuffle=shuffle)
    state = found.load_state(model, optimizer, loader.state(), shuffle=shuffle)
    assert state.step == found.step
    optimizer.rng_state, optimizer.step_count = state.optimizer_rng, state.optimizer_step
    loader.set_state(state.loader)
    for _ in range(40):
        loader.next_batch()


def _sign(files: Files, rng: random.Random) -> None:
    """Change values in the manifest of step 3, or leave damage in its files, and make the checksums fit."""
    import zlib

    done = checkpoint_files("", 3).done.name
    try:
        manifest = json.loads(files[done])["manifest"]
        for path in checkpoint_files("", 3)[:2]:
            if rng.random() < 0.9:
                manifest["files"][path.name] = {"bytes": len(files[path.name]), "crc32": [zlib.crc32(files[path.name])]}
        if rng.random() < 0.5:
            _other_value(manifest, rng)
        files[done] = signed(manifest).encode()
    except (KeyError, ValueError, TypeError):
        pass  # llm.c's empty file, or one that is no manifest any more


def _other_value(tree: dict[str, Any], rng: random.Random) -> None:
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and rng.random() < 0.8:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(
                (None, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, 1e308, "x", True, [], {}, [[1]], {"a": None})
            )
        return


def write_safetensors(folder: Path, number: int) -> None:
    """Write a Hugging Face folder; for every third number in shards, with an index."""
    model = GPT2(CONFIG, dtype="bf16" if number % 2 else "f32", threads=1)
    export_model(model, folder, max_shard_bytes=2000 if number % 3 == 0 else 1 << 30)


def read_safetensors(folder: Path) -> None:
    model = load_model(folder, threads=1)
    model.logits(np.arange(8).reshape(1, 8) % model.config.vocab_size)


def write_vocabulary(folder: Path, number: int) -> None:
    hub_tokenizer.write_tokenizer(
        Tokenizer.train_bpe("low lower lowest newer wider " * 9, 257 + number % 30), folder, 8
    )


def read_vocabulary(folder: Path) -> None:
    tokenizer = hub_tokenizer.read_tokenizer(folder)
    if tokenizer is not None:
        text = "newest <|endoftext|> widest é"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def write_state(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    inputs, targets = rng.integers(0, 40, (2, 2, 4)).astype(np.int32)
    gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in CONFIG.parameter_shapes.items()}
    logits = rng.normal(size=(2, 4, 40)).astype(np.float32)
    write_debug_state(folder / "s.bin", DebugState(inputs, targets, logits, 1.5, gradients, [1.0] * (number % 3)))


def read_state(folder: Path) -> None:
    state = read_debug_state(folder / "s.bin", CONFIG)
    assert state.logits.shape == (*state.inputs.shape, CONFIG.vocab_size)


TARGETS = {
    "shard": Target(write_shards, read_shards),
    "tokenizer": Target(write_tokenizer, read_tokenizer),
    "eval": Target(write_eval, read_eval),
    "model": Target(write_model, read_model),
    "run": Target(write_run, read_run, _sign),
    "safetensors": Target(write_safetensors, read_safetensors),
    "vocabulary": Target(write_vocabulary, read_vocabulary),
    "debug_state": Target(write_state, read_state),
}

# ---- the child ----


class Source:
    """The mutations of a kind; put(i) writes one as files in a folder."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed, self.folder = name, seed, folder
        self.target = TARGETS[name]
        self.whole: list[Files] = []
        for number in range(12):
            self._empty()
            self.target.write(folder, number)
            self.target.read(folder)  # whole files must be read without any error
            self.whole.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})

    def _empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def put(self, i: int) -> None:
        rng = random.Random(f"{self.name} {self.seed} {i}")
        files = mutated(rng.choice(self.whole), rng)
        if self.target.repair is not None and rng.random() < 0.5:
            self.target.repair(files, rng)
        self._empty()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)


def child(name: str, seed: int, begin: int, end: int) -> None:
    """Print "begin i", then "ok i" or the error's name and i, for each mutation."""
    with tempfile.TemporaryDirectory(prefix="llmc-fuzz-") as folder:
        source = Source(name, seed, Path(folder) / "files")
        _limit_memory()
        for i in range(begin, end):
            source.put(i)
            print("begin", i, flush=True)
            try:
                source.target.read(source.folder)
                outcome = "ok"
            except CLEAR_ERRORS as e:
                outcome = type(e).__name__ if str(e) and "\n" not in str(e) else "ERROR-WITHOUT-A-CLEAR-TEXT"
            except Exception:  # MemoryError, too
                print(f"--- {name} --only {i}", file=sys.stderr)
                traceback.print_exc()
                outcome = f"UNEXPECTED-{sys.exc_info()[0].__name__}"  # type: ignore[union-attr]
            print(outcome, i, flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: crashes and hangs are still seen
        return
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if os.path.exists("/proc/self/statm")
        else 4 << 30
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


# ---- the parent ----


def fuzz(name: str, count: int, seed: int = 0) -> tuple[collections.Counter[str], list[str]]:
    """Try mutations 0 .. count - 1; return how often each outcome came, and what went wrong."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    begin = 0
    while begin < count:
        command = [sys.executable, __file__, name, "--child", str(begin), str(count), "--seed", str(seed)]
        current = -1
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in _lines(process):
                word, number = line.split()
                current = int(number)
                if word != "begin":
                    outcomes[word] += 1
                    begin = current + 1
                    if word.isupper() or word.startswith("UNEXPECTED"):
                        wrong.append(f"{name} --only {current} --seed {seed}: {word}")
            code = process.wait()
        if begin < count:
            if current < begin:
                raise RuntimeError(f"{name}: the child ended with code {code} before mutation {begin}")
            outcome = "HANG" if code == -9 else "CRASH"
            outcomes[outcome] += 1
            wrong.append(f"{name} --only {current} --seed {seed}: {outcome} (exit code {code})")
            begin = current + 1
    return outcomes, wrong


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the child's lines; kill it if none comes for too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    patience = 60.0  # for the imports and the whole files
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            process.kill()
            return
        if line is None:
            return
        patience = SECONDS
        yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)} [all]")
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one mutation, in this process")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.targets or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            parser.error(f"'{name}' is none of {', '.join(TARGETS)}")
    if args.child is not None:
        child(names[0], args.seed, *args.child)
        return 0
    if args.only is not None:
        folder = Path(tempfile.mkdtemp(prefix="llmc-fuzz-"))
        source = Source(names[0], args.seed, folder / "files")
        source.put(args.only)
        print(f"files in {source.folder}")
        print(source.target.read(source.folder))
        return 0
    failed = False
    for name in names:
        start = time.perf_counter()
        outcomes, wrong = fuzz(name, args.count, args.seed)
        listing = ", ".join(f"{k} {v}" for k, v in outcomes.most_common())
        print(
            f"{name}: {sum(outcomes.values())} mutations in {time.perf_counter() - start:.1f} s: {listing}", flush=True
        )
        for line in wrong[:20]:
            print(f"  WRONG: {line}")
        failed |= bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
