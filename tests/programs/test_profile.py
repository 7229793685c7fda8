"""dev/profile.py: where the time of a step goes. NVIDIA's profilers are stubs here, which say what the real ones would."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import TINY

import llmc

SCRIPT = Path(__file__).parents[2] / "dev" / "profile.py"

NSYS = """Generating SQLite file report.sqlite from report.nsys-rep
Processing [report.sqlite] with [/opt/nsight-systems/reports/cuda_gpu_kern_sum.py]...

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
60.0,"6,000,000",40,150000.0,150000.0,140000,160000,100.0,"void llmc::<unnamed>::layernorm_backward_kernel<float, (int)4>(T1 *, const T1 *)"
30.0,3000000,24,125000.0,125000.0,120000,130000,100.0,nvjet_tst_128x256_64x4_2x1_v_bz_TNT
10.0,1000000,20,50000.0,50000.0,40000,60000,100.0,"void llmc::(anonymous namespace)::layernorm_backward_kernel<llmc::bf16, 8>(T1 *)"

"""

NCU = """==PROF== Connected to process 1234 (/usr/bin/python3)
==PROF== Profiling "adamw_kernel" - 0: 0%....100% - 1 pass
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"""  # noqa: E501


def ncu_call(number: int, kernel: str, ns: str, read: str, written: str, tensor: str) -> str:
    """Return the rows of one call, as ncu has them."""
    metrics = {"gpu__time_duration.sum": ns, "dram__bytes_read.sum": read, "dram__bytes_write.sum": written}
    metrics["sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"] = tensor
    row = '"{}","1234","python3","host","{}","1","7","(256, 1, 1)","(4, 1, 1)","0","9.0","Command line","{}","unit","{}"\n'
    return "".join(row.format(number, kernel, name, value) for name, value in metrics.items())


@pytest.fixture(scope="module")
def profile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_profile", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_profile"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ops_of_a_step(
    profile: ModuleType,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rows add up to the step, and the FLOP of the ops to what is known of the whole."""
    monkeypatch.setattr(llmc.GPT2Config, "from_descriptor", lambda name: TINY)
    options = ["-b", "2", "-t", "7", "--layers", "3", "--steps", "3", "--no-ceilings", "--kernels", "none"]
    profile.main([*options, "--device", device, "--json", str(tmp_path / "p.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "p.json").read_text())
    ops = result["ops"]
    assert sorted(result["profiled_seconds"])[1] == pytest.approx(sum(row["seconds"] for row in ops))
    assert "| step " in printed and "3 layers, B=2 T=7 f32" in printed

    def of(name: str, key: str) -> list[float]:
        return [row[key] for row in ops if name in row["op"]]

    C, V, L, N = TINY.channels, TINY.padded_vocab_size, 3, 2 * 7
    assert sum(of("matmul", "flops")) == 6 * N * (12 * C * C * L + V * C)
    assert sum(of("attention", "flops")) == 7 * L * 2 * C * 7 * 8
    assert of("attention_forward", "calls") == of("attention_backward", "calls") == [L]
    assert sum(of("layernorm_backward", "calls")) == 2 * L + 1
    phases = {(row["op"], row["phase"]) for row in ops}
    classifier = {"matmul_forward", "fused_classifier", "matmul_backward", "sum"}
    assert {op for op, phase in phases if phase == "classifier"} == classifier
    assert {op for op, phase in phases if phase == "optimizer"} >= {"adamw_many", "gradient_norm_squared"}
    assert ("encoder_backward", "backward") in phases and ("gelu_forward", "backward") in phases  # recomputed


def test_ceilings(profile: ModuleType) -> None:
    top = profile.Ceilings(1e9, 1e8)
    assert top.floor((2e9, 1e8)) == 2 and top.floor((1e9, 3e8)) == 3
    assert profile.Ceilings(None, 1e8).floor((9e9, 1e8)) == 1 and "unknown" in str(profile.Ceilings(None, 1e8))


def test_kernels_by_nsys(profile: ModuleType) -> None:
    first, second = profile.nsys_kernels(NSYS)
    assert (first.name, first.calls) == ("layernorm_backward_kernel", 60) and first.seconds == pytest.approx(7e-3)
    assert (second.name, second.calls) == ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 24)


def test_kernels_by_ncu(profile: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    text = NCU + ncu_call(0, "void llmc::<unnamed>::adamw_kernel<4>(T1)", "1,000", "2,000", "1,000", "0")
    text += ncu_call(1, "sm90_gemm_bf16", "3,000", "100", "200", "80") + ncu_call(
        2, "sm90_gemm_bf16", "1,000", "0", "0", "n/a"
    )
    matmul, adamw = profile.ncu_kernels(text)
    assert (matmul.name, matmul.calls, matmul.dram_bytes) == ("sm90_gemm_bf16", 2, 300)
    assert matmul.seconds == pytest.approx(4e-6) and matmul.tensor == pytest.approx(60)
    assert adamw.dram_bytes / adamw.seconds == pytest.approx(3e9)
    profile.print_kernels([matmul, adamw], 2)
    assert "| sm90_gemm_bf16 |     1 | 0.002 | 80.0% |" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="stubs are shell scripts")
def test_profilers_are_started(profile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(name: str, body: str) -> None:
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{body}\n')
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    argv = ["--device", "cuda", "--steps", "4"]
    args = profile.parse_arguments(argv)
    if profile.find_profiler("auto") is None:
        with pytest.raises(FileNotFoundError, match="nsys is neither"):
            profile.find_profiler("nsys")
    (tmp_path / "text").write_text(NSYS)
    stub("nsys", f'[ "$1" = profile ] || cat {tmp_path}/text')
    kernels, steps = profile.measure_kernels(profile.find_profiler("auto"), args, argv)
    assert len(kernels) == 2 and steps == 4
    first, then = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("profile ") and first.endswith(f"{SCRIPT} --device cuda --steps 4 --captured 4")
    assert then.startswith("stats ") and then.endswith("report.nsys-rep")

    stub("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    with pytest.raises(RuntimeError, match=r"ncu has seen no kernels(.|\n)*ERR_NVGPUCTRPERM"):
        profile.measure_kernels(profile.find_profiler("ncu"), args, argv)


def test_wrong_arguments(profile: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in ((["--steps", "0"], "at least 1"), (["--kernels", "ncu"], "--device cuda")):
        with pytest.raises(SystemExit):
            profile.parse_arguments(argv)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="1024 positions"):
        profile.main(["-t", "2000", "--layers", "1"])
