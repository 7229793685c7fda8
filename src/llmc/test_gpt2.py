"""`python -m llmc.test_gpt2`: compares llmc with PyTorch on a debug state, as llm.c's test of the same name does.

It reads a model and a debug state (llmc.formats.debug_state), compares logits, loss and every gradient, trains ten steps and compares
the losses, with the tolerances of llm.c's tests. It prints a line for each comparison, then `overall okay: 1` if all agree; if not,
it prints `overall okay: 0` and exits with 1. csrc/apps/test_gpt2.cpp is the same program without Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.arguments import Parser
from llmc.cli import report_errors
from llmc.formats.debug_state import LOSS_RECIPE, DebugState, read_debug_state
from llmc.models.gpt2 import GPT2
from llmc.optim.adamw import AdamW
from llmc.values import canonical_dtype

# Losses of ten steps from OpenAI's GPT-2 124M, as llm.c's test_gpt2.cu has them: debug states that llm.c wrote hold no losses.
GPT2_124M_LOSSES = (5.270009, 4.060681, 3.320085, 2.717550, 2.181066, 1.653923, 1.168050, 0.736873, 0.401021, 0.187493)

# llm.c's tolerances are those of test_gpt2.cu, but for the losses of f32 steps, which are test_gpt2.c's. A gradient may differ from
# the expected value by 7.9 % of that value plus a tolerance, which in bf16 depends on the parameter.
_GRADIENT_RELATIVE = 0.079
_F32 = {"logits": 1e-3, "loss": 1e-5, "gradient": 1e-6, "step": 1e-2}
_BF16 = {"logits": 25.0, "loss": 0.05, "step": 0.05}
# fmt: off
_BF16_GRADIENTS = {
    "wte": 5e-1, "wpe": 4e-3, "ln1w": 1e-1, "ln1b": 4e-2, "qkvw": 5e-2, "qkvb": 3.5e-2, "attprojw": 2e-2, "attprojb": 3e-2,
    "ln2w": 5e-2, "ln2b": 3e-2, "fcw": 3e-2, "fcb": 3e-2, "fcprojw": 2e-2, "fcprojb": 1e-2, "lnfw": 1e-1, "lnfb": 2e-2,
}
# fmt: on
# llm.c's 25 for bf16 logits fits OpenAI's GPT-2, whose logits reach -130. For smaller logits the tolerance is smaller in proportion.
_BF16_LOGITS_RELATIVE = 25.0 / 130.0
# Adam's first steps follow the signs of the gradients. With random weights many gradients are near zero, and rounding to bf16 changes
# their signs. So a tenth of what the loss has fallen is added to the tolerance.
_BF16_STEP_RELATIVE = 0.1


def logits_tolerance(dtype: str, expected: NDArray[np.float32]) -> float:
    """Return how far logits may be from the expected ones, for a model of this dtype."""
    if dtype == "f32":
        return _F32["logits"]
    return min(_BF16["logits"], _BF16_LOGITS_RELATIVE * float(np.abs(expected).max()))


def check_tensor(name: str, got: NDArray[Any], expected: NDArray[np.float32], tolerance: float) -> bool:
    """Compare a gradient with the expected one; print the first five pairs and a verdict, as llm.c does.

    Args:
        name: what the tensor is called in the output.
        got: any shape, f32 or bf16.
        expected: the same shape.
        tolerance: the absolute difference that is allowed beside 7.9 % of the expected value.

    Returns:
        Whether all elements are close. A NaN is not.
    """
    a, b = got.astype(np.float32).reshape(-1), expected.reshape(-1)
    difference = np.abs(a - b)
    close = difference <= tolerance + _GRADIENT_RELATIVE * np.abs(b)
    print(name)
    for i in range(min(5, len(a))):
        print(f"{'OK' if close[i] else 'NOT OK'} {a[i]:f} {b[i]:f}")
    ok = bool(close.all())
    worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    print(f"TENSOR {'OK' if ok else 'NOT OK'}, maxdiff = {difference[worst]:e} at {worst}")
    return ok


def check_logits(model: GPT2, state: DebugState) -> bool:
    """Compare the model's logits with the debug state's; print ten pairs and a verdict, and return whether all are close."""
    got = model.logits(state.inputs)
    tolerance = logits_tolerance(model.dtype, state.logits)
    for x, y in list(zip(state.logits.reshape(-1), got.reshape(-1)))[:10]:
        print(f"{x:f}, {y:f}")
    difference = np.abs(got - state.logits)
    ok = bool((difference < tolerance).all())
    if not ok:
        b, t, v = np.unravel_index(int(np.argmax(~(difference < tolerance))), difference.shape)
        print(f"MISMATCH AT INDEX {b * got.shape[1] + t},{v}: {state.logits[b, t, v]:f} {got[b, t, v]:f}")
    print(f"{'' if ok else 'NOT '}OK (LOGITS), max_diff = {difference.max():e}")
    return ok


def check(model: GPT2, state: DebugState) -> bool:
    """Make all comparisons, for which the model is trained ten steps.

    Args:
        model: a model with the weights from which the debug state was made.
        state: the debug state.

    Returns:
        Whether everything agrees.
    """
    bf16 = model.dtype == "bf16"
    tolerances = _BF16 if bf16 else _F32
    okay = check_logits(model, state)
    recipe = LOSS_RECIPE
    optimizer = AdamW(
        model,
        betas=(recipe["beta1"], recipe["beta2"]),
        eps=recipe["eps"],
        weight_decay=recipe["weight_decay"],
        grad_clip=recipe["grad_clip"],
    )
    expected = list(state.losses)
    if not expected and abs(state.loss - GPT2_124M_LOSSES[0]) < 1e-3 and model.config.channels == 768:
        expected = list(GPT2_124M_LOSSES)
    for step in range(10):
        start = time.perf_counter()
        model.zero_grad()
        model.forward(state.inputs)
        model.backward(state.targets)
        loss = model.mean_loss
        took = 1000 * (time.perf_counter() - start)
        if step == 0:
            ok = abs(loss - state.loss) < tolerances["loss"]
            print(f"LOSS {'OK' if ok else 'MISMATCH'}: {loss:f} {state.loss:f}")
            okay &= ok
            gradients = model.gradients
            for name, reference in state.gradients.items():
                tolerance = _BF16_GRADIENTS[name] if bf16 else _F32["gradient"]
                okay &= check_tensor(f"d{name}", gradients[name], reference, tolerance)
        optimizer.step(recipe["lr"])
        if step < len(expected):
            fallen = expected[0] - expected[step] if bf16 and state.losses else 0.0
            ok = abs(loss - expected[step]) < tolerances["step"] + _BF16_STEP_RELATIVE * max(0.0, fallen)
            okay &= ok
            print(f"step {step}: loss {loss:f} expected {expected[step]:f} (took {took:f} ms) OK = {int(ok)}")
        else:
            print(f"step {step}: loss {loss:f} (took {took:f} ms)")
    if not expected:
        print("the steps' losses were compared with nothing: the debug state holds none (llmc.reference writes them)")
    return okay


def run(args: argparse.Namespace) -> int:
    """Read the files, compare and print; return the exit code: 0 if everything agrees, else 1."""
    dtype = canonical_dtype(args.dtype)
    path = args.model or ("gpt2_124M_bf16.bin" if dtype == "bf16" else "gpt2_124M.bin")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no model '{path}': `python -m llmc.reference` writes one and its debug state (needs torch), and llm.c's starter "
            "pack has both"
        )
    model = GPT2.from_checkpoint(path, dtype=dtype, device=args.device, recompute=args.recompute)
    print("[GPT-2]")
    for name in ("max_seq_len", "vocab_size", "padded_vocab_size", "num_layers", "num_heads", "channels"):
        print(f"{name}: {getattr(model.config, name)}")
    print(f"num_parameters: {model.num_parameters}")
    state = read_debug_state(args.state, model.config)
    print(f"[State]\nbatch_size: {state.inputs.shape[0]}\nseq_len: {state.inputs.shape[1]}")
    okay = check(model, state)
    print(f"overall okay: {int(okay)}")
    return 0 if okay else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. argv: the arguments, None for those of the process."""
    parser = Parser(prog="python -m llmc.test_gpt2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="model file [gpt2_124M.bin, with --dtype bf16 gpt2_124M_bf16.bin]")
    parser.add_argument(
        "state", nargs="?", default="gpt2_124M_debug_state.bin", help="debug state [gpt2_124M_debug_state.bin]"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--dtype", default="f32", help="f32 or bf16 [f32]")
    parser.add_argument(
        "--recompute",
        type=int,
        choices=(0, 1, 2),
        default=1,
        help="how much backward computes again instead of keeping it [1]",
    )
    args = parser.parse_args(argv)
    return report_errors("python -m llmc.test_gpt2", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
