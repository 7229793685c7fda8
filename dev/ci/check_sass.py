"""Checks the machine code of the CUDA kernels, without a GPU: no kernel spills registers, and kernels written for 16 bytes
a thread load and store 16 bytes at a time.

    python dev/ci/check_sass.py build/cuda/_llmc*.so            # needs cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump
    python dev/ci/check_sass.py build/cuda/_llmc*.so --table    # nvidia-cuda-nvdisasm); --table prints every kernel

The exit code is 1 if a kernel fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Kernels bound by memory. The first number among the template's arguments is how many elements a thread takes at once; if
# that is more than 1, 16 bytes at a time must be loaded, and stored by those that write what they have read.
LOADS = (
    "elementwise",
    "layernorm",
    "classifier",
    "encoder_forward",
    "block_sum",
    "adamw",
    "column_sum",
    "wte_chunk",
    "wpe_backward",
    "delta_kernel",
)
STORES = ("elementwise", "adamw", "layernorm", "encoder_forward")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0  # local memory accesses in the code
    loads: dict[int, int] = field(default_factory=dict)  # bytes at a time -> instructions
    stores: dict[int, int] = field(default_factory=dict)

    @property
    def is_wide(self) -> bool:
        width = re.search(r"[<, ](\d+)[,>]", self.name)
        return self.name.startswith(LOADS) and width is not None and int(width[1]) > 1


def find_tool(name: str) -> str:
    spec = importlib.util.find_spec("nvidia")
    wheels = [f"{p}/cu13/bin" for p in (spec.submodule_search_locations or [])] if spec else []
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *wheels]))
    if not found:
        raise FileNotFoundError(f"{name} was not found: pip install nvidia-cuda-{name}")
    return found


def demangle(names: list[str]) -> list[str]:
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|llmc::|^void ", "", n) for n in out]
    return [re.sub(r"\((float|__nv_bfloat16|bf16|[^<>]*\*).*$", "", n) for n in short]


def disassemble(library: Path) -> list[Kernel]:
    cuobjdump = find_tool("cuobjdump")
    env = {**os.environ, "PATH": f"{Path(find_tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def run(flag: str) -> str:
        result = subprocess.run([cuobjdump, flag, str(library)], capture_output=True, text=True, check=True, env=env)
        return result.stdout

    kernels: dict[tuple[str, str], Kernel] = {}
    arch, name = "", ""
    for line in run("-sass").splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m[1]
        elif m := re.search(r"Function : (\S+)", line):
            name = m[1]
            kernels[arch, name] = Kernel(name, arch)
        elif m := re.search(r"\b(LDG|STG|LDL|STL)\.?(\S*)", line):
            kernel = kernels[arch, name]
            if m[1] in ("LDL", "STL"):
                kernel.spills += 1
                continue
            width = next((int(b) // 8 for b in ("128", "64") if f".{b}" in f".{m[2]}"), 4)
            counts = kernel.loads if m[1] == "LDG" else kernel.stores
            counts[width] = counts.get(width, 0) + 1
    for line in run("-res-usage").splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m[1]
        elif m := re.search(r"Function (\S+):", line):
            name = m[1]
        elif (m := re.search(r"REG:(\d+) STACK:(\d+)", line)) and (arch, name) in kernels:
            kernels[arch, name].registers, kernels[arch, name].stack = int(m[1]), int(m[2])
    found = list(kernels.values())
    for kernel, readable in zip(found, demangle([k.name for k in found])):
        kernel.name = readable
    return [k for k in found if "cub::" not in k.name]


def fault(k: Kernel) -> str:
    """Return what is wrong with a kernel, or an empty string."""
    if k.spills:
        return f"{k.spills} accesses of local memory"
    if k.is_wide and not k.loads.get(16):
        return "no loads of 16 bytes"
    if (
        k.is_wide
        and not k.stores.get(16)
        and (k.name.startswith(STORES) or (k.name.startswith("classifier") and "true" in k.name))
    ):
        return "no stores of 16 bytes"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--table", action="store_true", help="print every kernel")
    args = parser.parse_args()
    kernels = disassemble(args.library)
    if not kernels:
        raise ValueError(f"{args.library} has no CUDA kernels")
    for k in sorted(kernels, key=lambda k: (k.arch, k.name)):
        if args.table or fault(k):
            loads, stores = ({b: c[b] for b in sorted(c, reverse=True)} for c in (k.loads, k.stores))
            print(f"{k.arch} {k.registers:4} registers, loads {loads}, stores {stores}  {k.name}  {fault(k)}")
    wide, faulty = sum(k.is_wide for k in kernels), sum(bool(fault(k)) for k in kernels)
    arches = sorted({k.arch for k in kernels})
    print(f"{len(kernels)} kernels for {', '.join(arches)}: {wide} work on 16 bytes a thread, {faulty} fail")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
