// Flash attention, backward: two kernels that compute the scores again from lse, one whose blocks own keys and
// walk over the queries from the diagonal on (dk, dv), one whose blocks own queries and walk over the keys up
// to it (dq). No sum crosses blocks, so there are no atomics, and every run gives the same bits; the price is 7
// matmuls instead of 5.
//
// In the first kernel everything is transposed (rows are keys), so that the scores, as they lie in registers, are the
// left operand of the matmul that follows:
//   s^T = k q^T;  p^T = exp(s^T scale - lse);  dp^T = v dout^T;  ds^T = p^T (dp^T - delta)
//   dv += p^T dout;  dk += ds^T q, times scale at the end
#include "cuda/flash.cuh"

#include <cmath>
#include <limits>

namespace llmc {

namespace {

using namespace flash;

// Rows of a tile that the loop loads: few enough for the accumulators to stay in registers.
template <int HS>
constexpr int kStep = HS == 64 ? 64 : 32;

template <int HS>
constexpr std::size_t kSharedBytes =
    (2 * kRows + 4 * kStep<HS>)*kLd<HS> * sizeof(bf16) + 4 * kStep<HS> * sizeof(float);

// Loads lse, in units of log2, and delta. Past the end lse is +infinity, so that p is 0, and delta is 0.
template <int HS>
__device__ __forceinline__ void load_stats(float* stats, const float* lse, const float* delta, int row0,
                                           int T_) {
    const int r = threadIdx.x;
    if (r >= kStep<HS>) return;
    const bool valid = row0 + r < T_;
    stats[r] = valid ? lse[row0 + r] * kLog2e : std::numeric_limits<float>::infinity();
    stats[kStep<HS> + r] = valid ? delta[row0 + r] : 0.0f;
}

// The two bf16 of row g (half 0) or g + 8 of a warp's result, to row t of a head.
template <int HS>
__device__ __forceinline__ void store_rows(bf16* head, i64 stride, int row, int T_,
                                           const float (&x)[HS / 8][4], float scale) {
    const int i = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = row + half * 8;
        if (t >= T_) continue;
#pragma unroll
        for (int n = 0; n < HS / 8; ++n)
            store(head + t * stride + n * 8 + 2 * i,
                  Floats<2>{x[n][2 * half] * scale, x[n][2 * half + 1] * scale});
    }
}

template <int HS>
__global__ void __launch_bounds__(kThreads)
    flash_backward_keys_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse,
                               const float* delta, AttentionDims d, int together, float scale) {
    LLMC_DYNAMIC_SHARED(shared);
    constexpr int kQueries = kStep<HS>, kTile = kQueries * kLd<HS>;
    bf16 *const keys = reinterpret_cast<bf16*>(shared), *const values = keys + kRows * kLd<HS>;
    bf16 *const queries = values + kRows * kLd<HS>, *const douts = queries + 2 * kTile;
    float* const stats = reinterpret_cast<float*>(douts + 2 * kTile);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    const Place at = place<kRows>(d, together, false);
    const int T_ = static_cast<int>(d.T), C = static_cast<int>(d.C);
    const int stride = 3 * C, key0 = at.tile * kRows;
    const bf16* const q = qkv + at.b * d.T * stride + at.h * HS;
    const bf16* const dy = dout + at.b * d.T * d.C + at.h * HS;
    const float *const lse_row = lse + at.row * d.T, *const delta_row = delta + at.row * d.T;
    const float scale_log2e = scale * kLog2e;

    load_tile<HS, kRows>(keys, q + d.C, stride, key0, T_);
    load_tile<HS, kRows>(values, q + 2 * d.C, stride, key0, T_);
    const auto fetch = [&](int buffer, int query0) {
        load_tile<HS, kQueries>(queries + buffer * kTile, q, stride, query0, T_);
        load_tile<HS, kQueries>(douts + buffer * kTile, dy, C, query0, T_);
        load_stats<HS>(stats + buffer * 2 * kQueries, lse_row, delta_row, query0, T_);
    };
    fetch(0, key0);
    ptx::cp_async_commit();

    float dk[HS / 8][4], dv[HS / 8][4];
    clear(dk);
    clear(dv);
    const bf16 *const warp_keys = keys + warp * 16 * kLd<HS>, *const warp_values =
                                                                  values + warp * 16 * kLd<HS>;
    const int row = key0 + warp * 16 + g;  // and row + 8
    int buffer = 0;
    for (int query0 = key0; query0 < T_; query0 += kQueries, buffer ^= 1) {
        if (query0 + kQueries < T_) fetch(buffer ^ 1, query0 + kQueries);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads();
        const bf16 *const query = queries + buffer * kTile, *const dquery = douts + buffer * kTile;
        const float* const stat = stats + buffer * 2 * kQueries + 2 * i;

        float p[kQueries / 8][4], ds[kQueries / 8][4];
        clear(p);
        clear(ds);
        multiply_rows<HS, kQueries>(
            p, [&](std::uint32_t (&a)[4], int c) { load_a<HS>(a, warp_keys, c); }, query);
        multiply_rows<HS, kQueries>(
            ds, [&](std::uint32_t (&a)[4], int c) { load_a<HS>(a, warp_values, c); }, dquery);
        const bool diagonal = query0 < key0 + kRows;
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float log2_sum = stat[n * 8 + j % 2], mean = stat[kQueries + n * 8 + j % 2];
                p[n][j] = ptx::exp2(fmaf(p[n][j], scale_log2e, -log2_sum));
                if (diagonal && row + j / 2 * 8 > query0 + n * 8 + 2 * i + j % 2) p[n][j] = 0.0f;
                ds[n][j] = p[n][j] * (ds[n][j] - mean);
            }
        multiply_values<HS, kQueries>(dv, p, dquery);
        multiply_values<HS, kQueries>(dk, ds, query);
        __syncthreads();  // before this buffer is filled again
    }
    ptx::cp_async_wait<0>();
    bf16* const to = dqkv + at.b * d.T * stride + at.h * HS;
    store_rows<HS>(to + d.C, stride, row, T_, dk, scale);
    store_rows<HS>(to + 2 * d.C, stride, row, T_, dv, 1.0f);
}

template <int HS>
__global__ void __launch_bounds__(kThreads)
    flash_backward_queries_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse,
                                  const float* delta, AttentionDims d, int together, float scale) {
    LLMC_DYNAMIC_SHARED(shared);
    constexpr int kKeys = kStep<HS>, kTile = kKeys * kLd<HS>;
    bf16 *const queries = reinterpret_cast<bf16*>(shared), *const douts = queries + kRows * kLd<HS>;
    bf16 *const keys = douts + kRows * kLd<HS>, *const values = keys + 2 * kTile;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    const Place at = place<kRows>(d, together, true);
    const int T_ = static_cast<int>(d.T), C = static_cast<int>(d.C);
    const int stride = 3 * C, query0 = at.tile * kRows;
    const bf16* const q = qkv + at.b * d.T * stride + at.h * HS;
    const float scale_log2e = scale * kLog2e;

    load_tile<HS, kRows>(queries, q, stride, query0, T_);
    load_tile<HS, kRows>(douts, dout + at.b * d.T * d.C + at.h * HS, C, query0, T_);
    const auto fetch = [&](int buffer, int key0) {
        load_tile<HS, kKeys>(keys + buffer * kTile, q + d.C, stride, key0, T_);
        load_tile<HS, kKeys>(values + buffer * kTile, q + 2 * d.C, stride, key0, T_);
    };
    fetch(0, 0);
    ptx::cp_async_commit();

    const int row = query0 + warp * 16 + g;  // and row + 8
    float log2_sum[2], mean[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = row + half * 8;
        log2_sum[half] = t < T_ ? lse[at.row * d.T + t] * kLog2e : std::numeric_limits<float>::infinity();
        mean[half] = t < T_ ? delta[at.row * d.T + t] : 0.0f;
    }
    float dq[HS / 8][4];
    clear(dq);
    const bf16 *const warp_queries = queries + warp * 16 * kLd<HS>, *const warp_douts =
                                                                        douts + warp * 16 * kLd<HS>;
    const int last = query0 + kRows < T_ ? query0 + kRows : T_;
    int buffer = 0;
    for (int key0 = 0; key0 < last; key0 += kKeys, buffer ^= 1) {
        if (key0 + kKeys < last) fetch(buffer ^ 1, key0 + kKeys);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads();
        float p[kKeys / 8][4], ds[kKeys / 8][4];
        clear(p);
        clear(ds);
        multiply_rows<HS, kKeys>(
            p, [&](std::uint32_t (&a)[4], int c) { load_a<HS>(a, warp_queries, c); }, keys + buffer * kTile);
        multiply_rows<HS, kKeys>(
            ds, [&](std::uint32_t (&a)[4], int c) { load_a<HS>(a, warp_douts, c); }, values + buffer * kTile);
        const bool diagonal = key0 + kKeys > query0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                p[n][j] = ptx::exp2(fmaf(p[n][j], scale_log2e, -log2_sum[j / 2]));
                if (diagonal && key0 + n * 8 + 2 * i + j % 2 > row + j / 2 * 8) p[n][j] = 0.0f;
                ds[n][j] = p[n][j] * (ds[n][j] - mean[j / 2]);
            }
        multiply_values<HS, kKeys>(dq, ds, keys + buffer * kTile);
        __syncthreads();  // before this buffer is filled again
    }
    ptx::cp_async_wait<0>();
    store_rows<HS>(dqkv + at.b * d.T * stride + at.h * HS, stride, row, T_, dq, scale);
}

}  // namespace

void flash_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor lse, const float* delta,
                    const AttentionDims& d, cudaStream_t stream) {
    flash::visit_head_size(d.HS, [&](auto head_size) {
        constexpr int HS = decltype(head_size)::value;
        for (const auto kernel : {flash_backward_keys_kernel<HS>, flash_backward_queries_kernel<HS>})
            launch(kernel, blocks_for(d.B * d.NH * ceil_div(d.T, flash::kRows), 1), flash::kThreads,
                   kSharedBytes<HS>, stream, dqkv.as<bf16>(), dout.as<bf16>(), qkv.as<bf16>(),
                   lse.as<float>(), delta, d, heads_together(d), 1.0f / std::sqrt(static_cast<float>(d.HS)));
    });
}

}  // namespace llmc
