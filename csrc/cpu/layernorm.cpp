// layernorm, alone and fused with the residual addition before it. A row is read once from memory: the second
// and third look find it in the L1 cache.
//
// dweight, dbias and dinp_sum are sums over all rows. Blocks of rows have partial sums of their own, which are added in
// the order of the blocks: the blocks depend on the shape alone, so the result does not depend on the number
// of threads.
#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

namespace {
constexpr std::int64_t kRows = 16;        // rows a task of the forward pass takes
constexpr std::int64_t kBlockRows = 128;  // rows that share a partial sum in the backward pass
}  // namespace

void CpuBackend::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                                   Tensor bias) {
    const auto [N, C] = layernorm_forward_dims("layernorm_forward", out, mean, rstd, inp, weight, bias);
    visit_float(inp.dtype, [&, N = N, C = C](auto tag) {
        using T = decltype(tag);
        for_ranges(N, kRows, [&](std::int64_t r, std::int64_t rows) {
            kernels<T>().layernorm_forward(out.as<T>() + r * C, mean.as<float>() + r, rstd.as<float>() + r,
                                           inp.as<T>() + r * C, weight.as<T>(), bias.as<T>(), rows, C);
        });
    });
}

void CpuBackend::fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd,
                                                  Tensor a, Tensor b, Tensor weight, Tensor bias) {
    const auto [N, C] = fused_residual_layernorm_forward_dims(residual, out, mean, rstd, a, b, weight, bias);
    visit_float(a.dtype, [&, N = N, C = C](auto tag) {
        using T = decltype(tag);
        for_ranges(N, kRows, [&](std::int64_t r, std::int64_t rows) {
            kernels<T>().residual_layernorm_forward(
                residual.as<T>() + r * C, out.as<T>() + r * C, mean.as<float>() + r, rstd.as<float>() + r,
                a.as<T>() + r * C, b.as<T>() + r * C, weight.as<T>(), bias.as<T>(), rows, C);
        });
    });
}

void CpuBackend::layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dinp_sum, Tensor dout,
                                    Tensor inp, Tensor weight, Tensor mean, Tensor rstd) {
    const auto [N, C] =
        layernorm_backward_dims(dinp, dweight, dbias, dinp_sum, dout, inp, weight, mean, rstd);
    const std::int64_t blocks = ceil_div(N, kBlockRows), sums = (dinp_sum ? 3 : 2) * C;
    float* const partial = static_cast<float*>(shared_scratch(blocks * sums * 4));
    visit_float(inp.dtype, [&, N = N, C = C](auto tag) {
        using T = decltype(tag);
        parallel_for(threads_, blocks, [&](std::int64_t block, int) {
            const std::int64_t r = block * kBlockRows, rows = N - r < kBlockRows ? N - r : kBlockRows;
            float* const dw = partial + block * sums;
            for (std::int64_t i = 0; i < sums; ++i) dw[i] = 0.0f;
            kernels<T>().layernorm_backward(dinp.as<T>() + r * C, dw, dw + C, dout.as<T>() + r * C,
                                            inp.as<T>() + r * C, weight.as<T>(), mean.as<float>() + r,
                                            rstd.as<float>() + r, rows, C);
            if (dinp_sum)  // the block's rows are in the L2 cache
                kernels<T>().column_sum(dw + 2 * C, dinp.as<T>() + r * C, rows, C, C);
        });
    });
    for (std::int64_t block = 1; block < blocks; ++block)
        kernels<float>().accumulate(partial, partial + block * sums, sums);
    visit_float(dweight.dtype, [&, N = N, C = C](auto tag) {
        using G = decltype(tag);
        if (N > 0) {
            kernels<G>().add_into(dweight.as<G>(), partial, C);
            kernels<G>().add_into(dbias.as<G>(), partial + C, C);
            if (dinp_sum) kernels<G>().add_into(dinp_sum.as<G>(), partial + 2 * C, C);
        }
    });
}

}  // namespace llmc
