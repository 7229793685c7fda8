// What every family of models offers, bound once: a family's own file adds its config and constructor.
#include "bindings/model.h"

#include <optional>

namespace llmc {

namespace {

struct BT {
    std::int64_t B, T;
};
BT batch_shape(const Tokens& tokens, const char* name) {
    const auto& ids = tokens.ids;
    LLMC_CHECK(ids.ndim() == 2, "{} have shape {}, expected (B, T): one row of ids is [ids]", name,
               std::string(py::str(ids.attr("shape"))));
    return {ids.shape(0), ids.shape(1)};
}

Parameter parameter_named(Model& model, const std::string& name) {
    for (const Parameter& p : model.parameters())
        if (p.name == name) return p;
    throw ArgumentError(filled("no parameter is named '{}'", name));
}

Tensor activation_named(const Model& model, const std::string& name) {
    for (const auto& [n, tensor] : model.activations())
        if (n == name) return tensor;
    throw ArgumentError(filled("no activation is named '{}'", name));
}

// On the CPU a view, which keeps the memory when the model gives it up for a larger batch. On a GPU a copy.
py::array activation(const BoundModel& self, const std::string& name) {
    Tensor tensor;
    std::shared_ptr<void> memory;
    {
        const Busy busy(self.backend());
        tensor = activation_named(*self.model, name);
        if (self.backend().info().name == "cpu") {
            memory = self.model->activation_memory();
        } else {
            const auto host = std::make_shared<std::vector<char>>(static_cast<std::size_t>(tensor.bytes()));
            self.backend().to_host(host->data(), tensor);
            tensor.data = host->data();
            memory = host;
        }
    }
    const py::capsule base(new std::shared_ptr<void>(memory),
                           [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
    py::array array = host_view(tensor, base);
    array.attr("setflags")("write"_a = false);
    return array;
}

}  // namespace

Tokens tokens_of(py::handle given) {
    if (py::isinstance<decltype(Tokens::ids)>(given))  // as what a loader gives: nothing to look through
        return {py::reinterpret_borrow<decltype(Tokens::ids)>(given)};
    py::array ids;
    try {
        ids = py::module_::import("numpy").attr("asarray")(given);
    } catch (py::error_already_set& e) {
        if (!e.matches(PyExc_ValueError)) throw;  // a tensor on a GPU says itself what to do
        throw ArgumentError("token ids must be rows of one length, and these are not");
    }
    const char kind = ids.dtype().kind();
    const std::string type = py::str(ids.dtype());
    const bool array = kind != 'O' || ids.ndim() > 0;  // what is no array becomes one of a single object
    if (kind == 'U' || kind == 'S' || kind == 'T')
        throw py::type_error(
            "token ids must be integers, got text: a tokenizer's encode(text) makes them of it");
    LLMC_CHECK(kind == 'i' || kind == 'u' || (array && ids.size() == 0), "token ids must be integers, got {}",
               array ? type : std::string(py::str(py::type::handle_of(given).attr("__name__"))));
    if (ids.itemsize() >= 4 && type != "int32" && ids.size() > 0)
        for (const char* const extreme : {"min", "max"}) {
            const py::int_ id = ids.attr(extreme)();
            LLMC_CHECK(id >= py::int_(INT32_MIN) && id <= py::int_(INT32_MAX),
                       "token id {} does not fit 32 bits", std::string(py::str(id)));
        }
    return {py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>::ensure(ids)};
}

void bind_model(py::module_& m) {
    m.def(
        "token_ids", [](const Tokens& tokens) { return tokens.ids; }, "tokens"_a,
        "Return token ids, in anything that NumPy reads, as an array of int32 of the same shape.");
    py::class_<ParameterSpec>(m, "ParameterSpec",
                              "A row of a model's table of parameters: csrc/model/parameters.h.")
        .def_readonly("name", &ParameterSpec::name, "llm.c's name.")
        .def_property_readonly(
            "shape", [](const ParameterSpec& s) { return py::tuple(py::cast(s.shape)); },
            "The extents, with the number of layers first if per_layer.")
        .def_readonly("per_layer", &ParameterSpec::per_layer,
                      "Each layer has one; all are stacked in one tensor.")
        .def_readonly("decay", &ParameterSpec::decay, "Weight decay applies to it.")
        .def_readonly("padding", &ParameterSpec::padding, "How many of the last rows are zero and stay so.")
        .def_readonly("matrices", &ParameterSpec::matrices,
                      "How many matrices each layer's value is, one below the other, for Muon; 0 if it takes "
                      "none of it.");
    py::class_<MemoryPlan>(m, "MemoryPlan", "The memory that a training run takes, in bytes by purpose.")
        .def_readonly("parameters", &MemoryPlan::parameters, "The weights.")
        .def_readonly("gradients", &MemoryPlan::gradients, "The gradients of the weights.")
        .def_readonly("optimizer", &MemoryPlan::optimizer, "Moments and master weights.")
        .def_readonly("activations", &MemoryPlan::activations,
                      "What forward() keeps for backward(), and what both need for themselves.")
        .def_property_readonly("total", &MemoryPlan::total, "The sum of all purposes.");
    py::class_<ModelOptions>(m, "ModelOptions", "How a model is computed: csrc/model/options.h.")
        .def(py::init([](const std::string& dtype, const std::string& grad_dtype, int recompute,
                         std::int64_t classifier_rows) {
                 ModelOptions o{dtype_from_name(dtype), dtype_from_name(grad_dtype),
                                static_cast<Recompute>(recompute), classifier_rows};
                 o.validate();
                 return o;
             }),
             "dtype"_a = "f32", "grad_dtype"_a = "f32", "recompute"_a = 1, "classifier_rows"_a = 1024)
        .def_property_readonly(
            "dtype", [](const ModelOptions& o) { return name_of(o.dtype); },
            "'f32' or 'bf16': of parameters and activations.")
        .def_property_readonly(
            "grad_dtype", [](const ModelOptions& o) { return name_of(o.grad_dtype); },
            "'f32' or 'bf16': of the parameters' gradients.")
        .def_property_readonly(
            "recompute", [](const ModelOptions& o) { return static_cast<int>(o.recompute); },
            "What backward() computes again: 0 nothing, 1 GELU, 2 GELU and layernorm.")
        .def_readonly("classifier_rows", &ModelOptions::classifier_rows,
                      "Rows of logits that exist at a time.");

    py::class_<BoundModel>(m, "Model", "What every family of models offers: csrc/model/model.h.")
        .def_property_readonly(
            "options", [](const BoundModel& self) { return self.model->options(); },
            "How the model is computed.")
        .def_property_readonly(
            "backend", [](const BoundModel& self) { return self.model->backend(); },
            "The backend that the model is on.")
        .def_property_readonly(
            "vocab_size", [](const BoundModel& self) { return self.model->vocab_size(); },
            "V, the number of tokens.")
        .def_property_readonly(
            "max_seq_len", [](const BoundModel& self) { return self.model->max_seq_len(); },
            "The largest number of positions.")
        .def_property_readonly(
            "num_parameters", [](const BoundModel& self) { return self.model->num_parameters(); },
            "The number of elements of all parameters.")
        .def(
            "init_weights",
            [](BoundModel& self, std::uint32_t seed) {
                const Busy busy(self.backend());
                self.model->init_weights(seed);
            },
            "seed"_a = 42, "Set random weights, as the table of parameters says.")
        .def(
            "forward",
            [](BoundModel& self, const Tokens& inputs) {
                const auto [B, T] = batch_shape(inputs, "inputs");
                const std::int32_t* const data = inputs.ids.data();
                const Busy busy(self.backend());
                self.weights_may_have_changed_in_views();
                self.model->forward(data, B, T);
            },
            "inputs"_a, "Compute the activations of inputs (B, T) int32 that backward() needs.")
        .def(
            "backward",
            [](BoundModel& self, const Tokens& targets, float scale,
               std::optional<std::shared_ptr<GradientSink>> sink) {
                const auto [B, T] = batch_shape(targets, "targets");
                const std::int32_t* const data = targets.ids.data();
                const Busy busy(self.backend());  // first, because another thread may call forward()
                const Tensor of = self.model->targets();
                LLMC_CHECK(of.rank == 0 || of.is({B, T}), "targets have shape ({}, {}), but forward() had {}",
                           B, T, of);
                self.model->backward(data, scale, sink ? sink->get() : nullptr);
            },
            "targets"_a, "scale"_a = 1.0f, "sink"_a = py::none(),
            "Add scale times the gradients and the mean loss of the last forward() to gradients and "
            "loss().\n\n"
            "targets: (B, T) int32; a negative one is ignored. sink: takes the gradients of an update's last "
            "micro-batch, layer by layer as they are complete.")
        .def(
            "zero_grad",
            [](BoundModel& self) {
                const Busy busy(self.backend());
                self.model->zero_grad();
                if (self.views->alive > 0) self.model->materialize_gradients();
            },
            "Begin a new update: gradients and loss() are zero again.")
        .def(
            "loss",
            [](const BoundModel& self) {
                const Busy busy(self.backend());
                return self.model->loss();
            },
            "Return the sum of scale * mean loss over the backward() calls since zero_grad(). Waits.")
        .def(
            "evaluate",
            [](BoundModel& self, const Tokens& inputs, const Tokens& targets, bool by_token) -> py::object {
                const auto [B, T] = batch_shape(inputs, "inputs");
                const auto shape = batch_shape(targets, "targets");
                LLMC_CHECK(shape.B == B && shape.T == T, "targets have shape ({}, {}), inputs ({}, {})",
                           shape.B, shape.T, B, T);
                const std::int32_t *const x = inputs.ids.data(), *const y = targets.ids.data();
                py::array_t<float> losses({B, T});
                float* const out = losses.mutable_data();
                float mean;
                {
                    const Busy busy(self.backend());
                    self.weights_may_have_changed();
                    mean = self.model->evaluate(x, y, B, T, out);
                }
                if (by_token) return losses;
                return py::float_(mean);
            },
            "inputs"_a, "targets"_a, "by_token"_a = false,
            "Compute the loss without gradients; inputs and targets (B, T) int32.\n\n"
            "Returns the mean over all targets, or with by_token the losses, (B, T) f32.")
        .def(
            "logits",
            [](BoundModel& self, const Tokens& inputs) {
                const auto [B, T] = batch_shape(inputs, "inputs");
                py::array_t<float> logits({B, T, self.model->vocab_size()});
                float* const out = logits.mutable_data();
                const std::int32_t* const x = inputs.ids.data();
                const Busy busy(self.backend());
                self.weights_may_have_changed();
                self.model->logits(x, B, T, out);
                return logits;
            },
            "inputs"_a, "Compute the logits, (B, T, vocab_size) f32, of inputs (B, T) int32.")
        .def(
            "parameter_names",
            [](const BoundModel& self) {
                std::vector<std::string> names;
                for (const auto& [name, tensor] : self.model->parameter_tensors()) names.push_back(name);
                return names;
            },
            "Return the parameters' names, in the order of the model's file.")
        .def(
            "parameter",
            [](BoundModel& self, const std::string& name) {
                for (const auto& [n, tensor] : self.model->parameter_tensors())
                    if (n == name) return self.parameter_tensor(tensor);
                throw ArgumentError(filled("no parameter is named '{}'", name));
            },
            "name"_a,
            "Return a parameter, in the model's memory and dtype. Call weights_changed() after writing to "
            "it.")
        .def(
            "gradient",
            [](BoundModel& self, const std::string& name) {
                {
                    const Busy busy(self.backend());
                    self.model->materialize_gradients();
                }
                return OwnedTensor{self.model->backend(), parameter_named(*self.model, name).grad,
                                   self.model};
            },
            "name"_a,
            "Return a parameter's gradient, in the model's memory, of its shape and of dtype grad_dtype.")
        .def(
            "parameter_view",
            [](BoundModel& self, const std::string& name) {
                for (const auto& [n, tensor] : self.model->parameter_tensors())
                    if (n == name) {
                        const py::array view = self.view(tensor);
                        self.wait_all_here();
                        return view;
                    }
                throw ArgumentError(filled("no parameter is named '{}'", name));
            },
            "name"_a,
            "Return a NumPy view of a parameter in the CPU's memory, bf16 as uint16. It may be written to.")
        .def(
            "gradient_view",
            [](BoundModel& self, const std::string& name) {
                {
                    const Busy busy(self.backend());
                    self.model->materialize_gradients();
                }
                return self.view(parameter_named(*self.model, name).grad);
            },
            "name"_a, "Return a NumPy view of a parameter's gradient in the CPU's memory, bf16 as uint16.")
        .def(
            "activation_names",
            [](const BoundModel& self) {
                std::vector<std::string> names;
                const Busy busy(self.backend());
                for (const auto& [name, tensor] : self.model->activations()) names.push_back(name);
                return names;
            },
            "Return the names of what forward() has left for backward(), in the order in which it is "
            "computed.")
        .def("activation", &activation, "name"_a,
             "Return an activation as an array that may not be written to, bf16 as uint16: on the CPU a "
             "view, into which the next "
             "forward() writes, on a GPU a copy.")
        .def(
            "all_parameters",
            [](BoundModel& self) { return self.parameter_tensor(self.model->all_parameters()); },
            "Return all parameters as one tensor (num_parameters), in the order of the model's file.")
        .def(
            "weights_changed",
            [](BoundModel& self) {
                const Busy busy(self.backend());
                self.model->weights_changed();
            },
            "Drop packed copies of the weights. Call after writing to a parameter from outside.");
}

}  // namespace llmc
