#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

void CpuBackend::residual_forward(Tensor out, Tensor a, Tensor b) {
    const std::int64_t n = elementwise_numel("residual_forward", out, a, b);
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        for_ranges(n, kGrain, [&](std::int64_t i, std::int64_t count) {
            kernels<T>().add(out.as<T>() + i, a.as<T>() + i, b.as<T>() + i, count);
        });
    });
}

}  // namespace llmc
