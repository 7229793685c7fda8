// Muon's ops beside its matmuls. Bound by memory bandwidth; newton_schulz is composed in core/backend.cpp.
#include <algorithm>
#include <cmath>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

void CpuBackend::muon_momentum(Tensor out, Tensor m, Tensor grad, Tensor factor, float momentum,
                               bool nesterov) {
    const std::int64_t n = muon_momentum_dims(out, m, grad, factor);
    const float f = *factor.as<float>();
    if (!std::isfinite(f)) return;
    for_ranges(n, kGrain, [&](std::int64_t i, std::int64_t count) {
        float* const mi = m.as<float>() + i;
        if (out.dtype == DType::f32)
            kernels_->muon_momentum_f32(out.as<float>() + i, mi, grad.as<float>() + i, count, f, momentum,
                                        nesterov);
        else if (grad.dtype == DType::f32)
            kernels_->muon_momentum_bf16_grad_f32(out.as<bf16>() + i, mi, grad.as<float>() + i, count, f,
                                                  momentum, nesterov);
        else
            kernels_->muon_momentum_bf16(out.as<bf16>() + i, mi, grad.as<bf16>() + i, count, f, momentum,
                                         nesterov);
    });
}

void CpuBackend::muon_update(Tensor param, Tensor master, Tensor direction, Tensor factor,
                             const MuonStep& step) {
    const std::int64_t n = muon_update_dims(param, master, direction, factor);
    if (!std::isfinite(*factor.as<float>())) return;
    drop_packed_copies(param);
    for_ranges(n, kGrain, [&](std::int64_t i, std::int64_t count) {
        if (param.dtype == DType::f32)
            kernels_->muon_update_f32(param.as<float>() + i, direction.as<float>() + i, count, step);
        else
            kernels_->muon_update_bf16(param.as<bf16>() + i, master ? master.as<std::int16_t>() + i : nullptr,
                                       direction.as<bf16>() + i, step.first + i, count, step);
    });
}

void CpuBackend::scale(Tensor out, Tensor inp, Tensor factor, float scale) {
    const std::int64_t n = scale_dims(out, inp, factor);
    const float f = scale * *factor.as<float>();
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        for_ranges(n, kGrain, [&](std::int64_t i, std::int64_t count) {
            kernels<T>().scale(out.as<T>() + i, inp.as<T>() + i, f, count);
        });
    });
}

void CpuBackend::shifted_sum(Tensor out, Tensor x, Tensor y, float a, float b, float c) {
    const std::int64_t N = shifted_sum_dims(out, x, y);
    if (N == 0) return;
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        for_ranges(N, std::max<std::int64_t>(1, kGrain / N), [&](std::int64_t begin, std::int64_t rows) {
            kernels<T>().shifted_sum(out.as<T>(), x.as<T>(), y.as<T>(), a, b, c, begin, rows, N);
        });
    });
}

}  // namespace llmc
