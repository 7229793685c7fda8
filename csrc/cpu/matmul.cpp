// The three matmuls of a linear layer. Each block of C is a task, for which a kernel (simd/gemm.h) packs A and B and
// multiplies them.
//   forward   out (N,OC)  = inp (N,C) weight^T         A = inp            B = weight^T
//   dinp      (N,C)       = dout (N,OC) weight         A = dout           B = weight
//   dweight   (OC,C)      = dout^T (OC,N) inp          A = dout^T         B = inp
#include <algorithm>
#include <limits>
#include <numeric>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

namespace {

// C is cut evenly into a grid of tasks within the limits of the kernels (GemmTask): so many that every thread has
// several, and of all such grids the one that takes the least time. Each task packs or reads its rows of A and its columns
// of B, where an element takes about as long as 16 or 8 multiply-adds.
struct Grid {
    std::int64_t rows, columns;  // of a task
    Grid(const GemmTask& task, std::int64_t M, std::int64_t N, int threads) {
        const std::int64_t wanted = threads == 1 ? 1 : 4 * threads;
        const std::int64_t fewest_rows = ceil_div(M, task.rows), fewest_columns = ceil_div(N, task.columns);
        // A task below the least size is better than a thread without one.
        std::int64_t least_rows = task.least_rows, least_columns = task.least_columns;
        const auto too_few = [&] {
            return std::max<std::int64_t>(1, M / least_rows) * std::max<std::int64_t>(1, N / least_columns) <
                   threads;
        };
        while (too_few() && least_rows < task.rows && least_rows >= 96) least_rows /= 2;
        while (too_few() && least_columns < task.columns && least_columns >= 128) least_columns /= 2;
        const std::int64_t most_rows = std::max(fewest_rows, std::min(wanted, M / least_rows));
        const std::int64_t most_columns = std::max(fewest_columns, N / least_columns);
        std::int64_t least = std::numeric_limits<std::int64_t>::max();
        for (std::int64_t r = fewest_rows; r <= most_rows; ++r) {
            const std::int64_t enough = std::clamp(ceil_div(wanted, r), fewest_columns, most_columns);
            const std::int64_t step =
                threads / std::gcd<std::int64_t>(r, threads);  // r c tasks for all threads alike
            for (const std::int64_t c : {enough, std::min(ceil_div(enough, step) * step, most_columns)}) {
                const std::int64_t m = even_share(M, r, task.row_unit),
                                   n = even_share(N, c, task.column_unit);
                const std::int64_t time =
                    ceil_div(ceil_div(M, m) * ceil_div(N, n), threads) * threads * m * n + 16 * c * M +
                    8 * r * N;
                if (time < least) least = time, rows = m, columns = n;
            }
        }
    }
    static std::int64_t even_share(std::int64_t n, std::int64_t parts, std::int64_t unit) {
        return ceil_div(ceil_div(n, parts), unit) * unit;
    }
};

}  // namespace

void CpuBackend::run_gemm(Gemm g, DType dtype) {
    if (g.M == 0 || g.N == 0) return;
    visit_float(dtype, [&](auto tag) {
        using T = decltype(tag);
        const TypedKernels<T>& k = kernels<T>();
        if (g.M <= k.few_rows && !g.a_kmajor && !g.b_kmajor) {
            for_ranges(g.N, 64, [&](std::int64_t n, std::int64_t count) { k.matvec(g, n, n + count); });
            return;
        }
        g.packed = packed_weight(g, dtype);
        g.l2 = l2_share(caches_), g.l3 = l3_share(caches_);
        const Grid grid(k.gemm_task(g), g.M, g.N, threads_);
        const std::int64_t row_tasks = ceil_div(g.M, grid.rows), column_tasks = ceil_div(g.N, grid.columns);
        reserve_thread_scratch(k.gemm_scratch(g, 0, grid.rows, 0, grid.columns));
        parallel_for(threads_, row_tasks * column_tasks, [&](std::int64_t task, int thread) {
            const std::int64_t m = task / column_tasks * grid.rows, n = task % column_tasks * grid.columns;
            k.gemm(g, m, std::min(g.M, m + grid.rows), n, std::min(g.N, n + grid.columns),
                   thread_scratch(thread));
        });
    });
}

// The packed copy of B, which is packed again if the weight has changed. Null if B is not a weight, or if the kernel
// set does not pack weights ahead.
const void* CpuBackend::packed_weight(const Gemm& g, DType dtype) {
    if (dtype != DType::bf16 || !weights_) return nullptr;
    const TypedKernels<bf16>& k = kernels<bf16>();
    const PackedWeights::Copy copy = weights_->find(g, k.packed_bytes(g.K, g.N));
    if (copy.stale) {
        const std::int64_t rows = g.b_kmajor ? g.K : g.N;
        for_ranges(rows, 64, [&](std::int64_t begin, std::int64_t count) {
            k.pack_weight(copy.data, g, begin, begin + count);
        });
    }
    return copy.data;
}

static Gemm forward_gemm(const MatmulDims& d, Tensor out, Tensor inp, Tensor weight, Tensor bias) {
    Gemm g{};
    g.M = d.N, g.N = d.OC, g.K = d.C;
    g.a = inp.data, g.lda = d.C;
    g.b = weight.data, g.ldb = d.C;
    g.c = out.data, g.ldc = d.OC;
    g.c_f32 = out.dtype == DType::f32;
    g.bias = bias.data;
    return g;
}

void CpuBackend::matmul_forward(Tensor out, Tensor inp, Tensor weight, Tensor bias) {
    const MatmulDims d = matmul_forward_dims("matmul_forward", out, inp, weight, bias);
    run_gemm(forward_gemm(d, out, inp, weight, bias), inp.dtype);
}

void CpuBackend::matmul_gelu_forward(Tensor out, Tensor pre, Tensor inp, Tensor weight, Tensor bias) {
    const MatmulDims d = matmul_forward_dims("matmul_gelu_forward", out, inp, weight, bias);
    check::like("matmul_gelu_forward", "pre", pre, out);
    check::dtype("matmul_gelu_forward", "out", out, inp.dtype);
    Gemm g = forward_gemm(d, out, inp, weight, bias);
    g.pre = pre.data;
    run_gemm(g, inp.dtype);
}

void CpuBackend::matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                 Tensor weight, bool accumulate) {
    matmul_gelu_backward(dinp, dweight, dbias, dout, inp, weight, Tensor(), accumulate);
}

// pre absent: without GELU.
void CpuBackend::matmul_gelu_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                      Tensor weight, Tensor pre, bool accumulate) {
    const char* const op = pre ? "matmul_gelu_backward" : "matmul_backward";
    const MatmulDims d = matmul_backward_dims(op, dinp, dweight, dbias, dout, inp, weight);
    if (dinp) {
        if (pre) check::matrix(op, "pre", pre, weight.dtype, d.N, d.C);
        Gemm g{};
        g.M = d.N, g.N = d.C, g.K = d.OC;
        g.a = dout.data, g.lda = d.OC;
        g.b = weight.data, g.ldb = d.C, g.b_kmajor = true;
        g.c = dinp.data, g.ldc = d.C, g.c_f32 = dinp.dtype == DType::f32;
        g.dgelu = pre.data;
        run_gemm(g, weight.dtype);
    }
    if (dweight) {
        Gemm g{};
        g.M = d.OC, g.N = d.C, g.K = d.N;
        g.a = dout.data, g.lda = d.OC, g.a_kmajor = true;
        g.b = inp.data, g.ldb = d.C, g.b_kmajor = true;
        g.c = dweight.data, g.ldc = d.C, g.c_f32 = dweight.dtype == DType::f32;
        g.accumulate = accumulate;
        run_gemm(g, weight.dtype);
    }
    if (dbias) bias_gradient(dbias, dout, accumulate);
}

// Column sums, by blocks of rows as in layernorm_backward.
void CpuBackend::bias_gradient(Tensor dbias, Tensor dout, bool accumulate) {
    constexpr std::int64_t kRows = 128;
    const std::int64_t N = dout.rows(), OC = dout.cols(),
                       blocks = std::max<std::int64_t>(1, ceil_div(N, kRows));
    float* const partial = static_cast<float*>(shared_scratch(blocks * OC * 4));
    visit_float(dout.dtype, [&](auto tag) {
        using T = decltype(tag);
        parallel_for(threads_, blocks, [&](std::int64_t block, int) {
            float* const sum = partial + block * OC;
            std::fill(sum, sum + OC, 0.0f);
            kernels<T>().column_sum(sum, dout.as<T>() + block * kRows * OC,
                                    std::min(kRows, N - block * kRows), OC, OC);
        });
    });
    for (std::int64_t block = 1; block < blocks; ++block)
        kernels<float>().accumulate(partial, partial + block * OC, OC);
    visit_float(dbias.dtype, [&](auto tag) {
        using G = decltype(tag);
        if (accumulate)
            kernels<G>().add_into(dbias.as<G>(), partial, OC);
        else
            kernels<G>().from_f32(dbias.as<G>(), partial, OC);
    });
}

}  // namespace llmc
