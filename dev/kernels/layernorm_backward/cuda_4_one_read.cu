// Everything is read once: a block walks over rows, a thread keeps its columns' sums in registers
//
// Thread t of a block owns four columns. It reads them of a row, 16 bytes at a time, keeps them in registers while the block makes the two
// averages of the row, writes dinp, and adds to its eight sums, which it stores after the last of its rows. The number of blocks is
// fixed, not taken from the GPU, so that the bits are the same on every one; a second kernel adds the blocks' sums in order.
#include "kernel.cuh"

constexpr int kBlocks = 528;  // four on each of an H100's 132 multiprocessors

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int W>
struct alignas(4 * W) Floats {
    float v[W];
};

// partial (blocks, 2, C)
template <int W>
__global__ void layernorm_backward(float* dinp, float* partial, const float* dout, const float* inp,
                                   const float* weight, const float* mean, const float* rstd, int64_t N,
                                   int64_t C) {
    // Of this row and of the one before, which a slow warp may still read: so one barrier a row is enough.
    __shared__ float sums[2][2][kWarp];
    using Vector = Floats<W>;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int64_t column = static_cast<int64_t>(threadIdx.x) * W;
    const bool live = column < C;
    Vector w = {}, dw = {}, db = {};
    if (live) w = *reinterpret_cast<const Vector*>(weight + column);
    int turn = 0;
    for (int64_t r = blockIdx.x; r < N; r += gridDim.x, turn ^= 1) {
        Vector d = {}, n = {}, dx = {};
        if (live) {
            d = *reinterpret_cast<const Vector*>(dout + r * C + column);
            n = *reinterpret_cast<const Vector*>(inp + r * C + column);
            dx = *reinterpret_cast<const Vector*>(dinp + r * C + column);
        }
        const float m = mean[r], s = rstd[r];
        float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
        for (int k = 0; k < W; ++k) {
            n.v[k] = (n.v[k] - m) * s;
            dw.v[k] += d.v[k] * n.v[k];
            db.v[k] += d.v[k];
            sum_g += d.v[k] * w.v[k];
            sum_gn += d.v[k] * w.v[k] * n.v[k];
        }
        sum_g = warp_sum(sum_g);
        sum_gn = warp_sum(sum_gn);
        if (lane == 0) {
            sums[turn][0][warp] = sum_g;
            sums[turn][1][warp] = sum_gn;
        }
        __syncthreads();
        sum_g = sum_gn = 0.0f;
        for (int i = 0; i < warps; ++i) {
            sum_g += sums[turn][0][i];
            sum_gn += sums[turn][1][i];
        }
        const float avg_g = sum_g / static_cast<float>(C), avg_gn = sum_gn / static_cast<float>(C);
        if (live) {
#pragma unroll
            for (int k = 0; k < W; ++k) dx.v[k] += s * (d.v[k] * w.v[k] - avg_g - n.v[k] * avg_gn);
            *reinterpret_cast<Vector*>(dinp + r * C + column) = dx;
        }
    }
    if (live) {
        *reinterpret_cast<Vector*>(partial + (2 * blockIdx.x + 0) * C + column) = dw;
        *reinterpret_cast<Vector*>(partial + (2 * blockIdx.x + 1) * C + column) = db;
    }
}

// A block for 32 columns: warp y adds every 8th block's sums, then the 8 sums are added.
__global__ void add_blocks(float* dweight, float* dbias, const float* partial, int64_t blocks, int64_t C) {
    __shared__ float weights[8][kWarp];
    __shared__ float biases[8][kWarp];
    const int x = threadIdx.x, y = threadIdx.y;
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + x;
    float dw = 0.0f, db = 0.0f;
    if (c < C)
        for (int64_t block = y; block < blocks; block += 8) {
            dw += partial[(2 * block + 0) * C + c];
            db += partial[(2 * block + 1) * C + c];
        }
    weights[y][x] = dw;
    biases[y][x] = db;
    __syncthreads();
    if (y > 0 || c >= C) return;
    for (int i = 1; i < 8; ++i) {
        dw += weights[i][x];
        db += biases[i][x];
    }
    dweight[c] += dw;
    dbias[c] += db;
}

KERNEL void run(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                const float* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    const int W = C % 4 == 0 ? 4 : 1;
    const int64_t threads = ceil_div(ceil_div(C, W), kWarp) * kWarp, blocks = N < kBlocks ? N : kBlocks;
    if (threads > 1024)
        return note_error("rows of more than 4096 columns, or 1024 if they are no multiple of 4");
    float* const partial = scratch<float>(blocks * 2 * C);
    if (W == 4)
        layernorm_backward<4><<<blocks, threads>>>(dinp, partial, dout, inp, weight, mean, rstd, N, C);
    else
        layernorm_backward<1><<<blocks, threads>>>(dinp, partial, dout, inp, weight, mean, rstd, N, C);
    add_blocks<<<ceil_div(C, kWarp), dim3(kWarp, 8)>>>(dweight, dbias, partial, blocks, C);
}
