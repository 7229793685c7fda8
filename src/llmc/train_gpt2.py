"""`python -m llmc.train_gpt2`: prints what llm.c's train_gpt2.c prints, line for line.

It trains GPT-2 124M on tinyshakespeare: B = 4, T = 64, 40 steps of AdamW at 1e-4 in float32, the validation loss every 10 steps, a
sample at 20 and 40. It looks for the files where llm.c keeps them. If there are no weights, the model starts from random ones; if
there are no data, it prepares them as `llmc data tinyshakespeare` does, with llm.c's tokenizer file if that is there. It is also the
shortest program that shows how a model is trained by hand.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llmc import _llmc
from llmc.arguments import Parser
from llmc.cli import report_errors
from llmc.data.loader import DataLoader
from llmc.data.tokenizer import Tokenizer
from llmc.models.gpt2 import GPT2
from llmc.optim.adamw import AdamW

DATA = Path("dev/data/tinyshakespeare")
B, T = 4, 64
STEPS, VAL_BATCHES, SAMPLE_LENGTH = 40, 5, 64


def sample(model: GPT2, first: int, coin: _llmc.XorShift) -> Iterator[int]:
    """Draw tokens from the model one by one, as llm.c draws them.

    Args:
        model: the model.
        first: the token that the text begins with; it is not yielded.
        coin: the random generator that decides each token.

    Yields:
        SAMPLE_LENGTH - 1 tokens.
    """
    cache = model.kv_cache(1, SAMPLE_LENGTH)
    token = first
    for _ in range(SAMPLE_LENGTH - 1):
        logits = cache.decode(np.array([token], dtype=np.int32))
        token = _llmc.sample(logits[0], coin.randfloat32())
        yield token


def load_model(path: Path | None, threads: int) -> GPT2:
    """Load GPT-2 124M from llm.c's checkpoint, in float32.

    Args:
        path: the checkpoint; None takes gpt2_124M.bin if it is in the current folder, and random weights if not.
        threads: of the CPU; 0 is as many as the process may use.
    """
    if path is None and Path("gpt2_124M.bin").is_file():
        path = Path("gpt2_124M.bin")
    if path is not None:
        return GPT2.from_checkpoint(path, dtype="f32", threads=threads)
    print("gpt2_124M.bin is not here: the weights are random")
    return GPT2.from_descriptor("d12", threads=threads)


def tokenizer_file(folder: Path) -> Path | None:
    """Return llm.c's tokenizer file in the current folder or in that of the data; None if there is none."""
    paths = (Path("gpt2_tokenizer.bin"), folder / "gpt2_tokenizer.bin", folder / "tokenizer.bin")
    return next((path for path in paths if path.is_file()), None)


def run(model_path: Path | None, data: Path, threads: int = 0) -> None:
    """Train, and print what train_gpt2.c prints.

    Args:
        model_path: as of load_model().
        data: the folder of tiny_shakespeare_train.bin and tiny_shakespeare_val.bin, which are made if they are not there.
        threads: of the CPU; 0 is as many as the process may use.
    """
    model = load_model(model_path, threads)
    config = model.config
    train, val = data / "tiny_shakespeare_train.bin", data / "tiny_shakespeare_val.bin"
    if not (train.is_file() and val.is_file()):
        from llmc.datasets import tinyshakespeare

        tinyshakespeare.prepare(data, tokenizer=str(tokenizer_file(data) or "gpt2"))
    train_loader = DataLoader([train], B, T, shuffle=True, seed=42, vocab_size=config.vocab_size)
    val_loader = DataLoader([val], B, T, vocab_size=config.vocab_size)
    optimizer = AdamW(model, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=0.0)
    path = tokenizer_file(data)
    tokenizer = None if path is None else Tokenizer.load(path)
    coin = _llmc.XorShift(1337)

    print("[GPT-2]")
    for name in ("max_seq_len", "vocab_size", "padded_vocab_size", "num_layers", "num_heads", "channels"):
        print(f"{name}: {getattr(config, name)}")
    print(f"num_parameters: {model.num_parameters}")
    print(f"train dataset num_batches: {train_loader.num_tokens // (B * T)}")
    print(f"val dataset num_batches: {val_loader.num_tokens // (B * T)}")
    plan = _llmc.memory_plan(config.native(), _llmc.ModelOptions(), B, T)
    print(f"num_activations: {plan.activations // 4}")

    for step in range(STEPS + 1):
        if step % 10 == 0:
            val_loader.reset()
            losses = [model.evaluate(*val_loader.next_batch()) for _ in range(VAL_BATCHES)]
            print(f"val loss {sum(losses) / VAL_BATCHES:f}")
        if step > 0 and step % 20 == 0:
            print("generating:\n---")
            eot = tokenizer.eot_token if tokenizer is not None else config.vocab_size - 1
            tokens = sample(model, eot, coin)
            pieces = tokenizer.stream(tokens) if tokenizer is not None else (f"{t} " for t in tokens)
            for piece in pieces:
                print(piece, end="", flush=True)
            print("\n---")
        start = time.perf_counter()
        inputs, targets = train_loader.next_batch()
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        optimizer.step(1e-4)
        loss = model.mean_loss
        print(f"step {step}: train loss {loss:f} (took {(time.perf_counter() - start) * 1000:f} ms)", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. argv: the arguments, None for those of the process."""
    parser = Parser(prog="python -m llmc.train_gpt2", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument(
        "--model", type=Path, help="llm.c checkpoint; default: gpt2_124M.bin if it is here, else random weights"
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="FOLDER", help="folder of tiny_shakespeare_*.bin [%(default)s]"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as many as the process may use")
    args = parser.parse_args(argv)
    return report_errors(parser.prog, lambda: run(args.model, args.data, args.threads))


if __name__ == "__main__":
    sys.exit(main())
