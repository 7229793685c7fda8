"""Golden curves: what training computes, bit for bit, as it was when the files in tests/golden were recorded.

A change of structure must leave every value here as it is. The values come through public names alone, so that what is inside may
be moved freely: 40 updates of a small model with gradient accumulation, weight decay, active clipping, warm-up, cosine and a
classifier in chunks, over shuffled data of several epochs. Kept are each update's loss and gradient norm, the validation losses, a
sample, and checksums of the last checkpoint's two files, which hold weights, moments, masters, data order and generators.

Bits are compared if the build is of the recorded kind: compiler family and major version, processor architecture and C library.
They decide the bits by whether a*b+c is contracted to a fused multiply-add (a compiler's choice in every kernel set but baseline)
and by the last bits of logf, sinf and cosf, from which initial weights are drawn. Other builds, and GPUs and AMX tiles that are not
emulated, compute the same sums in other roundings: they are compared within LOOSE, without the checksums and the sample, and a
warning says so. A kernel set without a record is compared so with baseline's.

    python tests/golden/test_golden.py --record      # writes what this build computes into tests/golden

It is legitimate to record anew if a change is meant to alter bits, and its commit says which and why; or if continuous integration
moves to another compiler, in a commit that changes nothing else. To refactor with another compiler than the recorded one, record
before, compare after, and leave the files out of the commit. tests/golden/emulated.json is of the build of dev/ci/emulation.sh.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc import _llmc

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script
from conftest import CUDA, KERNEL_SETS

FOLDER = Path(__file__).parent
VOCAB = 131

SETS = [name.removeprefix("cpu:") for name in KERNEL_SETS]
# What changes bits. What must not, recompute and the number of threads, is varied in the tests. Curves take one thread: where
# several tests run at once, more would wait for each other most of the time.
VARIANTS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "f32"},
    "bf16": {"dtype": "bf16"},
    "bf16_f32_gradients": {"dtype": "bf16", "grad_dtype": "f32"},
    "bf16_no_masters": {"dtype": "bf16", "master_weights": False},
}
GRADIENTS = {name: VARIANTS[name] for name in ("f32", "bf16", "bf16_f32_gradients")}
# The emulated device is slow, so these are of few updates.
CUDA_VARIANTS: dict[str, dict[str, Any]] = {
    name: {**options, "max_steps": 6, "val_every": 3}
    for name, options in {
        "f32_simple": {"dtype": "f32", "attention": "simple"},
        "bf16_simple": {"dtype": "bf16", "attention": "simple", "grad_dtype": "bf16"},
        "bf16_flash": {"dtype": "bf16", "attention": "flash", "fused_gelu": "on", "heads": 1, "channels": 64},
    }.items()
}
# Relative differences that other roundings may come to: several times what they come to between kernel sets.
# They grow from update to update, in bf16 the norm's fastest: of norms, the first ten are compared.
LOOSE = {
    "f32": {"train_loss": 2e-6, "norm": 2e-5, "val_loss": 2e-6, "root mean square": 5e-6},
    "bf16": {"train_loss": 1e-2, "norm": 0.1, "val_loss": 1e-2, "root mean square": 5e-3},
}

SHAPES = {
    "tiny": llmc.GPT2Config(max_seq_len=19, vocab_size=61, num_layers=2, num_heads=3, channels=33),
    "deep": llmc.GPT2Config(max_seq_len=8, vocab_size=128, num_layers=7, num_heads=1, channels=8),
    "wide": llmc.GPT2Config(max_seq_len=33, vocab_size=300, num_layers=1, num_heads=5, channels=80),
}


# ---- what is computed ----


@contextmanager
def device(name: str) -> Iterator[dict[str, Any]]:
    """The settings that choose a kernel set of the CPU, or "cuda"."""
    if name == "cuda":
        yield {"device": "cuda"}
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_ISA", name)
        yield {"device": "cpu"}


def pseudo_random(count: int, seed: int) -> Iterator[int]:
    """Small numbers that no library's next version changes."""
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) % 2**31
        yield seed >> 16


def token_file(path: Path, count: int, seed: int) -> str:
    """llm.c's token file, with something to learn in it."""
    tokens = [(7 * i + r % 3) % VOCAB for i, r in enumerate(pseudo_random(count, seed))]
    header = struct.pack("<3i", 20240520, 1, count).ljust(1024, b"\0")
    path.write_bytes(header + np.array(tokens, dtype="<u2").tobytes())
    return str(path)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    # fmt: off
    return {
        "data": (token_file(folder / "train.bin", 2000, 1),), "val_data": (token_file(folder / "val.bin", 300, 2),),
        "output_dir": str(folder / "run"),
        "vocab_size": VOCAB, "layers": 3, "heads": 3, "channels": 39, "max_seq_len": 23, "seed": 3, "data_seed": 4,
        "seq_len": 21, "batch_size": 3, "total_batch_size": 2 * 3 * 21, "classifier_rows": 25, "max_steps": 40,
        "optimizer": "adamw", "muon_lr_ratio": 1.0, "rows_per_sample": 0, "position_init": "normal",
        "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 5, "final_lr_frac": 0.1, "weight_decay": 0.1,
        "grad_clip": 0.7, "val_every": 20, "val_steps": 3, "sample_every": 0, "tf32": False, "fused_gelu": "off",
        "threads": 1, "progress": "none", "plot": False, "async_save": False,
        **changes,
    }
    # fmt: on


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def curve(folder: Path, where: str, **changes: Any) -> dict[str, Any]:
    """What a run computes; of a run that is resumed, from there on."""
    with device(where) as place:
        result = llmc.train(**settings(folder, **place, **changes))
        sample = result.model.generate([5, 12], 20, temperature=0.9, top_k=40, top_p=0.95, seed=7)
    names = f"model_{result.step:08d}.bin", f"state_{result.step:08d}_00000.bin"
    checksums = [digest((folder / "run" / name).read_bytes()) for name in names]
    numbers = {name: [x.hex() for x in result.history[name]] for name in ("train_loss", "norm", "val_loss")}
    return {**numbers, "sample": sample, "model": checksums[0], "state": checksums[1]}


def table(tensors: Any) -> dict[str, list[str]]:
    """By tensor: a checksum, and for other builds the root of the mean square."""
    out = {}
    for name in tensors:
        array = np.ascontiguousarray(tensors[name])
        mean_square = float(np.mean(array.astype(np.float64) ** 2))
        out[name] = [digest(array.tobytes()), f"{mean_square**0.5:.6e}"]
    return out


def initial_weights(shape: str, seed: int, dtype: str) -> dict[str, list[str]]:
    return table(llmc.GPT2(SHAPES[shape], dtype=dtype, seed=seed, threads=1).parameters)


def gradients(where: str, threads: int, recompute: int, **options: Any) -> dict[str, list[str]]:
    """Of two micro-batches of different lengths."""
    with device(where) as place:
        model = llmc.GPT2(SHAPES["tiny"], threads=threads, recompute=recompute, seed=1, **place, **options)
    model.zero_grad()
    for B, T in ((3, 19), (2, 11)):
        tokens = np.array([r % 61 for r in pseudo_random(B * (T + 1), T)]).reshape(B, T + 1)
        model.forward(tokens[:, :-1])
        model.backward(tokens[:, 1:], 0.5)
    return table(model.gradients)


# ---- what was recorded ----


def build() -> dict[str, str]:
    """What decides the bits, beside the kernel set."""
    family, _, version = str(_llmc.compiler).partition(" ")
    return {
        "compiler": f"{family} {version.partition('.')[0]}",
        "machine": platform.machine(),
        "libc": platform.libc_ver()[0],
    }


def emulated(where: str) -> bool:
    if where == "cuda":
        return "emulated" in _llmc.Backend("cuda").info().description
    if where != "amx":
        return False
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LLMC_ISA", raising=False)
        return bool(_llmc.isa()["used"] != "amx")  # emulated tiles are never used unasked


def file_of(where: str) -> Path:
    return FOLDER / ("emulated.json" if where in ("amx", "cuda") else "cpu.json")


def recorded(where: str, key: str) -> tuple[Any, bool]:
    """What was recorded, and whether its bits are promised here."""
    contents = json.loads(file_of(where).read_text())
    exact = contents["build"] == build() and (where not in ("amx", "cuda") or emulated(where))
    if key not in contents["values"]:  # neon
        key = key.replace(where, "baseline", 1)
        exact = False
    if not exact:
        warnings.warn(f"{key}: compared within rounding, for this is {build()}", stacklevel=3)
    return contents["values"][key], exact


def check_curve(found: dict[str, Any], where: str, variant: str, first: int = 0) -> None:
    """first: the update with which a resumed run began."""
    expected, exact = recorded(where, f"curve {where} {variant}")
    begin = {"train_loss": first, "norm": first, "val_loss": first // 20}
    for name in begin:
        wanted, got = expected[name][begin[name] :], found[name]
        assert len(got) == len(wanted)
        if exact:
            different = [f"{i}: {a} was {b}" for i, (a, b) in enumerate(zip(got, wanted)) if a != b]
            assert not different, f"{name} differs {len(different)} times, first at {different[0]}"
        else:
            last = max(0, 10 - first) if name == "norm" else None
            a, b = ([float.fromhex(x) for x in numbers[:last]] for numbers in (got, wanted))
            np.testing.assert_allclose(a, b, rtol=LOOSE[variant.partition("_")[0]][name], err_msg=name)
    if exact:
        assert found["sample"] == expected["sample"]
        assert (found["model"], found["state"]) == (expected["model"], expected["state"])


def check_table(found: dict[str, list[str]], where: str, key: str, dtype: str) -> None:
    expected, exact = recorded(where, key)
    assert list(found) == list(expected)
    for name in expected:
        if exact:
            assert found[name][0] == expected[name][0], (
                f"{name}: root mean square {found[name][1]}, was {expected[name][1]}"
            )
        else:
            a, b = float(found[name][1]), float(expected[name][1])
            assert a == pytest.approx(b, rel=LOOSE[dtype]["root mean square"]), name


# ---- the tests ----


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("isa", SETS)
def test_curve(tmp_path: Path, isa: str, variant: str, recompute: int) -> None:
    """The same at all levels of recomputation."""
    found = curve(tmp_path, isa, recompute=recompute, **VARIANTS[variant])
    check_curve(found, isa, variant)


def resumed(tmp_path: Path, where: str, **changes: Any) -> dict[str, Any]:
    """Cut off in update 21, and continued from the checkpoint after 20."""

    class PowerCut(llmc.Callback):
        def on_step(self, trainer: llmc.Trainer, info: Any) -> None:
            if info.step == 20:
                raise InterruptedError

    with device(where) as place, pytest.raises(InterruptedError):
        llmc.train(**settings(tmp_path, checkpoint_every=20, **place, **changes), callbacks=[PowerCut()])
    return curve(tmp_path, where, resume=True, **changes)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("isa", SETS)
def test_resumed_curve(tmp_path: Path, isa: str, variant: str) -> None:
    """The rest of the uninterrupted curve, and its checkpoint."""
    check_curve(resumed(tmp_path, isa, **VARIANTS[variant]), isa, variant, first=20)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="neither a GPU nor an emulated one")
@pytest.mark.parametrize("variant", CUDA_VARIANTS)
def test_cuda_curve(tmp_path: Path, variant: str) -> None:
    check_curve(curve(tmp_path, "cuda", recompute=1, **CUDA_VARIANTS[variant]), "cuda", variant)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("shape", SHAPES)
def test_initial_weights(shape: str, seed: int, dtype: str) -> None:
    check_table(initial_weights(shape, seed, dtype), "baseline", f"weights {shape} {seed} {dtype}", dtype)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("variant", GRADIENTS)
@pytest.mark.parametrize("where", [*SETS, *CUDA])
def test_gradients(where: str, variant: str, recompute: int) -> None:
    """The same at all levels of recomputation and numbers of threads."""
    found = gradients(where, recompute + 1, recompute, **GRADIENTS[variant])
    check_table(found, where, f"gradients {where} {variant}", GRADIENTS[variant]["dtype"])


# ---- recording ----


def values() -> Iterator[tuple[str, str, Callable[[Path], Any]]]:
    """(where, key, function that computes) of all that this build can record."""
    cuda = ["cuda"] if CUDA and emulated("cuda") else []
    places = [isa for isa in SETS if isa != "accelerate" and (isa != "amx" or emulated("amx"))] + cuda
    for shape in SHAPES:
        for seed in (0, 42):
            for dtype in ("f32", "bf16"):
                yield (
                    "baseline",
                    f"weights {shape} {seed} {dtype}",
                    lambda _, a=(shape, seed, dtype): initial_weights(*a),
                )
    for where in places:
        for variant, options in GRADIENTS.items():
            yield where, f"gradients {where} {variant}", lambda _, w=where, o=options: gradients(w, 1, 1, **o)
        for variant, options in (CUDA_VARIANTS if where == "cuda" else VARIANTS).items():
            yield (
                where,
                f"curve {where} {variant}",
                lambda folder, w=where, o=options: curve(folder, w, recompute=1, **o),
            )


def record() -> None:
    new: dict[Path, dict[str, Any]] = {}
    for where, key, compute in values():
        with tempfile.TemporaryDirectory() as folder:
            new.setdefault(file_of(where), {})[key] = compute(Path(folder))
        print(key)
    for path, found in new.items():
        old = json.loads(path.read_text()) if path.exists() else {"values": {}, "build": build()}
        left = sorted(set(old["values"]) - set(found))
        if left and old["build"] != build():
            sys.exit(f"{path}: recorded by {old['build']}, and this build, {build()}, cannot record {', '.join(left)}")
        for key in left:
            print(f"{key}: cannot be recorded here, left as it was")
        # One list a line: a curve that changed is some lines of a diff.
        rows = [
            f"{json.dumps(key)}: {{\n"
            + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            + "\n}"
            for key, value in {**old["values"], **found}.items()
        ]
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{{\n"build": {json.dumps(build())},\n"values": {{\n' + ",\n".join(rows) + "\n}\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    record()
