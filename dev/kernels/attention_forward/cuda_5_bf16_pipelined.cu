// bf16 on tensor cores, the next tile copied meanwhile
//
// Version 4 waits for each tile: first memory works, then the tensor cores. cp.async (from sm_80 on) copies from global to shared
// memory without passing through registers, and does not wait: a block has two buffers, and asks for the next keys and values before it
// computes with those that have arrived. Only tiles on the diagonal are masked, and the scale goes into one multiply-add with the
// maximum. csrc/cuda/flash_forward.cu is this kernel for head sizes from 64 to 128.
#include "kernel.cuh"

namespace ptx = llmc::ptx;

constexpr int HS = 64, kTile = 64, kThreads = 128;
constexpr int kLd =
    HS + 8;  // 16 bytes more in a row: the 8 rows that ldmatrix reads at once lie in different banks

// Asks for rows row0.. of a head, with zeros behind the last position. They are there when the group of copies has been waited for.
__device__ void load_tile(bf16* tile, const bf16* head, int row0, int T, int stride) {
    const bf16* const from = head + int64_t(row0) * stride;
    const int left = T - row0;
#pragma unroll
    for (int turn = 0; turn < kTile * HS / 8 / kThreads; ++turn) {
        const int n = turn * kThreads + threadIdx.x;
        const int r = n / (HS / 8), c = n % (HS / 8) * 8;
        const bool valid = r < left;
        ptx::cp_async16(tile + r * kLd + c, from + (valid ? r * stride + c : 0), valid);
    }
}

// s (16 x 64) = q k^T for the 16 queries of a warp, in `q`, and the 64 keys of a tile.
__device__ void multiply_rows(float (&s)[8][4], const uint32_t (&q)[4][4], const bf16* keys) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < 4; ++n)  // 16 keys
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // 16 channels
            uint32_t b[4];
            ptx::ldmatrix_x4(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * kLd + k * 16 + lane / 8 % 2 * 8);
            ptx::mma_bf16(s[2 * n], q[k], b[0], b[1]);
            ptx::mma_bf16(s[2 * n + 1], q[k], b[2], b[3]);
        }
}

// o (16 x 64) += p v for the probabilities of a warp's queries and the values of a tile.
__device__ void multiply_values(float (&o)[8][4], const float (&p)[8][4], const bf16* values) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 keys
        const uint32_t a[4] = {ptx::bf16x2_bits(p[2 * k][0], p[2 * k][1]),
                               ptx::bf16x2_bits(p[2 * k][2], p[2 * k][3]),
                               ptx::bf16x2_bits(p[2 * k + 1][0], p[2 * k + 1][1]),
                               ptx::bf16x2_bits(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < 4; ++n) {  // 16 channels
            uint32_t b[4];
            ptx::ldmatrix_x4_trans(b, values + (k * 16 + lane % 16) * kLd + n * 16 + lane / 16 * 8);
            ptx::mma_bf16(o[2 * n], a, b[0], b[1]);
            ptx::mma_bf16(o[2 * n + 1], a, b[2], b[3]);
        }
    }
}

__global__ void __launch_bounds__(kThreads, 4)
    attention(bf16* out, float* lse, const bf16* qkv, int T, int NH, float scale_log2e) {
    __shared__ alignas(16) bf16 keys[2][kTile * kLd];
    __shared__ alignas(16) bf16 values[2][kTile * kLd];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, C = NH * HS;
    const int query0 = (gridDim.y - 1 - blockIdx.y) * kTile;  // the longest first
    const bf16* const head = qkv + int64_t(b) * T * 3 * C + h * HS;

    load_tile(keys[1], head, query0, T, 3 * C);  // the queries, on their way to registers
    load_tile(keys[0], head + C, 0, T, 3 * C);
    load_tile(values[0], head + 2 * C, 0, T, 3 * C);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    uint32_t q[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
        ptx::ldmatrix_x4(q[k], keys[1] + (warp * 16 + lane % 16) * kLd + k * 16 + lane / 16 * 8);
    __syncthreads();  // before keys[1] is filled

    float o[8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const int row = query0 + warp * 16 + g;  // and row + 8
    for (int key0 = 0; key0 <= query0; key0 += kTile) {
        const int now = key0 / kTile % 2, next = 1 - now;
        if (key0 < query0) {
            load_tile(keys[next], head + C, key0 + kTile, T, 3 * C);
            load_tile(values[next], head + 2 * C, key0 + kTile, T, 3 * C);
        }
        ptx::cp_async_commit();   // empty at the end, so that the count in the next line is right there too
        ptx::cp_async_wait<1>();  // for all groups but the last
        __syncthreads();
        float s[8][4] = {};
        multiply_rows(s, q, keys[now]);
        if (key0 == query0) {  // on the diagonal
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (key0 + n * 8 + 2 * i + j % 2 > row + j / 2 * 8) s[n][j] = -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows g and g + 8
            float top = largest[half];
#pragma unroll
            for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
            const float correction = ptx::exp2((largest[half] - top) * scale_log2e);
            const float shift = top * scale_log2e;
            largest[half] = top;
            total[half] *= correction;
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; ++j) {
                    s[n][j] = ptx::exp2(fmaf(s[n][j], scale_log2e, -shift));
                    total[half] += s[n][j];
                    o[n][j] *= correction;
                }
        }
        multiply_values(o, s, values[now]);
        __syncthreads();  // before this buffer is filled again
    }
    ptx::cp_async_wait<0>();  // no thread may end before its copies
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int t = row + half * 8;
        if (t >= T) continue;
        bf16* const to = out + (int64_t(b) * T + t) * C + h * HS + 2 * i;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            *reinterpret_cast<uint32_t*>(to + n * 8) =
                ptx::bf16x2_bits(o[n][2 * half] / sum, o[n][2 * half + 1] / sum);
        if (i == 0)
            lse[int64_t(blockIdx.x) * T + t] = (largest[half] * scale_log2e + log2f(sum)) * 0.69314718f;
    }
}

KERNEL void run(bf16* out, float* lse, const bf16* qkv, int64_t B, int64_t T, int64_t NH) {
    attention<<<dim3(B * NH, ceil_div(T, kTile)), kThreads>>>(out, lse, qkv, T, NH, 0.125f * 1.44269504f);
}
