// Every op of a Backend, so that each kernel can be tested against NumPy and a schedule can be written in
// Python.
#include <optional>
#include <span>
#include <vector>

#include "backends.h"
#include "bindings/bindings.h"

namespace llmc {

void bind_allocation(py::class_<Backend, std::shared_ptr<Backend>>& backend);

namespace {

// An op's parameter as Python passes it: a Tensor of this backend, or None if the op allows that.
template <class T>
struct Passed {
    using type = T;
    static T unwrap(const Backend&, T x) { return x; }
};
template <>
struct Passed<Tensor> {
    using type = const OwnedTensor*;
    static Tensor unwrap(const Backend& backend, const OwnedTensor* t) {
        if (!t) return Tensor();
        LLMC_CHECK(t->backend.get() == &backend, "{} belongs to another backend", t->tensor);
        return t->tensor;
    }
};

template <>
struct Passed<std::span<const Tensor>> {
    using type = std::vector<std::optional<OwnedTensor>>;
    static std::vector<Tensor> unwrap(const Backend& backend, const type& list) {
        std::vector<Tensor> tensors;
        for (const auto& t : list) tensors.push_back(Passed<Tensor>::unwrap(backend, t ? &*t : nullptr));
        return tensors;
    }
};
// An AdamWOperands that keeps its tensors alive.
struct BoundAdamWOperands {
    std::optional<OwnedTensor> param, master, m, v, grad;
    float weight_decay;
    std::uint32_t seed;
    std::int64_t first;
};
template <>
struct Passed<std::span<const AdamWOperands>> {
    using type = std::vector<BoundAdamWOperands>;
    static std::vector<AdamWOperands> unwrap(const Backend& backend, const type& list) {
        std::vector<AdamWOperands> operands;
        for (const BoundAdamWOperands& o : list) {
            const auto tensor = [&](const std::optional<OwnedTensor>& t) {
                return Passed<Tensor>::unwrap(backend, t ? &*t : nullptr);
            };
            operands.push_back({tensor(o.param), tensor(o.master), tensor(o.m), tensor(o.v), tensor(o.grad),
                                o.weight_decay, o.seed, o.first});
        }
        return operands;
    }
};

template <class... Args>
auto op(void (Backend::*method)(Args...)) {
    return [method](Backend& self, typename Passed<std::remove_cvref_t<Args>>::type... args) {
        const Busy busy(self);
        (self.*method)(Passed<std::remove_cvref_t<Args>>::unwrap(self, args)...);
    };
}

}  // namespace

void bind_ops(py::module_& m) {
    py::class_<AdamWStep>(
        m, "AdamWStep",
        "The numbers of one AdamW step, which the host knows; correction1 and correction2 are 1 - beta^t.")
        .def(py::init([](float lr, float beta1, float beta2, float eps, float weight_decay, float correction1,
                         float correction2, std::uint32_t seed, std::int64_t first) {
                 return AdamWStep{lr, beta1, beta2, eps, weight_decay, correction1, correction2, seed, first};
             }),
             "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "correction1"_a, "correction2"_a,
             "seed"_a = 0, "first"_a = 0);

    py::class_<BoundAdamWOperands>(
        m, "AdamWOperands",
        "What adamw_many updates of one parameter, or of a part of one that begins at element `first`. The "
        "weight_decay, seed and first of its AdamWStep do not count.")
        .def(py::init([](std::optional<OwnedTensor> param, std::optional<OwnedTensor> master,
                         std::optional<OwnedTensor> m_, std::optional<OwnedTensor> v,
                         std::optional<OwnedTensor> grad, float weight_decay, std::uint32_t seed,
                         std::int64_t first) {
                 return BoundAdamWOperands{param, master, m_, v, grad, weight_decay, seed, first};
             }),
             "param"_a, "master"_a, "m"_a, "v"_a, "grad"_a, "weight_decay"_a = 0.0f, "seed"_a = 0,
             "first"_a = 0)
        .def_readonly("param", &BoundAdamWOperands::param)
        .def_readonly("master", &BoundAdamWOperands::master)
        .def_readonly("m", &BoundAdamWOperands::m)
        .def_readonly("v", &BoundAdamWOperands::v)
        .def_readonly("grad", &BoundAdamWOperands::grad);

    py::class_<MuonStep>(m, "MuonStep",
                         "The numbers of muon_update: param -= lr (scale direction + weight_decay param).")
        .def(py::init([](float lr, float scale, float weight_decay, std::uint32_t seed, std::int64_t first) {
                 return MuonStep{lr, scale, weight_decay, seed, first};
             }),
             "lr"_a, "scale"_a, "weight_decay"_a, "seed"_a = 0, "first"_a = 0);

    m.attr("NORM_DIGITS") = kNormDigits;
    m.attr("UNIT_DIGIT") = kUnitDigit;

    py::class_<SamplerOptions>(m, "SamplerOptions", "How a token is chosen from logits: csrc/core/sampler.h.")
        .def(py::init([](float temperature, std::int64_t top_k, float top_p) {
                 return SamplerOptions{temperature, top_k, top_p};
             }),
             "temperature"_a = 1.0f, "top_k"_a = 0, "top_p"_a = 1.0f)
        .def("__repr__", [](const SamplerOptions& o) {
            return filled("SamplerOptions(temperature={}, top_k={}, top_p={})", o.temperature, o.top_k,
                          o.top_p);
        });

    const auto none = py::none();
    py::class_<Backend, std::shared_ptr<Backend>> backend(
        m, "Backend",
        "A device and its ops.\n\n"
        "Float tensors are f32 or bf16; statistics (mean, rstd, lse, losses, m, v) are f32, token ids i32. N "
        "is any number of rows. Formulas and rules of accumulation: csrc/core/backend.h.");
    bind_allocation(backend);
    backend.def(py::init(&make_backend), "device"_a = "cpu", "threads"_a = 0)
        .def("__repr__",
             [](const Backend& self) {
                 const DeviceInfo info = self.info();
                 const std::string threads = info.name == "cpu" ? filled(", threads {}", info.threads) : "";
                 return filled("Backend({}, {}{})", info.name, info.isa, threads);
             })
        .def("info", &Backend::info, "Return the device's name, hardware, memory and options.")
        .def_property_readonly("runs_ahead", &Backend::runs_ahead,
                               "Ops are only queued, so that the host may be ahead of the device.")
        .def(
            "synchronize",
            [](Backend& self) {
                const Busy busy(self);
                self.synchronize();
            },
            "Wait until all queued ops are done.")
        .def(
            "set_option",
            [](Backend& self, const std::string& name, const std::string& value) {
                const Busy busy(self);
                self.set_option(name, value);
            },
            "name"_a, "value"_a,
            "Set an option of the backend, such as 'attention' to 'flash' on 'cuda': doc/cuda.md lists them.")
        .def(
            "workspace_bytes",
            [](Backend& self, std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t NH,
               const std::string& dtype) {
                const Busy busy(self);
                return self.workspace_bytes(B, T, C, NH, dtype_from_name(dtype));
            },
            "B"_a, "T"_a, "C"_a, "NH"_a, "dtype"_a,
            "Return the bytes that the ops of a training step take for themselves, beside the tensors that "
            "they are given.")
        .def("zero", op(&Backend::zero), "x"_a, "Fill a tensor with zeros.")
        .def("copy", op(&Backend::copy), "out"_a, "inp"_a,
             "Copy a tensor to one of its shape, converting between f32 and bf16.")
        .def("weights_changed", op(&Backend::weights_changed), "weights"_a,
             "Drop packed copies of this memory.\n\n"
             "Call once for memory that holds weights, and again after writing them by any other way than "
             "zero, copy, from_host, adamw, adamw_many or muon_update.")
        .def("encoder_forward", op(&Backend::encoder_forward), "out"_a, "inp"_a, "wte"_a, "wpe"_a,
             "start"_a = none,
             "Embed tokens inp (B,T): out (B,T,C) = wte (Vp,C) by token + wpe (maxT,C) by position, from "
             "start (B) i32 on.")
        .def("encoder_backward", op(&Backend::encoder_backward), "dwte"_a, "dwpe"_a, "dout"_a, "inp"_a,
             "Add dout (B,T,C) to dwte (Vp,C) by token and to dwpe (maxT,C) by position.")
        .def("layernorm_forward", op(&Backend::layernorm_forward), "out"_a, "mean"_a, "rstd"_a, "inp"_a,
             "weight"_a, "bias"_a,
             "Normalize the rows of inp (N,C) to out (N,C); weight and bias (C). Keeps mean and rstd (N).")
        .def(
            "layernorm_backward", op(&Backend::layernorm_backward), "dinp"_a, "dweight"_a, "dbias"_a,
            "dinp_sum"_a, "dout"_a, "inp"_a, "weight"_a, "mean"_a, "rstd"_a,
            "Add the gradients of layernorm to dinp (N,C), dweight (C) and dbias (C), and the column sums of "
            "what is then in dinp to dinp_sum (C) or None.")
        .def("matmul_forward", op(&Backend::matmul_forward), "out"_a, "inp"_a, "weight"_a, "bias"_a = none,
             "Compute out (N,OC) = inp (N,C) weight (OC,C)^T + bias (OC).")
        .def("matmul_backward", op(&Backend::matmul_backward), "dinp"_a, "dweight"_a, "dbias"_a, "dout"_a,
             "inp"_a, "weight"_a, "accumulate"_a = true,
             "Compute dinp (N,C) = dout (N,OC) weight (OC,C), and add to dweight (OC,C) and dbias (OC), or "
             "overwrite them.")
        .def("attention_forward", op(&Backend::attention_forward), "out"_a, "lse"_a, "qkv"_a, "NH"_a,
             "Compute causal attention out (B,T,C) of qkv (B,T,3C), and lse (B,NH,T) for its backward.")
        .def("attention_backward", op(&Backend::attention_backward), "dqkv"_a, "dout"_a, "qkv"_a, "out"_a,
             "lse"_a, "NH"_a,
             "Compute dqkv (B,T,3C) from dout (B,T,C) and what attention_forward read and wrote.")
        .def("attention_decode", op(&Backend::attention_decode), "out"_a, "kcache"_a, "vcache"_a, "qkv"_a,
             "start"_a, "NH"_a,
             "Append the keys and values of qkv (B,T,3C) to the caches (B,NH,maxT,HS) at start (B) i32, and "
             "attend: out (B,T,C).")
        .def("gelu_forward", op(&Backend::gelu_forward), "out"_a, "inp"_a,
             "Compute out = gelu(inp), the tanh form, in any shape.")
        .def("gelu_backward", op(&Backend::gelu_backward), "dinp"_a, "inp"_a, "dout"_a,
             "Compute dinp = dout * gelu'(inp), in any shape.")
        .def("residual_forward", op(&Backend::residual_forward), "out"_a, "a"_a, "b"_a,
             "Compute out = a + b, in any shape.")
        .def("crossentropy_forward", op(&Backend::crossentropy_forward), "losses"_a, "logits"_a, "targets"_a,
             "V"_a, "Compute losses (N) of logits (N,Vp), of which V count, for targets (N) i32.")
        .def("crossentropy_softmax_backward", op(&Backend::crossentropy_softmax_backward), "logits"_a,
             "targets"_a, "dloss"_a, "V"_a,
             "Replace logits (N,Vp) by dloss times the gradient of the losses for targets (N) i32.")
        .def("sum", op(&Backend::sum), "out"_a, "inp"_a, "scale"_a = 1.0f,
             "Add scale * the sum of inp, f32 in any shape, to out (1) f32.")
        .def("global_norm_squared", op(&Backend::global_norm_squared), "out"_a, "inp"_a,
             "Add the sum of the squares of inp, in any shape, to out (1) f32.")
        .def(
            "clip_factor", op(&Backend::clip_factor), "norm"_a, "factor"_a, "norm_squared"_a, "max_norm"_a,
            "Compute norm and factor = min(1, max_norm / norm), (1) f32 each, from norm_squared: (1), or the "
            "digits (NORM_DIGITS) of gradient_norm_squared.")
        .def("adamw", op(&Backend::adamw), "param"_a, "master"_a, "m"_a, "v"_a, "grad"_a, "factor"_a,
             "step"_a,
             "Update param, m and v by the gradient grad * factor. master, i16 or None, holds the 16 bits "
             "below "
             "a bf16 param.")
        .def("muon_momentum", op(&Backend::muon_momentum), "out"_a, "m"_a, "grad"_a, "factor"_a, "momentum"_a,
             "nesterov"_a,
             "Update m by the gradient g = grad * factor: m = lerp(g, m, momentum). Compute out = lerp(g, m, "
             "momentum), or m unless nesterov.")
        .def("muon_update", op(&Backend::muon_update), "param"_a, "master"_a, "direction"_a, "factor"_a,
             "step"_a,
             "Subtract lr * (scale * direction + weight_decay * param) from param, if factor (1) is finite. "
             "master as of adamw.")
        .def("scale", op(&Backend::scale), "out"_a, "inp"_a, "factor"_a, "scale"_a,
             "Compute out = scale * factor * inp, in any shape, for factor (1) f32.")
        .def("shifted_sum", op(&Backend::shifted_sum), "out"_a, "x"_a, "y"_a, "a"_a, "b"_a, "c"_a,
             "Compute out = a I + b x + c y of square matrices (N,N).")
        .def("newton_schulz", op(&Backend::newton_schulz), "out"_a, "inp"_a, "gram"_a, "polynomial"_a,
             "norms"_a, "steps"_a,
             "Compute out (R,C) = inp with all singular values near 1, by steps of Newton-Schulz's "
             "iteration.\n\n"
             "inp, gram and polynomial (k,k), k = min(R,C), and norms (NORM_DIGITS + 2) f32 are overwritten.")
        .def("fused_residual_layernorm_forward", op(&Backend::fused_residual_layernorm_forward), "residual"_a,
             "out"_a, "mean"_a, "rstd"_a, "a"_a, "b"_a, "weight"_a, "bias"_a,
             "Compute residual (N,C) = a + b, and the layernorm out (N,C) of it. Keeps mean and rstd (N).")
        .def("matmul_gelu_forward", op(&Backend::matmul_gelu_forward), "out"_a, "pre"_a, "inp"_a, "weight"_a,
             "bias"_a = none, "Compute pre (N,OC) as matmul_forward does, and out = gelu(pre).")
        .def("matmul_gelu_backward", op(&Backend::matmul_gelu_backward), "dinp"_a, "dweight"_a, "dbias"_a,
             "dout"_a, "inp"_a, "weight"_a, "pre"_a, "accumulate"_a = true,
             "Compute what matmul_backward does, for inp = gelu(pre): dinp is that of pre.")
        .def("fused_classifier", op(&Backend::fused_classifier), "losses"_a, "logits"_a, "targets"_a,
             "dloss"_a, "V"_a,
             "Compute losses (N) as crossentropy_forward, and replace logits (N,Vp) as "
             "crossentropy_softmax_backward.")
        .def("adamw_many", op(&Backend::adamw_many), "operands"_a, "factor"_a, "step"_a,
             "Do for each of `operands` what adamw does, all at once.\n\n"
             "The Tensors of AdamWOperands are those of adamw.")
        .def(
            "gradient_norm_squared", op(&Backend::gradient_norm_squared), "out"_a, "gradients"_a,
            "Add the sum of the squares of all gradients to out (NORM_DIGITS) f32.\n\n"
            "It is the sum of out[k] * 2**(16 * (k - UNIT_DIGIT)). On the CPU it does not depend on threads, "
            "nor on how gradients are cut at multiples of 1024 elements; digits of up to 256 ranks add "
            "without an error.")
        .def("sample", op(&Backend::sample), "tokens"_a, "logits"_a, "coins"_a, "V"_a, "options"_a,
             "Choose tokens (N) i32, or faults for token_of(), from logits (N,Vp) f32 by coins (N) f32 in "
             "[0, 1).");
}

}  // namespace llmc
