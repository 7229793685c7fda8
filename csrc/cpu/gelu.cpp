// gelu, the tanh form. Training fuses it into the matmuls before and after it (matmul.cpp); these functions are for
// recomputation, and for schedules that are written in Python.
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
