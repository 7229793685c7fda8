// AdamW with gradient clipping, the master weight and the rounding to bf16 in one pass: each of param, grad,
// m and v is touched once. Bound by memory bandwidth.
#include <cmath>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

void CpuBackend::adamw_many(std::span<const AdamWOperands> operands, Tensor factor, const AdamWStep& step) {
    adamw_many_dims(operands, factor);
    const float f = *factor.as<float>();
    if (!std::isfinite(f)) return;
    for (const AdamWOperands& o : operands) drop_packed_copies(o.param);
    for_ranges_of_all(operands, kGrain, [&](const AdamWOperands& o, std::int64_t i, std::int64_t n, int) {
        AdamWKernelStep s{step, 1.0f / step.correction1, 1.0f / step.correction2, f};
        s.weight_decay = o.weight_decay, s.seed = o.seed;
        float *const m = o.m.as<float>() + i, *const v = o.v.as<float>() + i;
        if (o.param.dtype == DType::f32) {
            kernels_->adamw_f32(o.param.as<float>() + i, m, v, o.grad.as<float>() + i, n, s);
            return;
        }
        std::int16_t* const low = o.master ? o.master.as<std::int16_t>() + i : nullptr;
        if (o.grad.dtype == DType::f32)
            kernels_->adamw_bf16_grad_f32(o.param.as<bf16>() + i, low, m, v, o.grad.as<float>() + i,
                                          o.first + i, n, s);
        else
            kernels_->adamw_bf16(o.param.as<bf16>() + i, low, m, v, o.grad.as<bf16>() + i, o.first + i, n, s);
    });
}

}  // namespace llmc
