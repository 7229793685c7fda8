// bf16, a row kept in registers
//
// 1,024 threads have registers for 57,344 logits in bf16, two in a register: a whole row. So it is read once, all of it on its
// way at the same time, and there is no need for the online sum: the maximum comes first, then the sum, then the gradient,
// all from registers. The price: one such block fills a multiprocessor, so half as many rows are under way, and while it
// computes, nothing of the next row is on its way. Which of both counts for more is a question to the stopwatch: on an
// H200 the price does, and version 5 is 4 % faster.
//
// It takes rows of up to 57,344 logits, and says so if they are longer.
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

constexpr int W = 8, kThreads = 1024, kVectors = 7;

// Eight logits as they lie in memory, two in a word.
struct alignas(16) Packed {
    unsigned words[W / 2];
    __device__ float operator[](int k) const {
        return __uint_as_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
    }
    // Makes the logits from the one numbered `count` on the lowest number of bf16, whose exponential is 0.
    __device__ void keep_first(int count) {
#pragma unroll
        for (int i = 0; i < W / 2; ++i) {
            if (2 * i >= count) words[i] = (words[i] & 0xffff0000u) | 0xff7fu;
            if (2 * i + 1 >= count) words[i] = (words[i] & 0x0000ffffu) | 0xff7f0000u;
        }
    }
    // Lets the compiler take the logits for new ones, which it has to unpack again. Else it would keep what it computed of them in
    // the pass before, and that is twice as many registers as there are.
    __device__ void forget() {
#pragma unroll
        for (unsigned& word : words) llmc::ptx::forget(word);
    }
};

__global__ void __launch_bounds__(kThreads)
    fused_classifier(float* losses, bf16* logits, const int32_t* targets, float dloss, int V, int Vp) {
    bf16* x = logits + static_cast<int64_t>(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x], first = threadIdx.x * W;
    constexpr int step = kThreads * W;
    const float at_target = to_float(x[target]);  // before a thread overwrites it
    Packed row[kVectors] = {};
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
        if (first + j * step < Vp) row[j] = *reinterpret_cast<const Packed*>(x + first + j * step);
    float highest = -3e38f, total = 0.0f;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        row[j].keep_first(V - (first + j * step));  // of padding, and of what lies behind the row, none
#pragma unroll
        for (int k = 0; k < W; ++k) highest = fmaxf(highest, row[j][k]);
    }
    highest = block_reduce(highest, -3e38f, Max());
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        row[j].forget();
#pragma unroll
        for (int k = 0; k < W; ++k) total += __expf(row[j][k] - highest);
    }
    total = block_reduce(total, 0.0f, Sum());
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) - (at_target - highest);
    const float factor = dloss / total;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
        const int c = first + j * step;
        row[j].forget();
        const auto gradient = [&](int k) { return __expf(row[j][k] - highest) * factor; };
        Packed d;
#pragma unroll
        for (int i = 0; i < W / 2; ++i)
            d.words[i] = llmc::ptx::bf16x2_bits(gradient(2 * i), gradient(2 * i + 1));
        if (c < Vp) *reinterpret_cast<Packed*>(x + c) = d;
    }
    // By the thread that has just written it without the 1.
    if (target / W % kThreads == threadIdx.x)
        x[target] = to_bf16(__expf(at_target - highest) * factor - dloss);
}

KERNEL void run(float* losses, bf16* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    if (Vp > kVectors * kThreads * W) return note_error("a row has more than 57,344 logits");
    fused_classifier<<<N, kThreads>>>(losses, logits, targets, 1.0f / static_cast<float>(N),
                                      static_cast<int>(V), static_cast<int>(Vp));
}
