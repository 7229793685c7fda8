"""`llmc check`: it passes here, and it names the op whose result is wrong, whichever op and result that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import GPT2, _llmc, cli
from llmc.selfcheck import devices, step
from llmc.selfcheck.cases import Case, Result
from llmc.selfcheck.ops import Cases
from llmc.selfcheck.run import judged, run_case
from llmc.values import MEMORY_DTYPES, VALUE_DTYPES

DTYPES = ["f32", "bf16"]


def small_cases(dtype: str) -> list[Case]:
    """Return the cases without the large ones, which take time and find nothing more of what is broken below."""
    cases = [case for group in Cases(dtype, 1).groups() for case in group if not case.real]
    return [c for c in cases if max(np.size(o.exact) for o in c.operands if isinstance(o, Result)) < 40_000]


CASES = {dtype: small_cases(dtype) for dtype in DTYPES}


def results(case: Case) -> list[tuple[int, Result]]:
    return [(i, o) for i, o in enumerate(case.operands) if isinstance(o, Result)]


# Each op's results, by the position of the operand.
RESULTS = sorted({(dtype, c.op, i, o.name) for dtype in DTYPES for c in CASES[dtype] for i, o in results(c)})


def flat(args: Any) -> list[Any]:
    """Return the arguments of an op with those in lists in one row, as a case has them."""
    found: list[Any] = []
    for x in args:
        if isinstance(x, list):
            found += flat(x)
        elif isinstance(x, _llmc.AdamWOperands):
            found += [x.param, x.master, x.m, x.v, x.grad]
        else:
            found.append(x)
    return found


class Broken:
    """A backend of which one op does harm to one of its results."""

    def __init__(self, backend: _llmc.Backend, op: str, harm: Callable[..., bool], at: int = 0) -> None:
        self.backend, self.op, self.harm, self.at = backend, op, harm, at
        self.harmed = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.backend, name)
        if name != self.op:
            return call

        def broken(*args: Any) -> None:
            target = flat(args)[self.at]
            before = target.to_host()
            call(*args)
            after = target.to_host()
            x = after.copy()
            values = x.view(VALUE_DTYPES.get(target.dtype, MEMORY_DTYPES[target.dtype])).reshape(-1)
            self.harm(values, before.view(values.dtype).reshape(-1), target.shape[-1])
            self.harmed = not np.array_equal(x, after)
            target.from_host(x)

        return broken


def one_element(x: Any, before: Any, columns: int) -> None:
    """The last element is off by a 50th of the largest."""
    if x.dtype.kind == "i":
        x[-1] += 1
    else:
        x[-1] += np.float32(np.abs(x.astype(np.float32)).max() / 50 or 0.02)


def neighbour(x: Any, before: Any, columns: int) -> None:
    """An index is off by one, in the place where neighbours differ most."""
    if len(x) > 1:
        i = np.abs(np.diff(x.astype(np.float64))).argmax()
        x[i] = x[i + 1]


def unwritten(x: Any, before: Any, columns: int) -> None:
    """The last element is not written, as by a kernel that forgets the rest of a vector."""
    x[-1] = before[-1]


def row_of_another(x: Any, before: Any, columns: int) -> None:
    """The last row is the first one's."""
    x[-columns:] = x[:columns]


@pytest.fixture(scope="module")
def cpu() -> _llmc.Backend:
    return _llmc.Backend("cpu", 2)


@pytest.mark.parametrize("dtype,op,at,name", RESULTS, ids=lambda x: str(x))
def test_a_broken_result_is_noticed(cpu, dtype, op, at, name):
    """Whatever the harm, the outcome of this result is wrong in every case of the op, and those of its other results are right."""
    for harm in (one_element, neighbour, unwritten, row_of_another):
        harmed = 0
        for case in CASES[dtype]:
            if case.op != op or at >= len(case.operands) or not isinstance(case.operands[at], Result):
                continue
            broken = Broken(cpu, op, harm, at)
            outcomes = {o.result: o for o in run_case(broken, case, "cpu")}
            worst = outcomes.pop(name)
            if broken.harmed and not within(case, at, harm):
                assert not worst.ok, f"{harm.__name__}: {worst}, ratio {worst.ratio:.3f}"
                harmed += 1
            assert all(o.ok for o in outcomes.values())
        # Zeros have no neighbours that differ; a number has none; a result of one row has no other.
        assert harmed or harm in (neighbour, row_of_another, unwritten), f"{harm.__name__} did no harm to {op}"


def within(case: Case, at: int, harm: Callable[..., None]) -> bool:
    """Return whether the harm is no more than what is allowed: exact values that lie closer together than their limits."""
    o = case.operands[at]
    assert isinstance(o, Result)
    exact = np.asarray(o.exact, np.float64).reshape(-1).copy()
    before = exact if o.before is None else np.asarray(o.before, np.float64).reshape(-1)
    if harm is one_element:
        return False
    if harm is unwritten and o.before is None:
        return False
    x = exact.copy()
    harm(x, before, np.shape(o.exact)[-1])
    limit = np.broadcast_to(np.asarray(o.limit, np.float64), np.shape(o.exact)).reshape(-1)
    return bool((np.abs(x - exact) <= 2 * limit).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "op", ["matmul_forward", "matmul_gelu_forward", "layernorm_forward", "fused_residual_layernorm_forward"]
)
def test_an_ignored_bias_is_noticed(cpu, dtype, op):
    class WithoutBias(Broken):
        def __getattr__(self, name: str) -> Any:
            call = getattr(self.backend, name)
            if name != op:
                return call
            return lambda *args: call(*args[:-1], cpu.empty(list(args[-1].shape), args[-1].dtype))

    cases = [c for c in CASES[dtype] if c.op == op and c.operands[-1] is not None]
    assert cases
    for case in cases:
        assert not all(o.ok for o in run_case(WithoutBias(cpu, op, one_element), case, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["matmul_forward", "matmul_gelu_forward", "matmul_backward", "matmul_gelu_backward"])
def test_a_forgotten_addend_is_noticed(cpu, dtype, op):
    """A matmul over all but the last column of its inputs, or the last row of dout."""

    class Short(Broken):
        def __getattr__(self, name: str) -> Any:
            call = getattr(self.backend, name)
            if name != op:
                return call

            def short(*args: Any) -> None:
                inp = args[3 if "backward" in op else 1 + ("gelu" in op)]
                x = inp.to_host()
                x[(-1,) if "backward" in op else (slice(None), -1)] = 0
                inp.from_host(x)
                call(*args)

            return short

    for case in (c for c in CASES[dtype] if c.op == op):
        assert not all(o.ok for o in run_case(Short(cpu, op, one_element), case, "cpu")), case.size


def test_nan_and_infinity_are_wrong():
    for x in ([np.nan], [np.inf], [-np.inf]):
        assert not judged("op", "cpu", "f32", "1", "out", x, [1.0], 1e9).ok
    assert judged("op", "cpu", "f32", "1", "out", [1.0], [1.0], 0.0).ok
    assert not judged("op", "cpu", "f32", "1", "out", [1.0], [1.0 + 1e-9], 0.0).ok
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(1,\)"):
        judged("op", "cpu", "f32", "1", "out", [1.0, 1.0], [1.0], 0.0)


# ---- the training step ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["scale", "weight", "targets", "rate", "decay", "generation", "tokens"])
def test_a_wrong_step_is_noticed(cpu, monkeypatch, dtype, what):
    """A gradient scaled by 1.1, one weight matrix of a layer left out, targets that are ignored taken, a rate 10 % off, no decay."""
    exact = step.exact_step(devices.ODD, dtype, 3, 19, seed=0)
    assert all(o.ok for o in step.check_step(cpu, exact, "cpu"))
    backward, forward, rates = GPT2.backward, GPT2.forward, dict(step.RATES)
    if what == "scale":
        monkeypatch.setattr(GPT2, "backward", lambda self, y: backward(self, y, 1.1))
    elif what == "targets":
        monkeypatch.setattr(GPT2, "backward", lambda self, y: backward(self, np.abs(y)))
    elif what == "weight":

        def changed(self: GPT2, x: Any) -> None:
            self.parameters["attprojw"] = self.parameters["attprojw"] * np.array([[[1]], [[0]]])  # of two layers
            forward(self, x)

        monkeypatch.setattr(GPT2, "forward", changed)
    elif what == "generation":
        monkeypatch.setattr(step, "decoded", lambda model, x: np.roll(model.logits(x)[:, -3:], 1, axis=1))
    elif what == "tokens":
        generate = GPT2.generate
        monkeypatch.setattr(
            GPT2, "generate", lambda self, p, n, **o: [[t ^ 1 for t in x] for x in generate(self, p, n, **o)]
        )
    else:
        monkeypatch.setattr(step, "RATES", {**rates, **({"lr": 0.11} if what == "rate" else {"weight_decay": 0.0})})
    wrong = [o for o in step.check_step(cpu, exact, "cpu") if not o.ok]
    assert wrong and {o.op for o in wrong} == {"generation" if what in ("generation", "tokens") else "training step"}


def test_threads_that_differ_are_noticed(monkeypatch):
    exact = step.exact_step(devices.ODD, "f32", 3, 19, seed=0)
    assert step.check_threads(exact, "cpu", lambda threads: _llmc.Backend("cpu", threads)).ok
    gradients_of, count = step.gradients_of, []

    def differ(model: GPT2, exact: step.Exact) -> Any:
        count.append(model)
        result = gradients_of(model, exact)
        result["qkvw"][0, 0, 0] *= len(count)
        return result

    monkeypatch.setattr(step, "gradients_of", differ)
    assert not step.check_threads(exact, "cpu", lambda threads: _llmc.Backend("cpu", threads)).ok


# ---- the command ----


def test_every_op_is_checked():
    methods = {name: method.__doc__ or "" for name, method in vars(_llmc.Backend).items() if not name.startswith("_")}
    ops = {name for name, doc in methods.items() if "Tensor" in doc.split("->")[0]}
    assert ops - {"weights_changed"} == {op for _, op, _, _ in RESULTS}


def test_all_kernel_sets_pass(monkeypatch, capsys):
    small = {config: batch for config, batch in devices.BATCHES.items() if config is not devices.WIDE}
    monkeypatch.setattr(devices, "BATCHES", small)  # the wide model's exact step takes longer than all the rest
    assert cli.main(["check", "--isa", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for isa in _llmc.isa()["usable"]:
        for dtype in DTYPES:
            for op in ("matmul_backward", "adamw", "training step", "threads 1 and 2"):
                assert any(line.startswith(op) and f" {isa} " in line and f" {dtype} " in line for line in lines)
    assert lines[0] == f"checking {', '.join(_llmc.isa()['usable'])}"
    assert all(line.endswith(" ok") for line in lines[2:-1])
    assert lines[-1].startswith(f"llmc {_llmc.__version__}, cpu: ") and lines[-1].endswith("all right")


@pytest.fixture
def only_layernorm(monkeypatch):
    """Let the command check one group of ops, and no model."""
    monkeypatch.setattr(Cases, "groups", lambda self: iter([self.layernorm()]))
    monkeypatch.setattr(devices, "BATCHES", {})


def test_a_broken_kernel_is_named(monkeypatch, capsys, only_layernorm):
    def broken(backend: Any, case: Case, kernel: str) -> Any:
        return run_case(Broken(backend, "layernorm_backward", one_element, 1), case, kernel)

    monkeypatch.setattr(devices, "run_case", broken)
    assert cli.main(["check", "--device", "cpu", "--dtype", "bfloat16"]) == 1
    shown = capsys.readouterr()
    isa = _llmc.isa()["used"]
    assert len(shown.err.splitlines()) == 1
    assert f"error: wrong: layernorm_backward ({isa}, bf16). The first: layernorm_backward ({isa}, bf16, " in shown.err
    assert "dweight is off by" in shown.err and "llmc info" in shown.err
    verdicts = {line.split()[0]: line.split()[-1] for line in shown.out.splitlines()[2:-1]}
    assert verdicts == {
        "layernorm_forward": "ok",
        "fused_residual_layernorm_forward": "ok",
        "layernorm_backward": "WRONG",
    }
    assert " WRONG" in shown.out.splitlines()[-1]


@pytest.mark.parametrize("for_good", [False, True])
def test_an_op_that_raises_is_named(monkeypatch, capsys, only_layernorm, for_good):
    """It alone, also if the device takes no call after it, as a GPU after an illegal access."""
    raised = []

    def broken(backend: Any, case: Case, kernel: str) -> Any:
        class Raises(Broken):
            def __getattr__(self, name: str) -> Any:
                if name == "layernorm_forward" or (raised and for_good):
                    raised.append(name)
                    raise _llmc.Error("an illegal\nmemory access")
                return getattr(self.backend, name)

        return run_case(Raises(backend, "", one_element), case, kernel)

    monkeypatch.setattr(devices, "run_case", broken)
    assert cli.main(["check", "--device", "cpu", "--dtype", "f32"]) == 1
    out, error = capsys.readouterr()
    assert error.count("wrong: layernorm_forward (") == 1 and "; " not in error and "an illegal memory access" in error
    assert len(error.splitlines()) == 1
    assert out.count("WRONG\n") == 2 and ("takes no more calls" in out) == for_good  # its line and the last one


@pytest.mark.parametrize("error", [MemoryError(), _llmc.Error("cpu: out of memory (allocating 9 MB)")])
def test_too_little_memory_is_no_wrong_kernel(monkeypatch, capsys, only_layernorm, error):
    def without_memory(backend: Any, case: Case, kernel: str) -> Any:
        class Raises(Broken):
            def __getattr__(self, name: str) -> Any:
                raise error

        return run_case(Raises(backend, "", one_element), case, kernel)

    monkeypatch.setattr(devices, "run_case", without_memory)
    assert cli.main(["check", "--device", "cpu", "--dtype", "f32"]) == 1
    out, said = capsys.readouterr()
    assert "WRONG" not in out and len(said.splitlines()) == 1
    assert "error: there is not enough memory to check layernorm_forward (" in said and "memory" in said.split(": ")[-1]


def test_verbose_has_a_line_for_each_result(capsys, only_layernorm):
    assert cli.main(["check", "--device", "cpu", "--dtype", "f32", "--verbose", "--seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f": {len(lines) - 3} results in " in lines[-1] and len(lines) > 30


@pytest.mark.parametrize(
    "argv,code,message",
    [
        (["--isa", "sse9"], 2, "--isa sse9: expected all, or a kernel set that is usable here: baseline"),
        (["--isa", "all", "--device", "cuda"], 2, "--isa all is a kernel set of the CPU"),
        (["--dtype", "f16"], 2, "unknown dtype 'f16'"),
        (["--isa", ""], 2, "--isa : expected all, or"),
        (["--seed", "-1"], 2, "seed is -1"),
        (["--device", "tpu"], 2, "'tpu'"),
    ],
)
def test_errors(capsys, argv, code, message):
    assert cli.main(["check", *argv]) == code
    assert message in capsys.readouterr().err


# ---- a GPU, real or emulated ----


@pytest.mark.cuda
def test_a_gpu_passes(cuda, monkeypatch, capsys):
    """In bf16, which has more kinds of kernels, and if the device is emulated as one that has them all."""
    monkeypatch.setenv("LLMC_EMULATION_CAPABILITY", "9.0")
    assert cli.main(["check", "--device", "cuda", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, current in devices.options_of(cuda).items():
        for value in (v for v in devices.option_values(cuda, name) if v != current):
            left_out = any(line.startswith(f"left out: {name}={value}: ") for line in lines)
            assert left_out or any(f" {name}={value} " in line for line in lines), f"{name}={value} was not checked"
    assert lines[-1].startswith(f"llmc {_llmc.__version__}, cuda:0: ") and lines[-1].endswith("all right")


@pytest.mark.cuda
def test_options_are_set_back(cuda):
    before = devices.options_of(cuda)
    kernels, _ = devices.with_options(cuda)
    assert {"attention=flash", "attention=simple", "tf32=on"} <= {k.name for k in kernels}
    for k in kernels:
        with k.chosen():
            assert f"{k.option[0]} {k.option[1]}" in cuda.info().options
    assert devices.options_of(cuda) == before


@pytest.mark.cuda
def test_a_step_is_recorded_and_launched(cuda):
    backend = _llmc.Backend("cuda")
    if "graphs" not in devices.options_of(backend):
        pytest.skip("this backend records nothing")
    backend.set_option("graphs", "on")
    exact = step.exact_step(devices.ODD, "f32", 3, 19, seed=0)
    assert all(o.ok for o in step.check_step(backend, exact, "graphs=on"))
    recorded = int(backend.info().options.partition("graphs on (")[2].partition(" recorded")[0])
    assert recorded >= 2 and "recordings" not in backend.info().fallbacks  # forward and backward


@pytest.mark.cuda
def test_a_step_beside_the_simple_attention(cuda):
    kernels = [devices.Kernels(cuda, "cuda"), *devices.with_options(cuda)[0]]
    outcomes = list(devices.beside_simple(kernels, devices.EVEN, 2, 64))
    assert {o.kernel for o in outcomes} >= {"cuda", "attention=flash"} and all(o.ok for o in outcomes)
    # It was another kernel.
    assert all(o.error > 0 for o in outcomes if o.kernel == "attention=flash" and "qkvw" in o.result)
