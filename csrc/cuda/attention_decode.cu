// Attention of one new token per sequence. The keys of a head are cut into chunks of 128, and a block takes a chunk;
// the block that comes last of a head merges what all have found, in the order of the chunks (flash-decoding, Dao et
// al. 2023). Which chunks there are is known on the device alone, from `start`, so the grid has room for maxT keys and
// blocks without keys end at once.
//
// L lanes share a key, 16 bytes of it each, so 32 / L keys pass through a warp side by side. Each such group of lanes
// keeps a maximum, a sum and its part of the result, as in online softmax.
#include <cmath>
#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"

namespace llmc {

namespace {

constexpr int kChunk = 128;  // keys of a block
constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr float kLowest = -3e38f;
constexpr float kLog2e = 1.4426950408889634f;

// parts: of each chunk of each head the unscaled result (HS), the maximum and the sum. arrived: how many blocks of each
// head have stored theirs.
template <class T>
struct Decode {
    T *out, *kcache, *vcache;
    const T* qkv;
    const std::int32_t* start;
    float* parts;
    unsigned* arrived;
    DecodeDims d;
    int chunks;
    float scale;
    bool early;  // start, kcache and vcache may be read before the wait
};

template <class T, int L>
__global__ void __launch_bounds__(kThreads) decode_kernel(Decode<T> p) {
    constexpr int W = 16 / sizeof(T), kGroups = kWarp / L;  // groups of a warp
    constexpr int kSteps = kChunk / (kWarps * kGroups), kAhead = kSteps < 4 ? kSteps : 4;
    constexpr int kStride = kWarps * kGroups;  // between a lane's keys
    LLMC_SHARED(sums, float[kWarps][L * W]);
    LLMC_SHARED(highest, float[kWarps]);
    LLMC_SHARED(totals, float[kWarps]);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const unsigned rows = static_cast<unsigned>(p.d.B * p.d.NH);
    const int HS = static_cast<int>(p.d.HS), maxT = static_cast<int>(p.d.maxT);
    const unsigned row = blockIdx.x % rows;
    const int chunk = static_cast<int>(blockIdx.x / rows);
    const i64 b = row / p.d.NH, h = row % p.d.NH, cache = static_cast<i64>(row) * maxT * HS;
    const int c = lane % L * W;  // the lane's channels
    const int key0 = chunk * kChunk + warp * kGroups + lane / L;
    // What was there before the chain of kernels may be read before the wait: all keys and values but the new ones.
    if (!p.early) overlap_kernels();
    // A position out of range, which the host cannot see without waiting, has no keys: its result is 0 / 0.
    const int given = p.start[b], position = given < 0 || given >= maxT ? -1 : given;
    const int last_chunk = position < 0 ? 0 : position / kChunk;
    if (chunk > last_chunk) {
        if (p.early) overlap_kernels();
        return;
    }
    Floats<W> q = zeros<W>(), sum = zeros<W>();
    float top = kLowest, total = 0.0f;
    const T* const fresh = p.qkv + b * 3 * p.d.C + h * HS + c;  // q; k and v of the new position behind it
#pragma unroll
    for (int first = 0; first < kSteps; first += kAhead) {
        Packed<W, T> k[kAhead] = {}, v[kAhead] = {};
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
            if (const int key = key0 + (first + a) * kStride; key < position && c < HS) {
                k[a].load(p.kcache + cache + key * HS + c);
                v[a].load(p.vcache + cache + key * HS + c);
            }
        if (first == 0) {
            if (p.early) overlap_kernels();
            if (c < HS) q = load<W>(fresh);
#pragma unroll
            for (int i = 0; i < W; ++i) q[i] *= p.scale;
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
            if (const int key = key0 + (first + a) * kStride; key == position && c < HS) {
                k[a].load(fresh + p.d.C);
                v[a].load(fresh + 2 * p.d.C);
                k[a].store(p.kcache + cache + key * HS + c);
                v[a].store(p.vcache + cache + key * HS + c);
            }
        float score[kAhead], top_before = top;
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const Floats<W> x = k[a].floats();
            float s = 0.0f;
#pragma unroll
            for (int i = 0; i < W; ++i) s = fmaf(q[i], x[i], s);
#pragma unroll
            for (int distance = L / 2; distance > 0; distance /= 2)
                s += __shfl_xor_sync(kAllLanes, s, distance);
            const int key = key0 + (first + a) * kStride;
            score[a] = key <= position ? s : -std::numeric_limits<float>::infinity();
            top = Max()(score[a], top);
        }
        const float correction = ptx::exp2(top_before - top);
        total *= correction;
#pragma unroll
        for (int i = 0; i < W; ++i) sum[i] *= correction;
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
            const float weight = ptx::exp2(score[a] - top);
            const Floats<W> x = v[a].floats();
            total += weight;
#pragma unroll
            for (int i = 0; i < W; ++i) sum[i] = fmaf(weight, x[i], sum[i]);
        }
    }
    T* const out = p.out + b * p.d.C + h * HS;
    // The groups of a warp, then the warps.
    float all_top = top;
#pragma unroll
    for (int distance = L; distance < kWarp; distance *= 2)
        all_top = Max()(all_top, __shfl_xor_sync(kAllLanes, all_top, distance));
    const float correction = ptx::exp2(top - all_top);
    total *= correction;
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] *= correction;
#pragma unroll
    for (int distance = L; distance < kWarp; distance *= 2) {
        total += __shfl_xor_sync(kAllLanes, total, distance);
#pragma unroll
        for (int i = 0; i < W; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], distance);
    }
    if (lane < L)
#pragma unroll
        for (int i = 0; i < W; ++i) sums[warp][c + i] = sum[i];
    if (lane == 0) {
        highest[warp] = all_top;
        totals[warp] = total;
    }
    __syncthreads();
    float block_top = kLowest, block_total = 0.0f, x = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) block_top = Max()(highest[w], block_top);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const float share = ptx::exp2(highest[w] - block_top);
        block_total = fmaf(totals[w], share, block_total);
        if (thread < HS) x = fmaf(sums[w][thread], share, x);
    }
    if (last_chunk == 0) {
        if (thread < HS) out[thread] = narrow<T>(x / block_total);
        return;
    }

    const int stride = HS + 2;
    float* const parts = p.parts + static_cast<i64>(row) * p.chunks * stride;
    float* const part = parts + chunk * stride;
    if (thread < HS) part[thread] = x;
    if (thread == 0) {
        part[HS] = block_top;
        part[HS + 1] = block_total;
    }
    if (!last_of_blocks(p.arrived + row, static_cast<unsigned>(last_chunk) + 1)) return;
    if (thread >= HS) return;
    top = kLowest, total = 0.0f, x = 0.0f;
    for (int first = 0; first <= last_chunk; first += 8) {
        float value[8], part_top[8], part_total[8];
#pragma unroll
        for (int a = 0; a < 8; ++a) {
            const float* const other = parts + (first + a) * stride;
            const bool there = first + a <= last_chunk;
            value[a] = there ? __ldcg(other + thread) : 0.0f;
            part_top[a] = there ? __ldcg(other + HS) : kLowest;
            part_total[a] = there ? __ldcg(other + HS + 1) : 0.0f;
        }
        const float before = top;
#pragma unroll
        for (int a = 0; a < 8; ++a) top = Max()(part_top[a], top);
        const float shrink = ptx::exp2(before - top);
        total *= shrink, x *= shrink;
#pragma unroll
        for (int a = 0; a < 8; ++a) {
            const float share = ptx::exp2(part_top[a] - top);
            total = fmaf(part_total[a], share, total);
            x = fmaf(value[a], share, x);
        }
    }
    out[thread] = narrow<T>(x / total);
}

}  // namespace

// Returns false if the shape is not for this kernel.
bool CudaBackend::attention_decode_in_chunks(const DecodeDims& d, Tensor out, Tensor kcache, Tensor vcache,
                                             Tensor qkv, Tensor start) {
    const i64 rows = d.B * d.NH, chunks = ceil_div(d.maxT, kChunk);
    const i64 W = qkv.dtype == DType::bf16 ? 8 : 4;
    const auto aligned = [](const Tensor& x) { return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0; };
    if (d.T != 1 || d.HS % W != 0 || d.HS > kWarp * W || d.HS > kThreads || rows > kCounters ||
        d.maxT * d.HS > 1 << 30 || rows * chunks > 1 << 30 || !aligned(kcache) || !aligned(vcache) ||
        !aligned(qkv))
        return false;
    float* const parts = static_cast<float*>(scratch(rows * chunks * (d.HS + 2) * 4));
    unsigned* const arrived = counters();
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        const Decode<T> p{out.as<T>(),
                          kcache.as<T>(),
                          vcache.as<T>(),
                          qkv.as<T>(),
                          start.as<std::int32_t>(),
                          parts,
                          arrived,
                          d,
                          static_cast<int>(chunks),
                          kLog2e / std::sqrt(static_cast<float>(d.HS)),
                          at_rest(start) && at_rest(kcache) && at_rest(vcache)};
        const i64 lanes = d.HS / W;
        const auto kernel = lanes <= 4    ? decode_kernel<T, 4>
                            : lanes <= 8  ? decode_kernel<T, 8>
                            : lanes <= 16 ? decode_kernel<T, 16>
                                          : decode_kernel<T, 32>;
        launch(kernel, blocks_for(rows * chunks, 1), kThreads, 0, overlapping_stream({out, kcache, vcache}),
               p);
    });
    return true;
}

}  // namespace llmc
