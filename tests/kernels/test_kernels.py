"""dev/kernels: every version against its op's formula, on the CPU and on the emulated device, and the harness that compares them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "dev" / "kernels"))
import run  # noqa: E402
from harness import compiling, ops  # noqa: E402

if sys.platform == "win32":
    pytest.skip("dev/kernels wants a compiler with the options of g++", allow_module_level=True)
try:
    compiling.cxx()
except run.KernelError as e:
    pytest.skip(str(e), allow_module_level=True)

FAST = "-O0"  # to compile, which is what takes the time here
VERSIONS = [v for name in run.op_names() for device in ("cpu", "cuda") for v in run.find_op(name).versions(device)]


def wrong(results: list[run.Result]) -> dict[str, float]:
    """Return the versions whose error is more than is allowed."""
    return {f"{r.op}/{r.version}": r.error for r in results if not r.error <= 1}


@pytest.mark.parametrize("op", run.op_names())
def test_cpu_versions(op: str) -> None:
    results = run.measure(op, timed=False, peers=False, optimize=FAST, threads=2)
    assert len(results) > 2 and not wrong(results)


@pytest.mark.skipif(sys.platform != "linux", reason="the device is emulated on Linux")
def test_cuda_versions_on_the_emulated_device() -> None:
    compiling.build_all([v for v in VERSIONS if v.path.suffix == ".cu"], "emulated")
    assert not wrong(
        [r for op in run.op_names() if run.find_op(op).versions("cuda") for r in run.measure(op, "emulated")]
    )


def test_numbers_are_those_of_a_formula_known_by_heart() -> None:
    """A check of op.py's oracles themselves: 3 numbers 1, 2, 3 have mean 2 and variance 2/3."""
    op = run.find_op("layernorm_forward")
    inputs = {"inp": np.array([[1.0, 2.0, 3.0]]), "weight": np.ones(3), "bias": np.zeros(3)}
    for name in ("cpu_1", "cpu_8_bf16"):
        out = run.call(op.version(name), shape={"N": 1, "C": 3}, optimize=FAST, **inputs)
        np.testing.assert_allclose(out["mean"], [2.0])
        np.testing.assert_allclose(out["rstd"], [1.5**0.5], rtol=1e-4)
        np.testing.assert_allclose(out["out"].astype(float), [[-(1.5**0.5), 0, 1.5**0.5]], rtol=1e-2)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: f"{v.op}-{v.name}")
def test_each_file_says_what_it_is(version: run.Version) -> None:
    """It begins with a title, an empty line of comment, and what is different and why."""
    first, second, third = re.sub(r"^// (needs|flags):.*\n", "", version.source, flags=re.MULTILINE).split("\n")[:3]
    assert re.match(r"// (?=[A-Z0-9]|bf16)", first) and len(first) < 110, first
    assert second == "//" and third.startswith("// "), "what it changes, and why that should be faster"
    others = run.find_op(version.op).versions("cpu" if version.path.suffix == ".cpp" else "cuda")
    assert [v.number for v in others] == list(range(1, len(others) + 1)), "versions are numbered from 1"


# ---- the harness ----

OP = """
import numpy as np
SHAPE, SMALL = {"N": 1000}, [{"N": 1}, {"N": 33}]
OUTPUTS, F32 = {"out": ("N",)}, set()
def inputs(rng, N):
    return {"inp": rng.standard_normal(N), "factor": 2.0}
def oracle(inp, factor):
    return inp * factor
def limit(name, dtype):
    return 1e-6
def flops(N):
    return N
"""
TIMES = """// Times factor
#include "kernel.h"
KERNEL void run(float* out, const float* inp, float factor, int64_t N) {
    for (int64_t i = 0; i < N; ++i) out[i] = inp[i] * factor;
}
"""


@pytest.fixture
def make_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that makes an op of one version whose source has something replaced, and returns the op's name."""
    monkeypatch.setattr(ops, "FOLDER", tmp_path)
    monkeypatch.setattr(compiling, "BUILD", tmp_path / "build")

    def make(*replaced: tuple[str, str]) -> str:
        text = TIMES
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        run.find_op.cache_clear()
        (tmp_path / "times").mkdir(exist_ok=True)
        (tmp_path / "times" / "op.py").write_text(OP)
        (tmp_path / "times" / "cpu_1_times.cpp").write_text(text)
        return "times"

    yield make
    run.find_op.cache_clear()


@pytest.mark.parametrize(
    "old,new",
    [("* factor;", "* factor + 1e-4f;"), ("i = 0", "i = 1"), ("* factor;", "/ 0.0f;")],
    ids=["inexact", "an element is not written", "infinite"],
)
def test_a_wrong_version_is_seen(make_op: Callable[..., str], old: str, new: str) -> None:
    (result,) = run.measure(make_op((old, new)), optimize=FAST, timed=False)
    assert result.error > 1
    assert "WRONG" in run.table([result])[0][1]


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("i < N", "i <= N", "writes outside of out"),
        (
            "const float* inp, float factor",
            "float factor, const float* inp",
            r"expected\s+float\* out, const float\* inp, float",
        ),
        ("* factor;", "* factors;", "times-cpu_1_times does not compile"),
        ("void run", "void walk", "no `KERNEL void run"),
    ],
)
def test_a_version_that_does_not_fit(make_op: Callable[..., str], old: str, new: str, message: str) -> None:
    with pytest.raises(run.KernelError, match=message):
        run.measure(make_op((old, new)), optimize=FAST, timed=False)


def test_what_is_not_there() -> None:
    with pytest.raises(run.KernelError, match=r"no op 'norm': expected one of .*layernorm_forward"):
        run.measure("norm")
    with pytest.raises(run.KernelError, match="no version cpu_99"):
        run.measure("gelu_forward", versions=["cpu_99"])
    with pytest.raises(run.KernelError, match="no size T: expected N"):
        run.measure("gelu_forward", shape={"T": 3})
    with pytest.raises(run.KernelError, match="no device 'gpu': expected one of cpu, cuda, emulated"):
        run.measure("gelu_forward", "gpu")
    with pytest.raises(run.KernelError, match="gelu_forward/cuda_1_tanh.cu is not for cpu"):
        run.call(run.find_op("gelu_forward").version("cuda_1"), shape={"N": 1}, inp=np.ones(1))
    with pytest.raises(run.KernelError, match="expected V <= Vp"):
        run.measure("classifier", versions=["cpu_1"], shape={"V": 60000}, optimize=FAST, peers=False, budget=0.0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["norm"], "no op begins with 'norm'"),
        (["gelu", "--check", "--versions", "cpu_99"], "gelu_backward, gelu_forward: no version cpu_99 for cpu"),
        (["gelu", "--build", "--versions", "cpu_99"], "gelu_backward, gelu_forward: no version cpu_99 for cpu"),
        (["gelu", "--threads", "-1"], "--threads -1: expected"),
        (["gelu", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["gelu", "--shape", "N=0"], "'N=0': expected NAME=NUMBER"),
    ],
)
def test_the_program_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert run.main(arguments) == 2
    except SystemExit as e:  # argparse's
        assert e.code == 2
    assert message in capsys.readouterr().err


def test_call_compares_what_it_gets_with_the_op(make_op: Callable[..., str]) -> None:
    version = run.find_op(make_op()).version("cpu_1")
    inputs = {"inp": np.array([1, 2, 3]), "factor": 2}
    assert run.call(version, shape={"N": 3}, optimize=FAST, **inputs)["out"].tolist() == [2.0, 4.0, 6.0]
    for shape, changed, message in (
        ({"N": 4}, {}, r"inp has shape \(3,\), expected \(4,\)"),
        ({"T": 3}, {}, "has the sizes N, not T"),
        ({"N": 3}, {"weight": 1.0}, "takes inp, factor, not inp, factor, weight"),
    ):
        with pytest.raises(run.KernelError, match=message):
            run.call(version, shape=shape, optimize=FAST, **inputs, **changed)


def test_a_compiler_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(run.KernelError, match="there is no 'no-such-compiler', which CXX names"):
        compiling.cxx.__wrapped__()


def test_the_program_writes_what_it_shows(
    make_op: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [make_op(), "--small", "--threads", "1", "--shape", "N=50", "--json", str(tmp_path / "results.json")]
    assert run.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "times (N=50)" in shown and "cpu_1_times: Times factor" in shown
    written = json.loads((tmp_path / "results.json").read_text())
    (result,) = written["results"]
    assert written["machine"]["threads"] == 1
    assert result["seconds"] > 0 and result["error"] <= 1 and result["shape"] == {"N": 50}
    assert result["gbs"] == pytest.approx(2 * 4 * 50 / result["seconds"] / 1e9)
    make_op(("* factor;", "* factor + 1.0f;"))
    assert run.main(["times", "--check"]) == 1


def test_llmc_and_others_are_beside_the_versions() -> None:
    results = run.measure("gelu_forward", versions=["cpu_3"], small=True, budget=0.0, optimize=FAST)
    assert [r.version for r in results][:2] == ["cpu_3_vectors", "numpy_f32"] and results[-1].version == "llmc_f32"
    assert not wrong(results) and all(r.seconds for r in results)


def test_cuda_becomes_cpp() -> None:
    cuda = """
__global__ void f(int n) {
    __shared__ float tile[32][W + 1];
    extern __shared__ __align__(16) unsigned char bytes[];
}
    f<<<ceil_div(n, 32), dim3(32, 8), sizeof(float) * n>>>(n);
    g<float, 4>
        <<<1, 32>>>(a, b);
"""
    cpp = compiling.emulated(cuda, Path("f.cu"))
    assert cpp.count("\n") == cuda.count("\n") + 1, "a line that tells the number of the next; the others stay"
    for part in (
        "auto& tile = cuda_emulation::shared_variable<float[32][W + 1], decltype([] {})>();",
        "unsigned char* const bytes = reinterpret_cast<unsigned char*>(cuda_emulation::dynamic_shared());",
        "emulated_launch(dim3(ceil_div(n, 32)), dim3( dim3(32, 8)), static_cast<std::size_t>( sizeof(float) * n)",
        "f(arguments...); })(n);",
        "g<float, 4>\n",
    ):
        assert part in cpp, cpp
    assert "<<<" not in cpp


def test_source_of_a_function() -> None:
    text = run.source("dev/kernels/gelu_forward/cpu_3_vectors.cpp", "exponential")
    assert text.startswith("static Vec exponential(Vec x) {") and text.endswith("}")
    assert run.source("dev/kernels/kernel.h").startswith("// What a CPU kernel")
    with pytest.raises(run.KernelError, match="no function 'nothing'"):
        run.source("dev/kernels/kernel.h", "nothing")
