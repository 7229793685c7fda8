"""Train GPT-2 in PyTorch, beside llmc's own training, with the options of llm.c's train_gpt2.py.

By default it overfits one batch for ten steps. Before that it writes the files with which llmc and llm.c test themselves: the model
(gpt2_124M.bin, in bf16 gpt2_124M_bf16.bin), a debug state (gpt2_124M_debug_state.bin), the tokenizer (gpt2_tokenizer.bin).

Under torchrun it trains in several processes, with NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.arguments import Parser
from llmc.cli import report_errors
from llmc.data.files import find_shards
from llmc.data.loader import DataLoader
from llmc.data.tokenizer import Tokenizer
from llmc.formats.debug_state import LOSS_RECIPE, DebugState, write_debug_state
from llmc.formats.model_file import write_model_file
from llmc.hub.reading import open_hub_model
from llmc.load import find_tokenizer, load_model
from llmc.models.config import GPT2Config
from llmc.optim.schedule import lr_schedule

try:
    import torch
    from torch import Tensor
except ImportError as e:
    if __name__ == "__main__":
        sys.exit(
            f"python -m llmc.reference: error: the reference is PyTorch's, which is not installed: pip install torch ({e})"
        )
    raise
from llmc.reference.model import GPT

# How llm.c's files of OpenAI's four models are called.
_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m llmc.reference", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--input_bin", default="dev/data/tinyshakespeare/tiny_shakespeare_val.bin", help="token files to train on")
    add("--input_val_bin", default="", help="token files for the validation loss")
    add("--output_dir", default="", help="folder for main.log")
    add("--tensors_dir", default=".", help="folder for what --write_tensors writes [.]")
    add(
        "--model",
        default="gpt2",
        help="weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or .bin file; random: d12, d24, gpt3:c768, ... [gpt2]",
    )
    add("--batch_size", type=int, default=4, help="rows of a micro-batch, B [4]")
    add("--sequence_length", type=int, default=64, help="tokens of a row, T [64]")
    add("--total_batch_size", type=int, default=256, help="tokens of an update [256]")
    add("--num_iterations", type=int, default=10, help="updates [10]")
    add("--inference_only", type=int, default=0, help="1: forward only")
    add("--learning_rate", type=float, default=1e-4, help="highest learning rate [1e-4]")
    add("--warmup_iters", type=int, default=0, help="steps of linear warm-up [0]")
    add(
        "--learning_rate_decay_frac",
        type=float,
        default=1.0,
        help="last learning rate, as a fraction of the highest [1]",
    )
    add("--weight_decay", type=float, default=0.0, help="weight decay of matrices and embeddings [0]")
    add("--grad_clip", type=float, default=1.0, help="largest global gradient norm [1]")
    add("--val_loss_every", type=int, default=0, help="validate every n steps; 0: never [0]")
    add("--val_max_steps", type=int, default=20, help="validation batches [20]")
    add("--sample_every", type=int, default=0, help="sample every n steps; 0: never [0]")
    add("--overfit_single_batch", type=int, default=1, help="train on the first batch over and over [1]")
    add("--shuffle", type=int, default=0, help="1: the data in llmc-train's order; 0: in file order [0]")
    add("--tensorcores", type=int, default=0, help="1: TF32 for f32 matmuls")
    add("--device", default="", help="cpu, cuda, mps [the best there is]")
    add("--compile", type=int, default=0, help="1: torch.compile")
    add("--flash", type=int, default=0, help="1: PyTorch's fused attention")
    add("--dtype", choices=tuple(_DTYPES), default="float32", help="dtype of autocast [float32]")
    add(
        "--zero_stage", type=int, choices=(0, 1), default=0, help="1: share the optimizer's state between processes [0]"
    )
    add("--write_tensors", type=int, default=1, help="0: write no files")
    return parser


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of torchrun; without torchrun it is alone.

    Attributes:
        rank: number of this process, from 0.
        local_rank: its number on its machine.
        size: number of processes.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @staticmethod
    def from_environment() -> Processes:
        """Read what torchrun put into the environment."""
        if "RANK" not in os.environ:
            return Processes()
        return Processes(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))

    def print(self, text: str) -> None:
        """Print a line, on rank 0 alone."""
        if self.rank == 0:
            print(text, flush=True)


def choose_device(wanted: str, processes: Processes) -> torch.device:
    """Return the device that is wanted, else the best there is; among several processes on GPUs, the one of this process."""
    if wanted:
        device = torch.device(wanted)
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if device.type == "cuda" and processes.size > 1:
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    return device


def make_model(name: str, flash: bool) -> tuple[GPT, str, Path | None]:
    """Make the model.

    Args:
        name: one of OpenAI's four, a Hugging Face folder or name, a .bin file, or a descriptor, for random weights.
        flash: whether attention is PyTorch's fused kernel.

    Returns:
        The model, what its files are to be called by, and the folder that may have its tokenizer.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the name is no descriptor.
    """
    attention = "flash" if flash else "math"
    path = Path(name)
    if path.suffix == ".bin":
        loaded = load_model(path, dtype="f32")
        model = GPT(loaded.config, attention=attention)
        model.load_llmc(loaded.parameters)
        return model, path.stem.removeprefix("gpt2_"), path.parent
    if path.is_dir() or name in _SIZES or "/" in name:
        hub_model = open_hub_model(name)
        model = GPT(hub_model.config, attention=attention)
        model.load_llmc(hub_model.parameters())
        return model, _SIZES.get(name, path.name), hub_model.folder
    config = GPT2Config.from_descriptor(name)
    return GPT(config, attention=attention), name.replace(":", "_"), None


def debug_state(model: GPT, x: Tensor, y: Tensor, steps: int = 10) -> DebugState:
    """Compute forward, backward and the first losses of training on one batch, in f32. The model is left as it was.

    Args:
        model: the model.
        x, y: inputs and targets, (B, T) integers.
        steps: number of losses.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    r = LOSS_RECIPE
    optimizer = model.configure_optimizer(r["lr"], (r["beta1"], r["beta2"]), r["eps"], r["weight_decay"])
    losses = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits, loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first = logits.detach().float().cpu().numpy()
            gradients = model.gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), r["grad_clip"])
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    inputs, targets = (t.cpu().numpy().astype("int32") for t in (x, y))
    return DebugState(inputs, targets, first, losses[0], gradients, losses)


def write_tensors(model: GPT, tokenizer: Tokenizer | None, x: Tensor, y: Tensor, folder: Path, name: str) -> None:
    """Write the model in f32 and bf16, the debug state, and the tokenizer, under llm.c's names, and print the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = model.parameters_llmc()
    for dtype, ending in (("f32", ""), ("bf16", "_bf16")):
        path = folder / f"gpt2_{name}{ending}.bin"
        arrays = (torch.from_numpy(a).to(torch.bfloat16 if ending else torch.float32) for a in parameters.values())
        bits = (a.view(torch.int16 if ending else torch.int32).numpy() for a in arrays)  # NumPy has no bfloat16
        write_model_file(path, model.config.native(), dtype, bits)
        print(f"wrote {path}")
    path = folder / f"gpt2_{name}_debug_state.bin"
    write_debug_state(path, debug_state(model, x, y))
    print(f"wrote {path}")
    if tokenizer is not None:
        print(f"wrote {tokenizer.save_beside_model(folder)}")


@torch.no_grad()
def sample(model: GPT, start: int, count: int, device: torch.device, top_k: int = 40) -> list[int]:
    """Draw count tokens after the token start, each among the top_k most likely; return all, start included."""
    tokens = torch.tensor([[start]], device=device)
    for _ in range(count):
        logits, _ = model(tokens[:, -model.config.max_seq_len :])
        best, ids = logits[:, -1].float().topk(min(top_k, model.config.vocab_size))
        tokens = torch.cat([tokens, ids.gather(1, torch.multinomial(best.softmax(-1), 1))], dim=1)
    return tokens[0].tolist()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say; return the exit code, 0."""
    processes = Processes.from_environment()
    say = processes.print
    B, T = args.batch_size, args.sequence_length
    if args.total_batch_size <= 0 or args.total_batch_size % (B * T * processes.size):
        raise ValueError(
            f"--total_batch_size is {args.total_batch_size}, expected a multiple of B * T * processes = {B * T * processes.size}"
        )
    grad_accum_steps = args.total_batch_size // (B * T * processes.size)
    say(f"Running pytorch {torch.__version__}")
    device = choose_device(args.device, processes)
    say(f"using device: {device}")
    say(f"total desired batch size: {args.total_batch_size}")
    say(f"=> calculated gradient accumulation steps: {grad_accum_steps}")
    if processes.size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        _train(args, processes, device, grad_accum_steps)
        if processes.size > 1:
            # The process is terminated if the group's threads still have work when the group is destroyed. DistributedDataParallel
            # is part of reference cycles, so it must be collected first; and a rank that leaves early breaks the connections of
            # the others.
            gc.collect()
            torch.distributed.barrier()
    finally:
        if processes.size > 1:
            torch.distributed.destroy_process_group()
    return 0


def _train(args: argparse.Namespace, processes: Processes, device: torch.device, grad_accum_steps: int) -> None:
    say = processes.print
    B, T = args.batch_size, args.sequence_length
    torch.manual_seed(42)
    if args.tensorcores:
        torch.set_float32_matmul_precision("high")
    if args.dtype == "float32":
        autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    elif args.dtype == "float16" and device.type != "cuda":
        raise ValueError("--dtype float16 needs a CUDA device; bfloat16 works everywhere")
    else:
        autocast = torch.autocast(device.type, dtype=_DTYPES[args.dtype])

    raw_model, name, folder = make_model(args.model, bool(args.flash))
    if not 1 <= T <= raw_model.config.max_seq_len:
        raise ValueError(f"--sequence_length is {T}, the model's context {raw_model.config.max_seq_len}")
    raw_model.to(device)
    try:
        tokenizer = None
        if processes.rank == 0:
            tokenizer = find_tokenizer(folder) if folder is not None else None
            if tokenizer is None and raw_model.config.vocab_size == 50257:
                tokenizer = Tokenizer.gpt2()
    except ConnectionError as e:
        tokenizer = None
        print(f"no tokenizer is written, and samples are token ids: {e}", file=sys.stderr)

    def loader(pattern: str, shuffle: bool, validation: bool = False) -> DataLoader:
        files = find_shards(pattern, validation=validation)
        vocab_size = raw_model.config.vocab_size
        return DataLoader(
            files, B, T, shuffle=shuffle, rank=processes.rank, ranks=processes.size, vocab_size=vocab_size
        )

    def batch(source: DataLoader) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(a).long().to(device) for a in source.next_batch())
        return x, y

    train_loader = loader(args.input_bin, bool(args.shuffle))
    val_loader = loader(args.input_val_bin, False, validation=True) if args.input_val_bin else None
    say(f"DataLoader: total number of tokens: {train_loader.num_tokens:,} across {len(train_loader.files)} files")
    if processes.rank == 0 and args.write_tensors and not args.inference_only:
        write_tensors(raw_model, tokenizer, *batch(loader(args.input_bin, False)), Path(args.tensors_dir), name)

    model: torch.nn.Module = raw_model
    if args.compile:
        say("compiling the model...")
        model = torch.compile(model)  # type: ignore[assignment]
    if processes.size > 1:
        from torch.nn.parallel import DistributedDataParallel

        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer: torch.optim.Optimizer
    optimizer = raw_model.configure_optimizer(args.learning_rate, weight_decay=args.weight_decay)
    if processes.size > 1 and args.zero_stage == 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        groups = optimizer.param_groups
        optimizer = ZeroRedundancyOptimizer(
            groups[0]["params"],
            optimizer_class=torch.optim.AdamW,
            lr=args.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=args.weight_decay,
        )
        optimizer.add_param_group({"params": groups[1]["params"], "weight_decay": 0.0})
    lr_of = lr_schedule(
        "cosine", args.learning_rate, args.warmup_iters, args.num_iterations, args.learning_rate_decay_frac
    )

    log = None
    if args.output_dir and processes.rank == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        log = open(Path(args.output_dir) / "main.log", "w", encoding="utf-8", buffering=1)
    seconds = []
    norm = -1.0
    for step in range(args.num_iterations + 1):
        start = time.perf_counter()
        last = step == args.num_iterations
        if val_loader is not None and args.val_loss_every > 0 and (step % args.val_loss_every == 0 or last):
            val_loader.reset()
            total = torch.zeros((), device=device)
            with torch.no_grad(), autocast:
                for _ in range(args.val_max_steps):
                    total += model(*batch(val_loader))[1] / args.val_max_steps
            if processes.size > 1:
                torch.distributed.all_reduce(total)
                total /= processes.size
            say(f"val loss {total.item():f}")
            if log is not None:
                log.write(f"s:{step} tel:{total.item():f}\n")
        if args.sample_every > 0 and (step % args.sample_every == 0 or last) and processes.rank == 0:
            eot = tokenizer.eot_token if tokenizer is not None else raw_model.config.vocab_size - 1
            with autocast:
                tokens = sample(raw_model, eot, 32, device)
            say("---------------")
            say(tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens)))
            say("---------------")
        if last:
            break

        optimizer.zero_grad(set_to_none=True)
        if args.overfit_single_batch:
            train_loader.reset()
        loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if isinstance(model, torch.nn.parallel.DistributedDataParallel):
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast, torch.set_grad_enabled(not args.inference_only):
                part = model(*batch(train_loader))[1] / grad_accum_steps
            loss += part.detach()
            if not args.inference_only:
                part.backward()
        if processes.size > 1:
            torch.distributed.all_reduce(loss)
            loss /= processes.size
        lr = lr_of(step)
        if not args.inference_only:
            norm = float(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        synchronize(device)
        took = time.perf_counter() - start
        if step > 0 and step > args.num_iterations - 20:
            seconds.append(took)
        say(
            f"step {step + 1:4d}/{args.num_iterations} | train loss {loss.item():.6f} | norm {norm:.4f} | lr {lr:.2e} | "
            f"({took * 1000:.2f} ms | {args.total_batch_size / took:.0f} tok/s)"
        )
        if log is not None:
            log.write(f"s:{step} trl:{loss.item():f}\n")
    if log is not None:
        log.close()
    if seconds:
        say(f"final {len(seconds)} iters avg: {statistics.mean(seconds) * 1000:.3f}ms")
    if device.type == "cuda":
        say(f"peak memory consumption: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. argv: the arguments, None for those of the process."""
    args = _parser().parse_args(argv)
    return report_errors("python -m llmc.reference", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
