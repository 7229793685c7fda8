"""Who may include and import whom (doc/design.md), read from the sources themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "src" / "llmc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
MODULES = sorted(PACKAGE.rglob("*.py"))

# Folder -> the folders whose headers it may include; "" is csrc itself.
MAY_INCLUDE = {
    "": {"", "core"},
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "comm", "cuda"},
    "comm": {"core", "comm"},
    "optim": {"core", "comm", "optim"},
    "model": {"core", "comm", "model"},
    "bindings": {"", "core", "comm", "optim", "model", "bindings"},
    "apps": {"", "core", "optim", "model", "apps"},
}
# backends.cpp names the backends, and bindings report on the machine and the build.
EXCEPTIONS = {
    ("backends.cpp", "cpu/make_cpu.h"),
    ("backends.cpp", "cuda/make_cuda.h"),
    ("bindings/module.cpp", "cpu/caches.h"),
    ("bindings/module.cpp", "cpu/isa.h"),
    ("bindings/module.cpp", "cpu/parallel.h"),
    ("bindings/module.cpp", "cpu/peak.h"),
    ("bindings/module.cpp", "cuda/make_cuda.h"),
    ("bindings/comm.cpp", "cuda/make_cuda.h"),
}
CUDA_HEADERS = re.compile(r"cuda|cub/|cublas|cudnn|nccl|nvml")
# Of the files that are compiled once per instruction set: nothing in these has a function that the linker could merge.
PLAIN_HEADERS = {"immintrin.h", "emmintrin.h", "arm_neon.h", "cstdint", "dlfcn.h", "math.h", "string.h"}


def name(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def folder_of(file: str) -> str:
    return file.split("/")[0] if "/" in file else ""


def code(path: Path) -> str:
    """Return the file's text without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r'(?<!include )"(?:\\.|[^"\\\n])*"', '""', text)


def includes(path: Path) -> list[tuple[str, bool]]:
    """Return (header, whether it is a local one) of each include."""
    found = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.M)
    return [(header, bracket == '"') for bracket, header in found]


def test_there_is_something_to_look_at():
    assert {name(p) for p in SOURCES} >= {"core/backend.h", "model/gpt2.cpp", "cpu/parallel.cpp", "cuda/no_cuda.cpp"}
    assert {p.name for p in MODULES} >= {"gpt2.py", "trainer.py", "cli.py"}
    assert {folder_of(name(p)) for p in SOURCES} == set(MAY_INCLUDE)
    assert includes(CSRC / "core" / "parameter.h") == [
        ("cstdint", False),
        ("string", False),
        ("core/tensor.h", True),
    ]
    assert functions(CSRC / "core" / "check.h") == {"fill_into", "filled"}
    assert imports(ast.parse("def f():\n    from llmc import checkpoint as c, _llmc\n    import llmc")) == {
        "llmc.checkpoint",
        "llmc",
    }
    assert STD_FUNCTIONS >= {"format", "move", "size", "exists", "floor"} and not STD_FUNCTIONS & {"string", "printf"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes(path):
    folder = folder_of(name(path))
    for header, local in includes(path):
        if local and (name(path), header) not in EXCEPTIONS:
            # Emulated intrinsics of dev/cuda_emulation are found by their bare name.
            allowed = folder_of(header) in MAY_INCLUDE[folder] or (
                folder == "cuda" and header in ("ptx_emulated.h", "ptx_sm90_emulated.h")
            )
            assert allowed, f"{name(path)} includes {header}"
        if not local:
            assert folder == "cuda" or not CUDA_HEADERS.search(header), f"{name(path)} includes <{header}>"
            assert folder == "bindings" or not header.startswith(("pybind11", "Python")), (
                f"{name(path)} includes <{header}>"
            )
            assert header != "omp.h" or name(path).startswith("cpu/parallel"), f"{name(path)} includes <omp.h>"
            if folder in ("core", "comm", "optim", "model"):
                assert not header.endswith(".h"), f"{name(path)} includes <{header}>: core is standard C++ alone"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_words(path):
    """The library does not print or end the process, has its threads in one place, and asks whether CUDA was built only in csrc/cuda."""
    text, folder = code(path), folder_of(name(path))
    assert "#pragma omp" not in text or name(path).startswith("cpu/parallel")
    assert not re.search(r"std::thread\b(?!::id)", text) or name(path).startswith(("cpu/parallel", "cpu/cpu_backend"))
    if folder != "apps":
        for word in (
            r"\bprintf\s*\(",
            r"\bputs\s*\(",
            r"std::c(out|err|log)\b",
            r"(?<![\w.])_?exit\s*\(",
            r"\babort\s*\(",
        ):
            assert not re.search(word, text), f"{name(path)} has {word}"
    if folder != "cuda":
        assert not re.search(r"#\s*(if|elif).*(LLMC_CUDA|__CUDA)", text)
    assert "-ffast-math" not in text


def test_files_of_one_instruction_set_stand_alone():
    """They include intrinsics, plain C and each other: an inline function shared with others would crash older CPUs."""
    for path in SOURCES:
        if name(path).startswith("cpu/simd/"):
            for header, local in includes(path):
                fine = header.startswith("cpu/simd/") or header in ("cpu/kernels.h", "core/bf16.h")
                assert fine if local else header in PLAIN_HEADERS, f"{name(path)} includes {header}"
            others = set(re.findall(r"std::(\w+)", code(path))) - {"int8_t", "int16_t", "int32_t", "int64_t"}
            assert others <= {"uint8_t", "uint16_t", "uint32_t", "uint64_t", "uintptr_t"}, (
                f"{name(path)} uses std::{others}"
            )
    plain = "core/adamw_step.h", "core/muon_step.h", "core/bf16.h"
    for header in ("cpu/kernels.h", *plain):
        path = CSRC / header
        assert set(includes(path)) <= {("cstdint", False), *((other, True) for other in plain)}
        assert "inline" not in code(path)


# The functions of namespace std and of those inside it, C's own left out, in libc++, libstdc++ and Microsoft's library.
STD_FUNCTIONS = set(Path(__file__).with_name("std_functions.txt").read_text(encoding="utf-8").split())


def functions(path: Path) -> set[str]:
    """Return the functions declared at the beginning of a line, which are those of namespaces; classes and bodies are indented."""
    lines = re.findall(r"^[A-Za-z_\[][^\n{]*", code(path), flags=re.M)
    return {f for line in lines for f in re.findall(r"(?<![\w:.>~])([a-z]\w*)\(", line)}


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "dev" / "ci" / "check_kernels.cpp"], ids=lambda p: p.name)
def test_no_function_is_named_like_one_of_std(path):
    """A call with a std::string among its arguments looks for functions in std too (argument-dependent lookup): a format()
    of llmc is ambiguous with some libraries, and with others std's is called silently. Functions of numbers and vectors are safe."""
    if path.is_relative_to(CSRC / "cpu" / "simd"):  # they know no type of std, see above
        return
    safe = {"lerp"} if path == CSRC / "cuda" / "adamw.cu" else set()
    assert not functions(path) & STD_FUNCTIONS - safe


# ---- Python ----

# Packages that are not needed to train on a CPU; each is imported by the function that uses it.
OPTIONAL = {"torch", "matplotlib", "mpi4py", "safetensors", "transformers", "huggingface_hub", "wandb", "tensorboardX"}
OPTIONAL |= {"pyarrow", "requests", "tokenizers", "datasets", "lm_eval", "pynvml", "gguf"}


def imported_at_once(tree: ast.Module) -> set[str]:
    """Return the imports that run when the module is imported: those outside of functions and of TYPE_CHECKING."""
    found: set[str] = set()
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            queue += ast.iter_child_nodes(node)
    return found


# All modules but two that are built on such packages, PyTorch and lm-eval. No other module imports these two at its top.
SPECIAL = ("llmc.reference", "llmc.lm_eval")
ORDINARY = [p for p in MODULES if not (p.is_relative_to(PACKAGE / "reference") or p.name == "lm_eval.py")]


@pytest.mark.parametrize("path", ORDINARY, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_optional_packages_are_imported_where_used(path):
    found = imported_at_once(ast.parse(path.read_text(encoding="utf-8")))
    assert not {name for name in found if name.split(".")[0] in OPTIONAL or name.startswith(SPECIAL)}


# Room (a folder of src/llmc, or a module beside them) -> the rooms that it may import, in the order in which they stand on each
# other: a room imports only such as come before it, so there is no circle between rooms.
FLOORS: dict[str, set[str]] = {
    "values": set(),
    "system": {"values"},
    "distributed": {"values", "system"},
    "formats": {"values", "system"},
    "models": {"values", "system", "formats"},
    "data": {"values", "system", "formats"},
    "datasets": {"values", "system", "formats", "data"},
    "optim": {"values", "models"},
    "selfcheck": {"values", "formats", "models", "optim"},
    "checkpoint": {"values", "system", "formats", "models", "optim"},
    "evals": {"values", "system", "formats", "models", "data"},
    "hub": {"values", "system", "formats", "models", "data"},
    "load": {"values", "system", "formats", "models", "data", "checkpoint", "hub"},
    "plot": {"values", "system", "formats", "optim"},
    "training": {
        "values",
        "system",
        "distributed",
        "formats",
        "models",
        "data",
        "optim",
        "checkpoint",
        "evals",
        "plot",
    },
    "__init__": {"values", "system", "models", "data", "optim", "training"},
    "sweep": {"values", "system", "distributed", "formats", "optim", "checkpoint", "plot", "training"},
    "arguments": {"values"},
    "commands": {
        "arguments",
        "values",
        "system",
        "distributed",
        "formats",
        "models",
        "data",
        "datasets",
        "optim",
        "selfcheck",
        "checkpoint",
        "evals",
        "hub",
        "load",
        "plot",
        "training",
        "sweep",
    },
    "cli": {"arguments", "commands"},
    # Programs of their own, which no other room imports.
    "train_gpt2": {"system", "models", "data", "datasets", "optim", "arguments", "cli"},
    "test_gpt2": {"values", "system", "formats", "models", "optim", "arguments", "cli"},
    "reference": {"values", "system", "formats", "models", "data", "optim", "hub", "load", "arguments", "cli"},
    "lm_eval": {"models", "data", "load", "cli"},
    "__main__": {"cli"},
}
NAMES = {".".join(("llmc", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in MODULES}


def room(module: str) -> str:
    """Return the room of a module: training for llmc.training.trainer, __init__ for llmc itself."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST) -> set[str]:
    """Return the modules of llmc that a module imports, in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "llmc"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            if node.module and node.module.split(".")[0] == "llmc":
                for a in node.names:
                    whole = f"{node.module}.{a.name}"
                    is_module = whole in NAMES or f"{whole}.__init__" in NAMES or whole == "llmc._llmc"
                    found.add(whole if is_module else node.module)
    return found - {"llmc._llmc"}


GRAPH = {name: imports(ast.parse(path.read_text(encoding="utf-8"))) for name, path in NAMES.items()}


def test_floors_stand_on_each_other():
    order = list(FLOORS)
    for i, (floor, below) in enumerate(FLOORS.items()):
        assert below <= set(order[:i]), f"{floor} may import {below - set(order[:i])}, which stands above it"
    assert {room(name) for name in NAMES} == set(order)


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_down(module):
    for other in GRAPH[module]:
        allowed = room(other) == room(module) or room(other) in FLOORS[room(module)]
        assert allowed, f"{module} imports {other}: {room(module)} stands on {sorted(FLOORS[room(module)])}"


def test_no_circle():
    """Imports make no circle between modules, those of one room included."""
    left = {name: {m for m in others if m in GRAPH} - {name} for name, others in GRAPH.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_importing_llmc_imports_little():
    """The package and its command line are imported in a process of their own."""
    script = "import sys, llmc, llmc.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(out.split())
    assert "llmc" in loaded and not loaded & OPTIONAL
