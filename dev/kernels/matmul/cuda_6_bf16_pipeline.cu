// A pipeline of four buffers, and larger warp tiles
//
// Tensor cores are so fast that they wait for memory. cp.async copies from global to shared memory past the registers, while the
// thread goes on: three steps are on their way while a fourth is computed, and one barrier a step is enough. 4 warps share the 128 x 128
// elements of a block, so that a warp has 64 x 64: 32 products from 8 ldmatrix, where there were 16 from 6. Results go by way of shared
// memory, so that rows of 128 bytes are written at once.
#include "kernel.cuh"

namespace ptx = llmc::ptx;

constexpr int kTile = 128, kDepth = 32, kThreads = 128, kStride = kDepth + 8, kStages = 4;
constexpr int kStage = 2 * kTile * kStride;  // elements of inp and of weight
constexpr int kWarpTile = 64, kOutStride = kWarpTile + 8;
constexpr int kBytes = kStages * kStage * 2;

// Begins to copy columns c .. c + 31 of 128 rows, with zeros for what does not exist.
__device__ __forceinline__ void fetch(bf16* tile, const bf16* matrix, int64_t row0, int64_t rows, int64_t c0,
                                      int64_t C) {
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {  // 512 times 16 bytes
        const int t = threadIdx.x, row = (turn * kThreads + t) / 4, k = t % 4 * 8;
        const int64_t c = c0 + k;
        const bool exists = row0 + row < rows && c < C;
        const bf16* const from = exists ? matrix + (row0 + row) * C + c : matrix;
        bf16* const to = tile + row * kStride + k;
        if (C % 8 == 0)
            ptx::cp_async16(to, from, exists);
        else  // not aligned
            for (int i = 0; i < 8; ++i) to[i] = exists && c + i < C ? from[i] : bf16{0};
    }
}

__global__ void __launch_bounds__(kThreads, 2) matmul(bf16* out, const bf16* inp, const bf16* weight,
                                                      const bf16* bias, int64_t N, int64_t C, int64_t OC) {
    extern __shared__ bf16x8 shared[];
    bf16* const stages = &shared[0].v[0];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile,
                  o0 = static_cast<int64_t>(blockIdx.x) * kTile;
    const int warp_n = warp / 2 * kWarpTile, warp_o = warp % 2 * kWarpTile;
    const int left = (warp_n + lane % 16) * kStride + lane / 16 * 8;
    const int right = (kTile + warp_o + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
    const int steps = static_cast<int>(ceil_div(C, kDepth));
    const auto fetch_step = [&](int step) {
        if (step < steps) {
            bf16* const stage = stages + step % kStages * kStage;
            fetch(stage, inp, n0, N, static_cast<int64_t>(step) * kDepth, C);
            fetch(stage + kTile * kStride, weight, o0, OC, static_cast<int64_t>(step) * kDepth, C);
        }
        ptx::cp_async_commit();  // empty at the end, so that the count of groups is right there too
    };
    float sum[4][8][4] = {};
    for (int step = 0; step < kStages - 1; ++step) fetch_step(step);
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // all threads' parts of this step are there, and nobody reads the step before any more:
        fetch_step(step + kStages - 1);  // its buffer is filled again
        const bf16* const stage = stages + step % kStages * kStage;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t x[4][4], w[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4(x[i], stage + left + i * 16 * kStride + k);
#pragma unroll
            for (int j = 0; j < 4; ++j) ptx::ldmatrix_x4(w[j], stage + right + j * 16 * kStride + k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    ptx::mma_bf16(sum[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();

    bf16* const mine = stages + warp * kWarpTile * kOutStride;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int column = j * 8 + lane % 4 * 2;
        const int64_t o = o0 + warp_o + column;
        const float shift[2] = {o < OC ? to_float(bias[o]) : 0.0f, o + 1 < OC ? to_float(bias[o + 1]) : 0.0f};
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = i * 16 + half * 8 + lane / 4;
                *reinterpret_cast<uint32_t*>(mine + row * kOutStride + column) =
                    ptx::bf16x2_bits(sum[i][j][half * 2] + shift[0], sum[i][j][half * 2 + 1] + shift[1]);
            }
    }
    __syncwarp();
    for (int row = lane / 8; row < kWarpTile; row += 4) {  // 8 lanes write 128 bytes of a row
        const int64_t n = n0 + warp_n + row, o = o0 + warp_o + lane % 8 * 8;
        const bf16* const from = mine + row * kOutStride + lane % 8 * 8;
        if (n >= N) continue;
        if (OC % 8 == 0 && o < OC)
            *reinterpret_cast<bf16x8*>(out + n * OC + o) = *reinterpret_cast<const bf16x8*>(from);
        else
            for (int i = 0; i < 8; ++i)
                if (o + i < OC) out[n * OC + o + i] = from[i];
    }
}

KERNEL void run(bf16* out, const bf16* inp, const bf16* weight, const bf16* bias, int64_t N, int64_t C,
                int64_t OC) {
    allow_shared(matmul, kBytes);
    matmul<<<dim3(ceil_div(OC, kTile), ceil_div(N, kTile)), kThreads, kBytes>>>(out, inp, weight, bias, N, C,
                                                                                OC);
}
