// Softmax and cross-entropy over rows of logits, and their gradient in place. One block per row: a first pass
// finds the maximum and the sum of exponentials together (each thread rescales its sum when its maximum rises),
// a second writes the gradient while the row is still in the L2 cache.
//
// A target of V or more, which the host cannot see without waiting, makes its row NaN.
#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"

namespace llmc {

namespace {

// Two blocks of this size fill a multiprocessor of an A100 or H100. The rows then under way, 100 KB each for
// GPT-2, fit into its L2 cache; at twice as many the second pass would read from memory again.
constexpr int kThreads = 1024;
constexpr float kLowest = -std::numeric_limits<float>::max();  // a logit may be no lower, or -infinity
constexpr float kLog2e = 1.4426950408889634f;

// e^(x - top). The difference comes first: scaled on their own, two extreme values would be infinite, and their
// difference NaN.
__device__ __forceinline__ float exponential(float x, float top) { return ptx::exp2((x - top) * kLog2e); }

// The maximum of what a thread has seen, and the sum of exponentials relative to it. A NaN is not greater than
// the maximum, but comes through the exponential.
struct OnlineSum {
    float highest = kLowest, total = 0.0f;
    template <int vectors, int W>
    __device__ __forceinline__ void add(const Floats<W> (&x)[vectors]) {
        float top = highest;
#pragma unroll
        for (int j = 0; j < vectors; ++j)
#pragma unroll
            for (int k = 0; k < W; ++k) top = Max()(x[j][k], top);
        total *= exponential(highest, top);
#pragma unroll
        for (int j = 0; j < vectors; ++j)
#pragma unroll
            for (int k = 0; k < W; ++k) total += exponential(x[j][k], top);
        highest = top;
    }
};

// losses may be null. A row is V / W whole vectors, which the threads take in pairs, for two loads to be
// under way at once; then fewer than W logits; then padding.
template <class T, int W, bool gradient>
__global__ void __launch_bounds__(kThreads)
    classifier_kernel(float* losses, T* logits, const std::int32_t* targets, float dloss, int V, int Vp) {
    T* const x = logits + static_cast<i64>(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), whole = V / W * W;
    constexpr int kStep = kThreads * W;
    OnlineSum sum;
    int c = thread * W;
    for (; c + kStep < whole; c += 2 * kStep) {
        const Floats<W> v[2] = {load<W>(x + c), load<W>(x + c + kStep)};
        sum.add(v);
    }
    if (c < whole) {
        const Floats<W> v[1] = {load<W>(x + c)};
        sum.add(v);
    }
    if (whole + thread < V) {
        const Floats<1> v[1] = {load<1>(x + whole + thread)};
        sum.add(v);
    }
    const float shift = block_reduce(sum.highest, kLowest, Max());
    const float total = block_reduce(sum.total * exponential(sum.highest, shift), 0.0f, Sum());

    const bool ignored = target < 0, impossible = target >= V;
    if (losses && thread == 0) {
        // Not -log(p): p underflows if the loss exceeds 87.
        if (impossible)
            losses[blockIdx.x] = std::numeric_limits<float>::quiet_NaN();
        else
            losses[blockIdx.x] = ignored ? 0.0f : logf(total) - (widen(x[target]) - shift);
    }
    if constexpr (gradient) {
        if (losses) __syncthreads();  // the loss reads a logit that its thread does not own
        const float factor = impossible ? std::numeric_limits<float>::quiet_NaN() : dloss / total;
        const auto derive = [&](auto& v, int column) {
            constexpr int width = sizeof(v) / sizeof(float);
#pragma unroll
            for (int k = 0; k < width; ++k) v[k] = exponential(v[k], shift) * factor;
            if (static_cast<unsigned>(target - column) < width)
#pragma unroll
                for (int k = 0; k < width; ++k)
                    if (column + k == target) v[k] -= dloss;
            store(x + column, v);
        };
        const int live = ignored ? 0 : whole;
        for (c = thread * W; c + kStep < live; c += 2 * kStep) {
            Floats<W> v = load<W>(x + c), next = load<W>(x + c + kStep);
            derive(v, c);
            derive(next, c + kStep);
        }
        if (c < live) {
            Floats<W> v = load<W>(x + c);
            derive(v, c);
        }
        c = whole + thread;
        if (c < V && !ignored) {
            Floats<1> v = load<1>(x + c);
            derive(v, c);
        } else if (c < whole + W && c < Vp) {  // a row's padding begins within a vector
            store(x + c, zeros<1>());
        }
        for (c = (ignored ? 0 : whole + W) + thread * W; c < Vp; c += kStep) store(x + c, zeros<W>());
    }
}

}  // namespace

void CudaBackend::classifier(const char* op, Tensor losses, Tensor logits, Tensor targets, float dloss,
                             std::int64_t V, bool gradient) {
    const ClassifierDims d = classifier_dims(op, logits, targets, V);
    if (losses) check::f32_values(op, "losses", losses, d.N);
    constexpr i64 kMost = std::numeric_limits<int>::max() / 2;  // the kernel's columns are of 32 bits
    LLMC_CHECK(d.Vp <= kMost, "{} columns are more than a classifier on a GPU takes", d.Vp);
    visit_float(logits.dtype, [&](auto tag) {
        using T = decltype(tag);
        visit_width<T>(
            d.Vp,
            [&](auto width) {
                constexpr int W = decltype(width)::value;
                launch(gradient ? classifier_kernel<T, W, true> : classifier_kernel<T, W, false>,
                       blocks_for(d.N, 1), kThreads, 0, stream(), losses.as<float>(), logits.as<T>(),
                       targets.as<std::int32_t>(), dloss, static_cast<int>(d.V), static_cast<int>(d.Vp));
            },
            logits.data);
    });
}

void CudaBackend::crossentropy_forward(Tensor losses, Tensor logits, Tensor targets, std::int64_t V) {
    constexpr const char* op = "crossentropy_forward";
    check::present(op, "losses", losses);
    classifier(op, losses, logits, targets, 0.0f, V, false);
}

void CudaBackend::crossentropy_softmax_backward(Tensor logits, Tensor targets, float dloss, std::int64_t V) {
    classifier("crossentropy_softmax_backward", Tensor(), logits, targets, dloss, V, true);
}

void CudaBackend::fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss,
                                   std::int64_t V) {
    constexpr const char* op = "fused_classifier";
    check::present(op, "losses", losses);
    classifier(op, losses, logits, targets, dloss, V, true);
}

}  // namespace llmc
