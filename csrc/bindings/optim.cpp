// Optimizer bound once; of each optimizer only its constructor and what its class knows.
#include <optional>

#include "bindings/model.h"
#include "optim/adamw.h"
#include "optim/muon.h"

namespace llmc {

namespace {

// An optimizer and the model whose parameters it updates.
struct BoundOptimizer {
    // An optimizer looks at gradients even if no backward() came after zero_grad().
    void measure() {
        owner.model->materialize_gradients();
        optimizer->measure();
    }
    void apply(float lr) {
        optimizer->apply(lr);
        if (owner.looked_at()) owner.model->arrivals()->wait();
    }
    std::size_t index(const std::string& name) const {
        const auto& state = optimizer->state();
        for (std::size_t i = 0; i < state.size(); ++i)
            if (state[i].name == name) return i;
        throw ArgumentError(filled("no parameter is named '{}'", name));
    }
    Backend& backend() const { return owner.backend(); }
    BoundModel owner;
    std::shared_ptr<Optimizer> optimizer;
};

struct BoundAdamW : BoundOptimizer {
    BoundAdamW(const BoundModel& model, const AdamWOptions& options, std::shared_ptr<Comm> comm)
        : BoundOptimizer{model,
                         (options.validate(),  // before parameters() allocates the gradients
                          let_others_run(std::make_shared<AdamW>(
                              model.model->backend(), model.model->parameters(), options,
                              Sharding{std::move(comm), model.model->arrivals()})))} {}
};

struct BoundMuon : BoundOptimizer {
    BoundMuon(const BoundModel& model, const MuonOptions& options, std::shared_ptr<Comm> comm)
        : BoundOptimizer{model, (options.validate(),  // before parameters() allocates the gradients
                                 let_others_run(std::make_shared<Muon>(
                                     model.model->backend(), model.model->parameters(), options,
                                     Sharding{std::move(comm), model.model->arrivals()})))} {}
};

MuonAdjust adjust_from_name(const std::string& name) {
    if (name == "original") return MuonAdjust::original;
    if (name == "match_rms_adamw") return MuonAdjust::match_rms_adamw;
    throw ArgumentError(filled("adjust_lr is '{}', expected 'original' or 'match_rms_adamw'", name));
}

}  // namespace

void bind_optim(py::module_& m) {
    py::class_<BoundOptimizer>(m, "Optimizer",
                               "An optimizer over a model's parameters: csrc/optim/optimizer.h.")
        .def(
            "step",
            [](BoundOptimizer& self, float lr) {
                const Busy busy(self.backend());
                self.measure();
                self.apply(lr);
            },
            "lr"_a, "Queue an update: measure() and apply(), without waiting.")
        .def(
            "measure",
            [](BoundOptimizer& self) {
                const Busy busy(self.backend());
                self.measure();
                return self.optimizer->norm();
            },
            "Measure the gradients and return their global norm before clipping. Waits.")
        .def(
            "apply",
            [](BoundOptimizer& self, float lr) {
                const Busy busy(self.backend());
                self.apply(lr);
            },
            "lr"_a, "Queue the update with the gradients measured last, and count it.")
        .def(
            "norm",
            [](const BoundOptimizer& self) {
                const Busy busy(self.backend());
                return self.optimizer->norm();
            },
            "Return the global norm of the gradients measured last, before clipping. Waits.")
        .def_property_readonly(
            "bytes", [](const BoundOptimizer& self) { return self.optimizer->bytes(); },
            "The memory of moments and master weights, in bytes.")
        .def_property(
            "step_count",
            [](const BoundOptimizer& self) {
                const Busy busy(self.backend());
                return self.optimizer->step_count();
            },
            [](BoundOptimizer& self, std::int64_t count) {
                const Busy busy(self.backend());
                self.optimizer->set_step_count(count);
            },
            "Updates made so far, which the correction of the moments' bias goes by.")
        .def_property(
            "rng_state",
            [](const BoundOptimizer& self) {
                const Busy busy(self.backend());
                return self.optimizer->rng_state();
            },
            [](BoundOptimizer& self, std::uint64_t state) {
                const Busy busy(self.backend());
                self.optimizer->set_rng_state(state);
            },
            "The state of the generator that draws the seeds of stochastic rounding.")
        .def(
            "state",
            [](const py::object& self) {
                py::dict out;
                const Optimizer& optimizer = *self.cast<BoundOptimizer&>().optimizer;
                const auto owner = std::make_shared<py::object>(self);
                const auto tensor = [&](const Tensor& t) -> py::object {
                    if (!t) return py::none();
                    return py::cast(OwnedTensor{optimizer.backend(), t, owner});
                };
                for (const Optimizer::State& s : optimizer.state()) {
                    py::list moments;
                    for (const Tensor& moment : s.moments) moments.append(tensor(moment));
                    out[py::str(s.name)] = py::make_tuple(py::tuple(moments), tensor(s.master));
                }
                return out;
            },
            "Return (moments, master) by the parameter's name: flat Tensors of as many elements, or among "
            "ranks of "
            "those that this rank updates.\n\n"
            "moments: a tuple, f32. "
            "master holds the 16 bits below a bf16 parameter, i16; None if there are no master weights.")
        .def_property_readonly(
            "sharded", [](const BoundOptimizer& self) { return self.optimizer->sharded(); },
            "Whether this rank keeps the state of what it updates only (ZeRO-1).")
        .def_property_readonly(
            "partition",
            [](const BoundOptimizer& self) {
                return std::const_pointer_cast<Partition>(self.optimizer->partition());  // nothing changes it
            },
            "Which rank updates what, for Reduction; None if this process updates everything.")
        .def(
            "layers",
            [](const BoundOptimizer& self, const std::string& name) {
                return self.optimizer->state()[self.index(name)].layers.size();
            },
            "name"_a, "Return how many layers of a parameter are stacked; 1 if it has none.")
        .def(
            "gather",
            [](const py::object& self, const std::string& name, std::size_t kind, std::int64_t layer) {
                auto& bound = self.cast<BoundOptimizer&>();
                const std::size_t i = bound.index(name);
                Tensor t;
                {
                    const Busy busy(bound.backend());
                    t = bound.optimizer->gather(i, kind, layer);
                }
                return OwnedTensor{bound.optimizer->backend(), t, std::make_shared<py::object>(self)};
            },
            "name"_a, "kind"_a, "layer"_a,
            "Return all of one layer's state, flat, valid until the next call; every rank calls it alike.\n\n"
            "kind: which moment, from 0 on; the number of moments means the master.")
        .def(
            "scatter",
            [](BoundOptimizer& self, const std::string& name, std::size_t kind, std::int64_t layer,
               const std::optional<py::array>& values) {
                const std::size_t i = self.index(name);
                const Optimizer::State& s = self.optimizer->state()[i];
                const bool master = kind == s.moments.size();
                if (values) {
                    const py::dtype expected =
                        master ? py::dtype::of<std::int16_t>() : py::dtype::of<float>();
                    LLMC_CHECK(values->dtype().is(expected) && (values->flags() & py::array::c_style) &&
                                   values->size() == s.layer_numel,
                               "values of a layer of {}: expected {} contiguous {}", name, s.layer_numel,
                               master ? "int16" : "float32");
                }
                const void* const data = values ? values->data() : nullptr;
                const Busy busy(self.backend());
                self.optimizer->scatter(i, kind, layer, data);
            },
            "name"_a, "kind"_a, "layer"_a, "values"_a,
            "Set all of one layer's state, flat, from rank 0's values; the other ranks pass None. Every rank "
            "calls "
            "it alike.");

    py::class_<BoundAdamW, BoundOptimizer>(
        m, "AdamW", "AdamW over a model's parameters: csrc/optim/adamw.h. llmc.AdamW is made of it.")
        .def(py::init([](const BoundModel& model, float beta1, float beta2, float eps, float weight_decay,
                         float grad_clip, bool decay_all, bool master_weights, std::uint64_t seed,
                         std::optional<std::shared_ptr<Comm>> comm) {
                 AdamWOptions o;
                 o.beta1 = beta1, o.beta2 = beta2, o.eps = eps, o.weight_decay = weight_decay;
                 o.grad_clip = grad_clip, o.decay_all = decay_all, o.master_weights = master_weights;
                 o.seed = seed;
                 const Busy busy(model.backend());
                 return std::make_unique<BoundAdamW>(model, o, comm ? *comm : nullptr);
             }),
             "model"_a, "beta1"_a = 0.9f, "beta2"_a = 0.95f, "eps"_a = 1e-8f, "weight_decay"_a = 0.0f,
             "grad_clip"_a = 1.0f, "decay_all"_a = false, "master_weights"_a = true, "seed"_a = 13371337,
             "comm"_a = py::none())
        .def_static(
            "bytes_per_parameter",
            [](const std::string& dtype, bool master_weights) {
                return AdamW::bytes_per_parameter(dtype_from_name(dtype), master_weights);
            },
            "dtype"_a, "master_weights"_a,
            "Return the bytes that AdamW keeps of each weight of a model of this dtype.");

    py::class_<BoundMuon, BoundOptimizer>(m, "Muon",
                                          "Muon over a model's matrices, AdamW over the rest: "
                                          "csrc/optim/muon.h. llmc.Muon is made of it.")
        .def(py::init([](const BoundModel& model, float momentum, bool nesterov, int ns_steps, float lr_ratio,
                         const std::string& adjust_lr, float beta1, float beta2, float eps,
                         float weight_decay, float grad_clip, bool master_weights, std::uint64_t seed,
                         std::optional<std::shared_ptr<Comm>> comm) {
                 MuonOptions o;
                 o.momentum = momentum, o.nesterov = nesterov, o.ns_steps = ns_steps, o.lr_ratio = lr_ratio;
                 o.adjust = adjust_from_name(adjust_lr);
                 o.beta1 = beta1, o.beta2 = beta2, o.eps = eps, o.weight_decay = weight_decay;
                 o.grad_clip = grad_clip, o.master_weights = master_weights, o.seed = seed;
                 const Busy busy(model.backend());
                 return std::make_unique<BoundMuon>(model, o, comm ? *comm : nullptr);
             }),
             "model"_a, "momentum"_a = 0.95f, "nesterov"_a = true, "ns_steps"_a = 5, "lr_ratio"_a = 1.0f,
             "adjust_lr"_a = "match_rms_adamw", "beta1"_a = 0.9f, "beta2"_a = 0.95f, "eps"_a = 1e-8f,
             "weight_decay"_a = 0.0f, "grad_clip"_a = 1.0f, "master_weights"_a = true, "seed"_a = 13371337,
             "comm"_a = py::none());
}

}  // namespace llmc
