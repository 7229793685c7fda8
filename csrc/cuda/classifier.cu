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

constexpr int kThreads = 512;
constexpr float kLowest = -3e38f;

// losses null: not wanted.
template <class T, int W, bool gradient>
__global__ void classifier_kernel(float* losses, T* logits, const std::int32_t* targets, float dloss, i64 V,
                                  i64 Vp) {
    T* const x = logits + static_cast<i64>(blockIdx.x) * Vp;
    const i64 target = targets[blockIdx.x];
    float highest = kLowest, total = 0.0f;
    for (i64 c = threadIdx.x * W; c < V; c += kThreads * W) {
        const Floats<W> v = load<W>(x + c);
        float top = highest;
#pragma unroll
        for (int k = 0; k < W; ++k)
            if (c + k < V) top = Max()(v[k], top);  // a NaN is not greater, but comes through the exponential
        total *= expf(highest - top);
#pragma unroll
        for (int k = 0; k < W; ++k)
            if (c + k < V) total += expf(v[k] - top);
        highest = top;
    }
    const float shift = block_reduce(highest, kLowest, Max());
    total = block_reduce(total * expf(highest - shift), 0.0f, Sum());

    const bool ignored = target < 0, impossible = target >= V;
    if (losses && threadIdx.x == 0) {
        // Not -log(p): p underflows where the loss passes 87.
        if (impossible)
            losses[blockIdx.x] = std::numeric_limits<float>::quiet_NaN();
        else
            losses[blockIdx.x] = ignored ? 0.0f : logf(total) - (widen(x[target]) - shift);
    }
    if constexpr (gradient) {
        if (losses) __syncthreads();  // the loss reads a logit that its thread does not own
        const float factor = impossible ? std::numeric_limits<float>::quiet_NaN() : dloss / total;
        for (i64 c = threadIdx.x * W; c < Vp; c += kThreads * W) {
            Floats<W> v = load<W>(x + c);
#pragma unroll
            for (int k = 0; k < W; ++k) {
                float d = expf(v[k] - shift) * factor;
                if (c + k == target) d -= dloss;
                v[k] = ignored || c + k >= V ? 0.0f : d;
            }
            store(x + c, v);
        }
    }
}

}  // namespace

void CudaBackend::classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V,
                             bool gradient) {
    const ClassifierDims d = classifier_dims("classifier", logits, targets, V);
    if (losses) detail::check_stat("classifier", "losses", losses, d.N);
    visit_float(logits.dtype, [&](auto tag) {
        using T = decltype(tag);
        visit_width<T>(
            d.Vp,
            [&](auto width) {
                constexpr int W = decltype(width)::value;
                launch(gradient ? classifier_kernel<T, W, true> : classifier_kernel<T, W, false>,
                       blocks_for(d.N, 1), kThreads, 0, stream(), losses.as<float>(), logits.as<T>(),
                       targets.as<std::int32_t>(), dloss, d.V, d.Vp);
            },
            logits.data);
    });
}

void CudaBackend::crossentropy_forward(Tensor losses, Tensor logits, Tensor targets, std::int64_t V) {
    detail::check_present("crossentropy_forward", "losses", losses);
    classifier(losses, logits, targets, 0.0f, V, false);
}

void CudaBackend::crossentropy_softmax_backward(Tensor logits, Tensor targets, float dloss, std::int64_t V) {
    classifier(Tensor(), logits, targets, dloss, V, true);
}

void CudaBackend::fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss,
                                   std::int64_t V) {
    detail::check_present("fused_classifier", "losses", losses);
    classifier(losses, logits, targets, dloss, V, true);
}

}  // namespace llmc
