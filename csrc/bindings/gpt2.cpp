// GPT-2's config, constructor and model file. What it shares with other families is in model.cpp and cache.cpp.
#include "model/gpt2.h"

#include "bindings/model.h"
#include "model/checkpoint.h"

namespace llmc {

namespace {

struct BoundGPT2 : BoundModel {
    explicit BoundGPT2(std::shared_ptr<GPT2> m) : BoundModel{m}, gpt2(std::move(m)) {}
    std::shared_ptr<GPT2> gpt2;
};

}  // namespace

void bind_gpt2(py::module_& m) {
    py::class_<GPT2Config>(m, "GPT2Config", "The shape of a GPT-2 or GPT-3 model.")
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
        .def_readonly("max_seq_len", &GPT2Config::max_seq_len, "The largest number of positions.")
        .def_readonly("vocab_size", &GPT2Config::vocab_size, "V, the number of tokens.")
        .def_readonly("padded_vocab_size", &GPT2Config::padded_vocab_size,
                      "Vp, the rows of wte: V rounded up to a multiple of 128 by default.")
        .def_readonly("num_layers", &GPT2Config::num_layers, "L, the number of layers.")
        .def_readonly("num_heads", &GPT2Config::num_heads, "NH, the attention heads of a layer.")
        .def_readonly("channels", &GPT2Config::channels, "C, the width of the residual stream.");
    m.def("parameter_table", &gpt2_parameters, "config"_a,
          "Return the parameters of a model, in the order of its file.");
    m.def(
        "config_from_descriptor", &gpt2_config_from_descriptor, "descriptor"_a,
        "Return the config that a descriptor of llm.c names: 'd12', 'gpt2:d12' or 'gpt3:c768'; or 'd2': any "
        "other depth N has 64 N channels in N heads.");

    m.def("memory_plan", &GPT2::memory_plan, "config"_a, "options"_a, "B"_a, "T"_a, "training"_a = true,
          "optimizer_bytes"_a = 0, "micro_gradients"_a = false,
          "Return the bytes that a model takes for batches of (B, T), and, if `training`, its gradients "
          "(twice, if those "
          "of a micro-batch are kept apart) and an optimizer that keeps optimizer_bytes.");

    py::class_<BoundGPT2, BoundModel>(m, "GPT2",
                                      "GPT-2 and GPT-3: csrc/model/gpt2.h. llmc.GPT2 is made of it.")
        .def(py::init(
                 [](const GPT2Config& config, std::shared_ptr<Backend> backend, const ModelOptions& options) {
                     const Busy busy(*backend);
                     return BoundGPT2(let_others_run(std::make_shared<GPT2>(config, backend, options)));
                 }),
             "config"_a, py::arg("backend").none(false), "options"_a)
        .def_property_readonly(
            "config", [](const BoundGPT2& self) { return self.gpt2->config(); }, "The shape of the model.")
        .def(
            "load_checkpoint",
            [](BoundGPT2& self, const std::filesystem::path& path) {
                const Busy busy(self.backend());
                load_checkpoint(*self.gpt2, path);
            },
            "path"_a, "Read the weights from a llm.c model file of the same config, in f32 or bf16.")
        .def(
            "save_checkpoint",
            [](const BoundGPT2& self, const std::filesystem::path& path) {
                const Busy busy(self.backend());
                save_checkpoint(*self.gpt2, path);
            },
            "path"_a, "Write the weights to a llm.c model file, in the model's dtype.");

    m.def(
        "inspect_checkpoint",
        [](const std::filesystem::path& path) {
            const CheckpointInfo info = inspect_checkpoint(path);
            return py::make_tuple(info.config, name_of(info.dtype), info.num_parameters);
        },
        "path"_a,
        "Return (config, dtype, number of parameters) of a llm.c model file, whose header and size are "
        "checked.");
    m.def(
        "checkpoint_header",
        [](const GPT2Config& config, const std::string& dtype) {
            const Header h = checkpoint_header(config, dtype_from_name(dtype));
            return py::bytes(reinterpret_cast<const char*>(h.data()), sizeof h);
        },
        "config"_a, "dtype"_a, "Return the 1024 bytes that a llm.c model file begins with.");
}

}  // namespace llmc
