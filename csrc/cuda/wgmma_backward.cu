// Attention on Hopper's warpgroup matmul, backward: the two kernels and the formulas of flash_backward.cu.
#include <cmath>

#include "cuda/wgmma.cuh"
#include "cuda/wgmma.h"

namespace llmc {

namespace {

using namespace hopper;

// lse and delta of queries query0.. to shared memory. Past the last one they are zeros, and so are dout and delta - dp.
constexpr int kStats = 2 * kRows;
__device__ __forceinline__ void load_stats(float* stats, const float* lse, const float* delta, int query0,
                                           int T_) {
    static_assert(kThreads == kStats);
    const int r = static_cast<int>(threadIdx.x), t = query0 + r % kRows;
    const bool valid = t < T_;
    ptx::cp_async4(stats + r, (r < kRows ? lse : delta) + (valid ? t : 0), valid);
}

constexpr int kKeysBlocks = 3, kQueriesBlocks = 4;  // of a multiprocessor

__global__ void __launch_bounds__(kThreads, kKeysBlocks)
    wgmma_backward_keys_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse,
                               const float* delta, AttentionDims d, int together, float scale) {
    LLMC_DYNAMIC_TILES(shared);
    bf16* const keys = reinterpret_cast<bf16*>(shared);
    bf16* const values = keys + kTile;
    bf16 *const queries = values + kTile, *const douts = queries + 2 * kTile;
    float* const stats = reinterpret_cast<float*>(douts + 2 * kTile);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, i = lane % 4;
    const Place at = place<kRows>(d, together, false);
    const int T_ = static_cast<int>(d.T), C = static_cast<int>(d.C), stride = 3 * C, key0 = at.tile * kRows;
    const bf16* const q = qkv + at.b * d.T * stride + at.h * kHS;
    const bf16* const dy = dout + at.b * d.T * C + at.h * kHS;
    const float *const lse_row = lse + at.row * d.T, *const delta_row = delta + at.row * d.T;
    const float scale_log2e = scale * kLog2e;
    const int turns = (T_ - key0 + kRows - 1) / kRows;
    const auto fetch = [&](int turn) {
        const int query0 = key0 + turn * kRows, buffer = turn % 2;
        load_tile(queries + buffer * kTile, q, stride, query0, T_);
        load_tile(douts + buffer * kTile, dy, C, query0, T_);
        load_stats(stats + buffer * kStats, lse_row, delta_row, query0, T_);
        ptx::cp_async_commit();
    };
    load_tile(keys, q + C, stride, key0, T_);
    load_tile(values, q + 2 * C, stride, key0, T_);
    fetch(0);

    Product dk, dv;
    clear(dk);
    clear(dv);
    for (int turn = 0; turn < turns; ++turn) {
        const int buffer = turn % 2;
        float* const stat = stats + buffer * kStats;
        ptx::cp_async_wait<0>();
        if (threadIdx.x < kRows) stat[threadIdx.x] *= kLog2e;  // which this thread has loaded
        arrive();
        if (turn + 1 < turns) fetch(turn + 1);
        const std::uint32_t query_tile = ptx::tile_descriptor(queries + buffer * kTile);
        const std::uint32_t dout_tile = ptx::tile_descriptor(douts + buffer * kTile);
        Product s, dp;
        ptx::wgmma_fence();
        start_rows(s, ptx::tile_descriptor(keys), query_tile);
        ptx::wgmma_commit();
        start_rows(dp, ptx::tile_descriptor(values), dout_tile);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::hold(s);
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
            const Floats<2> log2_sum = load<2>(stat + n * 8 + 2 * i);
#pragma unroll
            for (int j = 0; j < 4; ++j) s[n][j] = ptx::exp2(fmaf(s[n][j], scale_log2e, -log2_sum[j % 2]));
        }
        if (turn == 0) mask<true>(s, warp * 16 + g, 2 * i, 0.0f);
        ptx::wgmma_wait<0>();
        ptx::hold(dp);
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
            const Floats<2> mean = load<2>(stat + kRows + n * 8 + 2 * i);
#pragma unroll
            for (int j = 0; j < 4; ++j) dp[n][j] = s[n][j] * (dp[n][j] - mean[j % 2]);
        }
        Operand p, ds;
        as_operand(ds, dp);
        as_operand(p, s);
        ptx::wgmma_fence();
        start_values(dv, p, dout_tile);
        start_values(dk, ds, query_tile);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::hold(dk);
        ptx::hold(dv);
    }
    bf16* const to = dqkv + at.b * d.T * stride + at.h * kHS;
    store_rows(to + C, stride, key0, T_, keys, dk, {scale, scale});
    store_rows(to + 2 * C, stride, key0, T_, values, dv, {1.0f, 1.0f});
}

__global__ void __launch_bounds__(kThreads, kQueriesBlocks)
    wgmma_backward_queries_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse,
                                  const float* delta, AttentionDims d, int together, float scale) {
    LLMC_DYNAMIC_TILES(shared);
    bf16* const queries = reinterpret_cast<bf16*>(shared);
    bf16* const douts = queries + kTile;
    bf16 *const keys = douts + kTile, *const values = keys + 2 * kTile;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, i = lane % 4;
    const Place at = place<kRows>(d, together, true);
    const int T_ = static_cast<int>(d.T), C = static_cast<int>(d.C), stride = 3 * C, query0 = at.tile * kRows;
    const bf16* const q = qkv + at.b * d.T * stride + at.h * kHS;
    const float scale_log2e = scale * kLog2e;
    const auto fetch = [&](int tile) {
        load_tile(keys + tile % 2 * kTile, q + C, stride, tile * kRows, T_);
        load_tile(values + tile % 2 * kTile, q + 2 * C, stride, tile * kRows, T_);
        ptx::cp_async_commit();
    };
    load_tile(queries, q, stride, query0, T_);
    load_tile(douts, dout + at.b * d.T * C + at.h * kHS, C, query0, T_);
    fetch(0);

    float log2_sum[2], mean[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = query0 + warp * 16 + g + half * 8;
        log2_sum[half] = t < T_ ? lse[at.row * d.T + t] * kLog2e : 0.0f;
        mean[half] = t < T_ ? delta[at.row * d.T + t] : 0.0f;
    }
    Product dq;
    clear(dq);
    for (int tile = 0; tile <= at.tile; ++tile) {
        arrive();
        if (tile < at.tile) fetch(tile + 1);
        const std::uint32_t key_tile = ptx::tile_descriptor(keys + tile % 2 * kTile);
        const std::uint32_t value_tile = ptx::tile_descriptor(values + tile % 2 * kTile);
        Product s, dp;
        ptx::wgmma_fence();
        start_rows(s, ptx::tile_descriptor(queries), key_tile);
        ptx::wgmma_commit();
        start_rows(dp, ptx::tile_descriptor(douts), value_tile);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::hold(s);
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) s[n][j] = ptx::exp2(fmaf(s[n][j], scale_log2e, -log2_sum[j / 2]));
        if (tile == at.tile) mask<false>(s, warp * 16 + g, 2 * i, 0.0f);
        ptx::wgmma_wait<0>();
        ptx::hold(dp);
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) dp[n][j] = s[n][j] * (dp[n][j] - mean[j / 2]);
        Operand ds;
        as_operand(ds, dp);
        ptx::wgmma_fence();
        start_values(dq, ds, key_tile);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::hold(dq);
    }
    store_rows(dqkv + at.b * d.T * stride + at.h * kHS, stride, query0, T_, queries, dq, {scale, scale});
}

}  // namespace

void wgmma_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor lse, const float* delta,
                    const AttentionDims& d, cudaStream_t stream) {
    const auto start = [&](auto kernel, std::size_t shared) {
        launch(kernel, blocks_for(d.B * d.NH * ceil_div(d.T, kRows), 1), kThreads, shared, stream,
               dqkv.as<bf16>(), dout.as<bf16>(), qkv.as<bf16>(), lse.as<float>(), delta, d, heads_together(d),
               1.0f / std::sqrt(static_cast<float>(d.HS)));
    };
    start(wgmma_backward_keys_kernel, (2 + 2 * 2) * kTile * sizeof(bf16) + 2 * kStats * sizeof(float));
    start(wgmma_backward_queries_kernel, (2 + 2 * 2) * kTile * sizeof(bf16));
}

}  // namespace llmc
