#include "bindings/bindings.h"
#include "core/optimizer.h"

namespace llmc {

void bind_optim(py::module_& m) {
    py::class_<AdamW>(m, "AdamW")
        .def(py::init([](const py::object& model, float beta1, float beta2, float eps, float weight_decay,
                         float grad_clip, bool decay_all, bool master_weights, std::uint64_t seed) {
                 AdamWOptions o;
                 o.beta1 = beta1, o.beta2 = beta2, o.eps = eps, o.weight_decay = weight_decay,
                 o.grad_clip = grad_clip;
                 o.decay_all = decay_all, o.master_weights = master_weights, o.seed = seed;
                 const py::capsule parameters = py::module_::import("llmc._llmc").attr("_parameters")(model);
                 return std::make_unique<AdamW>(model.attr("backend").cast<std::shared_ptr<Backend>>(),
                                                *parameters.get_pointer<std::vector<Parameter>>(), o);
             }),
             "model"_a, "beta1"_a = 0.9f, "beta2"_a = 0.95f, "eps"_a = 1e-8f, "weight_decay"_a = 0.0f,
             "grad_clip"_a = 1.0f, "decay_all"_a = false, "master_weights"_a = true, "seed"_a = 13371337,
             py::keep_alive<1, 2>())
        .def("step", busy(&AdamW::step), "lr"_a, "step"_a)
        .def("measure", busy(&AdamW::measure))
        .def("apply", busy(&AdamW::apply), "lr"_a, "step"_a)
        .def("norm", busy(&AdamW::norm))
        .def_property_readonly("bytes", &AdamW::bytes)
        .def_property(
            "rng_state", [](const AdamW& self) { return self.rng.state; },
            [](AdamW& self, std::uint64_t state) {
                LLMC_CHECK(state != 0, "an xorshift state cannot be 0");
                self.rng.state = state;
            })
        .def(
            "state",
            [](const py::object& self, const std::shared_ptr<Backend>& backend) {
                py::dict out;
                const auto own = std::make_shared<py::object>(self);
                const auto tensor = [&](const Tensor& t) -> py::object {
                    if (!t) return py::none();
                    return py::cast(OwnedTensor{backend, t, std::shared_ptr<void>(own, own.get())});
                };
                for (const AdamW::State& s : self.cast<AdamW&>().state())
                    out[py::str(s.name)] = py::make_tuple(tensor(s.m), tensor(s.v), tensor(s.master));
                return out;
            },
            "backend"_a, "name -> (m, v, master) as Tensors; master is None for f32 parameters.");
}

}  // namespace llmc
