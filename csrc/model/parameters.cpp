#include "model/parameters.h"

#include <algorithm>

#include "core/random.h"

namespace llmc {

std::int64_t ParameterSpec::numel() const {
    std::int64_t n = 1;
    for (const std::int64_t extent : shape) n *= extent;
    return n;
}

std::int64_t count_parameters(const ParameterTable& table) {
    std::int64_t n = 0;
    for (const ParameterSpec& spec : table) n += spec.numel();
    return n;
}

void init_parameters(Backend& backend, const ParameterTable& table, const std::vector<Tensor>& tensors,
                     std::uint32_t seed) {
    Mt19937 rng(seed);
    std::vector<float> values;
    std::vector<bf16> rounded;
    const auto put = [&](const Tensor& t) {
        if (t.dtype == DType::f32) return backend.from_host(t, values.data());
        rounded.resize(values.size());
        std::transform(values.begin(), values.end(), rounded.begin(),
                       [](float x) { return from_float<bf16>(x); });
        backend.from_host(t, rounded.data());
    };
    const auto start = [&](const ParameterSpec& spec, const Tensor& t) {
        if (spec.initial == Initial::zeros) return backend.zero(t);
        values.assign(static_cast<std::size_t>(t.numel()), 1.0f);
        if (spec.initial == Initial::normal) rng.normal_(values.data(), t.numel(), 0.0f, spec.std);
        put(t);
    };
    for (std::size_t i = 0; i < table.size();) {
        if (!table[i].per_layer) {
            const Tensor& t = tensors[i];
            const std::int64_t rows = t.shape[0] - table[i].padding;
            start(table[i], t.slice(0, rows));
            if (table[i].padding > 0) backend.zero(t.slice(rows, t.shape[0]));
            ++i;
            continue;
        }
        std::size_t end = i;
        while (end < table.size() && table[end].per_layer) ++end;
        for (std::int64_t l = 0; l < table[i].shape[0]; ++l)
            for (std::size_t k = i; k < end; ++k) start(table[k], tensors[k][l]);
        i = end;
    }
}

}  // namespace llmc
