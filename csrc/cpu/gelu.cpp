// gelu, the tanh form. In training it runs fused into the products on either side (matmul.cpp); these serve
// recomputation and whoever writes a schedule of their own.
#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

void CpuBackend::gelu_forward(Tensor out, Tensor inp) {
    const std::int64_t n = elementwise_numel("gelu_forward", out, inp, inp);
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        for_ranges(n, kGrain, [&](std::int64_t i, std::int64_t count) {
            kernels<T>().gelu_forward(out.as<T>() + i, inp.as<T>() + i, count);
        });
    });
}

void CpuBackend::gelu_backward(Tensor dinp, Tensor inp, Tensor dout) {
    const std::int64_t n = elementwise_numel("gelu_backward", dinp, inp, dout);
    visit_float(dinp.dtype, [&](auto tag) {
        using T = decltype(tag);
        for_ranges(n, kGrain, [&](std::int64_t i, std::int64_t count) {
            kernels<T>().gelu_backward(dinp.as<T>() + i, inp.as<T>() + i, dout.as<T>() + i, count);
        });
    });
}

}  // namespace llmc
