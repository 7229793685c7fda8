// Sums over whole tensors, one or many, in two kernels: blocks of fixed size have totals in double, which one block
// adds in a fixed order. The same bits on every run and every GPU.
#include <limits>

#include "core/dims.h"
#include "cuda/batch.cuh"
#include "cuda/cuda_backend.h"

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

template <class T>
struct Values {
    const T* x;
    i64 n;
};
constexpr int kBatch = 128;

template <class T, int W, class Term>
__global__ void block_sum_kernel(double* sums, const __grid_constant__ Batch<Values<T>, kBatch> batch,
                                 Term term) {
    const auto [item, block] = batch.place(blockIdx.x);
    const T* const x = batch.items[item].x;
    const Part part =
        part_of<W>(batch.items[item].n, block, kBlock, reinterpret_cast<std::uintptr_t>(x) % 16 == 0);
    float sum = 0.0f;
    for (i64 i = part.begin + threadIdx.x * W; i < part.middle; i += kThreads * W) {
        const Floats<W> v = load<W>(x + i);
#pragma unroll
        for (int k = 0; k < W; ++k) sum += term(v[k]);
    }
    for (i64 i = part.middle + threadIdx.x; i < part.end; i += kThreads) sum += term(widen(x[i]));
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

i64 blocks_of(std::span<const Tensor> inputs) {
    i64 blocks = 0;
    for (const Tensor& x : inputs) blocks += ceil_div(x.numel(), kBlock);
    return blocks;
}

// out[0] += scale * the sum of the terms of all inputs. sums: of each of their blocks.
template <class Term>
void launch_sum(cudaStream_t stream, float* out, std::span<const Tensor> inputs, double* sums, float scale,
                Term term) {
    double* next = sums;
    for (const DType dtype : {DType::f32, DType::bf16})
        visit_float(dtype, [&](auto tag) {
            using T = decltype(tag);
            const auto launch_batch = [&](const Batch<Values<T>, kBatch>& batch) {
                launch(block_sum_kernel<T, 16 / sizeof(T), Term>, batch.blocks(), kThreads, 0, stream, next,
                       batch, term);
                next += batch.blocks();
            };
            static_assert(sizeof(Batch<Values<T>, kBatch>) <= 4000);
            Batches<Values<T>, kBatch, decltype(launch_batch)> batches(launch_batch);
            for (const Tensor& x : inputs)
                if (x.dtype == dtype) batches.add({x.as<T>(), x.numel()}, blocks_for(x.numel(), kBlock));
            batches.flush();
        });
    launch(total_kernel, 1, kLastThreads, 0, stream, out, sums, next - sums, scale);
}

}  // namespace

void CudaBackend::sum(Tensor out, Tensor inp, float scale) {
    reduction_dims("sum", out, inp);
    check::dtype("sum", "inp", inp, DType::f32);
    double* const sums = static_cast<double*>(scratch(blocks_of({&inp, 1}) * 8));
    launch_sum(stream(), out.as<float>(), {&inp, 1}, sums, scale, Value());
}

void CudaBackend::global_norm_squared(Tensor out, Tensor inp) {
    reduction_dims("global_norm_squared", out, inp);
    double* const sums = static_cast<double*>(scratch(blocks_of({&inp, 1}) * 8));
    launch_sum(stream(), out.as<float>(), {&inp, 1}, sums, 1.0f, Square());
}

void CudaBackend::gradient_norm_squared(Tensor out, std::span<const Tensor> gradients) {
    norm_dims(out, gradients);
    double* const sums = static_cast<double*>(scratch(blocks_of(gradients) * 8));
    launch_sum(stream(), out.as<float>() + kUnitDigit, gradients, sums, 1.0f, Square());
}

void CudaBackend::clip_factor(Tensor norm, Tensor factor, Tensor norm_squared, float max_norm) {
    clip_factor_dims(norm, factor, norm_squared);
    launch(clip_factor_kernel, 1, 1, 0, stream(), norm.as<float>(), factor.as<float>(),
           norm_squared.as<float>(), static_cast<int>(norm_squared.numel()), max_norm);
}

}  // namespace llmc
