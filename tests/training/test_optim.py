"""AdamW and Muon: the op against its formula, the optimizers against PyTorch's, master weights to the bit, rounding without bias."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import TINY
from oracle import ULP, check, error, get, put, rounded

import llmc
from llmc import _llmc
from llmc.formats.state_file import join_master, split_master

STEP = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "correction1": 0.19,
    "correction2": 0.0975,
}
STEP = {name: float(np.float32(value)) for name, value in STEP.items()}  # corrections as the op takes them


def native_step(seed=0, **changes):
    return _llmc.AdamWStep(**{**STEP, **changes}, seed=seed)


# ---- the op ----


@pytest.mark.parametrize("n", [1, 33, 70_001])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_adamw_f32(backend, rng, n, factor):
    param, m, grad = (rounded(x, "f32") for x in rng.standard_normal((3, n)))
    # m has grad's sign and v is positive, so nothing cancels and rounding errors stay relative.
    m, v = np.copysign(m, grad), rounded(rng.standard_normal(n) ** 2, "f32")
    t = {"param": put(backend, param), "m": put(backend, m), "v": put(backend, v)}
    backend.adamw(t["param"], None, t["m"], t["v"], put(backend, grad), put(backend, [factor]), native_step())
    check(t, oracle.adamw, param, m, v, grad, factor, STEP, ulps=2)


@pytest.mark.parametrize("grad_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("n", [1, 33, 70_001])
def test_adamw_with_master_weights_is_adamw_in_f32(backend, rng, grad_dtype, n):
    """The bf16 weight and the 16 bits below it are an f32 weight, which changes as in an f32 model, bit for bit."""
    weights, m = (x.astype(np.float32) for x in rng.standard_normal((2, n)))
    v, grad = (rng.standard_normal(n) ** 2).astype(np.float32), rounded(rng.standard_normal(n), grad_dtype)
    high, low = split_master(weights)
    param, master = backend.empty([n], "bf16"), backend.empty([n], "i16")
    param.from_host(high)
    master.from_host(low)
    wide = put(backend, weights)
    for tensors, g in [((param, master), put(backend, grad, grad_dtype)), ((wide, None), put(backend, grad))]:
        backend.adamw(*tensors, put(backend, m), put(backend, v), g, put(backend, [0.5]), native_step())
    np.testing.assert_array_equal(join_master(param.to_host(), master.to_host()), get(wide))
    assert (get(wide) != weights).all()


def test_split_weights_are_nearest_and_join_again(rng):
    """For all exponents, ties, zeros and infinities every bit comes back, and the bf16 is the nearest one."""
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    bits = np.concatenate(
        [bits, np.arange(256, dtype=np.uint32) << 24 | 0x8000, [0, 0x80000000, 0x7F800000, 0xFF800000]]
    )
    weights = bits.astype(np.uint32).view(np.float32)
    weights = weights[~np.isnan(weights)]
    high, low = split_master(weights)
    np.testing.assert_array_equal(join_master(high, low).view(np.uint32), weights.view(np.uint32))
    as_f32 = (high.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    finite = np.isfinite(as_f32) & np.isfinite(weights)
    exact = weights[finite].astype(np.float64)
    np.testing.assert_array_equal(np.abs(as_f32[finite] - exact), np.abs(rounded(weights[finite], "bf16") - exact))


def test_stochastic_rounding_is_unbiased(backend):
    """Rounding keeps the mean of a weight at one, two or three quarters of the way between two bf16; seeds draw independently."""
    n = 1 << 16
    for part in (0.25, 0.5, 0.75):
        target = 1 - part * 2.0**-8  # bf16 below 1 lie 2^-8 apart
        means = []
        for seed in (1, 2):
            param, zeros = put(backend, np.ones(n), "bf16"), [put(backend, np.zeros(n)) for _ in range(2)]
            step = native_step(seed, lr=1.0, weight_decay=1 - target, eps=1.0)
            backend.adamw(param, None, *zeros, put(backend, np.zeros(n), "bf16"), put(backend, [1.0]), step)
            x = get(param).astype(np.float64)
            assert set(np.unique(x)) == {1 - 2.0**-8, 1.0}
            means.append(x)
            # Five standard deviations of the count.
            assert abs(x.mean() - target) < 5 * 2.0**-8 * math.sqrt(part * (1 - part) / n)
        assert 0.2 < (means[0] != means[1]).mean() < 0.8
        # Neighbours draw independently.
        a = means[0] - means[0].mean()
        assert abs((a[1:] * a[:-1]).mean() / a.var()) < 5 / math.sqrt(n)


def test_stochastic_rounding_leaves_bf16_weights_alone(backend, rng):
    """A weight that bf16 holds exactly is not moved by its rounding."""
    x = rounded(rng.standard_normal(1000), "bf16")
    param, zeros = put(backend, x, "bf16"), [put(backend, np.zeros(1000)) for _ in range(2)]
    backend.adamw(
        param, None, *zeros, put(backend, np.zeros(1000)), put(backend, [1.0]), native_step(3, weight_decay=0.0)
    )
    np.testing.assert_array_equal(rounded(get(param), "f32"), x)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_factor_that_is_not_finite_changes_nothing(backend, rng, factor, dtype):
    values = rng.standard_normal((4, 40))
    t = [put(backend, values[0], dtype), *(put(backend, v) for v in values[1:])]
    before = [x.to_host() for x in t]
    backend.adamw(t[0], None, *t[1:], put(backend, [factor]), native_step())
    for tensor, old in zip(t, before):
        np.testing.assert_array_equal(tensor.to_host(), old)


# ---- the optimizer ----


def set_gradients(model, values):
    model.zero_grad()
    for name, value in values.items():
        model.gradients[name] = value


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("decay_all", [False, True])
def test_optimizer_is_pytorchs(tiny, rng, clip, decay_all):
    """Weights and norms over five updates of given gradients, against torch.optim.AdamW in float64 and float32."""
    from llmc.reference import GPT

    model, options = tiny(), {"betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    steps = [{n: rng.standard_normal(g.shape).astype(np.float32) for n, g in model.gradients.items()} for _ in range(5)]
    for s in steps:
        s["wte"][TINY.vocab_size :] = 0  # padding has no gradient

    def train_pytorch(dtype):
        gpt = GPT(TINY)
        gpt.load_llmc(model.parameters)
        gpt.to(dtype)
        optimizer = gpt.configure_optimizer(1e-2, **options)
        if decay_all:
            for group in optimizer.param_groups:
                group["weight_decay"] = options["weight_decay"]
        norms = []
        for gradients in steps:
            for name, tensors in gpt._parameters_by_name().items():
                g = torch.from_numpy(gradients[name])
                g = g[: TINY.vocab_size] if name == "wte" else g
                for p, value in zip(tensors, g if len(tensors) == TINY.num_layers else [g]):
                    p.grad = value.to(dtype).clone()
            norms.append(torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip or math.inf).item())
            optimizer.step()
        return gpt.parameters_llmc(), norms

    (exact, exact_norms), (peer, _) = train_pytorch(torch.float64), train_pytorch(torch.float32)
    optimizer = llmc.AdamW(model, grad_clip=clip, decay_all=decay_all, **options)
    for gradients, norm in zip(steps, exact_norms):
        set_gradients(model, gradients)
        optimizer.step(1e-2)
        assert optimizer.norm == pytest.approx(norm, rel=4 * ULP["f32"])
    for name, value in exact.items():
        allowed = 2 * error(peer[name], value) + 5 * ULP["f32"]
        assert (error(model.parameters[name], value) <= allowed).all(), name


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("grad_dtype", ["f32", "bf16"])
def test_bf16_weights_follow_f32_ones(tiny, rng, master_weights, grad_dtype):
    """An f32 model and a bf16 one get the same gradients. With master weights the bf16 weights are the f32 ones, rounded."""
    wide, narrow = tiny(), tiny(dtype="bf16", grad_dtype=grad_dtype)
    for name in wide.parameters:
        wide.parameters[name] = np.asarray(narrow.parameters[name], np.float32)
    optimizers = [
        llmc.AdamW(wide, weight_decay=0.1),
        llmc.AdamW(narrow, weight_decay=0.1, master_weights=master_weights),
    ]
    for _ in range(20):
        gradients = {n: rounded(rng.standard_normal(g.shape), "bf16") for n, g in wide.gradients.items()}
        for model, optimizer in zip((wide, narrow), optimizers):
            set_gradients(model, gradients)
            optimizer.step(1e-3)
    for name in wide.parameters:
        truth = np.asarray(wide.parameters[name], np.float64)
        if master_weights:
            high, _ = split_master(np.asarray(wide.parameters[name]))
            np.testing.assert_array_equal(narrow.parameter_tensors()[name].to_host(), high, err_msg=name)
        else:
            assert (error(narrow.parameters[name], truth)[0] <= math.sqrt(20) * ULP["bf16"]).all(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("make", "kept_of_all"), [(llmc.AdamW, 16 * 3), (llmc.Muon, 12 * 3 + 4 * 2)])
def test_a_bad_gradient_leaves_weights_and_moments(tiny, rng, make, kept_of_all, bad):
    model = tiny(dtype="bf16")
    optimizer = make(model)
    gradients = {n: rng.standard_normal(g.shape) for n, g in model.gradients.items()}
    set_gradients(model, gradients)
    optimizer.step(1e-2)

    def everything():
        rows = optimizer.state().values()
        kept = [t for row in rows for t in (*row.moments, row.master) if t is not None]
        assert len(kept) == kept_of_all
        return [t.to_host() for t in (model.all_parameters(), *kept)]

    before = everything()
    gradients["ln2b"][1, 7] = bad
    set_gradients(model, gradients)
    optimizer.step(1e-2)
    assert not math.isfinite(optimizer.norm)
    for a, b in zip(everything(), before):
        np.testing.assert_array_equal(a, b)


def test_measure_then_apply_is_step(tiny, rng):
    models = [tiny(), tiny()]
    gradients = {n: rng.standard_normal(g.shape) for n, g in models[0].gradients.items()}
    optimizers = [llmc.AdamW(m) for m in models]
    for m in models:
        set_gradients(m, gradients)
    optimizers[0].step(1e-2)
    norm = optimizers[1].measure()
    np.testing.assert_array_equal(*(np.array(tiny().parameters["fcw"]), np.array(models[1].parameters["fcw"])))
    optimizers[1].apply(1e-2)
    assert optimizers[0].norm == optimizers[1].norm == norm
    assert [o.step_count for o in optimizers] == [1, 1]
    np.testing.assert_array_equal(*(m.all_parameters().to_host() for m in models))


@pytest.mark.parametrize(("dtype", "master_weights"), [("f32", True), ("bf16", True), ("bf16", False)])
def test_bytes_per_parameter_are_those_of_the_state(tiny, dtype, master_weights):
    model = tiny(dtype=dtype)
    state = llmc.AdamW(model, master_weights=master_weights).state()
    kept = [t.to_host().nbytes for row in state.values() for t in (*row.moments, row.master) if t is not None]
    assert sum(kept) == model.num_parameters * llmc.AdamW.bytes_per_parameter(dtype, master_weights)


def test_optimizer_errors(tiny):
    model = tiny()
    for options, message in [
        ({"betas": (1.0, 0.9)}, "betas are 1 and 0.9"),
        ({"betas": (0.9, -0.1)}, "betas are 0.9 and -0.1"),
        ({"eps": 0.0}, "eps is 0"),
        ({"seed": 0}, "seed is 0"),
        ({"grad_clip": math.nan}, "grad_clip is nan"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            llmc.AdamW(model, **options)
    optimizer = llmc.AdamW(model)
    with pytest.raises(ValueError, match="step_count is -1"):
        optimizer.step_count = -1
    with pytest.raises(ValueError, match="rng_state is 0"):
        optimizer.rng_state = 0


def test_apply_needs_a_measure(tiny):
    """Without one the clip factor is none of these gradients'."""
    optimizer = llmc.AdamW(tiny())
    with pytest.raises(ValueError, match="measure"):
        optimizer.apply(1e-3)
    optimizer.measure()
    optimizer.apply(1e-3)
    with pytest.raises(ValueError, match="measure"):
        optimizer.apply(1e-3)
    assert optimizer.step_count == 1


# ---- Muon ----


class Peer:
    """torch.optim.Muon for the matrices of a model, q, k and v apart, and torch.optim.AdamW for the rest."""

    def __init__(
        self, weights: dict[str, np.ndarray], dtype: torch.dtype, lr_ratio: float = 1.0, **muon: object
    ) -> None:
        self.begin, self.parameters, self.dtype = weights, {}, dtype
        matrices, decaying, others = [], [], []
        for spec in _llmc.parameter_table(TINY.native()):
            value = torch.from_numpy(weights[spec.name].astype(np.float64)).to(dtype)
            if spec.matrices:
                value = value.reshape(-1, value.shape[1] // spec.matrices, value.shape[2])
            pieces = [torch.nn.Parameter(x.clone()) for x in (value if spec.matrices else [value])]
            self.parameters[spec.name] = pieces
            (matrices if spec.matrices else decaying if spec.decay else others).extend(pieces)
        groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=1e-2 * lr_ratio, weight_decay=0.1, **muon),
            torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
        ]

    def step(self, gradients: dict[str, np.ndarray]) -> None:
        for name, pieces in self.parameters.items():
            g = torch.from_numpy(gradients[name].astype(np.float64)).to(self.dtype)
            for p, value in zip(pieces, g.reshape(len(pieces), *pieces[0].shape)):
                p.grad = value.clone()
        torch.nn.utils.clip_grad_norm_([p for pieces in self.parameters.values() for p in pieces], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def moved(self, name: str) -> np.ndarray:
        """Return by how much the weights of a parameter have changed."""
        now = np.stack([p.detach().double().numpy() for p in self.parameters[name]])
        return now.reshape(self.begin[name].shape) - self.begin[name]


def in_its_dtype(patch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's Newton-Schulz iterations run in the dtype of the gradient, which they would otherwise round to bf16."""
    patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def random_gradients(model, rng, count, dtype="f32"):
    steps = [
        {n: rounded(rng.standard_normal(g.shape), dtype) for n, g in model.gradients.items()} for _ in range(count)
    ]
    for gradients in steps:
        gradients["wte"][TINY.vocab_size :] = 0  # padding has no gradient
    return steps


@pytest.mark.parametrize(
    "options",
    [
        {"adjust_lr": "match_rms_adamw"},
        {"adjust_lr": "original", "nesterov": False, "momentum": 0.8, "ns_steps": 4, "lr_ratio": 3.0},
    ],
)
def test_muon_is_pytorchs(tiny, rng, monkeypatch, options):
    """Over twenty updates of given gradients, clipped, with decay, beside float64: no further off than PyTorch in float32."""
    in_its_dtype(monkeypatch)
    model = tiny()
    begin = {name: np.array(value, np.float64) for name, value in model.parameters.items()}
    theirs = {("adjust_lr_fn" if name == "adjust_lr" else name): value for name, value in options.items()}
    exact, peer = (Peer(begin, dtype, **theirs) for dtype in (torch.float64, torch.float32))
    optimizer = llmc.Muon(model, weight_decay=0.1, betas=(0.9, 0.95), **options)
    for gradients in random_gradients(model, rng, 20):
        exact.step(gradients), peer.step(gradients)
        set_gradients(model, gradients)
        optimizer.step(1e-2)
    for name in begin:
        moved = np.asarray(model.parameters[name], np.float64) - begin[name]
        allowed = 2 * error(peer.moved(name), exact.moved(name)) + 8 * ULP["f32"]
        assert (error(moved, exact.moved(name)) <= allowed).all(), name


def test_muon_in_bf16_is_pytorchs(tiny, rng, monkeypatch):
    """A bf16 model with master weights is no further from float64 than PyTorch's float32 weights, whose iterations are in bf16 too."""
    model = tiny(dtype="bf16")
    begin = {name: np.asarray(value, np.float64) for name, value in model.parameters.items()}
    exact, peer = (Peer(begin, dtype, adjust_lr_fn="match_rms_adamw") for dtype in (torch.float64, torch.float32))
    optimizer = llmc.Muon(model, weight_decay=0.1)
    for gradients in random_gradients(model, rng, 20, "bf16"):
        peer.step(gradients)
        with monkeypatch.context() as patch:
            in_its_dtype(patch)
            exact.step(gradients)
        set_gradients(model, gradients)
        optimizer.step(1e-2)
    for name, state in optimizer.state().items():
        high, low = model.parameter_tensors()[name].to_host(), state.master.to_host()
        moved = join_master(high.ravel(), low).reshape(begin[name].shape) - begin[name]
        allowed = 2 * error(peer.moved(name), exact.moved(name)) + 16 * ULP["f32"]
        assert (error(moved, exact.moved(name)) <= allowed).all(), name


def test_muon_keeps_one_moment_of_matrices(tiny):
    """And says so; its memory is that of the state, and of the largest matrix at a time."""
    for dtype, size in ("f32", 4), ("bf16", 2):
        model = tiny(dtype=dtype)
        muon, adamw = llmc.Muon(model), llmc.AdamW(model)
        table = {spec.name: spec for spec in _llmc.parameter_table(TINY.native())}
        assert {name: spec.matrices for name, spec in table.items() if spec.matrices} == {
            "qkvw": 3, "attprojw": 1, "fcw": 1, "fcprojw": 1
        }  # fmt: skip
        for name, state in muon.state().items():
            assert len(state.moments) == (1 if table[name].matrices else 2)
            assert all(m.numel == np.prod(table[name].shape) for m in state.moments)
        saved = sum(4 * int(np.prod(spec.shape)) for spec in table.values() if spec.matrices)
        scratch = size * (2 * 4 * TINY.channels**2 + 2 * TINY.channels**2) + 4 * (_llmc.NORM_DIGITS + 2)
        assert abs(muon.bytes - (adamw.bytes - saved + scratch)) < 20 * 256  # tensors begin at multiples of 256 bytes


def test_muon_goes_on_from_its_state(tiny, rng):
    """Moments, masters and counts carried to another optimizer, as by a checkpoint, make the same next updates to the bit."""
    models = [tiny(dtype="bf16") for _ in range(2)]
    first, second = (llmc.Muon(m, weight_decay=0.1) for m in models)
    steps = random_gradients(models[0], rng, 4)
    for gradients in steps[:2]:
        set_gradients(models[0], gradients)
        first.step(1e-2)
    models[1].all_parameters().from_host(models[0].all_parameters().to_host())
    for name, state in first.state().items():
        for kind in range(len(state.moments) + 1):
            for layer in range(first.layers(name)):
                second.scatter(name, kind, layer, first.gather(name, kind, layer).to_host())
    second.step_count, second.rng_state = first.step_count, first.rng_state
    for gradients in steps[2:]:
        for model, optimizer in zip(models, (first, second)):
            set_gradients(model, gradients)
            optimizer.step(1e-2)
    np.testing.assert_array_equal(*(m.all_parameters().to_host() for m in models))


def test_muon_errors(tiny):
    model = tiny()
    for options, message in [
        ({"momentum": 1.0}, "momentum is 1"),
        ({"ns_steps": 0}, "ns_steps is 0"),
        ({"lr_ratio": 0.0}, "lr_ratio is 0"),
        ({"lr_ratio": math.inf}, "lr_ratio is inf"),
        ({"adjust_lr": "match"}, "adjust_lr is 'match', expected 'original' or 'match_rms_adamw'"),
        ({"betas": (1.0, 0.9)}, "betas are 1 and 0.9"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"seed": 0}, "seed is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            llmc.Muon(model, **options)
    with pytest.raises(TypeError, match="expected the model itself"):
        llmc.Muon(model.parameters)
