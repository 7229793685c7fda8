// bf16, 8 logits an access
//
// Half the bytes, so half the time if memory is all that counts. It computes in float32 and rounds the gradient once, when it is
// stored. The rows under way on an H100, two blocks on each of 132 multiprocessors and 100 KB each, are 27 MB and fit into its
// L2 cache of 50 MB: the second pass reads from there. So memory is read once and written once. csrc/cuda/classifier.cu is this
// kernel for both dtypes and any width of a row.
#include "kernel.cuh"

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// Every thread gets the result. The order of a sum is fixed: halves of a warp, then halves of the warps' results.
template <class Op>
__device__ float block_reduce(float x, float identity, Op op) {
    __shared__ float partial[kWarp];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        x = op(x, __shfl_xor_sync(kAllLanes, x, distance));
    __syncthreads();  // the reduction before may still be reading
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = lane < warps ? partial[lane] : identity;
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        x = op(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

constexpr int W = 8;
constexpr float kLowest = -3e38f;

// Eight logits from column c on.
struct Eight {
    float v[W];
    __device__ static Eight load(const bf16* row, int c, int V) {
        const bf16x8 x = *reinterpret_cast<const bf16x8*>(row + c);
        Eight r;
        for (int k = 0; k < W; ++k) r.v[k] = c + k < V ? to_float(x.v[k]) : kLowest;
        return r;
    }
    __device__ void store(bf16* row, int c) const {
        bf16x8 x;
        for (int k = 0; k < W; ++k) x.v[k] = to_bf16(v[k]);
        *reinterpret_cast<bf16x8*>(row + c) = x;
    }
    __device__ static Eight none() {
        Eight r;
        for (int k = 0; k < W; ++k) r.v[k] = kLowest;
        return r;
    }
};

// What a thread has seen: its maximum, and the sum of e^(x - highest).
struct OnlineSum {
    float highest = kLowest, total = 0.0f;
    __device__ void add(const Eight& a, const Eight& b) {
        float top = highest;
        for (int k = 0; k < W; ++k) top = fmaxf(top, fmaxf(a.v[k], b.v[k]));
        total *= __expf(highest - top);
        for (int k = 0; k < W; ++k) total += __expf(a.v[k] - top) + __expf(b.v[k] - top);
        highest = top;
    }
};

__global__ void fused_classifier(float* losses, bf16* logits, const int32_t* targets, float dloss, int V,
                                 int Vp) {
    bf16* x = logits + static_cast<int64_t>(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x], first = threadIdx.x * W, step = blockDim.x * W;
    OnlineSum sum;
    for (int c = first; c < Vp; c += 2 * step) {
        const Eight a = Eight::load(x, c, V);
        const Eight b = c + step < Vp ? Eight::load(x, c + step, V) : Eight::none();
        sum.add(a, b);
    }
    const float highest = block_reduce(sum.highest, kLowest, Max());
    const float total = block_reduce(sum.total * __expf(sum.highest - highest), 0.0f, Sum());
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) - (to_float(x[target]) - highest);
    __syncthreads();  // thread 0 has read the target's logit, which belongs to another thread
    const float factor = dloss / total;
    for (int c = first; c < Vp; c += step) {
        Eight a = Eight::load(x, c, V);
        for (int k = 0; k < W; ++k)
            a.v[k] = __expf(a.v[k] - highest) * factor - (c + k == target ? dloss : 0.0f);
        a.store(x, c);
    }
}

KERNEL void run(float* losses, bf16* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    constexpr int threads = 1024;
    fused_classifier<<<N, threads>>>(losses, logits, targets, 1.0f / static_cast<float>(N),
                                     static_cast<int>(V), static_cast<int>(Vp));
}
