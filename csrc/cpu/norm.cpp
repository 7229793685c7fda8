// Sums over whole tensors. Blocks of fixed size have totals in double, added in order: the same bits for any
// number of threads. The norm of all gradients is summed exactly: the same bits for any number of ranks, too.
#include <cmath>
#include <limits>
#include <vector>

#include "core/dims.h"
#include "core/exact_sum.h"
#include "cpu/cpu_backend.h"

namespace llmc {

namespace {

constexpr std::int64_t kBlock = 1 << 18;
static_assert(kBlock % kNormBlock == 0);

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

// The term is rounded before it is added: so the loss of several micro-batches on one rank is, to the bit, that of one
// micro-batch on each of several ranks, whose terms are added in f32.
void CpuBackend::sum(Tensor out, Tensor inp, float scale) {
    reduction_dims("sum", out, inp);
    check::dtype("sum", "inp", inp, DType::f32);
    const double total = sum_of_blocks(threads_, inp.numel(), [&](std::int64_t i, std::int64_t n) {
        return kernels_->sum_f32(inp.as<float>() + i, n);
    });
    *out.as<float>() += static_cast<float>(scale * total);
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

void CpuBackend::gradient_norm_squared(Tensor out, std::span<const Tensor> gradients) {
    norm_dims(out, gradients);
    struct alignas(64) ThreadSum : ExactSum {};  // a cache line is written by one thread only
    std::vector<ThreadSum> sums(static_cast<std::size_t>(threads_));
    for_ranges_of_all(
        gradients, kBlock, [&](const Tensor& gradient, std::int64_t i, std::int64_t n, int thread) {
            visit_float(gradient.dtype, [&](auto tag) {
                using T = decltype(tag);
                const T* const x = gradient.as<T>() + i;
                ThreadSum& sum = sums[static_cast<std::size_t>(thread)];
                for (std::int64_t k = 0; k < n; k += kNormBlock)
                    sum.add(kernels<T>().sum_squares(x + k, n - k < kNormBlock ? n - k : kNormBlock));
            });
        });
    ExactSum total;
    total.add_digits(out.as<float>());
    for (const ThreadSum& sum : sums) total.add(sum);
    total.write(out.as<float>());
}

void CpuBackend::clip_factor(Tensor norm, Tensor factor, Tensor norm_squared, float max_norm) {
    clip_factor_dims(norm, factor, norm_squared);
    float n = std::sqrt(*norm_squared.as<float>());
    if (norm_squared.numel() == kNormDigits) {
        ExactSum sum;
        sum.add_digits(norm_squared.as<float>());
        n = static_cast<float>(std::sqrt(sum.value()));
    }
    *norm.as<float>() = n;
    if (!std::isfinite(n))
        *factor.as<float>() = std::numeric_limits<float>::quiet_NaN();
    else
        *factor.as<float>() = max_norm > 0.0f && n > max_norm ? max_norm / n : 1.0f;
}

}  // namespace llmc
