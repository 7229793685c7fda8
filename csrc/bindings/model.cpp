#include "bindings/model.h"

#include <optional>

#include "model/checkpoint.h"
#include "model/kv_cache.h"

namespace llmc {

namespace {

using Tokens = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

struct BT {
    std::int64_t B, T;
};
BT batch_shape(const Tokens& tokens, const char* name) {
    LLMC_CHECK(tokens.ndim() == 2, "{} has {} dimensions, expected (B, T)", name, tokens.ndim());
    return {tokens.shape(0), tokens.shape(1)};
}

// A cache and its model.
struct BoundCache {
    BoundCache(const BoundModel& model, std::int64_t B, std::int64_t max_len)
        : model(model), cache(*model.gpt2, B, max_len) {}
    void check_count(const char* what, const py::array& values) const {
        LLMC_CHECK(values.ndim() == 1 && values.size() == cache.B(), "{} {} for a cache of {} sequences",
                   values.size(), what, cache.B());
    }
    BoundModel model;
    KVCache cache;
};

Parameter parameter_named(GPT2& model, const std::string& name) {
    for (const Parameter& p : model.parameters())
        if (p.name == name) return p;
    throw ArgumentError(filled("no parameter is named '{}'", name));
}

}  // namespace

void bind_model(py::module_& m) {
    py::class_<GPT2Config>(m, "GPT2Config")
        .def(py::init([](std::int64_t max_seq_len, std::int64_t vocab_size, std::int64_t num_layers,
                         std::int64_t num_heads, std::int64_t channels, std::int64_t padded_vocab_size) {
                 GPT2Config c{
                     max_seq_len, vocab_size,
                     num_layers,  num_heads,
                     channels,    padded_vocab_size > 0 ? padded_vocab_size : padded_vocab(vocab_size)};
                 c.validate();
                 return c;
             }),
             "max_seq_len"_a, "vocab_size"_a, "num_layers"_a, "num_heads"_a, "channels"_a,
             "padded_vocab_size"_a = 0)
        .def_readonly("max_seq_len", &GPT2Config::max_seq_len)
        .def_readonly("vocab_size", &GPT2Config::vocab_size)
        .def_readonly("padded_vocab_size", &GPT2Config::padded_vocab_size)
        .def_readonly("num_layers", &GPT2Config::num_layers)
        .def_readonly("num_heads", &GPT2Config::num_heads)
        .def_readonly("channels", &GPT2Config::channels);
    py::class_<ParameterSpec>(m, "ParameterSpec",
                              "A row of a model's table of parameters: csrc/model/parameters.h.")
        .def_readonly("name", &ParameterSpec::name)
        .def_property_readonly("shape", [](const ParameterSpec& s) { return py::tuple(py::cast(s.shape)); })
        .def_readonly("per_layer", &ParameterSpec::per_layer)
        .def_readonly("decay", &ParameterSpec::decay)
        .def_readonly("padding", &ParameterSpec::padding);
    m.def("parameter_table", &gpt2_parameters, "config"_a,
          "The parameters of a model, in the order of its file.");
    m.def("config_from_descriptor", &gpt2_config_from_descriptor, "descriptor"_a);

    py::class_<MemoryPlan>(m, "MemoryPlan", "Bytes by purpose.")
        .def_readonly("parameters", &MemoryPlan::parameters)
        .def_readonly("gradients", &MemoryPlan::gradients)
        .def_readonly("optimizer", &MemoryPlan::optimizer)
        .def_readonly("activations", &MemoryPlan::activations)
        .def_property_readonly("total", &MemoryPlan::total);
    py::class_<ModelOptions>(m, "ModelOptions", "How a model is computed: csrc/model/options.h.")
        .def(py::init([](const std::string& dtype, const std::string& grad_dtype, int recompute,
                         std::int64_t classifier_rows) {
                 ModelOptions o{dtype_from_name(dtype), dtype_from_name(grad_dtype),
                                static_cast<Recompute>(recompute), classifier_rows};
                 o.validate();
                 return o;
             }),
             "dtype"_a = "f32", "grad_dtype"_a = "f32", "recompute"_a = 1, "classifier_rows"_a = 1024)
        .def_property_readonly("dtype", [](const ModelOptions& o) { return name_of(o.dtype); })
        .def_property_readonly("grad_dtype", [](const ModelOptions& o) { return name_of(o.grad_dtype); })
        .def_property_readonly("recompute",
                               [](const ModelOptions& o) { return static_cast<int>(o.recompute); })
        .def_readonly("classifier_rows", &ModelOptions::classifier_rows);
    m.def("memory_plan", &GPT2::memory_plan, "config"_a, "options"_a, "B"_a, "T"_a, "training"_a = true,
          "master_weights"_a = true,
          "The memory that a model takes for batches of (B, T), and its optimizer.");

    // Both before their methods, which name each other in signatures.
    py::class_<BoundModel> model(m, "GPT2", "The schedule of csrc/model/gpt2.cpp. llmc.GPT2 stands over it.");
    py::class_<BoundCache> cache(
        m, "KVCache", "Keys and values of the positions seen so far, and generation by means of them.");

    cache
        .def(py::init([](const BoundModel& model, std::int64_t B, std::int64_t max_len) {
                 const Busy busy(model.backend());
                 return std::make_unique<BoundCache>(model, B, max_len);
             }),
             "model"_a, "B"_a, "max_len"_a)
        .def_property_readonly("B", [](const BoundCache& self) { return self.cache.B(); })
        .def_property_readonly("max_len", [](const BoundCache& self) { return self.cache.max_len(); })
        .def_property_readonly("bytes", [](const BoundCache& self) { return self.cache.bytes(); })
        .def_property_readonly("backend", [](const BoundCache& self) { return self.cache.backend(); })
        .def(
            "length", [](const BoundCache& self, std::int64_t b) { return self.cache.length(b); }, "b"_a)
        .def(
            "clear", [](BoundCache& self, std::int64_t b) { self.cache.clear(b); }, "b"_a)
        .def(
            "prefill",
            [](BoundCache& self, std::int64_t b, const Tokens& tokens) {
                LLMC_CHECK(tokens.ndim() == 1, "tokens have {} dimensions, expected 1", tokens.ndim());
                py::array_t<float> logits(self.model.gpt2->config().vocab_size);
                float* const out = logits.mutable_data();
                const std::int32_t* const x = tokens.data();
                const std::int64_t n = tokens.size();
                const Busy busy(self.model.backend());
                self.model.weights_changed();
                self.cache.prefill(b, x, n, out);
                return logits;
            },
            "b"_a, "tokens"_a,
            "Append tokens to sequence b; return the logits (vocab_size) after the last of them.")
        .def(
            "decode",
            [](BoundCache& self, const Tokens& tokens) {
                self.check_count("tokens", tokens);
                py::array_t<float> logits({self.cache.B(), self.model.gpt2->config().vocab_size});
                float* const out = logits.mutable_data();
                const std::int32_t* const x = tokens.data();
                const Busy busy(self.model.backend());
                self.model.weights_changed();
                self.cache.decode(x, out);
                return logits;
            },
            "tokens"_a, "Append a token to every sequence; return the logits (B, vocab_size) after it.")
        .def(
            "queue_tokens",
            [](BoundCache& self, const std::optional<Tokens>& tokens,
               const py::array_t<float, py::array::c_style | py::array::forcecast>& coins,
               const SamplerOptions& options) {
                if (tokens) self.check_count("tokens", *tokens);
                self.check_count("coins", coins);
                const std::int32_t* const x = tokens ? tokens->data() : nullptr;
                const float* const coin = coins.data();
                const Busy busy(self.model.backend());
                self.model.weights_changed();
                self.cache.queue_tokens(x, coin, options);
            },
            "tokens"_a, "coins"_a, "options"_a,
            "decode(), and choose a token from each sequence's logits, without waiting. tokens None: go on "
            "from "
            "those chosen last.")
        .def(
            "read_tokens",
            [](BoundCache& self) {
                py::array_t<std::int32_t> tokens(self.cache.B());
                std::int32_t* const out = tokens.mutable_data();
                const Busy busy(self.model.backend());
                self.cache.read_tokens(out);
                return tokens;
            },
            "The tokens of the oldest queue_tokens() not read yet; negative: faults, see token_of().");

    model
        .def(py::init(
                 [](const GPT2Config& config, std::shared_ptr<Backend> backend, const ModelOptions& options) {
                     const Busy busy(*backend);
                     return BoundModel{std::make_shared<GPT2>(config, backend, options)};
                 }),
             "config"_a, py::arg("backend").none(false), "options"_a)
        .def_property_readonly("config", [](const BoundModel& self) { return self.gpt2->config(); })
        .def_property_readonly("options", [](const BoundModel& self) { return self.gpt2->options(); })
        .def_property_readonly("backend", [](const BoundModel& self) { return self.gpt2->backend(); })
        .def_property_readonly("num_parameters",
                               [](const BoundModel& self) { return self.gpt2->num_parameters(); })
        .def(
            "init_weights",
            [](BoundModel& self, std::uint32_t seed) {
                const Busy busy(self.backend());
                self.gpt2->init_weights(seed);
            },
            "seed"_a = 42)
        .def(
            "forward",
            [](BoundModel& self, const Tokens& inputs) {
                const auto [B, T] = batch_shape(inputs, "inputs");
                const std::int32_t* const data = inputs.data();
                const Busy busy(self.backend());
                self.weights_changed();
                self.gpt2->forward(data, B, T);
            },
            "inputs"_a)
        .def(
            "backward",
            [](BoundModel& self, const Tokens& targets, float scale,
               std::optional<std::shared_ptr<GradientSink>> sink) {
                const auto [B, T] = batch_shape(targets, "targets");
                const Tensor& of = self.gpt2->activations().targets;
                LLMC_CHECK(of.is({B, T}), "targets have shape ({}, {}), but forward() had {}", B, T, of);
                const std::int32_t* const data = targets.data();
                const Busy busy(self.backend());
                self.gpt2->backward(data, scale, sink ? sink->get() : nullptr);
            },
            "targets"_a, "scale"_a = 1.0f, "sink"_a = py::none())
        .def("zero_grad",
             [](BoundModel& self) {
                 const Busy busy(self.backend());
                 self.gpt2->zero_grad();
                 if (self.views->alive > 0) self.gpt2->materialize_gradients();
             })
        .def("loss",
             [](const BoundModel& self) {
                 const Busy busy(self.backend());
                 return self.gpt2->loss();
             })
        .def(
            "evaluate",
            [](BoundModel& self, const Tokens& inputs, const Tokens& targets, bool by_token) -> py::object {
                const auto [B, T] = batch_shape(inputs, "inputs");
                const auto shape = batch_shape(targets, "targets");
                LLMC_CHECK(shape.B == B && shape.T == T, "targets have shape ({}, {}), inputs ({}, {})",
                           shape.B, shape.T, B, T);
                const std::int32_t *const x = inputs.data(), *const y = targets.data();
                py::array_t<float> losses({B, T});
                float* const out = losses.mutable_data();
                float mean;
                {
                    const Busy busy(self.backend());
                    self.weights_changed();
                    mean = self.gpt2->evaluate(x, y, B, T, out);
                }
                if (by_token) return losses;
                return py::float_(mean);
            },
            "inputs"_a, "targets"_a, "by_token"_a = false)
        .def(
            "logits",
            [](BoundModel& self, const Tokens& inputs) {
                const auto [B, T] = batch_shape(inputs, "inputs");
                py::array_t<float> logits({B, T, self.gpt2->config().vocab_size});
                float* const out = logits.mutable_data();
                const std::int32_t* const x = inputs.data();
                const Busy busy(self.backend());
                self.weights_changed();
                self.gpt2->logits(x, B, T, out);
                return logits;
            },
            "inputs"_a)
        .def("parameter_names",
             [](const BoundModel& self) {
                 std::vector<std::string> names;
                 for (const auto& [name, tensor] : self.gpt2->parameter_tensors()) names.push_back(name);
                 return names;
             })
        .def(
            "parameter",
            [](BoundModel& self, const std::string& name) {
                for (const auto& [n, tensor] : self.gpt2->parameter_tensors())
                    if (n == name) return OwnedTensor{self.gpt2->backend(), tensor, self.gpt2};
                throw ArgumentError(filled("no parameter is named '{}'", name));
            },
            "name"_a)
        .def(
            "gradient",
            [](BoundModel& self, const std::string& name) {
                {
                    const Busy busy(self.backend());
                    self.gpt2->materialize_gradients();
                }
                return OwnedTensor{self.gpt2->backend(), parameter_named(*self.gpt2, name).grad, self.gpt2};
            },
            "name"_a)
        .def(
            "parameter_view",
            [](BoundModel& self, const std::string& name) {
                for (const auto& [n, tensor] : self.gpt2->parameter_tensors())
                    if (n == name) return self.view(tensor);
                throw ArgumentError(filled("no parameter is named '{}'", name));
            },
            "name"_a)
        .def(
            "gradient_view",
            [](BoundModel& self, const std::string& name) {
                {
                    const Busy busy(self.backend());
                    self.gpt2->materialize_gradients();
                }
                return self.view(parameter_named(*self.gpt2, name).grad);
            },
            "name"_a)
        .def("all_parameters",
             [](BoundModel& self) {
                 return OwnedTensor{self.gpt2->backend(), self.gpt2->all_parameters(), self.gpt2};
             })
        .def("weights_changed",
             [](BoundModel& self) {
                 const Busy busy(self.backend());
                 self.gpt2->weights_changed();
             })
        .def(
            "load_checkpoint",
            [](BoundModel& self, const std::filesystem::path& path) {
                const Busy busy(self.backend());
                load_checkpoint(*self.gpt2, path);
            },
            "path"_a)
        .def(
            "save_checkpoint",
            [](const BoundModel& self, const std::filesystem::path& path) {
                const Busy busy(self.backend());
                save_checkpoint(*self.gpt2, path);
            },
            "path"_a);

    m.def(
        "inspect_checkpoint",
        [](const std::filesystem::path& path) {
            const CheckpointInfo info = inspect_checkpoint(path);
            return py::make_tuple(info.config, name_of(info.dtype), info.num_parameters);
        },
        "path"_a, "(config, dtype, number of parameters) of a llm.c model file.");
    m.def(
        "checkpoint_header",
        [](const GPT2Config& config, const std::string& dtype) {
            const Header h = checkpoint_header(config, dtype_from_name(dtype));
            return py::bytes(reinterpret_cast<const char*>(h.data()), sizeof h);
        },
        "config"_a, "dtype"_a, "The 1024 bytes that a llm.c model file begins with.");
}

}  // namespace llmc
