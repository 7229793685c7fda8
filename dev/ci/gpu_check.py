"""The stages of dev/gpu_check.sh, which says what they are for. dev/ci/gpu_stages.py and dev/bench/bench_gpu.py do the measuring.

In --out: results.jsonl, all figures, a line each as they come; table_PART.txt, the summary, written again after each stage;
log_PART.txt, the output of the stages; cublaslt_algorithms.tsv, what tune=on chose; profile.json, a step by op.
LLMC_GPU_CHECK_SABOTAGE=hang:parity,fail:ops tests that the other stages still run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from common import append_json
from make_site import make_site

ROOT = Path(__file__).resolve().parents[2]

SECONDS = {"a": 180, "b": 300}  # for each part, after the build
# Only ops, and only in bf16, because under compute-sanitizer everything is many times slower.
OPS = "attention or norm or encoder or classifier or matmul or gelu or adamw or sums"
SANITIZED = f"({OPS}) and bf16 and not cudnn and not model and not 5120"
FLASH, WGMMA = "attention=flash rows=16384", "attention=wgmma rows=16384"
CUDNN = "attention=cudnn deterministic=off rows=16384"
FILES = ["tests/ops/test_ops.py", *(f"tests/cuda/test_{name}.py" for name in ("cuda_ops", "cuda_training", "nccl"))]


class NotRun(Exception):
    pass


@dataclass
class Result:
    stage: str
    status: str  # "ok", "FAILED", "not run"
    seconds: float
    detail: str
    report: str  # tables that are printed below the summary


class Check:
    def __init__(self, args: argparse.Namespace) -> None:
        self.dry_run: bool = args.dry_run
        self.part = ""
        self.out: Path = args.out
        self.results = self.out / "results.jsonl"
        self.build_dir: Path = args.build_dir or Path(tempfile.gettempdir()) / (
            f"llmc_{'emulation' if args.dry_run else 'gpu'}_{zlib.crc32(str(ROOT).encode()):08x}"
        )
        self.site = self.build_dir / "site"
        self.deadline = time.monotonic() + 600
        self.stages: list[Result] = []  # of the part that is running
        self.lock = threading.Lock()
        self.running: set[int] = set()  # process ids; each process leads a group of its own
        path = [str(self.site), os.environ.get("PYTHONPATH", "")]
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
        # Beside the figures that come of it, and not in the user's cache.
        self.env["LLMC_CUDA_TUNE_FILE"] = str(self.out / "cublaslt_algorithms.tsv")
        sabotage = os.environ.get("LLMC_GPU_CHECK_SABOTAGE", "")
        self.sabotage = {name: how for how, _, name in (s.partition(":") for s in sabotage.split(",") if s)}
        self.out.mkdir(parents=True, exist_ok=True)
        self.build_dir.mkdir(parents=True, exist_ok=True)

    # ---- running ----

    def run(self, name: str, command: list[str], limit: float, threads: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command. Past the limit, or at the end of the part's time, kill it and all that it started, and raise TimeoutError."""
        how = self.sabotage.get(name)
        if how == "hang":
            command, limit = ["sh", "-c", "sleep 1000 & sleep 1000"], 1
        elif how == "fail":
            command = [sys.executable, "-c", "raise SystemExit('error: sabotage')"]
        limit = min(limit * (10 if self.dry_run and not how else 1), self.deadline - time.monotonic())
        if limit <= 0:
            raise TimeoutError("no time left")
        env = {**self.env, "OMP_NUM_THREADS": str(threads)} if threads else self.env
        logs = [self.build_dir / f"{name}.{kind}" for kind in ("out", "err")]
        with open(logs[0], "w") as out, open(logs[1], "w") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=env, start_new_session=True)
            self.running.add(process.pid)
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill_group(process.pid)  # and all that the command has started
                process.wait()
                self.running.discard(process.pid)
        out_text, err_text = (log.read_text(encoding="utf-8", errors="replace") for log in logs)
        with self.lock, open(self.out / f"log_{self.part}.txt", "a", encoding="utf-8") as file:
            file.write(f"==== {name}: {' '.join(command)}\n{out_text[-100000:]}\n---- stderr\n{err_text[-30000:]}\n")
        if code is None:
            raise TimeoutError(f"stopped after {limit:.0f} s")
        return subprocess.CompletedProcess(command, code, out_text, err_text)

    def stopped(self, *_: object) -> None:
        """End at SIGTERM, with all processes of stages, so that none keeps the card busy."""
        for pid in list(self.running):
            kill_group(pid)
        os._exit(128 + signal.SIGTERM)

    def stage(self, name: str, body: Callable[[], str | tuple[str, str]]) -> bool:
        """Run a stage and keep its result; body returns a line of detail, and a report if it has one, or raises."""
        print(f"... {name}", file=sys.stderr, flush=True)
        start, report = time.monotonic(), ""
        for kind in ("out", "err"):
            (self.build_dir / f"{name}.{kind}").unlink(missing_ok=True)
        try:
            done = body()
            detail, report = (done, "") if isinstance(done, str) else done
            status = "ok"
        except NotRun as e:
            status, detail = "not run", str(e)
        except Exception as e:  # a failure must not stop the other stages
            status, detail = "FAILED", f"{type(e).__name__}: {e}"
        if status == "FAILED":  # its output may still tell something
            logs = [self.build_dir / f"{name}.{kind}" for kind in ("out", "err")]
            output = [log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists()]
            report = "\n".join("\n".join(output).splitlines()[-150:])
        with self.lock:
            self.stages.append(Result(name, status, round(time.monotonic() - start, 1), detail, report))
            row = {"what": "stage", "part": self.part, "stage": name, "status": status, "detail": detail}
            append_json(self.results, {**row, "seconds": self.stages[-1].seconds})
            (self.out / f"table_{self.part}.txt").write_text(self.table(), encoding="utf-8")
        return status == "ok"

    def together(self, *stages: tuple[str, Callable[[], str | tuple[str, str]]]) -> None:
        """Run stages at the same time, those that are judged by results and not by speed."""
        threads = [threading.Thread(target=self.stage, args=s) for s in stages]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def table(self) -> str:
        lines = ["REHEARSAL on the emulated device: nothing here ran on a GPU."] * self.dry_run
        width = max(len(r.stage) for r in self.stages)
        lines += [f"{r.stage:{width}}  {r.status:7}  {r.seconds:6.1f} s  {r.detail}" for r in self.stages]
        lines += [f"\n==== {r.stage}\n{r.report.strip()}" for r in self.stages if r.report.strip()]
        return "\n".join(lines) + "\n"

    # ---- building ----

    def build(self) -> str:
        pybind11 = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        )
        cmake = ["cmake", "-S", str(ROOT), "-B", str(self.build_dir), f"-DPython_EXECUTABLE={sys.executable}",
                 f"-Dpybind11_DIR={pybind11.stdout.strip()}", *(["-G", "Ninja"] if shutil.which("ninja") else [])]  # fmt: skip
        version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        cmake += [f"-DSKBUILD_PROJECT_VERSION_FULL={version[1]}"] if version else []
        notes: list[str] = []
        if self.dry_run:
            self.compile([*cmake, "-DLLMC_CUDA_EMULATION=ON"])
            notes.append("the emulated device")
        else:
            arch, optional = self.capability(), self.optional(notes)
            cmake += ["-DUSE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}-real"]
            switches = {f: f"-D{f}={'ON' if f in optional else 'OFF'}" for f in ("USE_CUDNN", "USE_NCCL")}
            try:
                self.compile([*cmake, *switches.values()])
            except RuntimeError as e:
                if not optional:
                    raise
                notes.append(f"without {' '.join(optional)}, with which it does not build: {e}")
                optional = []
                self.compile([*cmake, *(f"-D{f}=OFF" for f in switches)])
            notes.insert(0, f"sm_{arch} {' '.join(optional)}")
        make_site(self.build_dir)
        return ", ".join(notes)

    def compile(self, configure: list[str]) -> None:
        jobs = ["--parallel"] if not self.dry_run else ["--parallel", "2"]
        for name, command, limit in (
            ("configure", configure, 60),
            ("build", ["cmake", "--build", str(self.build_dir), *jobs], 240),
        ):
            done = self.run(name, command, limit)
            if done.returncode:
                raise RuntimeError(error_line(done.stdout + done.stderr))

    def capability(self) -> str:
        query = ["nvidia-smi", "--query-gpu=compute_cap,name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError):  # some containers have no nvidia-smi
            import torch

            if not torch.cuda.is_available():
                raise RuntimeError("there is no GPU here; --dry-run rehearses without one") from None
            first = ".".join(map(str, torch.cuda.get_device_capability())) + f", {torch.cuda.get_device_name()}"
        append_json(self.results, {"what": "nvidia-smi", "card": first})
        return first.split(",")[0].replace(".", "")

    def optional(self, notes: list[str]) -> list[str]:
        """Return those of USE_CUDNN and USE_NCCL whose headers are here, or are brought by pip within 10 seconds."""
        spec = importlib.util.spec_from_file_location("build_backend", ROOT / "cmake" / "build_backend.py")
        assert spec is not None and spec.loader is not None
        backend = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(backend)
        flags = []
        for flag in ("USE_CUDNN", "USE_NCCL"):
            required = backend.cuda_requirements({f"cmake.define.{flag}": "ON"})
            missing = [r for r in required if not installed(re.split(r"[<>=]", r)[0])]
            if missing:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "4", *missing]
                try:
                    code = self.run(f"pip_{flag}", pip, 10).returncode
                except TimeoutError:
                    code = 1
                if code:
                    notes.append(f"without {flag}: {' '.join(missing)} could not be had in 10 s")
                    continue
            flags.append(flag)
        return flags

    # ---- stages ----

    def status(self) -> str:
        code = "from llmc import _llmc; i = _llmc.Backend('cuda').info(); print(_llmc.__file__, _llmc.cuda_status()); "
        code += "print(f'{i.description}; {i.options}')"
        done = self.run("status", [sys.executable, "-c", code], 30)
        if done.returncode:
            raise RuntimeError(error_line(done.stderr))
        return done.stdout.splitlines()[-1]

    def kernels(self) -> tuple[str, str]:
        """Run what a user would run first. It needs neither PyTorch nor the tests."""
        done = self.run("check", [sys.executable, "-m", "llmc", "check", "--device", "cuda"], 60)
        if done.returncode:
            raise RuntimeError(error_line(done.stderr))
        return done.stdout.splitlines()[-1], done.stdout

    def worker(self, name: str, limit: float, threads: int = 0) -> tuple[str, str]:
        """Run a stage of gpu_stages.py."""
        command = [sys.executable, "dev/ci/gpu_stages.py", name, "--results", str(self.results)]
        done = self.run(name, [*command, *["--dry-run"] * self.dry_run], limit, threads)
        bad = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if done.returncode:
            raise RuntimeError(f"{len(bad)} checks: {'; '.join(bad[:3])}" if bad else error_line(done.stderr))
        checks = re.findall(r"^ok ", done.stdout, re.MULTILINE)
        return (f"{len(checks)} checks", "") if checks else ("see below", done.stdout)

    def bench(self, name: str, limit: float, *flags: str) -> tuple[str, str]:
        # 3 seconds before the limit the benchmark ends by itself and prints its table.
        own = str(max(1.0, min(limit, self.deadline - time.monotonic()) - 3))
        command = [sys.executable, "dev/bench/bench_gpu.py", "--out", str(self.results), "--limit", own, *flags]
        done = self.run(name, [*command, *["--dry-run"] * self.dry_run], limit)
        if done.returncode:
            raise RuntimeError(error_line(done.stdout + done.stderr))
        return "see below", done.stdout

    def by_op(self) -> tuple[str, str]:
        """Profile a step by op, and by kernel if there is a profiler."""
        size = ["-b", "64", "-t", "1024"]
        if self.dry_run:
            size = ["--layers", "1", "-b", "1", "-t", "16", "--steps", "1", "--no-ceilings"]
        command = [sys.executable, "dev/profile.py", "--device", "cuda", "--dtype", "bf16", *size]
        done = self.run("by_op", [*command, "--json", str(self.out / "profile.json")], 60)
        if done.returncode:
            raise RuntimeError(error_line(done.stdout + done.stderr))
        return "see below", done.stdout

    def tests(self, name: str, files: list[str], limit: float, *flags: str) -> str:
        parallel = ["-n", "2" if self.dry_run else "8"] if importlib.util.find_spec("xdist") else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "-m",
            "cuda",
            *parallel,
        ]
        return self.pytest(name, [*command, "--continue-on-collection-errors", *files, *flags], limit)

    def pytest(self, name: str, command: list[str], limit: float) -> str:
        try:
            done = self.run(name, command, limit, threads=2)
        except TimeoutError as e:
            log = self.build_dir / f"{name}.out"
            output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            passed, failed = (re.findall(rf"^.*\b{word}\b.*", output, re.MULTILINE) for word in ("PASSED", "FAILED"))
            raise TimeoutError(
                f"{e}; until then {len(passed)} passed, {len(failed)} failed {'; '.join(failed[:4])}"
            ) from None
        lines = done.stdout.strip().splitlines()
        last = next((line for line in reversed(lines) if re.search(r" in \d+\.\d+s", line)), "")  # pytest's last line
        summary = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", last)
        sanitizer = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout)
        detail = ", ".join([*summary, *sanitizer])
        if done.returncode or not any("passed" in s for s in summary):
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            raise RuntimeError(f"{detail or error_line(done.stdout + done.stderr)} {' '.join(failed[:4])}".strip())
        return detail

    def chosen(self, tool: str, which: str) -> list[str]:
        """Return some 45 tests of the kernels in bf16: the last two cases of each, which are among the larger ones."""
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "cuda", "-k", which, *FILES[:2]]
        done = self.run(f"{tool}_tests", command, 60)
        if done.returncode:
            raise RuntimeError(error_line(done.stdout + done.stderr))
        cases: dict[tuple[str, bool], list[str]] = {}
        for case in done.stdout.splitlines():
            if "::" in case:
                cases.setdefault((case.split("[")[0], "flash" in case), []).append(case)
        return [case for of_one in cases.values() for case in of_one[-2:]]

    def sanitizer(self, tool: str) -> str:
        # Racecheck crashes at cuBLASLt's kernels on Hopper, although --kernel-regex excludes them.
        which = f"{SANITIZED} and not matmul" if tool == "racecheck" else SANITIZED
        if self.dry_run:
            raise NotRun(
                f"needs a GPU, for {len(self.chosen(tool, which))} tests; the emulated device checks barriers and bounds itself"
            )
        spec = importlib.util.find_spec("nvidia")
        wheels = [f"{p}/cu13/bin" for p in (spec.submodule_search_locations or [])] if spec else []
        sanitizer = shutil.which(
            "compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *wheels])
        )
        if not sanitizer:
            raise NotRun("compute-sanitizer was not found: pip install 'nvidia-cuda-sanitizer-api==13.0.*'")
        command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=llmc", "--error-exitcode", "9"]
        command += ["--target-processes", "all"]
        pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
        pytest += self.chosen(tool, which)
        return self.pytest(tool, [*command, *pytest], 90)

    # ---- the parts ----

    def a(self) -> None:
        self.stage("check", self.kernels)
        self.together(
            ("smoke", lambda: self.worker("smoke", 80)),
            ("tests", lambda: self.tests("tests", FILES, 80)),
        )
        speed = ["--models", "d12:64", "--updates", "2"]
        settings = [FLASH, WGMMA, CUDNN, "", "attention=cudnn rows=16384", f"{WGMMA} tune=on", f"{CUDNN} tune=on"]
        throughput = [*speed, "--parts", "llmc", "--settings", *settings]
        self.stage("throughput", lambda: self.bench("throughput", 60, *throughput))
        ops = [*speed, "--parts", "ceilings", "ops", "--settings", self.fastest()]
        self.stage("ops", lambda: self.bench("ops", 45, *ops))
        self.stage("profile", lambda: self.worker("profile", 45))
        self.stage("generation", lambda: self.worker("generation", 45))

    def b(self) -> None:
        more = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py"))
        if self.dry_run:  # all tests take minutes on the emulated device; dev/ci/emulation.sh runs them
            more = ["tests/models/test_gpt2.py"]
        self.together(
            ("parity", lambda: self.worker("parity", 60)),
            ("steps", lambda: self.worker("steps", 90, threads=4)),
            ("memcheck", lambda: self.sanitizer("memcheck")),
            ("racecheck", lambda: self.sanitizer("racecheck")),
            ("more_tests", lambda: self.tests("more_tests", [f for f in more if f not in FILES], 90)),
        )
        options = ["--models", "d12:64", "--updates", "1", "--options", "--settings", ""]
        self.stage("options", lambda: self.bench("options", 60, *options))
        sizes = ["--models", "d24:32", "d48:16", "--updates", "2", "--parts", "llmc", "--settings", self.fastest()]
        self.stage("sizes", lambda: self.bench("sizes", 60, *sizes))
        llm_c = os.environ.get("LLM_C")
        peers = ["--models", "d12:64", "--updates", "3", "--settings", "", self.fastest(), "--parts", "llmc", "torch"]
        peers += ["llm.c", "--llm-c", llm_c] if llm_c else []
        self.stage("peers", lambda: self.bench("peers", 120, *peers))
        self.stage("by_op", self.by_op)

    def fastest(self) -> str:
        """Return the fastest settings measured in this --out, of those that change neither the gradients' dtype nor recompute."""
        rows = [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]
        speed = {
            r["settings"]: r["tokens_per_second"]
            for r in rows
            if r["what"] == "run" and r["who"] == "llmc" and r["model"] in ("d12", "tiny") and "tokens_per_second" in r
        }
        fair = [s for s in speed if "grad_dtype" not in s and "recompute" not in s]
        return max(fair, key=lambda s: speed[s], default=FLASH)

    def all(self, parts: list[str]) -> int:
        failed = False
        for self.part in parts:
            append_json(self.results, {
                "what": "begin", "part": self.part, "rehearsal": self.dry_run,
                "date": datetime.datetime.now().isoformat(timespec="seconds"),
            })  # fmt: skip
            self.stages = []
            self.deadline = time.monotonic() + 600 * (1 + 5 * self.dry_run)
            if self.stage("build", self.build):
                self.deadline = time.monotonic() + SECONDS[self.part] * (1 + 9 * self.dry_run)
                if self.stage("status", self.status):
                    {"a": self.a, "b": self.b}[self.part]()
            print(self.table(), flush=True)
            failed |= any(r.status == "FAILED" for r in self.stages)
        print(f"written: {self.out}")
        return 1 if failed else 0


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def error_line(output: str) -> str:
    """Return the first line that names an error, and the next, which has CMake's message; else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), len(lines) - 1)
    return " ".join(lines[found : found + 2])[:300] if lines else "no output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("a", "b", "all"), default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", metavar="DIR")
    parser.add_argument(
        "--build-dir", type=Path, metavar="DIR", help="default: in the folder for temporary files; kept"
    )
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the emulated device")
    args = parser.parse_args()
    args.out = args.out.resolve()
    check = Check(args)
    signal.signal(signal.SIGTERM, check.stopped)
    return check.all(["a", "b"] if args.part == "all" else [args.part])


if __name__ == "__main__":
    sys.exit(main())
