// Chooses the next token for each row of logits as core/sampler.cpp does; a block takes a row. The most likely
// token, and the tokens that top_k leaves, are the same as there. Sums of probabilities are taken in another
// order and exp is another library's, so the walk, and top_p's limit, may differ if they meet a boundary to some
// 1e-13.
//
// The host sorts; here the least likely token that top_k and top_p keep is found by bisection between
// probabilities that occur, and nothing is sorted. Positive doubles are in the order of their bits.
#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"

namespace llmc {

namespace {

// With as many registers as 512 threads leave, nothing spills.
constexpr int kThreads = 512, kWarps = kThreads / kWarp;

struct Least {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};
struct Largest {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};

// Calls f(i, x[i]) for i = begin, begin + step, ... below end. Eight loads are under way at once.
template <class T, class F>
__device__ __forceinline__ void each(const T* x, int begin, int end, int step, F f) {
    constexpr int kAhead = 8;
    int i = begin;
    for (; i < end - (kAhead - 1) * step; i += kAhead * step) {
        T v[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) v[k] = x[i + k * step];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) f(i + k * step, v[k]);
    }
    for (; i < end; i += step) f(i, x[i]);
}

// The tokens that top_k and top_p keep: those that are more likely than `least`, and up to token `last` those that are
// as likely.
struct Kept {
    double least;
    int last;
    __device__ double operator()(int i, double x) const {
        return x > least || (x == least && i <= last) ? x : 0.0;
    }
};

// As if the tokens were sorted, the likelier first and equals by number: the token of a rank is kept if rank <
// top_k and those before it have less than top_p of all. (The first one always is.)
__device__ Kept keep(const double* p, int V, int top_k, float top_p) {
    double sum = 0.0;
    i64 low = __double_as_longlong(1.0), high = low;  // the most likely token's
    each(p, threadIdx.x, V, kThreads, [&](int, double x) {
        sum += x;
        low = Least()(low, static_cast<i64>(__double_as_longlong(x)));
    });
    const double limit = top_p * block_reduce(sum, 0.0, Sum());
    low = block_reduce(low, high, Least());
    int before = 0;  // tokens above `high`, and their sum
    double mass = 0.0;
    while (low < high) {
        const i64 middle = low + (high - low) / 2;
        i64 under = low, over = high;  // the probabilities next to it
        int n = 0;
        sum = 0.0;
        each(p, threadIdx.x, V, kThreads, [&](int, double x) {
            const i64 bits = __double_as_longlong(x);
            if (bits > middle) {
                ++n, sum += x;
                over = Least()(over, bits);
            } else {
                under = Largest()(under, bits);
            }
        });
        n = block_reduce(n, 0, Sum());
        sum = block_reduce(sum, 0.0, Sum());
        if (n < top_k && sum < limit) {  // the first token at or below the middle is kept
            high = block_reduce(under, low, Largest());
            before = n, mass = sum;
        } else {
            low = block_reduce(over, high, Least());
        }
    }
    Kept kept{__longlong_as_double(low), V};
    int equals = 0;
    each(p, threadIdx.x, V, kThreads, [&](int, double x) { equals += x == kept.least; });
    equals = block_reduce(equals, 0, Sum());
    int wanted = 0;
    for (; wanted < equals && before + wanted < top_k && (before + wanted == 0 || mass < limit); ++wanted)
        mass += kept.least;
    if (wanted == equals) return kept;
    int first = 0;
    kept.last = V - 1;
    while (first < kept.last) {
        const int middle = first + (kept.last - first) / 2;
        int n = 0;
        each(p, threadIdx.x, middle + 1, kThreads, [&](int, double x) { n += x == kept.least; });
        if (block_reduce(n, 0, Sum()) >= wanted)
            kept.last = middle;
        else
            first = middle + 1;
    }
    return kept;
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(std::int32_t* tokens, const float* logits, const float* coins, double* probabilities, int V,
                  i64 Vp, float temperature, int top_k, float top_p) {
    overlap_kernels();
    const i64 row = blockIdx.x;
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    const float coin = coins[row];
    const float* const x = logits + row * Vp;
    if (!(coin >= 0.0f)) {
        if (thread == 0) tokens[row] = 0;
        return;
    }

    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float most = -kInfinity;
    int best = V, nan = V;
    each(x, thread, V, kThreads, [&](int i, float logit) {
        if (logit != logit)
            nan = Least()(nan, i);
        else if (best == V || logit > most)
            most = logit, best = i;
    });
    nan = block_reduce(nan, V, Least());
    const float all_most = block_reduce(most, -kInfinity, Max());
    best = block_reduce(most == all_most ? best : V, V, Least());
    const bool infinite = all_most == kInfinity || all_most == -kInfinity;
    if (nan < V || infinite || temperature == 0.0f) {
        if (thread == 0)
            tokens[row] = nan < V           ? -1 - nan
                          : !infinite       ? best
                          : all_most > 0.0f ? kLargestIsInfinite
                                            : kLargestIsMinusInfinite;
        return;
    }

    double* const p = probabilities + row * V;  // not normalised
    each(x, thread, V, kThreads,
         [&](int i, float logit) { p[i] = exp(static_cast<double>((logit - all_most) / temperature)); });
    const Kept kept = top_k < V || top_p < 1.0f ? keep(p, V, top_k, top_p) : Kept{0.0, V};
    __syncthreads();  // from here on warps take tokens that stand together

    // Warps take shares of the tokens, then shares of the share that holds the target, down to 32 tokens.
    LLMC_SHARED(sums, double[kWarps]);
    int begin = 0, end = V, share;
    double start = 0.0, target = -1.0;
    do {
        share = static_cast<int>(ceil_div(ceil_div(end - begin, kWarps), kWarp)) * kWarp;
        double sum = 0.0;
        each(p, begin + warp * share + lane, Least()(end, begin + (warp + 1) * share), kWarp,
             [&](int i, double x) { sum += kept(i, x); });
        sum = warp_reduce(sum, Sum());
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        if (target < 0.0) {
            double total = 0.0;
            for (int w = 0; w < kWarps; ++w) total += sums[w];
            target = coin * total;
        }
        int chosen = 0;
        double below = start;
        for (int w = 0; w < kWarps; ++w) {
            if (sums[w] > 0.0) chosen = w, start = below;  // the last such, if rounding leaves none
            below += sums[w];
            if (target < below) break;
        }
        begin += chosen * share;
        end = Least()(end, begin + share);
        __syncthreads();  // before the next sums
    } while (share > kWarp);
    if (warp > 0) return;

    const int i = begin + lane;
    const double probability = i < end ? kept(i, p[i]) : 0.0;
    double upto = probability;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const double other = __shfl_sync(kAllLanes, upto, lane >= distance ? lane - distance : lane);
        if (lane >= distance) upto += other;
    }
    const int token = warp_reduce(probability > 0.0 && target < start + upto ? i : V, Least());
    const int last = warp_reduce(probability > 0.0 ? i : 0, Largest());
    if (lane == 0) tokens[row] = token < V ? token : last;
}

}  // namespace

void CudaBackend::sample(Tensor tokens, Tensor logits, Tensor coins, std::int64_t V,
                         const SamplerOptions& options) {
    const ClassifierDims d = sample_dims(tokens, logits, coins, V);
    check_sampler(V, options);
    double* const probabilities =
        options.temperature > 0.0f ? static_cast<double*>(scratch(d.N * V * 8)) : nullptr;
    const std::int64_t top_k = options.top_k > 0 && options.top_k < V ? options.top_k : V;
    launch(sample_kernel, blocks_for(d.N, 1), kThreads, 0, overlapping_stream(), tokens.as<std::int32_t>(),
           logits.as<float>(), coins.as<float>(), probabilities, static_cast<int>(V), d.Vp,
           options.temperature, static_cast<int>(top_k), options.top_p);
}

}  // namespace llmc
