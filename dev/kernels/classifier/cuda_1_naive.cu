// A thread per row, probabilities kept
//
// The CPU's three functions, a kernel each: softmax and loss with a thread for each row, the gradient with a thread for each
// logit. The 32 threads of a warp read 32 rows at once, 201 KB apart: each access fetches 32 bytes and uses 4. And with 1,024
// rows there are only 1,024 threads, where a GPU wants a hundred thousand.
#include "kernel.cuh"

__global__ void softmax_forward(float* probs, const float* logits, int64_t N, int64_t V, int64_t Vp) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const float* x = logits + n * Vp;
    float* p = probs + n * Vp;
    float highest = x[0];
    for (int64_t v = 1; v < V; ++v) highest = fmaxf(highest, x[v]);
    double total = 0.0;  // in float, 50,257 additions one after the other would lose three digits
    for (int64_t v = 0; v < V; ++v) {
        p[v] = expf(x[v] - highest);
        total += p[v];
    }
    for (int64_t v = 0; v < V; ++v) p[v] /= static_cast<float>(total);
}

__global__ void crossentropy_forward(float* losses, const float* probs, const int32_t* targets, int64_t N,
                                     int64_t Vp) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (n < N) losses[n] = -logf(probs[n * Vp + targets[n]]);
}

__global__ void crossentropy_softmax_backward(float* dlogits, const float* probs, const int32_t* targets,
                                              int64_t N, int64_t V, int64_t Vp) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= N * Vp) return;
    const int64_t n = i / Vp, v = i % Vp;
    const float at_target = v == targets[n] ? 1.0f : 0.0f;
    dlogits[i] = v < V ? (probs[i] - at_target) / static_cast<float>(N) : 0.0f;
}

KERNEL void run(float* losses, float* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    constexpr int threads = 128;
    float* probs = scratch<float>(N * Vp);
    softmax_forward<<<ceil_div(N, threads), threads>>>(probs, logits, N, V, Vp);
    crossentropy_forward<<<ceil_div(N, threads), threads>>>(losses, probs, targets, N, Vp);
    crossentropy_softmax_backward<<<ceil_div(N * Vp, threads), threads>>>(logits, probs, targets, N, V, Vp);
}
