// Chooses the next token for each row of logits as core/sampler.cpp does. The most likely
// token, and the tokens that top_k leaves, are the same as there. Sums of probabilities are taken in another
// order and exp is another library's, so the walk, and top_p's limit, may differ if they meet a boundary to some
// 1e-13.
//
// The host sorts; here the least likely token that top_k and top_p keep is found by bisection between
// probabilities that occur, and nothing is sorted. Positive doubles are in the order of their bits.
//
// Rows are few in generation, so many blocks share a row; the one that comes last brings their results together.
#include <algorithm>
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

// ---- the largest logit, and probabilities: a block takes a part of a row ----

constexpr int kPart = 1024, kPartThreads = 256,
              kOwn = kPart / kPartThreads;  // tokens of a block, and of a thread

struct Part {
    float most;
    int best, nan;  // the first tokens with the largest logit, and with none; V if there are none
};
// The largest logit of a row, and its token; or a fault, or that the row is skipped.
struct Best {
    float most;
    bool decided;  // no coin is needed
};
struct Sample {
    std::int32_t* tokens;
    const float *logits, *coins;
    Part* parts;             // (N, P)
    Best* best;              // (N)
    double *sums, *weights;  // of parts (N, P); of tokens (N, V), not normalised: if all of them are wanted
    unsigned* arrived;       // (N)
    int V, P;
    i64 Vp;
    float temperature;

    __device__ double weight(float logit, float most) const {
        return exp(static_cast<double>((logit - most) / temperature));
    }
};

__global__ void __launch_bounds__(kPartThreads) best_kernel(Sample a) {
    overlap_kernels();
    const i64 row = blockIdx.x / a.P;
    const int part = static_cast<int>(blockIdx.x % a.P), thread = static_cast<int>(threadIdx.x);
    if (!(a.coins[row] >= 0.0f)) {
        if (part == 0 && thread == 0) {
            a.tokens[row] = 0;
            a.best[row] = {0.0f, true};
        }
        return;
    }
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float most = -kInfinity;
    int best = a.V, nan = a.V;
    const auto take = [&](float logit, int i, int is_nan) {
        nan = Least()(nan, is_nan);
        if (i < a.V && (best == a.V || logit > most)) most = logit, best = i;
    };
    const auto reduce = [&] {
        nan = block_reduce(nan, a.V, Least());
        const float all = block_reduce(most, -kInfinity, Max());
        best = block_reduce(most == all ? best : a.V, a.V, Least());
        most = all;
    };
    float x[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k)
        if (const int i = part * kPart + k * kPartThreads + thread; i < a.V) x[k] = a.logits[row * a.Vp + i];
#pragma unroll
    for (int k = 0; k < kOwn; ++k)
        if (const int i = part * kPart + k * kPartThreads + thread; i < a.V)
            x[k] != x[k] ? take(0.0f, a.V, i) : take(x[k], i, a.V);
    reduce();
    if (thread == 0) a.parts[row * a.P + part] = {most, best, nan};
    if (!last_of_blocks(a.arrived + row, static_cast<unsigned>(a.P))) return;

    most = -kInfinity, best = nan = a.V;
    for (int i = thread; i < a.P; i += kPartThreads) {  // not from L1, which may hold what was there before
        const Part* const other = a.parts + row * a.P + i;
        take(__ldcg(&other->most), __ldcg(&other->best), __ldcg(&other->nan));
    }
    reduce();
    if (thread > 0) return;
    const bool infinite = most == kInfinity || most == -kInfinity;
    const bool decided = nan < a.V || infinite || a.temperature == 0.0f;
    a.best[row] = {most, decided};
    if (decided)
        a.tokens[row] = nan < a.V     ? -1 - nan
                        : !infinite   ? best
                        : most > 0.0f ? kLargestIsInfinite
                                      : kLargestIsMinusInfinite;
}

// Without top_k and top_p the last block of a row chooses its token; else all weights are stored for sample_kernel.
template <bool choose>
__global__ void __launch_bounds__(kPartThreads) weigh_kernel(Sample a) {
    overlap_kernels();
    const i64 row = blockIdx.x / a.P;
    const int part = static_cast<int>(blockIdx.x % a.P), thread = static_cast<int>(threadIdx.x);
    const Best best = a.best[row];
    if (best.decided) return;
    const float* const logits = a.logits + row * a.Vp;
    // A thread has tokens that stand together.
    double own[kOwn], sum = 0.0;
    const auto weigh = [&](int of) {
        sum = 0.0;
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
            const int i = of * kPart + thread * kOwn + k;
            own[k] = i < a.V ? a.weight(logits[i], best.most) : 0.0;
            sum += own[k];
        }
    };
    weigh(part);
    if constexpr (!choose) {
#pragma unroll
        for (int k = 0; k < kOwn; ++k)
            if (const int i = part * kPart + thread * kOwn + k; i < a.V) a.weights[row * a.V + i] = own[k];
        return;
    }
    const double all = block_reduce(sum, 0.0, Sum());
    if (thread == 0) a.sums[row * a.P + part] = all;
    if (!last_of_blocks(a.arrived + row, static_cast<unsigned>(a.P))) return;

    // The part that holds the target; the last that has any weight, if rounding leaves none.
    LLMC_SHARED(sums, double[kPartThreads]);
    double target = 0.0, below = 0.0, start = 0.0;
    int chosen = -1;
    for (const bool find : {false, true}) {
        bool found = false;
        for (int first = 0; first < a.P; first += kPartThreads) {
            const int n = Least()(kPartThreads, a.P - first);
            __syncthreads();  // the sums may still be read
            if (thread < n) sums[thread] = __ldcg(a.sums + row * a.P + first + thread);
            __syncthreads();
            for (int i = 0; i < n && !found; ++i) {
                if (find && sums[i] > 0.0) chosen = first + i, start = below;
                below += sums[i];
                found = find && target < below;
            }
        }
        if (!find) target = a.coins[row] * below, below = 0.0;
    }
    weigh(chosen);
    LLMC_SHARED(warp_sums, double[kPartThreads / kWarp]);
    const int warp = thread / kWarp, lane = thread % kWarp;
    double upto = sum;  // of the threads up to this one
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const double other = __shfl_sync(kAllLanes, upto, lane >= distance ? lane - distance : lane);
        if (lane >= distance) upto += other;
    }
    if (lane == kWarp - 1) warp_sums[warp] = upto;
    __syncthreads();
    for (int w = 0; w < warp; ++w) start += warp_sums[w];
    double before = start + (upto - sum);
    int token = a.V, last = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
        before += own[k];
        if (own[k] > 0.0) {
            last = chosen * kPart + thread * kOwn + k;
            if (target < before) token = Least()(token, last);
        }
    }
    token = block_reduce(token, a.V, Least());
    last = block_reduce(last, 0, Largest());
    if (thread == 0) a.tokens[row] = token < a.V ? token : last;
}

// ---- with top_k or top_p: a block takes a row ----

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(std::int32_t* tokens, const float* coins, const Best* best, const double* weights, int V,
                  int top_k, float top_p) {
    overlap_kernels();
    const i64 row = blockIdx.x;
    if (best[row].decided) return;
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    const float coin = coins[row];
    const double* const p = weights + row * V;
    const Kept kept = keep(p, V, top_k, top_p);
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
    if (d.N == 0) return;
    const i64 P = ceil_div(V, kPart), most_rows = std::min(d.N, kCounters);
    const i64 top_k = options.top_k > 0 && options.top_k < V ? options.top_k : V;
    const bool all = top_k == V && options.top_p == 1.0f;  // tokens can be chosen
    Sample a{};
    const i64 weights = all || options.temperature == 0.0f ? 0 : most_rows * V * 8;
    const i64 sums = most_rows * P * 8, parts = most_rows * P * static_cast<i64>(sizeof(Part));
    char* const memory =
        static_cast<char*>(scratch(weights + sums + parts + most_rows * static_cast<i64>(sizeof(Best))));
    a.weights = reinterpret_cast<double*>(memory);
    a.sums = reinterpret_cast<double*>(memory + weights);
    a.parts = reinterpret_cast<Part*>(memory + weights + sums);
    a.best = reinterpret_cast<Best*>(memory + weights + sums + parts);
    a.arrived = counters();
    a.V = static_cast<int>(V), a.P = static_cast<int>(P), a.Vp = d.Vp;
    a.temperature = options.temperature;
    LaunchStream s = overlapping_stream({tokens});
    for (i64 first = 0; first < d.N; first += most_rows) {
        const i64 rows = std::min(most_rows, d.N - first);
        a.tokens = tokens.as<std::int32_t>() + first, a.coins = coins.as<float>() + first;
        a.logits = logits.as<float>() + first * d.Vp;
        const unsigned blocks = blocks_for(rows * P, 1);
        launch(best_kernel, blocks, kPartThreads, 0, s, a);
        s.overlap = kernels_overlap_;
        if (options.temperature == 0.0f) continue;
        launch(all ? weigh_kernel<true> : weigh_kernel<false>, blocks, kPartThreads, 0, s, a);
        if (!all)
            launch(sample_kernel, blocks_for(rows, 1), kThreads, 0, s, a.tokens, a.coins, a.best, a.weights,
                   a.V, static_cast<int>(top_k), options.top_p);
    }
}

}  // namespace llmc
