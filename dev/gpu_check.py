"""The stages of dev/gpu_check.sh, which says what they are for."""

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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Ops alone, without whole models, in bf16: under compute-sanitizer everything is many times slower.
OPS = "attention or layernorm or encoder or classifier or matmul or gelu or adamw or sums"
SANITIZED = f"({OPS}) and bf16 and not cudnn and not model and not 5120"


# An editable llmc would be found before the one that is built here.
BEFORE_EDITABLE = """\
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


@dataclass
class Result:
    stage: str
    status: str  # "ok", "FAILED", "not run"
    seconds: float
    detail: str


class Check:
    def __init__(self, args: argparse.Namespace) -> None:
        self.dry_run: bool = args.dry_run
        self.build_dir = ROOT / "build" / ("emulation" if args.dry_run else "gpu_check")
        self.out = args.json or self.build_dir / "results.json"
        self.site = self.build_dir / "site"
        self.deadline = time.monotonic() + args.minutes * 60
        self.results: list[Result] = []
        self.more: dict[str, Any] = {}
        path = [str(self.site), os.environ.get("PYTHONPATH", "")]
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)}

    # ---- running ----

    def run(
        self, command: list[str], limit: float, log: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Output goes to a file too. TimeoutError past the limit, or when the 8 minutes are over."""
        limit = min(limit, self.deadline - time.monotonic())
        if limit <= 0:
            raise TimeoutError("no time left")
        with open(self.build_dir / f"{log}.log", "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env or self.env, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
                raise TimeoutError(f"stopped after {limit:.0f} s, see {file.name}") from None
        output = Path(file.name).read_text(encoding="utf-8", errors="replace")
        return subprocess.CompletedProcess(command, code, output)

    def stage(self, name: str, body: Callable[[], str]) -> bool:
        """body gives a line of detail, or raises."""
        print(f"... {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            status, detail = "ok", body()
        except NotRun as e:
            status, detail = "not run", str(e)
        except Exception as e:  # a stage must not stop the others
            status, detail = "FAILED", f"{type(e).__name__}: {e}"
        self.results.append(Result(name, status, round(time.monotonic() - start, 1), detail))
        return status == "ok"

    def worker(self, name: str, limit: float) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "dev" / "gpu_check.py"), "--worker", name] + ["--dry-run"] * self.dry_run
        done = self.run(command, limit, name)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode:
            raise RuntimeError(last)
        self.more[name] = json.loads(last)
        return self.more[name]  # type: ignore[no-any-return]

    # ---- stages ----

    def build(self) -> str:
        self.build_dir.mkdir(parents=True, exist_ok=True)
        pybind11 = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        )
        command = ["cmake", "-S", ".", "-B", str(self.build_dir), f"-DPython_EXECUTABLE={sys.executable}",
                   f"-Dpybind11_DIR={pybind11.stdout.strip()}"]  # fmt: skip
        if shutil.which("ninja"):
            command += ["-G", "Ninja"]
        notes = []
        if self.dry_run:
            command.append("-DLLMC_CUDA_EMULATION=ON")
        else:
            arch = self.capability()
            flags = self.flags(notes)
            if "USE_CUDA" not in flags:
                raise RuntimeError("; ".join(notes))
            command += [*(f"-D{flag}=ON" for flag in flags), f"-DCMAKE_CUDA_ARCHITECTURES={arch}-real"]
            notes.insert(0, f"sm_{arch}, {' '.join(flags)}")
        for step, limit, log in (
            (command, 60, "configure"),
            (["cmake", "--build", str(self.build_dir), "--parallel"], 240 * (1 + 3 * self.dry_run), "build"),
        ):
            done = self.run(step, limit, log)
            if done.returncode:
                raise RuntimeError(error_line(done.stdout))
        package = self.site / "llmc"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(ROOT / "src" / "llmc", package, ignore=shutil.ignore_patterns("__pycache__", "_llmc*.so"))
        for library in self.build_dir.glob("_llmc*.so"):
            shutil.copy2(library, package)
        (self.site / "sitecustomize.py").write_text(BEFORE_EDITABLE)
        return ", ".join(notes) or "the emulated device"

    def capability(self) -> str:
        query = ["nvidia-smi", "--query-gpu=compute_cap,name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError):  # some containers have no nvidia-smi
            import torch

            if not torch.cuda.is_available():
                raise RuntimeError("there is no GPU here; --dry-run rehearses without one") from None
            first = ".".join(map(str, torch.cuda.get_device_capability())) + f", {torch.cuda.get_device_name()}"
        self.more["card"] = first
        return first.split(",")[0].replace(".", "")

    def flags(self, notes: list[str]) -> list[str]:
        """cuDNN and NCCL where their headers are here or can be had."""
        spec = importlib.util.spec_from_file_location("build_backend", ROOT / "cmake" / "build_backend.py")
        assert spec is not None and spec.loader is not None
        backend = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(backend)
        flags = []
        for flag in ("USE_CUDA", "USE_CUDNN", "USE_NCCL"):
            required = backend.cuda_requirements({f"cmake.define.{flag}": "ON"})
            missing = [r for r in required if not installed(re.split(r"[<>=]", r)[0])]
            if missing:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "10", *missing]
                if self.run(pip, 90, f"pip_{flag}").returncode:
                    notes.append(f"without {flag}: {' '.join(missing)} cannot be had")
                    continue
            flags.append(flag)
        return flags

    def status(self) -> str:
        code = "from llmc import _llmc; i = _llmc.Backend('cuda').info(); print(_llmc.__file__, _llmc.cuda_status()); "
        code += "print(i.description, i.options)"
        done = self.run([sys.executable, "-c", code], 30, "status")
        if done.returncode:
            raise RuntimeError(error_line(done.stdout))
        self.more["status"] = done.stdout.splitlines()
        return done.stdout.splitlines()[-1]

    def tests(self) -> str:
        files = (
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_cuda_*.py"))
            if self.dry_run
            else ["tests"]
        )
        return self.pytest([sys.executable], files, "tests", 400 if self.dry_run else 120, ["-m", "cuda"])

    def pytest(self, prefix: list[str], files: list[str], log: str, limit: float, more: list[str]) -> str:
        done = self.run(
            [*prefix, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *files, *more], limit, log
        )
        summary = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", (done.stdout.strip().splitlines() or [""])[-1])
        sanitizer = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout)
        detail = ", ".join([*summary, *sanitizer])
        if done.returncode or not any("passed" in s for s in summary):
            failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
            raise RuntimeError(f"{detail or error_line(done.stdout)} {' '.join(failed[:3])}".strip())
        return detail

    def sanitizer(self, tool: str) -> str:
        if self.dry_run:
            raise NotRun(
                "needs a GPU; the emulated device checks barriers, collectives, alignment and bounds by itself"
            )
        spec = importlib.util.find_spec("nvidia")
        wheels = [f"{p}/cu13/bin" for p in (spec.submodule_search_locations or [])] if spec else []
        sanitizer = shutil.which(
            "compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *wheels])
        )
        if not sanitizer:
            raise NotRun("compute-sanitizer was not found: pip install 'nvidia-cuda-sanitizer-api==13.0.*'")
        prefix = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
        return self.pytest(prefix, ["tests/test_cuda_ops.py"], tool, 60, ["-k", SANITIZED])

    def parity(self) -> str:
        return verdict(self.worker("parity", 60))

    def forty_steps(self) -> str:
        return verdict(self.worker("forty_steps", 200 if self.dry_run else 60))

    def bench(self) -> str:
        out = self.build_dir / "bench.json"
        mode = ["--dry-run"] if self.dry_run else ["--short", "--seconds", "3"]
        command = [sys.executable, "dev/bench/bench_gpu.py", "--json", str(out), *mode]
        done = self.run(command, 240, "bench")
        print(done.stdout[done.stdout.find("\n\n") :] if "\n\n" in done.stdout else done.stdout)
        if done.returncode:
            raise RuntimeError(error_line(done.stdout))
        self.more["bench"] = json.loads(out.read_text())
        runs = self.more["bench"]["runs"]
        return "; ".join(f"{r['who']} {r['tokens_per_second']:,.0f} tokens/s" for r in runs)

    def all(self) -> int:
        if self.stage("build", self.build):
            self.stage("status", self.status)
            self.stage("pytest -m cuda", self.tests)
            self.stage("parity with PyTorch", self.parity)
            self.stage("40 steps, CPU and GPU", self.forty_steps)
            self.stage("memcheck", lambda: self.sanitizer("memcheck"))
            self.stage("racecheck", lambda: self.sanitizer("racecheck"))
            self.stage("short benchmark", self.bench)
        report = {"rehearsal": self.dry_run, "date": datetime.datetime.now().isoformat(timespec="minutes"), **self.more}
        report["stages"] = [asdict(r) for r in self.results]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(report, indent=1) + "\n")
        if self.dry_run:
            print("REHEARSAL on the emulated device: nothing here ran on a GPU.")
        width = max(len(r.stage) for r in self.results)
        for r in self.results:
            print(f"{r.stage:{width}}  {r.status:7}  {r.seconds:6.1f} s  {r.detail}")
        print(f"written: {self.out}")
        return 1 if any(r.status == "FAILED" for r in self.results) else 0


class NotRun(Exception):
    pass


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def error_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next(
        (line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1] if lines else "no output"
    )[:300]


def verdict(rows: dict[str, Any]) -> str:
    """Of a worker's {name: [figure, limit]}."""
    bad = [f"{name} {figure:.2g} > {limit:.2g}" for name, (figure, limit) in rows.items() if not figure <= limit]
    if bad:
        raise RuntimeError("; ".join(bad))
    return ", ".join(f"{name} {figure:.1e}" for name, (figure, _) in rows.items())


# ---- workers: in processes of their own, with the build on the path ----


def attentions(backend: Any) -> list[str]:
    from llmc import _llmc

    usable = ["simple", "flash"]
    try:
        backend.set_option("attention", "cudnn")
        usable.append("cudnn")
    except _llmc.Error as e:
        print(f"without cudnn: {e}", file=sys.stderr)
    backend.set_option("attention", "simple")
    return usable


def parity(dry_run: bool) -> dict[str, Any]:
    """llmc on the GPU beside llmc.reference in PyTorch, of the same weights."""
    import numpy as np
    import torch

    import llmc
    from llmc.reference import GPT

    torch.backends.cuda.matmul.allow_tf32 = False
    where = "cpu" if dry_run else "cuda"
    if dry_run:
        config, B, T = llmc.GPT2Config(max_seq_len=32, vocab_size=250, num_layers=2, num_heads=1, channels=64), 1, 20
    else:
        config, B, T = llmc.GPT2Config.from_descriptor("d12"), 4, 512
    rng = np.random.default_rng(1)
    inputs, targets = (rng.integers(0, config.vocab_size, (B, T), dtype=np.int32) for _ in range(2))
    x, y = (torch.from_numpy(a).to(where, torch.int64) for a in (inputs, targets))
    rows: dict[str, Any] = {}

    def reference(model: llmc.GPT2, dtype: torch.dtype) -> tuple[Any, float, dict[str, Any]]:
        net = GPT(config)
        net.load_llmc({n: widen(model.native.parameter(n).to_host()) for n in model.native.parameter_names()})
        net.to(where, dtype)
        logits, loss = net(x, y)
        assert loss is not None
        loss.backward()
        return logits.detach().float().cpu().numpy(), float(loss.detach()), net.gradients()

    def ours(model: llmc.GPT2) -> tuple[Any, float, dict[str, Any]]:
        logits = model.logits(inputs)
        model.zero_grad()
        model.forward(inputs)
        model.backward(targets)
        return (
            logits,
            model.mean_loss,
            {n: widen(model.native.gradient(n).to_host()) for n in model.native.parameter_names()},
        )

    def worst(a: dict[str, Any], b: dict[str, Any]) -> float:
        return max(float(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n])) for n in b)

    model = llmc.GPT2(config, device="cuda", dtype="f32")
    logits, loss, gradients = ours(model)
    logits_t, loss_t, gradients_t = reference(model, torch.float32)
    rows["f32 logits"] = [float(np.abs(logits - logits_t).max()), 1e-3]
    rows["f32 loss"] = [abs(loss - loss_t), 1e-5]
    rows["f32 gradients"] = [worst(gradients, gradients_t), 1e-3]
    del model

    # bf16: no further from f32 than twice what PyTorch's own bf16 is.
    model = llmc.GPT2(config, device="cuda", dtype="bf16")
    logits_t, loss_t, gradients_t = reference(model, torch.float32)
    logits_b, _, gradients_b = reference(model, torch.bfloat16)
    for attention in attentions(model.native.backend):
        model.native.backend.set_option("attention", attention)
        logits, loss, gradients = ours(model)
        scale = float(np.abs(logits_t).max())
        limit = 2 * float(np.abs(logits_b - logits_t).max()) / scale
        rows[f"bf16 {attention} logits"] = [float(np.abs(logits - logits_t).max()) / scale, limit]
        rows[f"bf16 {attention} loss"] = [abs(loss - loss_t), 2e-2]
        rows[f"bf16 {attention} gradients"] = [worst(gradients, gradients_t), 2 * worst(gradients_b, gradients_t)]
    return rows


def forty_steps(dry_run: bool) -> dict[str, Any]:
    """Losses of the same run on the CPU and on the GPU: the largest difference, relative."""
    import pydoc_data.topics

    import numpy as np

    import llmc

    joined = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    text = np.frombuffer(joined.encode("ascii", "replace"), np.uint8).astype(np.int32)
    L, C, NH, B, T = (1, 64, 1, 1, 32) if dry_run else (4, 256, 4, 8, 256)
    config = llmc.GPT2Config(max_seq_len=T, vocab_size=128, num_layers=L, num_heads=NH, channels=C)

    def losses(device: str, dtype: str, attention: str) -> Any:
        model = llmc.GPT2(config, device=device, dtype=dtype)
        if device != "cpu":
            model.native.backend.set_option("attention", attention)
        optimizer = llmc.AdamW(model, weight_decay=0.1)
        history = []
        for step in range(40):
            at = step * 7919 % (len(text) - B * T - 1)
            piece = text[at : at + B * T + 1]
            model.zero_grad()
            model.forward(piece[:-1].reshape(B, T))
            model.backward(piece[1:].reshape(B, T))
            optimizer.step(1e-3)
            history.append(model.mean_loss)
        return np.array(history)

    rows: dict[str, Any] = {}
    f32 = losses("cpu", "f32", "")
    rows["f32"] = [float(np.abs(losses("cuda", "f32", "simple") / f32 - 1).max()), 2e-4]
    bf16 = losses("cpu", "bf16", "")
    for attention in attentions(llmc.Backend("cuda")):
        rows[f"bf16 {attention}"] = [float(np.abs(losses("cuda", "bf16", attention) / bf16 - 1).max()), 2e-2]
    return rows


def widen(host: Any) -> Any:
    """f32 of what to_host() gives: bf16 comes as its bits."""
    import numpy as np

    return (host.astype(np.uint32) << 16).view(np.float32) if host.dtype == np.uint16 else host


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the emulated device")
    parser.add_argument("--minutes", type=float, default=8, help="after which no stage begins or goes on")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=("parity", "forty_steps"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"parity": parity, "forty_steps": forty_steps}[args.worker](args.dry_run)))
        return 0
    return Check(args).all()


if __name__ == "__main__":
    sys.exit(main())
