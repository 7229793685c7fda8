// The cache of generation, over a model of any family.
#include <optional>

#include "bindings/model.h"
#include "model/kv_cache.h"

namespace llmc {

namespace {

// A cache and its model.
struct BoundCache {
    BoundCache(const BoundModel& model, std::int64_t B, std::int64_t max_len)
        : owner(model), cache(let_others_run(std::make_shared<KVCache>(*model.model, B, max_len))) {}
    void check_count(const char* what, const py::array& values) const {
        LLMC_CHECK(values.ndim() == 1 && values.size() == cache->B(), "{} {} for a cache of {} sequences",
                   values.size(), what, cache->B());
    }
    BoundModel owner;
    std::shared_ptr<KVCache> cache;
};

}  // namespace

void bind_cache(py::module_& m) {
    py::class_<BoundCache>(
        m, "KVCache", "The keys and values of the positions seen so far, and generation by means of them.")
        .def(py::init([](const BoundModel& model, std::int64_t B, std::int64_t max_len) {
                 const Busy busy(model.backend());
                 return std::make_unique<BoundCache>(model, B, max_len);
             }),
             "model"_a, "B"_a, "max_len"_a)
        .def("__repr__",
             [](const BoundCache& self) {
                 return filled("KVCache({} sequences of {} positions, {} bytes on {})", self.cache->B(),
                               self.cache->max_len(), self.cache->bytes(), self.owner.backend().info().name);
             })
        .def_property_readonly(
            "B", [](const BoundCache& self) { return self.cache->B(); }, "The number of sequences.")
        .def_property_readonly(
            "max_len", [](const BoundCache& self) { return self.cache->max_len(); },
            "The positions that there is room for in each sequence.")
        .def_property_readonly(
            "bytes", [](const BoundCache& self) { return self.cache->bytes(); },
            "The memory of the keys and values, in bytes.")
        .def_property_readonly(
            "backend", [](const BoundCache& self) { return self.cache->backend(); },
            "The backend of the model.")
        .def(
            "length",
            [](const BoundCache& self, std::int64_t b) {
                const Busy busy(self.owner.backend());
                return self.cache->length(b);
            },
            "b"_a, "Return the number of positions that sequence b has.")
        .def(
            "clear",
            [](BoundCache& self, std::int64_t b) {
                const Busy busy(self.owner.backend());
                self.cache->clear(b);
            },
            "b"_a, "Empty sequence b.")
        .def(
            "prefill",
            [](BoundCache& self, std::int64_t b, const Tokens& tokens) {
                LLMC_CHECK(tokens.ids.ndim() == 1, "tokens have {} dimensions, expected 1",
                           tokens.ids.ndim());
                py::array_t<float> logits(self.owner.model->vocab_size());
                float* const out = logits.mutable_data();
                const std::int32_t* const x = tokens.ids.data();
                const std::int64_t n = tokens.ids.size();
                const Busy busy(self.owner.backend());
                self.owner.weights_may_have_changed();
                self.cache->prefill(b, x, n, out);
                return logits;
            },
            "b"_a, "tokens"_a,
            "Append tokens (n) int32 to sequence b and return the logits after the last of them, "
            "(vocab_size) f32.")
        .def(
            "decode",
            [](BoundCache& self, const Tokens& tokens) {
                self.check_count("tokens", tokens.ids);
                py::array_t<float> logits({self.cache->B(), self.owner.model->vocab_size()});
                float* const out = logits.mutable_data();
                const std::int32_t* const x = tokens.ids.data();
                const Busy busy(self.owner.backend());
                self.owner.weights_may_have_changed();
                self.cache->decode(x, out);
                return logits;
            },
            "tokens"_a,
            "Append a token to every sequence, (B) int32, and return the logits after it, (B, vocab_size) "
            "f32.")
        .def(
            "queue_tokens",
            [](BoundCache& self, const std::optional<Tokens>& tokens,
               const py::array_t<float, py::array::c_style | py::array::forcecast>& coins,
               const SamplerOptions& options) {
                if (tokens) self.check_count("tokens", tokens->ids);
                self.check_count("coins", coins);
                const std::int32_t* const x = tokens ? tokens->ids.data() : nullptr;
                const float* const coin = coins.data();
                const Busy busy(self.owner.backend());
                self.owner.weights_may_have_changed();
                self.cache->queue_tokens(x, coin, options);
            },
            "tokens"_a, "coins"_a, "options"_a,
            "Append a token to every sequence and choose the next ones on the device, without waiting.\n\n"
            "tokens: (B) int32, or None to go on from those chosen last. coins: (B) f32 in [0, 1).")
        .def(
            "read_tokens",
            [](BoundCache& self) {
                py::array_t<std::int32_t> tokens(self.cache->B());
                std::int32_t* const out = tokens.mutable_data();
                const Busy busy(self.owner.backend());
                self.cache->read_tokens(out);
                return tokens;
            },
            "Return the tokens that the oldest queue_tokens() not read yet chose, (B) int32.\n\n"
            "Negative ones are faults, for token_of(). Waits.");
}

}  // namespace llmc
