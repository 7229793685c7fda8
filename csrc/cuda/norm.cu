// Sums over whole tensors, in two kernels: blocks of fixed size have totals in double, which one block adds in
// a fixed order. The same bits on every run and every GPU.
#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"

namespace llmc {

namespace {

constexpr int kThreads = 256, kLastThreads = 1024;
constexpr i64 kBlock = 16384;  // elements: 64 per thread, few enough for a sum in f32

struct Value {
    __device__ float operator()(float x) const { return x; }
};
struct Square {
    __device__ float operator()(float x) const { return x * x; }
};

template <class T, int W, class Term>
__global__ void block_sum_kernel(double* sums, const T* x, i64 n, Term term) {
    const i64 begin = static_cast<i64>(blockIdx.x) * kBlock;
    const i64 end = begin + kBlock < n ? begin + kBlock : n;
    float sum = 0.0f;
    i64 i = begin + threadIdx.x * W;
    for (; i + W <= end; i += kThreads * W) {
        const Floats<W> v = load<W>(x + i);
#pragma unroll
        for (int k = 0; k < W; ++k) sum += term(v[k]);
    }
    for (; i < end; ++i) sum += term(widen(x[i]));  // at most one thread, at the tensor's end
    const double total = block_reduce(static_cast<double>(sum), 0.0, Sum());
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// out += scale * sum of the sums
__global__ void total_kernel(float* out, const double* sums, i64 blocks, float scale) {
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < blocks; i += kLastThreads) sum += sums[i];
    const double total = block_reduce(sum, 0.0, Sum());
    if (threadIdx.x == 0) *out = static_cast<float>(*out + scale * total);
}

// norm_squared: digits (core/exact_sum.h), or a plain number, which is a unit's digit alone.
__global__ void clip_factor_kernel(float* norm, float* factor, const float* norm_squared, int digits,
                                   float max_norm) {
    double squared = norm_squared[digits - 1];
    for (int k = digits - 2; k >= 0; --k)
        squared = fma(squared, 65536.0, static_cast<double>(norm_squared[k]));
    if (digits > 1) squared = ldexp(squared, -16 * static_cast<int>(kUnitDigit));
    const float n = static_cast<float>(sqrt(squared));
    *norm = n;
    if (!(n <= std::numeric_limits<float>::max()))
        *factor = std::numeric_limits<float>::quiet_NaN();
    else
        *factor = max_norm > 0.0f && n > max_norm ? max_norm / n : 1.0f;
}

template <class Term>
void launch_sum(cudaStream_t stream, float* out, Tensor inp, double* sums, float scale, Term term) {
    const i64 n = inp.numel(), blocks = ceil_div(n, kBlock);
    visit_float(inp.dtype, [&](auto tag) {
        using T = decltype(tag);
        visit_width<T>(
            0,
            [&](auto width) {
                constexpr int W = decltype(width)::value;
                launch(block_sum_kernel<T, W, Term>, blocks_for(n, kBlock), kThreads, 0, stream, sums,
                       inp.as<T>(), n, term);
            },
            inp.data);
    });
    launch(total_kernel, 1, kLastThreads, 0, stream, out, sums, blocks, scale);
}

}  // namespace

void CudaBackend::sum(Tensor out, Tensor inp, float scale) {
    reduction_dims("sum", out, inp);
    check::dtype("sum", "inp", inp, DType::f32);
    double* const sums = static_cast<double*>(scratch(ceil_div(inp.numel(), kBlock) * 8));
    launch_sum(stream(), out.as<float>(), inp, sums, scale, Value());
}

void CudaBackend::global_norm_squared(Tensor out, Tensor inp) {
    reduction_dims("global_norm_squared", out, inp);
    double* const sums = static_cast<double*>(scratch(ceil_div(inp.numel(), kBlock) * 8));
    launch_sum(stream(), out.as<float>(), inp, sums, 1.0f, Square());
}

void CudaBackend::clip_factor(Tensor norm, Tensor factor, Tensor norm_squared, float max_norm) {
    clip_factor_dims(norm, factor, norm_squared);
    launch(clip_factor_kernel, 1, 1, 0, stream(), norm.as<float>(), factor.as<float>(),
           norm_squared.as<float>(), static_cast<int>(norm_squared.numel()), max_norm);
}

}  // namespace llmc
