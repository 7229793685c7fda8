// Sums over whole tensors. Blocks of fixed size have totals in double, added in order: the same bits for any
// number of threads.
#include <cmath>
#include <limits>
#include <vector>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

namespace {

constexpr std::int64_t kBlock = 1 << 18;

template <class BlockSum>
double sum_of_blocks(int threads, std::int64_t n, BlockSum block_sum) {
    std::vector<double> sums(static_cast<std::size_t>(ceil_div(n, kBlock)));
    parallel_for(threads, static_cast<std::int64_t>(sums.size()), [&](std::int64_t i, int) {
        const std::int64_t begin = i * kBlock;
        sums[static_cast<std::size_t>(i)] = block_sum(begin, n - begin < kBlock ? n - begin : kBlock);
    });
    double total = 0.0;
    for (const double s : sums) total += s;
    return total;
}

}  // namespace

void CpuBackend::sum(Tensor out, Tensor inp, float scale) {
    reduction_dims("sum", out, inp);
    check::dtype("sum", "inp", inp, DType::f32);
    const double total = sum_of_blocks(threads_, inp.numel(), [&](std::int64_t i, std::int64_t n) {
        return kernels_->sum_f32(inp.as<float>() + i, n);
    });
    *out.as<float>() = static_cast<float>(*out.as<float>() + scale * total);
}

void CpuBackend::global_norm_squared(Tensor out, Tensor inp) {
    reduction_dims("global_norm_squared", out, inp);
    visit_float(inp.dtype, [&](auto tag) {
        using T = decltype(tag);
        const double total = sum_of_blocks(threads_, inp.numel(), [&](std::int64_t i, std::int64_t n) {
            return kernels<T>().sum_squares(inp.as<T>() + i, n);
        });
        *out.as<float>() = static_cast<float>(*out.as<float>() + total);
    });
}

void CpuBackend::clip_factor(Tensor norm, Tensor factor, Tensor norm_squared, float max_norm) {
    for (const Tensor& t : {norm, factor, norm_squared}) check::f32_values("clip_factor", "an operand", t, 1);
    const float n = std::sqrt(*norm_squared.as<float>());
    *norm.as<float>() = n;
    if (!std::isfinite(n))
        *factor.as<float>() = std::numeric_limits<float>::quiet_NaN();
    else
        *factor.as<float>() = max_norm > 0.0f && n > max_norm ? max_norm / n : 1.0f;
}

}  // namespace llmc
