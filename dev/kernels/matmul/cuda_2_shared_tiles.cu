// Tiles in shared memory
//
// A block computes 32 x 32 elements. It loads 32 columns of its rows of inp and of weight into shared memory, whole cache
// lines at a time, and every value that was loaded serves 32 threads: global memory is read 32 times less. Still
// two loads, from shared memory now, for each multiply-add.
#include "kernel.cuh"

constexpr int kTile = 32;

__global__ void matmul(float* out, const float* inp, const float* weight, const float* bias, int64_t N,
                       int64_t C, int64_t OC) {
    // + 1: the threads of a warp read a column of b, from 32 different banks
    __shared__ float a[kTile][kTile];
    __shared__ float b[kTile][kTile + 1];
    const int x = threadIdx.x, y = threadIdx.y;
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile,
                  o0 = static_cast<int64_t>(blockIdx.x) * kTile;
    float sum = 0.0f;
    for (int64_t c = 0; c < C; c += kTile) {
        a[y][x] = n0 + y < N && c + x < C ? inp[(n0 + y) * C + c + x] : 0.0f;
        b[y][x] = o0 + y < OC && c + x < C ? weight[(o0 + y) * C + c + x] : 0.0f;
        __syncthreads();
        for (int k = 0; k < kTile; ++k) sum += a[y][k] * b[x][k];
        __syncthreads();  // before the tiles are overwritten
    }
    if (n0 + y < N && o0 + x < OC) out[(n0 + y) * OC + o0 + x] = sum + bias[o0 + x];
}

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    const dim3 block(kTile, kTile), grid(ceil_div(OC, kTile), ceil_div(N, kTile));
    matmul<<<grid, block>>>(out, inp, weight, bias, N, C, OC);
}
