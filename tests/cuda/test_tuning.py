"""The file in which timing's choices of matmul algorithms are kept (doc/formats.md), and where it lies.

The emulated device has one algorithm, 0x1 to 0xfedcba9876543210, but keeps and takes it as it does cuBLASLt's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import get, nans, put

from llmc.system import cache


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "HOME/.cache/llmc"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/llmc"),
        ("darwin", {}, "HOME/Library/Caches/llmc"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/llmc/Cache"),
        ("win32", {}, "HOME/AppData/Local/llmc/Cache"),
        ("linux", {"LLMC_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
    ],
)
def test_cache_directory(monkeypatch, platform, variables, expected):
    for name in ("LLMC_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", platform)
    home = Path(os.path.expanduser("~"))
    assert cache.cache_directory() == (home / expected[5:] if expected.startswith("HOME/") else Path(expected))
    assert cache.tune_file().parent == cache.cache_directory()


@pytest.fixture
def tuned(cuda, tmp_path):
    """Return the file, and a function that multiplies (N, C) by (OC, C) in an engine of its own, which reads the file anew."""
    path = tmp_path / "folder" / "träin 测试.tsv"

    def multiply(N=40, C=16, OC=24, dtype="f32", **options):
        for name, value in {"tune_file": str(path), "tune": "on", **options}.items():
            cuda.set_option(name, value)
        rng = np.random.default_rng(0)
        out = nans(cuda, (N, OC), dtype)
        inp, weight = (put(cuda, rng.standard_normal((rows, C)), dtype) for rows in (N, OC))
        cuda.matmul_forward(out, inp, weight, None)
        return get(out)

    yield path, multiply
    for name, value in {"tune": "off", "tune_file": "", "tf32": "off"}.items():
        cuda.set_option(name, value)


def lines(path):
    return path.read_text().splitlines()


def fnv(text: bytes) -> str:
    value = 2166136261
    for byte in text:
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return f"{value:08x}"


@pytest.mark.cuda
def test_a_choice_is_kept_and_taken(cuda, tuned, capfd):
    path, multiply = tuned
    first = multiply()
    (line,) = lines(path)
    device, matmul, milliseconds, words, checksum = line.split("\t")
    assert cuda.info().isa in device and cuda.info().description in device and "cuBLASLt" in device
    assert matmul == "TN 24 x 40 x 16, ld 16 16 24, f32 to f32, none, aligned 256 256 256 256 256"
    assert 0 < float(milliseconds) < 1000 and re.fullmatch("[0-9a-f]{128}", words)
    assert checksum == fnv(line[:-8].encode())
    again = multiply()
    assert lines(path) == [line]  # the second engine timed nothing
    np.testing.assert_array_equal(first, again)
    assert f"tune on (kept in {path})" in cuda.info().options
    assert capfd.readouterr().err == ""


@pytest.mark.cuda
def test_what_a_choice_depends_on(tuned):
    path, multiply = tuned
    for n, arguments in enumerate(
        [{}, {"N": 41}, {"C": 17}, {"OC": 25}, {"dtype": "bf16"}, {"tf32": "on"}, {"tf32": "on", "dtype": "bf16"}], 1
    ):
        multiply(**arguments)
        assert len(lines(path)) == min(n, 6)  # TF32 changes nothing for bf16
    assert len({line.split("\t")[1] for line in lines(path)}) == 6


@pytest.mark.cuda
def test_what_is_damaged_is_passed_over_with_one_warning(tuned, capfd):
    path, multiply = tuned
    expected = multiply()
    whole = path.read_bytes()
    wrong = [
        whole[:-2] + b"\n",
        b"\n",
        b"\xff\xfe\0\n",
        whole.replace(b"24", b"25", 1),
        whole[:100],
        whole[50:],
        b"\t" * 9 + b"\n",
    ]
    for damaged in [*wrong, b"".join(wrong)]:
        path.write_bytes(damaged)
        np.testing.assert_allclose(multiply(), expected, rtol=1e-4)
        error = capfd.readouterr().err
        assert error.count("warning") == 1 and f"{path}, line 1: damaged" in error
        assert path.read_bytes().startswith(damaged) and len(path.read_bytes()) == len(damaged) + len(whole)
    path.write_bytes(b"torn\n" + whole)
    multiply()
    assert "line 1: damaged" in capfd.readouterr().err and path.read_bytes() == b"torn\n" + whole


@pytest.mark.cuda
def test_an_algorithm_that_the_library_refuses_is_chosen_anew(cuda, tuned, capfd):
    if "emulated" not in cuda.info().description:
        pytest.skip("cuBLASLt crashes at an algorithm that it has not made, which is why lines have checksums")
    path, multiply = tuned
    expected = multiply()
    refused = lines(path)[0][:-8].replace("fedcba98", "fedcba99")
    refused += fnv(refused.encode())
    path.write_text(refused + "\n")
    np.testing.assert_array_equal(multiply(), expected)
    error = capfd.readouterr().err
    assert error.count("warning") == 1 and f"{path}, line 1: cuBLASLt does not take this algorithm" in error
    assert lines(path)[0] == refused and len(lines(path)) == 2
    multiply()  # the last line of a matmul counts
    assert capfd.readouterr().err == "" and len(lines(path)) == 2


@pytest.mark.cuda
def test_another_devices_choices_are_left_alone(tuned, capfd):
    path, multiply = tuned
    multiply()
    other = lines(path)[0][:-8].replace("cuBLASLt", "cuBLASLt 7")
    path.write_text(f"{other}{fnv(other.encode())}\n")
    multiply()
    assert len(lines(path)) == 2 and capfd.readouterr().err == ""


@pytest.mark.cuda
def test_a_folder_that_cannot_be_written_is_a_warning(tuned, capfd):
    path, multiply = tuned
    path.parent.write_text("a file, where the folder should be")
    expected = multiply(tune="off")
    np.testing.assert_allclose(multiply(), expected, rtol=1e-4)
    multiply(N=41, tune_file=str(path))
    error = capfd.readouterr().err
    assert error.count("warning") == 2 and f"{path}: cannot be written to" in error  # one for each engine


@pytest.mark.cuda
def test_without_a_file(tuned, cuda):
    path, multiply = tuned
    multiply(tune_file="")
    assert not path.parent.exists() and "kept" not in cuda.info().options


PROCESS = """
from llmc import _llmc
cuda = _llmc.Backend("cuda")
cuda.set_option("tune", "on")
for n in range(20, 80):  # fewer rows have a kernel of their own
    cuda.matmul_forward(cuda.empty([n, 8]), cuda.empty([n, 8]), cuda.empty([8, 8]), None)
print(_llmc.cuda_status())
"""


@pytest.mark.cuda
def test_processes_share_the_file(cuda, tmp_path):
    """LLMC_CUDA_TUNE_FILE names it, else it is in the cache. Lines of processes that write at once are whole."""
    default = tmp_path / "cache" / "cublaslt_algorithms.tsv"
    for name, path in (("LLMC_CUDA_TUNE_FILE", tmp_path / "file"), ("LLMC_CACHE", default)):
        value = path if name == "LLMC_CUDA_TUNE_FILE" else path.parent
        others = {k: v for k, v in os.environ.items() if k != "LLMC_CUDA_TUNE_FILE"}  # dev/gpu_check.sh sets it
        environment = {**others, name: str(value)}
        command = [sys.executable, "-c", PROCESS]
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        for process in running:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0 and error == ""
            assert f"matmuls ({path})" in out
        entries = [line.split("\t") for line in lines(path)]
        assert len({e[1] for e in entries}) == 60 and 60 <= len(entries) <= 240
        assert all(fnv("\t".join([*e[:4], ""]).encode()) == e[4] for e in entries)
