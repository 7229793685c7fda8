// bf16 on tensor cores, scores in registers
//
// A tensor core multiplies a 16 x 16 matrix of bf16 by a 16 x 8 one in one instruction of a whole warp, mma.m16n8k16, and adds in f32.
// csrc/cuda/ptx.cuh says which lane holds which element. A block has 4 warps and 64 queries, 16 for each warp. A lane has the numbers of a
// result that the next mma wants of its left operand, once rounded to bf16 (Dao 2023, arXiv:2307.08691): so scores and
// probabilities need no shared memory. A row of them is shared by 4 lanes.
//
// The factor scale log2(e) turns exp into 2^x, for which there is an instruction.
#include "kernel.cuh"

namespace ptx = llmc::ptx;

constexpr int HS = 64, kTile = 64, kThreads = 128;
constexpr int kLd =
    HS + 8;  // 16 bytes more in a row: the 8 rows that ldmatrix reads at once lie in different banks

// Copies rows row0.. of a head to a tile, 16 bytes at a time, with zeros behind the last position.
__device__ void load_tile(bf16* tile, const bf16* head, int row0, int T, int stride) {
    for (int n = threadIdx.x; n < kTile * HS / 8; n += kThreads) {
        const int r = n / (HS / 8), c = n % (HS / 8) * 8;
        bf16x8 x = {};
        if (row0 + r < T) x = *reinterpret_cast<const bf16x8*>(head + int64_t(row0 + r) * stride + c);
        *reinterpret_cast<bf16x8*>(tile + r * kLd + c) = x;
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

__global__ void __launch_bounds__(kThreads)
    attention(bf16* out, float* lse, const bf16* qkv, int T, int NH, float scale_log2e) {
    __shared__ alignas(16) bf16 keys[kTile * kLd];
    __shared__ alignas(16) bf16 values[kTile * kLd];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, C = NH * HS;
    const int query0 = (gridDim.y - 1 - blockIdx.y) * kTile;  // the longest first
    const bf16* const head = qkv + int64_t(b) * T * 3 * C + h * HS;

    load_tile(keys, head, query0, T, 3 * C);  // the queries, on their way to registers
    __syncthreads();
    uint32_t q[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
        ptx::ldmatrix_x4(q[k], keys + (warp * 16 + lane % 16) * kLd + k * 16 + lane / 16 * 8);

    float o[8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const int row = query0 + warp * 16 + g;  // and row + 8
    for (int key0 = 0; key0 <= query0; key0 += kTile) {
        __syncthreads();  // the tile before has been used
        load_tile(keys, head + C, key0, T, 3 * C);
        load_tile(values, head + 2 * C, key0, T, 3 * C);
        __syncthreads();
        float s[8][4] = {};
        multiply_rows(s, q, keys);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows g and g + 8
            float top = largest[half];
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; ++j) {
                    if (key0 + n * 8 + 2 * i + j % 2 > row + half * 8) s[n][j] = -INFINITY;
                    top = fmaxf(top, s[n][j]);
                }
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
            const float correction = ptx::exp2((largest[half] - top) * scale_log2e);
            largest[half] = top;
            total[half] *= correction;
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; ++j) {
                    s[n][j] = ptx::exp2((s[n][j] - top) * scale_log2e);
                    total[half] += s[n][j];
                    o[n][j] *= correction;
                }
        }
        multiply_values(o, s, values);
    }
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
