// AdamW with gradient clipping, the master weight and the rounding to bf16 in one pass: each of param, grad,
// m and v is touched once. Bound by memory bandwidth.
#include <cmath>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

void CpuBackend::adamw(Tensor param, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor factor,
                       const AdamWStep& step) {
    const std::int64_t count = adamw_numel(param, master, m, v, grad, factor);
    LLMC_CHECK(param.dtype == DType::bf16 || grad.dtype == DType::f32, "adamw: param is f32, but grad is {}",
               grad.dtype);
    const float f = *factor.as<float>();
    if (!std::isfinite(f)) return;
    drop_packed_copies(param);
    const AdamWKernelStep s{step, 1.0f / step.correction1, 1.0f / step.correction2, f};
    for_ranges(count, kGrain, [&](std::int64_t i, std::int64_t n) {
        float *const mi = m.as<float>() + i, *const vi = v.as<float>() + i;
        if (param.dtype == DType::f32) {
            kernels_->adamw_f32(param.as<float>() + i, mi, vi, grad.as<float>() + i, n, s);
            return;
        }
        std::int16_t* const low = master ? master.as<std::int16_t>() + i : nullptr;
        if (grad.dtype == DType::f32)
            kernels_->adamw_bf16_grad_f32(param.as<bf16>() + i, low, mi, vi, grad.as<float>() + i,
                                          step.first + i, n, s);
        else
            kernels_->adamw_bf16(param.as<bf16>() + i, low, mi, vi, grad.as<bf16>() + i, step.first + i, n,
                                 s);
    });
}

}  // namespace llmc
