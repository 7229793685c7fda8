#include "optim/adamw.h"

#include "bindings/model.h"

namespace llmc {

namespace {

// An optimizer and the model whose parameters it updates.
struct BoundAdamW {
    BoundAdamW(const BoundModel& model, const AdamWOptions& options)
        : owner(model), adamw(model.model->backend(), model.model->parameters(), options) {}
    // An optimizer looks at gradients even if no backward() came after zero_grad().
    void measure() {
        owner.model->materialize_gradients();
        adamw.measure();
    }
    BoundModel owner;
    AdamW adamw;
};

}  // namespace

void bind_optim(py::module_& m) {
    py::class_<BoundAdamW>(m, "AdamW",
                           "AdamW over a model's parameters: csrc/optim/adamw.h. llmc.AdamW is made of it.")
        .def(py::init([](const BoundModel& model, float beta1, float beta2, float eps, float weight_decay,
                         float grad_clip, bool decay_all, bool master_weights, std::uint64_t seed) {
                 AdamWOptions o;
                 o.beta1 = beta1, o.beta2 = beta2, o.eps = eps, o.weight_decay = weight_decay;
                 o.grad_clip = grad_clip, o.decay_all = decay_all, o.master_weights = master_weights;
                 o.seed = seed;
                 const Busy busy(model.backend());
                 return std::make_unique<BoundAdamW>(model, o);
             }),
             "model"_a, "beta1"_a = 0.9f, "beta2"_a = 0.95f, "eps"_a = 1e-8f, "weight_decay"_a = 0.0f,
             "grad_clip"_a = 1.0f, "decay_all"_a = false, "master_weights"_a = true, "seed"_a = 13371337)
        .def(
            "step",
            [](BoundAdamW& self, float lr) {
                const Busy busy(self.owner.backend());
                self.measure();
                self.adamw.apply(lr);
            },
            "lr"_a, "Queue an update: measure() and apply(), without waiting.")
        .def(
            "measure",
            [](BoundAdamW& self) {
                const Busy busy(self.owner.backend());
                self.measure();
                return self.adamw.norm();
            },
            "Measure the gradients and return their global norm before clipping. Waits.")
        .def(
            "apply",
            [](BoundAdamW& self, float lr) {
                const Busy busy(self.owner.backend());
                self.adamw.apply(lr);
            },
            "lr"_a, "Queue the update with the gradients measured last, and count it.")
        .def(
            "norm",
            [](const BoundAdamW& self) {
                const Busy busy(self.owner.backend());
                return self.adamw.norm();
            },
            "Return the global norm of the gradients measured last, before clipping. Waits.")
        .def_property_readonly(
            "bytes", [](const BoundAdamW& self) { return self.adamw.bytes(); },
            "The memory of moments and master weights, in bytes.")
        .def_property(
            "step_count", [](const BoundAdamW& self) { return self.adamw.step_count(); },
            [](BoundAdamW& self, std::int64_t count) { self.adamw.set_step_count(count); },
            "Updates made so far, which the correction of the moments' bias goes by.")
        .def_property(
            "rng_state", [](const BoundAdamW& self) { return self.adamw.rng_state(); },
            [](BoundAdamW& self, std::uint64_t state) { self.adamw.set_rng_state(state); },
            "The state of the generator that draws the seeds of stochastic rounding.")
        .def(
            "state",
            [](const py::object& self) {
                py::dict out;
                auto& adamw = self.cast<BoundAdamW&>().adamw;
                const auto owner = std::make_shared<py::object>(self);
                const auto tensor = [&](const Tensor& t) -> py::object {
                    if (!t) return py::none();
                    return py::cast(
                        OwnedTensor{adamw.backend(), t, std::shared_ptr<void>(owner, owner.get())});
                };
                for (const AdamW::State& s : adamw.state())
                    out[py::str(s.name)] = py::make_tuple(tensor(s.m), tensor(s.v), tensor(s.master));
                return out;
            },
            "Return (m, v, master) by the parameter's name: Tensors of its shape, m and v f32.\n\n"
            "master holds the 16 bits below a bf16 parameter, i16; None if there are no master weights.");
}

}  // namespace llmc
