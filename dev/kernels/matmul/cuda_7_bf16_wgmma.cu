// Hopper's warpgroup matmul, wgmma
// needs: sm_90a
//
// Four warps give tensor cores a product of 64 x 64 by 64 x 16 in one instruction, which reads both operands from shared memory by
// itself: no ldmatrix, no registers for operands, and the warps go on while it runs. Rows of a tile in shared memory are 64
// elements, 128 bytes, and its eight 16-byte parts change places from row to row, so that reading a column of parts meets all banks
// (csrc/cuda/ptx_sm90.cuh). Two blocks share a multiprocessor: while one of them waits at its barrier, the other's products run.
#include "kernel.cuh"

#include "cuda/ptx_sm90.cuh"

namespace ptx = llmc::ptx;

constexpr int kTile = 128, kDepth = 64, kThreads = 256, kStages = 3;
constexpr int kStage = 2 * kTile * kDepth;  // elements of inp and of weight
constexpr int kBytes = kStages * kStage * 2, kOutStride = kTile + 8;

// Begins to copy columns c0 .. c0 + 63 of 128 rows, with zeros for what does not exist.
__device__ __forceinline__ void fetch(bf16* tile, const bf16* matrix, int64_t row0, int64_t rows, int64_t c0,
                                      int64_t C) {
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {  // 1024 times 16 bytes
        const int t = threadIdx.x, row = (turn * kThreads + t) / 8, part = t % 8;
        const int64_t c = c0 + part * 8;
        const bool exists = row0 + row < rows && c < C;
        const bf16* const from = exists ? matrix + (row0 + row) * C + c : matrix;
        bf16* const to = tile + row * kDepth + (part ^ row % 8) * 8;
        if (C % 8 == 0)
            ptx::cp_async16(to, from, exists);
        else  // not aligned
            for (int i = 0; i < 8; ++i) to[i] = exists && c + i < C ? from[i] : bf16{0};
    }
}

__global__ void __launch_bounds__(kThreads, 2) matmul(bf16* out, const bf16* inp, const bf16* weight,
                                                      const bf16* bias, int64_t N, int64_t C, int64_t OC) {
    extern __shared__ __align__(1024) bf16x8 shared[];
    bf16* const stages = &shared[0].v[0];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile,
                  o0 = static_cast<int64_t>(blockIdx.x) * kTile;
    const int steps = static_cast<int>(ceil_div(C, kDepth));
    const auto fetch_step = [&](int step) {
        if (step < steps) {
            bf16* const stage = stages + step % kStages * kStage;
            fetch(stage, inp, n0, N, static_cast<int64_t>(step) * kDepth, C);
            fetch(stage + kTile * kDepth, weight, o0, OC, static_cast<int64_t>(step) * kDepth, C);
        }
        ptx::cp_async_commit();  // empty at the end, so that the count of groups is right there too
    };
    float sum[2][8][4] =
        {};  // [64 columns][8 columns][what a lane has]: 64 rows and 128 columns of a warpgroup
    for (int step = 0; step < kStages - 1; ++step) fetch_step(step);
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        ptx::fence_async_proxy();  // wgmma sees what this thread has fetched,
        __syncthreads();           // and what the others have; and nobody multiplies the step before any more
        const bf16* const stage = stages + step % kStages * kStage;
        const uint32_t a = ptx::tile_descriptor(stage + warp / 4 * 64 * kDepth);
        const uint32_t b = ptx::tile_descriptor(stage + kTile * kDepth);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                ptx::wgmma(sum[half], ptx::further(a, 32 * k), ptx::further(b, half * 64 * 128 + 32 * k),
                           true);
        ptx::wgmma_commit();
        fetch_step(step + kStages - 1);  // to the buffer of the step before
        ptx::wgmma_wait<0>();
        ptx::hold(sum[0]);
        ptx::hold(sum[1]);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();

    bf16* const mine = stages + warp * 16 * kOutStride;  // 16 rows of a warp
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const int column = j * 8 + lane % 4 * 2;
        const int64_t o = o0 + column;
        const float shift[2] = {o < OC ? to_float(bias[o]) : 0.0f, o + 1 < OC ? to_float(bias[o + 1]) : 0.0f};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* const s = sum[j / 8][j % 8] + half * 2;
            *reinterpret_cast<uint32_t*>(mine + (half * 8 + lane / 4) * kOutStride + column) =
                ptx::bf16x2_bits(s[0] + shift[0], s[1] + shift[1]);
        }
    }
    __syncwarp();
    for (int row = lane / 16; row < 16; row += 2) {  // 16 lanes write 256 bytes of a row
        const int64_t n = n0 + warp * 16 + row, o = o0 + lane % 16 * 8;
        const bf16* const from = mine + row * kOutStride + lane % 16 * 8;
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
