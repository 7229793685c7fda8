// Every op of a Backend, so that each kernel can be tested against NumPy and a schedule can be written in
// Python.
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

template <class... Args>
auto op(void (Backend::*method)(Args...)) {
    return [method](Backend& self, typename Passed<std::remove_cvref_t<Args>>::type... args) {
        const Busy busy(self);
        (self.*method)(Passed<std::remove_cvref_t<Args>>::unwrap(self, args)...);
    };
}

}  // namespace

void bind_ops(py::module_& m) {
    py::class_<AdamWStep>(m, "AdamWStep", "Everything that the host knows of one AdamW step.")
        .def(py::init([](float lr, float beta1, float beta2, float eps, float weight_decay, float correction1,
                         float correction2, std::uint32_t seed) {
                 return AdamWStep{lr, beta1, beta2, eps, weight_decay, correction1, correction2, seed};
             }),
             "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "correction1"_a, "correction2"_a,
             "seed"_a = 0);

    py::class_<SamplerOptions>(m, "SamplerOptions", "How a token is chosen: csrc/core/sampler.h.")
        .def(py::init([](float temperature, std::int64_t top_k, float top_p) {
                 return SamplerOptions{temperature, top_k, top_p};
             }),
             "temperature"_a = 1.0f, "top_k"_a = 0, "top_p"_a = 1.0f);

    const auto none = py::none();
    py::class_<Backend, std::shared_ptr<Backend>> backend(
        m, "Backend", "A device and its ops. Formulas, shapes and accumulation rules: csrc/core/backend.h.");
    bind_allocation(backend);
    backend.def(py::init(&make_backend), "device"_a = "cpu", "threads"_a = 0)
        .def("info", &Backend::info)
        .def_property_readonly("runs_ahead", &Backend::runs_ahead,
                               "Ops are only queued, so that the host may be ahead of them.")
        .def("synchronize",
             [](Backend& self) {
                 const Busy busy(self);
                 self.synchronize();
             })
        .def(
            "set_option",
            [](Backend& self, const std::string& name, const std::string& value) {
                const Busy busy(self);
                self.set_option(name, value);
            },
            "name"_a, "value"_a,
            "A choice that the backend offers, as ('attention', 'flash') of 'cuda': doc/cuda.md.")
        .def(
            "workspace_bytes",
            [](Backend& self, std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t NH,
               const std::string& dtype) {
                const Busy busy(self);
                return self.workspace_bytes(B, T, C, NH, dtype_from_name(dtype));
            },
            "B"_a, "T"_a, "C"_a, "NH"_a, "dtype"_a,
            "Bytes that the ops of a training step take for themselves, beside the tensors that they are "
            "given.")
        .def("zero", op(&Backend::zero), "x"_a)
        .def("copy", op(&Backend::copy), "out"_a, "inp"_a)
        .def("weights_changed", op(&Backend::weights_changed), "weights"_a,
             "Call once for memory that holds weights, and again after writing them by any other way than "
             "zero, copy, from_host or adamw: packed copies of this memory are dropped.")
        .def("encoder_forward", op(&Backend::encoder_forward), "out"_a, "inp"_a, "wte"_a, "wpe"_a,
             "start"_a = none)
        .def("encoder_backward", op(&Backend::encoder_backward), "dwte"_a, "dwpe"_a, "dout"_a, "inp"_a)
        .def("layernorm_forward", op(&Backend::layernorm_forward), "out"_a, "mean"_a, "rstd"_a, "inp"_a,
             "weight"_a, "bias"_a)
        .def("layernorm_backward", op(&Backend::layernorm_backward), "dinp"_a, "dweight"_a, "dbias"_a,
             "dout"_a, "inp"_a, "weight"_a, "mean"_a, "rstd"_a)
        .def("matmul_forward", op(&Backend::matmul_forward), "out"_a, "inp"_a, "weight"_a, "bias"_a = none)
        .def("matmul_backward", op(&Backend::matmul_backward), "dinp"_a, "dweight"_a, "dbias"_a, "dout"_a,
             "inp"_a, "weight"_a, "accumulate"_a = true)
        .def("attention_forward", op(&Backend::attention_forward), "out"_a, "lse"_a, "qkv"_a, "NH"_a)
        .def("attention_backward", op(&Backend::attention_backward), "dqkv"_a, "dout"_a, "qkv"_a, "out"_a,
             "lse"_a, "NH"_a)
        .def("attention_decode", op(&Backend::attention_decode), "out"_a, "kcache"_a, "vcache"_a, "qkv"_a,
             "start"_a, "NH"_a)
        .def("gelu_forward", op(&Backend::gelu_forward), "out"_a, "inp"_a)
        .def("gelu_backward", op(&Backend::gelu_backward), "dinp"_a, "inp"_a, "dout"_a)
        .def("residual_forward", op(&Backend::residual_forward), "out"_a, "a"_a, "b"_a)
        .def("crossentropy_forward", op(&Backend::crossentropy_forward), "losses"_a, "logits"_a, "targets"_a,
             "V"_a)
        .def("crossentropy_softmax_backward", op(&Backend::crossentropy_softmax_backward), "logits"_a,
             "targets"_a, "dloss"_a, "V"_a)
        .def("sum", op(&Backend::sum), "out"_a, "inp"_a, "scale"_a = 1.0f)
        .def("global_norm_squared", op(&Backend::global_norm_squared), "out"_a, "inp"_a)
        .def("clip_factor", op(&Backend::clip_factor), "norm"_a, "factor"_a, "norm_squared"_a, "max_norm"_a)
        .def("adamw", op(&Backend::adamw), "param"_a, "master"_a, "m"_a, "v"_a, "grad"_a, "factor"_a,
             "step"_a)
        .def("fused_residual_layernorm_forward", op(&Backend::fused_residual_layernorm_forward), "residual"_a,
             "out"_a, "mean"_a, "rstd"_a, "a"_a, "b"_a, "weight"_a, "bias"_a)
        .def("matmul_gelu_forward", op(&Backend::matmul_gelu_forward), "out"_a, "pre"_a, "inp"_a, "weight"_a,
             "bias"_a = none)
        .def("matmul_gelu_backward", op(&Backend::matmul_gelu_backward), "dinp"_a, "dweight"_a, "dbias"_a,
             "dout"_a, "inp"_a, "weight"_a, "pre"_a, "accumulate"_a = true)
        .def("fused_classifier", op(&Backend::fused_classifier), "losses"_a, "logits"_a, "targets"_a,
             "dloss"_a, "V"_a)
        .def("sample", op(&Backend::sample), "tokens"_a, "logits"_a, "coins"_a, "V"_a, "options"_a);
}

}  // namespace llmc
