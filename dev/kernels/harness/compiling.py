"""From a version's file to a library: the C++ compiler, nvcc, and CUDA's source as C++ for the emulated device.

What was built lies in build/kernels, under a name that has a hash of the source, of all headers and of the compiler's flags.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from .ops import FOLDER, ROOT, KernelError, Version

BUILD = ROOT / "build" / "kernels"
DEVICES = ("cpu", "cuda", "emulated")
INCLUDE = ["-I", str(ROOT / "csrc"), "-I", str(FOLDER)]


# ---- the compilers ----


@functools.cache
def cxx() -> str:
    """Return the C++ compiler."""
    return _found("CXX", ["c++", "g++", "clang++"], "no C++ compiler was found: install g++ or clang++")


@functools.cache
def nvcc() -> str:
    """Return CUDA's compiler."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    names = ["nvcc", str(home / "bin" / "nvcc")]
    return _found("NVCC", names, "no nvcc was found: install the CUDA toolkit, or use --device emulated")


def _found(variable: str, names: Sequence[str], otherwise: str) -> str:
    """Return the path of the program that an environment variable names, or else of the first of some names."""
    named = os.environ.get(variable)
    for name in [named] if named else names:
        if path := shutil.which(name):
            return path
    raise KernelError(
        f"there is no '{named}', which {variable} names" if named else f"{otherwise} ({variable} names one)"
    )


@functools.cache
def _accepted(*flags: str) -> bool:
    """Return whether the C++ compiler can make a program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx(), *flags, "-x", "c++", "-", "-o", str(Path(folder) / "program")]
        return subprocess.run(command, input="int main() {}", capture_output=True, text=True).returncode == 0


@functools.cache
def _cpu_flags() -> list[str]:
    # -ffp-contract: a b + c may be one multiply-add, as by -std=gnu++20 and by CUDA.
    flags = ["-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall"]
    for choice in (["-march=native"], ["-mcpu=native"], []):
        if _accepted(*choice):
            flags += choice
            break
    if _accepted("-fopenmp"):
        flags.append("-fopenmp")
    else:
        print(f"{cxx()} has no OpenMP: versions with threads run with one", file=sys.stderr)
    return flags


@functools.cache
def _macros() -> str:
    """Return the macros that the C++ compiler defines for this CPU: its own version, and the CPU's instruction sets."""
    command = [cxx(), *_cpu_flags(), "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise KernelError(f"the C++ compiler does not work:\n{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


@functools.cache
def _gpus() -> list[str]:
    """Return what nvcc calls the architectures of the GPUs, as ["sm_90"]; none if nvidia-smi knows of none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return ["sm_" + line.replace(".", "") for line in done.stdout.split()]


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout


def missing(version: Version, device: str) -> list[str]:
    """Return what a version needs and the CPU or its compiler, or the GPU, does not have."""
    if device == "cpu":
        return [macro for macro in version.needs if f"#define {macro} " not in _macros()]
    return [arch for arch in version.needs if device == "cuda" and arch.rstrip("a") not in _gpus()[:1]]


def _emulation_flags() -> list[str]:
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DLLMC_CUDA_EMULATION", "-pthread"]
    return [*flags, "-Wall", "-Wno-unknown-pragmas", "-I", str(ROOT / "dev" / "cuda_emulation"), *INCLUDE]


# ---- CUDA as C++ ----


def emulated(text: str, path: Path) -> str:
    """Return CUDA source as C++ for dev/cuda_emulation: launches and shared memory become calls. Lines stay where they were."""
    align = r"(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?"
    kind = r"((?:unsigned\s+)?[\w:]+(?:<[^;=]*?>)?)"
    text = re.sub(
        rf"extern\s+__shared__\s+{align}{kind}\s+(\w+)\[\]\s*;",
        r"\1* const \2 = reinterpret_cast<\1*>(cuda_emulation::dynamic_shared());",
        text,
    )
    text = re.sub(
        rf"__shared__\s+{align}{kind}\s+(\w+)((?:\s*\[[^\]]*\])*)\s*;",
        r"auto& \2 = cuda_emulation::shared_variable<\1\3, decltype([] {})>();",
        text,
    )
    launch = re.compile(
        r"([A-Za-z_][\w:]*\s*(?:<[^<>;{}]*(?:<[^<>;{}]*>[^<>;{}]*)*>)?\s*)<<<(.*?)>>>(\s*\()", re.DOTALL
    )
    text = launch.sub(
        lambda m: f"emulated_launch({_launch(m[2])}, [=](auto... arguments) {{ {m[1]}(arguments...); }}){m[3]}", text
    )
    return f'#line 1 "{path.as_posix()}"\n{text}'


def _launch(configuration: str) -> str:
    """Return grid, block and bytes of shared memory as arguments of a function."""
    parts, depth = [""], 0
    for c in configuration:
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    grid, block, shared = [*parts, "0"][:3]
    return f"dim3({grid}), dim3({block}), static_cast<std::size_t>({shared})"


# ---- compiling ----


def _headers() -> str:
    """Return the text of all that a kernel may include."""
    parts = ["csrc/cpu/simd/*.h", "csrc/core/*.h", "csrc/cuda/ptx*.cuh", "dev/cuda_emulation/*", "dev/kernels/kernel.*"]
    files = sorted(file for part in [*parts, "dev/kernels/vectors.h"] for file in ROOT.glob(part))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _compile(compiler: str, arguments: Sequence[str | Path], name: str, key: str, text: str | None = None) -> Path:
    """Run a compiler, unless the same was built before, and return what it wrote.

    Args:
        compiler: "c++" or "nvcc".
        arguments: what it gets; "@" stands for a file that has `text`.
        name: of the result, with "*" where the hash of all goes.
        key: what the result depends on beside arguments, headers and text.
        text: source that lies in no file.
    """
    hashed = "\0".join([compiler, *map(str, arguments), key, text or "", _headers()])
    digest = hashlib.sha256(hashed.replace(str(ROOT), "").encode()).hexdigest()  # a copy of the tree finds the same
    target = BUILD / name.replace("*", digest[:16])
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{os.getpid()}.{target.name}")  # others may be building the same
    source = partial.with_name(f"{partial.name}.cpp")
    if text is not None:
        source.write_text(text, encoding="utf-8")
    command = [nvcc() if compiler == "nvcc" else cxx(), *(str(source) if a == "@" else str(a) for a in arguments)]
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    source.unlink(missing_ok=True)
    if done.returncode != 0:
        raise KernelError(f"{name.split('.')[0]} does not compile:\n{' '.join(command)}\n{done.stderr.strip()}")
    _log(target).write_text(done.stdout + done.stderr, encoding="utf-8")
    partial.replace(target)
    return target


def _log(library: Path) -> Path:
    return library.with_name(f"{library.name}.log")


def _compiled_header(flags: Sequence[str]) -> list[str]:
    """Return flags by which g++ finds kernel.cuh compiled: most of the time of a small file goes into its headers.

    Not for kernel.h and vectors.h: with -march=native, g++ 12 fails on compiled headers.
    """
    if "#define __clang__ " in _macros():
        return []
    arguments = [*flags, "-x", "c++-header", FOLDER / "kernel.cuh"]
    return ["-I", str(_compile("c++", arguments, "headers.*/kernel.cuh.gch", _macros()).parent)]


def _emulator() -> Path:
    source = ROOT / "dev" / "cuda_emulation" / "emulator.cpp"
    arguments = [*_emulation_flags(), "-c", source]
    return _compile("c++", arguments, "emulator.*.o", _macros() + source.read_text(encoding="utf-8"))


def build(version: Version, device: str = "cpu", optimize: str = "-O3", arch: str = "native") -> Path:
    """Compile a version, unless that was done before, and return the library.

    Args:
        version: what is compiled.
        device: "cpu", "cuda" or "emulated".
        optimize: the C++ compiler's flag for "cpu".
        arch: nvcc's -arch for "cuda".
    """
    if device not in DEVICES:
        raise KernelError(f"there is no device '{device}': expected one of {', '.join(DEVICES)}")
    if version.path.suffix != (".cpp" if device == "cpu" else ".cu"):
        raise KernelError(f"{version.op}/{version.path.name} is not for {device}")
    text, name = version.source, f"{version.op}-{version.name}"
    if device == "cpu":
        flags = [*_cpu_flags(), optimize, *version.flags, *INCLUDE]
        return _compile("c++", [*flags, "-shared", version.path], f"{name}.*.so", _macros() + text)
    if device == "cuda":
        code = f"-arch={arch}"
        if version.needs:  # for that alone: other code has not got its instructions
            (arch,) = version.needs
            code = f"--generate-code=arch={arch.replace('sm', 'compute')},code={arch}"
        flags = [
            "-std=c++20",
            "-O3",
            code,
            "--expt-relaxed-constexpr",
            "-Xptxas=-v",
            *version.flags,
            *INCLUDE,
        ]
        options = [*flags, "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared"]
        key = "\0".join([_nvcc_version(), *_gpus(), text])  # "native" is what these are
        return _compile("nvcc", [*options, version.path], f"{name}.{arch}.*.so", key)
    flags = _emulation_flags()
    options = [*_compiled_header(flags), *flags, "-shared"]
    source = emulated(text, version.path)
    return _compile("c++", [*options, "@", _emulator()], f"{name}.emulated.*.so", _macros(), source)


def build_all(versions: Iterable[Version], device: str, optimize: str = "-O3", arch: str = "native") -> None:
    """Compile versions side by side."""
    versions = list(versions)
    for version in versions[:1]:  # what they share is built with the first
        build(version, device, optimize, arch)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(build, version, device, optimize, arch) for version in versions[1:]]:
            done.result()


def registers(library: Path) -> str:
    """Return what nvcc said of a library's kernels: the most registers of a thread, and bytes that were spilled."""
    log = _log(library).read_text(encoding="utf-8")
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return f"{max(used, default=0)} registers, {spilled} bytes spilled"
