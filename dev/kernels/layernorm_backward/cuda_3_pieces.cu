// Sums over pieces of 256 rows, added up in order by a second stage
//
// The parameters' sums get parallel and stay in order: a block takes 32 columns of 256 rows, eight rows at a time, and stores its sums. The
// pieces' sums are added by another kernel, first piece first. So the same bits come from every run, on every GPU. But dout and inp are
// read twice, once along the rows and once down the columns, and this op is bound by memory.
#include "kernel.cuh"

__device__ float warp_sum(float x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

__global__ void input_gradient(float* dinp, const float* dout, const float* inp, const float* weight,
                               const float* mean, const float* rstd, int64_t N, int64_t C) {
    const int64_t r = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (r >= N) return;
    const float *dy = dout + r * C, *x = inp + r * C;
    float* dx = dinp + r * C;
    const float m = mean[r], s = rstd[r];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int64_t c = lane; c < C; c += kWarp) {
        const float g = dy[c] * weight[c];
        sum_g += g;
        sum_gn += g * (x[c] - m) * s;
    }
    const float avg_g = warp_sum(sum_g) / static_cast<float>(C);
    const float avg_gn = warp_sum(sum_gn) / static_cast<float>(C);
    for (int64_t c = lane; c < C; c += kWarp) {
        const float n = (x[c] - m) * s, g = dy[c] * weight[c];
        dx[c] += s * (g - avg_g - n * avg_gn);
    }
}

constexpr int kRows = 8, kPiece = 256;

// partial (pieces, 2, C): the sums of each piece for dweight and dbias.
__global__ void sum_pieces(float* partial, const float* dout, const float* inp, const float* mean,
                           const float* rstd, int64_t N, int64_t C) {
    __shared__ float weights[kRows][kWarp];
    __shared__ float biases[kRows][kWarp];
    const int x = threadIdx.x, y = threadIdx.y;
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + x,
                  begin = static_cast<int64_t>(blockIdx.y) * kPiece;
    const int64_t end = begin + kPiece < N ? begin + kPiece : N;
    float dw = 0.0f, db = 0.0f;
    if (c < C)
        for (int64_t r = begin + y; r < end; r += kRows) {
            const float d = dout[r * C + c];
            dw += d * (inp[r * C + c] - mean[r]) * rstd[r];
            db += d;
        }
    weights[y][x] = dw;
    biases[y][x] = db;
    __syncthreads();
    if (y > 0 || c >= C) return;
    for (int i = 1; i < kRows; ++i) {
        dw += weights[i][x];
        db += biases[i][x];
    }
    partial[(2 * blockIdx.y + 0) * C + c] = dw;
    partial[(2 * blockIdx.y + 1) * C + c] = db;
}

__global__ void add_pieces(float* dweight, float* dbias, const float* partial, int64_t pieces, int64_t C) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float dw = 0.0f, db = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        dw += partial[(2 * piece + 0) * C + c];
        db += partial[(2 * piece + 1) * C + c];
    }
    dweight[c] += dw;
    dbias[c] += db;
}

KERNEL void run(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                const float* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    constexpr int threads = 256;
    const int64_t pieces = ceil_div(N, kPiece);
    float* const partial = scratch<float>(pieces * 2 * C);
    input_gradient<<<ceil_div(N * kWarp, threads), threads>>>(dinp, dout, inp, weight, mean, rstd, N, C);
    sum_pieces<<<dim3(ceil_div(C, kWarp), pieces), dim3(kWarp, kRows)>>>(partial, dout, inp, mean, rstd, N,
                                                                         C);
    add_pieces<<<ceil_div(C, kWarp), kWarp>>>(dweight, dbias, partial, pieces, C);
}
