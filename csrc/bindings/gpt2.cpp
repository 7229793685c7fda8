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
    m.def("parameter_table", &gpt2_parameters, "config"_a,
          "The parameters of a model, in the order of its file.");
    m.def("config_from_descriptor", &gpt2_config_from_descriptor, "descriptor"_a);

    m.def("memory_plan", &GPT2::memory_plan, "config"_a, "options"_a, "B"_a, "T"_a, "training"_a = true,
          "master_weights"_a = true,
          "The memory that a model takes for batches of (B, T), and its optimizer.");

    py::class_<BoundGPT2, BoundModel>(m, "GPT2",
                                      "The schedule of csrc/model/gpt2.cpp. llmc.GPT2 stands over it.")
        .def(py::init(
                 [](const GPT2Config& config, std::shared_ptr<Backend> backend, const ModelOptions& options) {
                     const Busy busy(*backend);
                     return BoundGPT2(std::make_shared<GPT2>(config, backend, options));
                 }),
             "config"_a, py::arg("backend").none(false), "options"_a)
        .def_property_readonly("config", [](const BoundGPT2& self) { return self.gpt2->config(); })
        .def(
            "load_checkpoint",
            [](BoundGPT2& self, const std::filesystem::path& path) {
                const Busy busy(self.backend());
                load_checkpoint(*self.gpt2, path);
            },
            "path"_a)
        .def(
            "save_checkpoint",
            [](const BoundGPT2& self, const std::filesystem::path& path) {
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
