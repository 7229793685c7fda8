"""Check the kernels of this machine: every op and a training step beside NumPy in float64. It takes less than half a minute.

Run it first on hardware that nobody has tried. Each line is an op with one dtype and one set of kernels: how many results were looked at,
and the one that is worst beside its limit. The exit code is 1 if a kernel is wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from llmc import _llmc
from llmc.arguments import threads
from llmc.selfcheck.devices import Kernels, check, cpu_backend, open_libraries, with_options
from llmc.selfcheck.run import Outcome
from llmc.training.setup import open_device
from llmc.values import canonical_dtype, check_seed

_HEADER = ("op", "kernels", "dtype", "results", "worst", "error", "limit", "")
_WIDTHS = (32, 21, 5, 7, 32, 7, 7, 5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: what training would take [auto]")
    parser.add_argument(
        "--isa", metavar="NAME", help="check this kernel set of the CPU, or all [what training would take]"
    )
    parser.add_argument("--dtype", help="f32 or bf16 [both]")
    parser.add_argument("--threads", type=threads, default=0, metavar="N", help="0: as many as the process may use [0]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs [0]")
    parser.add_argument("--verbose", action="store_true", help="a line for each result")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    check_seed(args.seed, 32)
    dtypes = [canonical_dtype(args.dtype)] if args.dtype else ["f32", "bf16"]
    start, absent = time.monotonic(), list[str]()
    if args.isa is not None:
        if args.device not in ("auto", "cpu"):
            raise ValueError(f"--isa {args.isa} is a kernel set of the CPU, but the device is {args.device}")
        usable = _llmc.isa()["usable"]
        if args.isa not in (*usable, "all"):
            raise ValueError(
                f"--isa {args.isa}: expected all, or a kernel set that is usable here: {', '.join(usable)}"
            )
        names = usable if args.isa == "all" else [args.isa]
        kernels = [Kernels(cpu_backend(name, args.threads), name) for name in names]
    else:
        device, backend = open_device(args.device, args.threads)
        kernels = [Kernels(backend, backend.info().isa)]
        if device != "cpu":
            open_libraries(backend)
            more, absent = with_options(backend)
            kernels += more
        elif args.device == "auto" and _llmc.cuda_built():
            absent = [f"the GPU: {_llmc.cuda_status()}"]
    info = kernels[0].backend.info()
    sets = ", ".join(k.name for k in kernels if k.option is None)
    print(f"checking {sets}", flush=True)  # before: a kernel that this machine cannot execute ends the process
    _print(_HEADER)
    outcomes: list[Outcome] = []
    for group in check(kernels, dtypes, args.seed):
        _show(group, args.verbose)
        outcomes += group
    wrong, unusable = [o for o in outcomes if not o.ok], any(o.fatal for o in outcomes)
    for reason in absent:
        print(f"left out: {reason}")
    if unusable:
        print("left out: what comes after, as the device takes no more calls")
    elif fallbacks := kernels[0].backend.info().fallbacks:
        print(f"right, but by slower means than chosen: {fallbacks}")
    threads = f", {info.threads} threads" if info.name == "cpu" else ""
    print(
        f"llmc {_llmc.__version__}, {info.name}: {info.description}, {sets}{threads}: {len(outcomes)} results in "
        f"{time.monotonic() - start:.1f} s, {f'{len(wrong)} WRONG' if wrong else 'all right'}"
    )
    if wrong:
        raise _llmc.Error(_complaint(wrong))
    return 0


def _show(outcomes: Sequence[Outcome], verbose: bool) -> None:
    """Print a line for each op, set of kernels and dtype, with the worst outcome; or for each outcome."""
    rows: dict[object, list[Outcome]] = {}
    for i, o in enumerate(outcomes):
        rows.setdefault(i if verbose else (o.op, o.kernel, o.dtype), []).append(o)
    for of_one in rows.values():
        worst = max(of_one, key=lambda o: o.ratio)
        what = worst.note or f"{worst.result}, {worst.size}".removesuffix(", ")
        figures = (f"{worst.error:.1e}", f"{worst.limit:.1e}", "ok" if worst.ok else "WRONG")
        _print((worst.op, worst.kernel, worst.dtype, str(len(of_one)), what, *figures))


def _print(columns: Sequence[str]) -> None:
    cells = [c.rjust(w) if i in (3, 5, 6) else c.ljust(w) for i, (c, w) in enumerate(zip(columns, _WIDTHS))]
    print("  ".join(cells).rstrip(), flush=True)


def _complaint(wrong: Sequence[Outcome]) -> str:
    """Return one line that names the kernels that are wrong, with the figures of the first."""
    names = dict.fromkeys(f"{o.op} ({o.kernel}, {o.dtype})" for o in wrong)
    first = " ".join(str(wrong[0]).split())
    return f"wrong: {'; '.join(names)}. The first: {first}. Please report it with this table and what `llmc info` says"
