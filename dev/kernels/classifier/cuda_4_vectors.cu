// 16 bytes an access, 1,024 threads a row
//
// An access of 16 bytes is one instruction where four were needed, and brings four times as much on its way at once. Each thread takes
// two of them before it computes. The maximum is updated once for these eight logits, so rescaling the sum costs an eighth.
//
// Rows are padded to a multiple of 128 logits, so a row is whole vectors. The padding takes part as a logit of -3e38, whose
// exponential is 0: so its gradient comes out as the 0 that it must be, and the loops need no end of their own.
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

constexpr int W = 4;
constexpr float kLowest = -3e38f;

// Four logits from column c on.
struct Four {
    float v[W];
    __device__ static Four load(const float* row, int c, int V) {
        const float4 x = *reinterpret_cast<const float4*>(row + c);
        Four r{{x.x, x.y, x.z, x.w}};
        for (int k = 0; k < W; ++k)
            if (c + k >= V) r.v[k] = kLowest;
        return r;
    }
    __device__ void store(float* row, int c) const {
        *reinterpret_cast<float4*>(row + c) = make_float4(v[0], v[1], v[2], v[3]);
    }
};

// What a thread has seen: its maximum, and the sum of e^(x - highest).
struct OnlineSum {
    float highest = kLowest, total = 0.0f;
    __device__ void add(const Four& a, const Four& b) {
        float top = highest;
        for (int k = 0; k < W; ++k) top = fmaxf(top, fmaxf(a.v[k], b.v[k]));
        total *= __expf(highest - top);
        for (int k = 0; k < W; ++k) total += __expf(a.v[k] - top) + __expf(b.v[k] - top);
        highest = top;
    }
};

__global__ void fused_classifier(float* losses, float* logits, const int32_t* targets, float dloss, int V,
                                 int Vp) {
    float* x = logits + static_cast<int64_t>(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x], first = threadIdx.x * W, step = blockDim.x * W;
    OnlineSum sum;
    for (int c = first; c < Vp; c += 2 * step) {
        const Four a = Four::load(x, c, V);
        const Four b =
            c + step < Vp ? Four::load(x, c + step, V) : Four{{kLowest, kLowest, kLowest, kLowest}};
        sum.add(a, b);
    }
    const float highest = block_reduce(sum.highest, kLowest, Max());
    const float total = block_reduce(sum.total * __expf(sum.highest - highest), 0.0f, Sum());
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) - (x[target] - highest);
    __syncthreads();  // thread 0 has read the target's logit, which belongs to another thread
    const float factor = dloss / total;
    for (int c = first; c < Vp; c += step) {
        Four a = Four::load(x, c, V);
        for (int k = 0; k < W; ++k)
            a.v[k] = __expf(a.v[k] - highest) * factor - (c + k == target ? dloss : 0.0f);
        a.store(x, c);
    }
}

KERNEL void run(float* losses, float* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    constexpr int threads = 1024;
    fused_classifier<<<N, threads>>>(losses, logits, targets, 1.0f / static_cast<float>(N),
                                     static_cast<int>(V), static_cast<int>(Vp));
}
