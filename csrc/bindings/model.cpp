#include <atomic>
#include <optional>

#include "bindings/bindings.h"
#include "model/checkpoint.h"
#include "model/gpt2.h"

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

// A model and the NumPy views of it that Python holds. Whoever holds a view may write through it, so packed
// copies of weights are not trusted while one lives, nor once after, and zeroed gradients are really zeroed.
struct Model {
    struct Views {
        std::atomic<std::int64_t> alive{0};
        std::atomic<bool> used{false};  // since weights_changed() was last called
    };
    std::shared_ptr<GPT2> gpt2;
    std::shared_ptr<Views> views = std::make_shared<Views>();

    py::array view(const Tensor& t) {
        LLMC_CHECK(gpt2->backend()->info().name == "cpu",
                   "parameters on {} cannot be viewed as NumPy arrays: use get() and set()",
                   gpt2->backend()->info().name);
        struct Keep {
            std::shared_ptr<GPT2> gpt2;
            std::shared_ptr<Views> views;
            ~Keep() { --views->alive; }
        };
        ++views->alive;
        views->used = true;
        const py::capsule base(new Keep{gpt2, views}, [](void* p) { delete static_cast<Keep*>(p); });
        return host_view(t, base);
    }
    // A view may have been written through: if there has been one since the last call, packed copies are dropped.
    void weights_changed() const {
        if (views->alive > 0 || views->used.exchange(false)) gpt2->weights_changed();
    }
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
    m.def("config_from_descriptor", &gpt2_config_from_descriptor, "descriptor"_a);

    py::class_<MemoryPlan>(m, "MemoryPlan", "Bytes by purpose.")
        .def_readonly("parameters", &MemoryPlan::parameters)
        .def_readonly("gradients", &MemoryPlan::gradients)
        .def_readonly("optimizer", &MemoryPlan::optimizer)
        .def_readonly("activations", &MemoryPlan::activations)
        .def_property_readonly("total", &MemoryPlan::total);
    m.def(
        "memory_plan",
        [](const GPT2Config& config, const std::string& dtype, const std::string& grad_dtype, std::int64_t B,
           std::int64_t T, int recompute, std::int64_t classifier_rows, bool training, bool master_weights) {
            return GPT2::memory_plan(config, dtype_from_name(dtype), dtype_from_name(grad_dtype), B, T,
                                     static_cast<Recompute>(recompute), classifier_rows, training,
                                     master_weights);
        },
        "config"_a, "dtype"_a, "grad_dtype"_a, "B"_a, "T"_a, "recompute"_a = 1, "classifier_rows"_a = 1024,
        "training"_a = true, "master_weights"_a = true);

    // Both before their methods, which name each other in signatures.
    py::class_<Model> model(m, "GPT2", "The schedule of csrc/model/gpt2.cpp. llmc.GPT2 stands over it.");
    py::class_<KVCache> cache(m, "KVCache", "Keys and values of the positions seen so far.");

    cache
        .def(py::init([](const Model& model, std::int64_t B, std::int64_t max_len) {
                 return std::make_unique<KVCache>(*model.gpt2, B, max_len);
             }),
             "model"_a, "B"_a, "max_len"_a)
        .def_property_readonly("B", &KVCache::B)
        .def_property_readonly("max_len", &KVCache::max_len)
        .def_property_readonly("bytes", &KVCache::bytes)
        .def("length", &KVCache::length, "b"_a)
        .def("clear", &KVCache::clear, "b"_a);

    model
        .def(py::init([](std::shared_ptr<Backend> backend, const GPT2Config& config, const std::string& dtype,
                         const std::string& grad_dtype) {
                 return Model{std::make_shared<GPT2>(std::move(backend), config, dtype_from_name(dtype),
                                                     dtype_from_name(grad_dtype))};
             }),
             py::arg("backend").none(false), "config"_a, "dtype"_a = "f32", "grad_dtype"_a = "f32")
        .def_property_readonly("config", [](const Model& self) { return self.gpt2->config(); })
        .def_property_readonly("dtype", [](const Model& self) { return name_of(self.gpt2->dtype()); })
        .def_property_readonly("grad_dtype",
                               [](const Model& self) { return name_of(self.gpt2->grad_dtype()); })
        .def_property_readonly("backend", [](const Model& self) { return self.gpt2->backend(); })
        .def_property_readonly("num_parameters",
                               [](const Model& self) { return self.gpt2->num_parameters(); })
        .def_property(
            "recompute", [](const Model& self) { return static_cast<int>(self.gpt2->recompute); },
            [](Model& self, int level) {
                LLMC_CHECK(level >= 0 && level <= 2, "recompute is {}, expected 0, 1 or 2", level);
                self.gpt2->recompute = static_cast<Recompute>(level);
            })
        .def_property(
            "classifier_rows", [](const Model& self) { return self.gpt2->classifier_rows; },
            [](Model& self, std::int64_t rows) {
                LLMC_CHECK(rows > 0, "classifier_rows is {}, expected positive", rows);
                self.gpt2->classifier_rows = rows;
            })
        .def(
            "init_weights",
            [](Model& self, std::uint32_t seed) {
                const Busy busy(*self.gpt2->backend());
                self.gpt2->init_weights(seed);
            },
            "seed"_a = 42)
        .def(
            "forward",
            [](Model& self, const Tokens& inputs) {
                const auto [B, T] = batch_shape(inputs, "inputs");
                const std::int32_t* const data = inputs.data();
                const Busy busy(*self.gpt2->backend());
                self.weights_changed();
                self.gpt2->forward(data, B, T);
            },
            "inputs"_a)
        .def(
            "backward",
            [](Model& self, const Tokens& targets, float scale, std::optional<std::shared_ptr<Comm>> comm) {
                const auto [B, T] = batch_shape(targets, "targets");
                const Tensor& of = self.gpt2->activations().targets;
                LLMC_CHECK(of.is({B, T}), "targets have shape ({}, {}), but forward() had {}", B, T, of);
                const std::int32_t* const data = targets.data();
                LLMC_CHECK(!comm || &(*comm)->backend() == self.gpt2->backend().get(),
                           "the Comm was made for another backend than the model's");
                const Busy busy(*self.gpt2->backend());
                self.gpt2->backward(data, scale, comm ? comm->get() : nullptr);
            },
            "targets"_a, "scale"_a = 1.0f, "comm"_a = py::none())
        .def("zero_grad",
             [](Model& self) {
                 const Busy busy(*self.gpt2->backend());
                 self.gpt2->zero_grad();
                 if (self.views->alive > 0) self.gpt2->materialize_gradients();
             })
        .def(
            "materialize_gradients",
            [](Model& self) {
                const Busy busy(*self.gpt2->backend());
                self.gpt2->materialize_gradients();
            },
            "Zeroes the gradients that zero_grad() has only marked, for who looks at them before backward().")
        .def("loss",
             [](const Model& self) {
                 const Busy busy(*self.gpt2->backend());
                 return self.gpt2->loss();
             })
        .def(
            "evaluate",
            [](Model& self, const Tokens& inputs, const Tokens& targets, bool by_token) -> py::object {
                const auto [B, T] = batch_shape(inputs, "inputs");
                const auto shape = batch_shape(targets, "targets");
                LLMC_CHECK(shape.B == B && shape.T == T, "targets have shape ({}, {}), inputs ({}, {})",
                           shape.B, shape.T, B, T);
                const std::int32_t *const x = inputs.data(), *const y = targets.data();
                py::array_t<float> losses({B, T});
                float* const out = losses.mutable_data();
                float mean;
                {
                    const Busy busy(*self.gpt2->backend());
                    self.weights_changed();
                    mean = self.gpt2->evaluate(x, y, B, T, out);
                }
                if (by_token) return losses;
                return py::float_(mean);
            },
            "inputs"_a, "targets"_a, "by_token"_a = false)
        .def(
            "logits",
            [](Model& self, const Tokens& inputs) {
                const auto [B, T] = batch_shape(inputs, "inputs");
                py::array_t<float> logits({B, T, self.gpt2->config().vocab_size});
                float* const out = logits.mutable_data();
                const std::int32_t* const x = inputs.data();
                const Busy busy(*self.gpt2->backend());
                self.weights_changed();
                self.gpt2->logits(x, B, T, out);
                return logits;
            },
            "inputs"_a)
        .def(
            "prefill",
            [](Model& self, KVCache& cache, std::int64_t b, const Tokens& tokens) {
                LLMC_CHECK(tokens.ndim() == 1, "tokens have {} dimensions, expected 1", tokens.ndim());
                py::array_t<float> logits(self.gpt2->config().vocab_size);
                float* const out = logits.mutable_data();
                const std::int32_t* const x = tokens.data();
                const std::int64_t n = tokens.size();
                const Busy busy(*self.gpt2->backend());
                self.weights_changed();
                self.gpt2->prefill(cache, b, x, n, out);
                return logits;
            },
            "cache"_a, "b"_a, "tokens"_a)
        .def(
            "decode",
            [](Model& self, KVCache& cache, const Tokens& tokens) {
                LLMC_CHECK(tokens.ndim() == 1 && tokens.size() == cache.B(),
                           "{} tokens for a cache of {} sequences", tokens.size(), cache.B());
                py::array_t<float> logits({cache.B(), self.gpt2->config().vocab_size});
                float* const out = logits.mutable_data();
                const std::int32_t* const x = tokens.data();
                const Busy busy(*self.gpt2->backend());
                self.weights_changed();
                self.gpt2->decode(cache, x, out);
                return logits;
            },
            "cache"_a, "tokens"_a)
        .def(
            "queue_tokens",
            [](Model& self, KVCache& cache, const std::optional<Tokens>& tokens,
               const py::array_t<float, py::array::c_style | py::array::forcecast>& coins,
               const SamplerOptions& options) {
                LLMC_CHECK(!tokens || (tokens->ndim() == 1 && tokens->size() == cache.B()),
                           "{} tokens for a cache of {} sequences", tokens->size(), cache.B());
                LLMC_CHECK(coins.ndim() == 1 && coins.size() == cache.B(),
                           "{} coins for a cache of {} sequences", coins.size(), cache.B());
                const std::int32_t* const x = tokens ? tokens->data() : nullptr;
                const float* const coin = coins.data();
                const Busy busy(*self.gpt2->backend());
                self.weights_changed();
                self.gpt2->queue_tokens(cache, x, coin, options);
            },
            "cache"_a, "tokens"_a, "coins"_a, "options"_a,
            "decode(), and a token chosen from each sequence's logits, without waiting. tokens None: those "
            "chosen last.")
        .def(
            "read_tokens",
            [](Model& self, KVCache& cache) {
                py::array_t<std::int32_t> tokens(cache.B());
                std::int32_t* const out = tokens.mutable_data();
                const Busy busy(*self.gpt2->backend());
                self.gpt2->read_tokens(cache, out);
                return tokens;
            },
            "cache"_a,
            "The tokens of the oldest queue_tokens() not read yet; negative: faults, see token_of().")
        .def("parameter_names",
             [](const Model& self) {
                 std::vector<std::string> names;
                 for (const auto& [name, tensor] : self.gpt2->parameter_tensors()) names.push_back(name);
                 return names;
             })
        .def(
            "parameter",
            [](Model& self, const std::string& name) {
                for (const auto& [n, tensor] : self.gpt2->parameter_tensors())
                    if (n == name) return OwnedTensor{self.gpt2->backend(), tensor, self.gpt2};
                throw ArgumentError(filled("no parameter is named '{}'", name));
            },
            "name"_a)
        .def(
            "gradient",
            [](Model& self, const std::string& name) {
                {
                    const Busy busy(*self.gpt2->backend());
                    self.gpt2->materialize_gradients();
                }
                return OwnedTensor{self.gpt2->backend(), parameter_named(*self.gpt2, name).grad, self.gpt2};
            },
            "name"_a)
        .def(
            "parameter_view",
            [](Model& self, const std::string& name) {
                for (const auto& [n, tensor] : self.gpt2->parameter_tensors())
                    if (n == name) return self.view(tensor);
                throw ArgumentError(filled("no parameter is named '{}'", name));
            },
            "name"_a)
        .def(
            "gradient_view",
            [](Model& self, const std::string& name) {
                {
                    const Busy busy(*self.gpt2->backend());
                    self.gpt2->materialize_gradients();
                }
                return self.view(parameter_named(*self.gpt2, name).grad);
            },
            "name"_a)
        .def("all_parameters",
             [](Model& self) {
                 return OwnedTensor{self.gpt2->backend(), self.gpt2->all_parameters(), self.gpt2};
             })
        .def("weights_changed",
             [](Model& self) {
                 const Busy busy(*self.gpt2->backend());
                 self.gpt2->weights_changed();
             })
        .def(
            "load_checkpoint",
            [](Model& self, const std::filesystem::path& path) {
                const Busy busy(*self.gpt2->backend());
                load_checkpoint(*self.gpt2, path);
            },
            "path"_a)
        .def(
            "save_checkpoint",
            [](const Model& self, const std::filesystem::path& path) {
                const Busy busy(*self.gpt2->backend());
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

    // optim.cpp needs the model behind the binding.
    m.def("_parameters", [](Model& self) {
        return py::capsule(new std::vector<Parameter>(self.gpt2->parameters()),
                           [](void* p) { delete static_cast<std::vector<Parameter>*>(p); });
    });
}

}  // namespace llmc
