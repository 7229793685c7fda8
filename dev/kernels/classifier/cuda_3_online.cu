// Maximum and sum in one pass (online softmax)
//
// A row is read twice instead of three times: what a thread has summed is made relative to the new maximum whenever its maximum
// rises (Milakov and Gimelshein 2018). That costs an exponential more each time, and a branch on which the threads of a warp
// part. A GPU that waits for memory has time for both.
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

// What a thread has seen: its maximum, and the sum of e^(x - highest).
struct OnlineSum {
    float highest = -3e38f, total = 0.0f;
    __device__ void add(float x) {
        if (x > highest) {
            total *= __expf(highest - x);
            highest = x;
        }
        total += __expf(x - highest);
    }
};

__global__ void fused_classifier(float* losses, float* logits, const int32_t* targets, float dloss, int V,
                                 int Vp) {
    float* x = logits + static_cast<int64_t>(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x], first = threadIdx.x, step = blockDim.x;
    OnlineSum sum;
    for (int v = first; v < V; v += step) sum.add(x[v]);
    const float highest = block_reduce(sum.highest, -3e38f, Max());
    const float total = block_reduce(sum.total * __expf(sum.highest - highest), 0.0f, Sum());
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) - (x[target] - highest);
    __syncthreads();  // thread 0 has read the target's logit, which belongs to another thread
    const float factor = dloss / total;
    for (int v = first; v < V; v += step)
        x[v] = __expf(x[v] - highest) * factor - (v == target ? dloss : 0.0f);
    for (int v = V + first; v < Vp; v += step) x[v] = 0.0f;
}

KERNEL void run(float* losses, float* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    constexpr int threads = 256;
    fused_classifier<<<N, threads>>>(losses, logits, targets, 1.0f / static_cast<float>(N),
                                     static_cast<int>(V), static_cast<int>(Vp));
}
