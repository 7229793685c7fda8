#include <pybind11/functional.h>

#include "bindings/bindings.h"
#include "core/bpe.h"
#include "core/dataloader.h"
#include "core/random.h"
#include "core/sampler.h"
#include "core/tokenizer.h"

namespace llmc {

namespace {

py::dict state_to_dict(const DataLoaderState& s) {
    return py::dict("rows_per_sample"_a = s.rows_per_sample, "epoch"_a = s.epoch, "shard"_a = s.shard,
                    "row"_a = s.row, "shard_indices"_a = s.shard_indices,
                    "sample_indices"_a = py::array_t<std::int32_t>(
                        static_cast<py::ssize_t>(s.sample_indices.size()), s.sample_indices.data()),
                    "rng"_a = py::make_tuple(s.rng.left, s.rng.next,
                                             py::array_t<std::uint32_t>(Mt19937::kSize, s.rng.state.data())));
}

DataLoaderState state_from_dict(const py::dict& d) {
    DataLoaderState s;
    s.rows_per_sample = d["rows_per_sample"].cast<std::int64_t>();
    s.epoch = d["epoch"].cast<std::int64_t>();
    s.shard = d["shard"].cast<std::int64_t>();
    s.row = d["row"].cast<std::int64_t>();
    s.shard_indices = d["shard_indices"].cast<std::vector<std::int32_t>>();
    s.sample_indices = d["sample_indices"].cast<std::vector<std::int32_t>>();
    const auto rng = d["rng"].cast<py::tuple>();
    s.rng.left = rng[0].cast<int>();
    s.rng.next = rng[1].cast<std::uint32_t>();
    const auto words = rng[2].cast<std::vector<std::uint32_t>>();
    LLMC_CHECK(words.size() == Mt19937::kSize && s.rng.left >= 1 && s.rng.left <= Mt19937::kSize &&
                   s.rng.next <= Mt19937::kSize &&
                   s.rng.next + static_cast<std::uint32_t>(s.rng.left) <= Mt19937::kSize + 1,
               "dataloader state: not the state of a Mersenne Twister");
    std::copy(words.begin(), words.end(), s.rng.state.begin());
    return s;
}

}  // namespace

void bind_data(py::module_& m) {
    py::class_<ShardInfo>(m, "ShardInfo", "What the header of a token file says.")
        .def_readonly("path", &ShardInfo::path, "The file.")
        .def_readonly("tokens", &ShardInfo::tokens, "The number of tokens.")
        .def_readonly("token_bytes", &ShardInfo::token_bytes, "Bytes of each token in the file: 2 or 4.")
        .def("__repr__", [](const ShardInfo& s) {
            return filled("ShardInfo({}, {} tokens)", std::string(py::repr(py::str(py::cast(s.path)))),
                          s.tokens);
        });
    m.def("inspect_shard", &inspect_shard, "path"_a,
          "Check the header and the size of a token file, and return what it says.");

    py::class_<DataLoader>(m, "DataLoader",
                           "Batches of tokens from token files, in llm.c's order: csrc/core/dataloader.h.")
        .def(py::init<std::vector<std::filesystem::path>, std::int64_t, std::int64_t, int, int, bool,
                      std::uint32_t, std::int64_t, std::int64_t>(),
             "files"_a, "B"_a, "T"_a, "rank"_a = 0, "ranks"_a = 1, "shuffle"_a = false, "seed"_a = 42,
             "vocab_size"_a = 0, "rows_per_sample"_a = 0)
        .def(
            "next_batch",
            [](DataLoader& self) {
                py::array_t<std::int32_t> inputs({self.B(), self.T()}), targets({self.B(), self.T()});
                std::int32_t *const x = inputs.mutable_data(), *const y = targets.mutable_data();
                {
                    const py::gil_scoped_release release;
                    self.next_batch(x, y);
                }
                return py::make_tuple(inputs, targets);
            },
            "Return the next inputs and targets, (B, T) int32 each; targets are the inputs moved on by one "
            "token.")
        .def("reset", &DataLoader::reset, "Begin a new epoch, in a new order if the data are shuffled.")
        .def_property_readonly("B", &DataLoader::B, "Rows of a batch.")
        .def_property_readonly("T", &DataLoader::T, "Tokens of a row.")
        .def_property_readonly("num_tokens", &DataLoader::num_tokens, "The number of tokens in all files.")
        .def_property_readonly("shards", &DataLoader::shards, "The files, in the order given.")
        .def(
            "state", [](const DataLoader& self) { return state_to_dict(self.state()); },
            "Return the position in the data and the state of the generator, for a checkpoint.")
        .def(
            "set_state",
            [](DataLoader& self, const py::dict& state) { self.set_state(state_from_dict(state)); },
            "state"_a,
            "Go to the position that state() returned. Raises ValueError if it does not fit these files.");

    py::class_<Mt19937>(m, "Mt19937", "The Mersenne Twister, drawn from as PyTorch's CPU generator does.")
        .def(py::init<std::uint32_t>(), "seed"_a)
        .def("randint32", &Mt19937::randint32, "Draw an integer of 32 bits.")
        .def(
            "normal",
            [](Mt19937& self, std::int64_t n, float mean, float std) {
                py::array_t<float> out(n);
                self.normal_(out.mutable_data(), n, mean, std);
                return out;
            },
            "n"_a, "mean"_a = 0.0f, "std"_a = 1.0f, "Draw n normally distributed numbers, (n) f32.")
        .def(
            "permutation",
            [](Mt19937& self, std::int32_t n) {
                std::vector<std::int32_t> p(static_cast<std::size_t>(n));
                for (std::int32_t i = 0; i < n; ++i) p[static_cast<std::size_t>(i)] = i;
                random_permutation(p, self);
                return p;
            },
            "n"_a, "Draw a permutation of 0 .. n-1.");

    py::class_<XorShift>(m, "XorShift", "xorshift*, which draws the coins for sampling.")
        .def(py::init([](std::uint64_t seed) {
                 LLMC_CHECK(seed != 0, "seed is 0, which xorshift cannot leave");
                 return XorShift{seed};
             }),
             "seed"_a = 1337)
        .def_readwrite("state", &XorShift::state, "The generator's 64 bits, never 0.")
        .def("randint32", &XorShift::randint32, "Draw an integer of 32 bits.")
        .def("randfloat32", &XorShift::randfloat32, "Draw a number in [0, 1).");

    m.def(
        "sample",
        [](const py::array_t<float, py::array::c_style | py::array::forcecast>& logits, float coin,
           float temperature, std::int64_t top_k, float top_p) {
            LLMC_CHECK(logits.ndim() == 1, "logits have {} dimensions, expected 1", logits.ndim());
            return sample_token(logits.data(), logits.size(), SamplerOptions{temperature, top_k, top_p},
                                coin);
        },
        "logits"_a, "coin"_a, "temperature"_a = 1.0f, "top_k"_a = 0, "top_p"_a = 1.0f,
        "Choose a token from logits (V) f32 by a coin in [0, 1): csrc/core/sampler.h.");

    m.def("token_of", &token_of, "token_or_fault"_a,
          "Return the token, or raise the Error that a fault stands for.");

    py::class_<Tokenizer>(m, "Tokenizer", "llm.c's tokenizer file, for decoding.")
        .def(py::init<std::filesystem::path>(), "path"_a)
        .def_property_readonly("vocab_size", &Tokenizer::vocab_size, "The number of tokens.")
        .def_property_readonly("eot_token", &Tokenizer::eot_token, "The end-of-text token.")
        .def(
            "decode", [](const Tokenizer& self, std::int64_t token) { return py::bytes(self.decode(token)); },
            "token"_a, "Return the token's bytes, which need not be whole UTF-8 characters.");

    m.def(
        "train_bpe",
        [](const std::vector<py::bytes>& words, const std::vector<std::int64_t>& counts, std::size_t size,
           const std::function<void(std::size_t)>& progress) {
            const std::vector<std::string> native(words.begin(), words.end());
            std::vector<std::string> tokens;
            {
                const py::gil_scoped_release release;
                tokens = train_bpe(native, counts, size, [&](std::size_t so_far) {
                    const py::gil_scoped_acquire acquire;
                    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                    progress(so_far);
                });
            }
            return std::vector<py::bytes>(tokens.begin(), tokens.end());
        },
        "words"_a, "counts"_a, "size"_a, "progress"_a,
        "Learn at most `size` tokens from words, bytes that occur counts times; progress is called now and "
        "then with the "
        "number of tokens so far: csrc/core/bpe.h.");

    py::class_<BpeEncoder>(m, "BpeEncoder", "Encodes one long word: csrc/core/bpe.h.")
        .def(py::init([](const std::vector<py::bytes>& tokens, std::size_t eot) {
                 return std::make_unique<BpeEncoder>(std::vector<std::string>(tokens.begin(), tokens.end()),
                                                     eot);
             }),
             "tokens"_a, "eot"_a)
        .def(
            "encode",
            [](const BpeEncoder& self, const py::bytes& word) {
                const auto bytes = static_cast<std::string_view>(word);
                std::vector<std::uint32_t> ids;
                {
                    const py::gil_scoped_release release;
                    ids = self.encode(bytes);
                }
                return py::array_t<std::uint32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
            },
            "word"_a, "Return the token ids of a word's bytes, (n) uint32.");
}

}  // namespace llmc
