// bf16 on tensor cores, scores in registers, the next tile copied meanwhile
//
// The products are those of attention_forward's version 5: 16 rows for each of 4 warps, and a result, rounded to bf16, is the left operand
// of the next product as it lies in registers. For that the kernel that owns keys has everything transposed, a row of its
// scores being a key:
//   s^T = k q^T;  p^T = exp(s^T scale - lse);  dp^T = v dout^T;  ds^T = p^T (dp^T - delta);  dv += p^T dout;  dk += ds^T q
// So nothing but tiles of inputs is in shared memory, in two buffers in turns. csrc/cuda/flash_backward.cu is this for
// head sizes from 64 to 128.
#include "kernel.cuh"

namespace ptx = llmc::ptx;

constexpr int HS = 64, kTile = 64, kThreads = 128;
constexpr int kLd =
    HS + 8;  // 16 bytes more in a row: the 8 rows that ldmatrix reads at once lie in different banks
constexpr int kSize = kTile * kLd;
constexpr float kLog2e = 1.44269504f;

// 8 lanes for each row.
__global__ void row_products(float* delta, const bf16* dout, const bf16* out, int64_t rows, int64_t T,
                             int64_t NH) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = index / 8;  // (b, t, h)
    float sum = 0;
    if (row < rows) {
        const bf16x8 x = reinterpret_cast<const bf16x8*>(dout)[index];
        const bf16x8 y = reinterpret_cast<const bf16x8*>(out)[index];
        for (int c = 0; c < 8; ++c) sum += to_float(x.v[c]) * to_float(y.v[c]);
    }
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (row >= rows || threadIdx.x % 8 != 0) return;
    const int64_t h = row % NH, t = row / NH % T, b = row / (NH * T);
    delta[(b * NH + h) * T + t] = sum;
}

// Asks for rows row0.. of a head, with zeros behind the last position. They are there when the group of copies has been waited for.
__device__ void load_tile(bf16* tile, const bf16* head, int row0, int T, int stride) {
    const bf16* const from = head + int64_t(row0) * stride;
    const int left = T - row0;
#pragma unroll
    for (int turn = 0; turn < kTile * HS / 8 / kThreads; ++turn) {
        const int n = turn * kThreads + threadIdx.x, r = n / (HS / 8), c = n % (HS / 8) * 8;
        ptx::cp_async16(tile + r * kLd + c, from + (r < left ? r * stride + c : 0), r < left);
    }
}

// s (16 x 64) += a b^T for the 16 rows of a warp, of tile `a`, and the 64 rows of tile `b`.
__device__ void multiply_rows(float (&s)[8][4], const bf16* a, const bf16* b) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint32_t x[4], y[4];
        ptx::ldmatrix_x4(x, a + (warp * 16 + lane % 16) * kLd + k * 16 + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            ptx::ldmatrix_x4(y, b + (n * 16 + lane / 16 * 8 + lane % 8) * kLd + k * 16 + lane / 8 % 2 * 8);
            ptx::mma_bf16(s[2 * n], x, y[0], y[1]);
            ptx::mma_bf16(s[2 * n + 1], x, y[2], y[3]);
        }
    }
}

// o (16 x 64) += p b, where p (16 x 64) is a result of multiply_rows.
__device__ void multiply_values(float (&o)[8][4], const float (&p)[8][4], const bf16* b) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t x[4] = {ptx::bf16x2_bits(p[2 * k][0], p[2 * k][1]),
                               ptx::bf16x2_bits(p[2 * k][2], p[2 * k][3]),
                               ptx::bf16x2_bits(p[2 * k + 1][0], p[2 * k + 1][1]),
                               ptx::bf16x2_bits(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            uint32_t y[4];
            ptx::ldmatrix_x4_trans(y, b + (k * 16 + lane % 16) * kLd + n * 16 + lane / 16 * 8);
            ptx::mma_bf16(o[2 * n], x, y[0], y[1]);
            ptx::mma_bf16(o[2 * n + 1], x, y[2], y[3]);
        }
    }
}

__device__ void store_rows(bf16* head, int row, int T, int stride, const float (&x)[8][4], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = row + half * 8;
        if (t >= T) continue;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            *reinterpret_cast<uint32_t*>(head + int64_t(t) * stride + n * 8 + threadIdx.x % 4 * 2) =
                ptx::bf16x2_bits(x[n][2 * half] * factor, x[n][2 * half + 1] * factor);
    }
}

template <bool owns_queries>
__global__ void __launch_bounds__(kThreads)
    backward(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse, const float* delta, int T,
             int NH, float scale) {
    extern __shared__ __align__(16) bf16 tiles[];
    __shared__ float
        sums[2][kTile];  // lse log2(e) and delta of the queries of a tile, for a block that owns keys
    __shared__ float means[2][kTile];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, C = NH * HS;
    const int own0 = (owns_queries ? gridDim.y - 1 - blockIdx.y : blockIdx.y) * kTile;  // the longest first
    const int row = own0 + warp * 16 + g;                                               // and row + 8
    const bf16 *const q = qkv + int64_t(b) * T * 3 * C + h * HS, *const k = q + C, *const v = k + C;
    const bf16* const d = dout + int64_t(b) * T * C + h * HS;
    lse += int64_t(blockIdx.x) * T;
    delta += int64_t(blockIdx.x) * T;

    // What is owned: q and dout, or k and v. What passes by: the others.
    bf16 *const own = tiles, *const own2 = own + kSize, *const other = own2 + kSize,
                *const other2 = other + 2 * kSize;
    load_tile(own, owns_queries ? q : k, own0, T, 3 * C);
    load_tile(own2, owns_queries ? d : v, own0, T, owns_queries ? C : 3 * C);
    const auto fetch = [&](int buffer, int row0) {
        load_tile(other + buffer * kSize, owns_queries ? k : q, row0, T, 3 * C);
        load_tile(other2 + buffer * kSize, owns_queries ? v : d, row0, T, owns_queries ? 3 * C : C);
        const int r = threadIdx.x;
        if (!owns_queries && r < kTile) {
            sums[buffer][r] = row0 + r < T ? lse[row0 + r] * kLog2e : INFINITY;  // infinity: p is 0
            means[buffer][r] = row0 + r < T ? delta[row0 + r] : 0.0f;
        }
    };
    const int begin = owns_queries ? 0 : own0, end = owns_queries ? own0 + 1 : T;
    fetch(0, begin);
    ptx::cp_async_commit();
    float row_sum[2] = {}, row_mean[2] = {};
    if (owns_queries)
        for (int half = 0; half < 2; ++half) {
            const int t = row + half * 8;
            row_sum[half] = t < T ? lse[t] * kLog2e : INFINITY;
            row_mean[half] = t < T ? delta[t] : 0.0f;
        }

    float sum[8][4] = {}, sum_v[8][4] = {};  // dq; or dk, and dv
    int now = 0;
    for (int other0 = begin; other0 < end; other0 += kTile, now ^= 1) {
        if (other0 + kTile < end) fetch(now ^ 1, other0 + kTile);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads();
        const bf16 *const tile = other + now * kSize, *const tile2 = other2 + now * kSize;
        float p[8][4] = {}, ds[8][4] = {};
        multiply_rows(p, own, tile);
        multiply_rows(ds, own2, tile2);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int mine = row + j / 2 * 8, column = n * 8 + 2 * i + j % 2, theirs = other0 + column;
                const float log2_sum = owns_queries ? row_sum[j / 2] : sums[now][column];
                const float mean = owns_queries ? row_mean[j / 2] : means[now][column];
                p[n][j] = ptx::exp2(fmaf(p[n][j], scale * kLog2e, -log2_sum));
                if (other0 == own0 && (owns_queries ? theirs > mine : mine > theirs)) p[n][j] = 0.0f;
                ds[n][j] = p[n][j] * (ds[n][j] - mean);
            }
        multiply_values(sum, ds, tile);
        if (!owns_queries) multiply_values(sum_v, p, tile2);
        __syncthreads();  // before this buffer is filled again
    }
    ptx::cp_async_wait<0>();  // no thread may end before its copies
    bf16* const to = dqkv + int64_t(b) * T * 3 * C + h * HS;
    store_rows(owns_queries ? to : to + C, row, T, 3 * C, sum, scale);
    if (!owns_queries) store_rows(to + 2 * C, row, T, 3 * C, sum_v, 1.0f);
}

KERNEL void run(bf16* dqkv, const bf16* dout, const bf16* qkv, const bf16* out, const float* lse, int64_t B,
                int64_t T, int64_t NH) {
    constexpr int bytes = 6 * kSize * sizeof(bf16);
    const int64_t rows = B * T * NH;
    float* delta = scratch<float>(rows);
    const dim3 grid(B * NH, ceil_div(T, kTile));
    allow_shared(backward<true>, bytes);
    allow_shared(backward<false>, bytes);
    row_products<<<ceil_div(8 * rows, 256), 256>>>(delta, dout, out, rows, T, NH);
    backward<true><<<grid, kThreads, bytes>>>(dqkv, dout, qkv, lse, delta, T, NH, 0.125f);
    backward<false><<<grid, kThreads, bytes>>>(dqkv, dout, qkv, lse, delta, T, NH, 0.125f);
}
