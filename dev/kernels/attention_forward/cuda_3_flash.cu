// Flash attention: tiles in shared memory, 4 x 4 results for each thread
//
// Dao et al. 2022 (arXiv:2205.14135). A block owns 64 queries of a head and takes 64 keys at a time. Both products are of 64 x 64
// tiles, and each of 256 threads computes 4 x 4 numbers of a result: 8 loads from shared memory for 16 multiply-adds, where version 2
// has a load for each. The probabilities pass through shared memory between the two products. Keys and values of a
// tile are loaded once for 64 queries. Tiles above the diagonal are skipped, and blocks with the most tiles come first, so that the
// short ones fill the gaps at the end.
//
// Thread (x, y) of 16 x 16 computes rows 4y.. and columns x, x + 16, x + 32, x + 48: neighbours read neighbours. The 16 threads of a
// row y are half a warp, among which the row's maximum and sum are found by shuffles.
#include "kernel.cuh"

constexpr int HS = 64, kTile = 64, kThreads = 256;
constexpr int kLd = HS + 1;  // floats from row to row: one more, so that a column lies in 32 different banks

// Copies rows row0.. of a head to a tile, with zeros behind the last position.
__device__ void load_tile(float* tile, const float* head, int row0, int T, int stride, float factor) {
    for (int n = threadIdx.x; n < kTile * HS; n += kThreads) {
        const int r = n / HS, c = n % HS;
        tile[r * kLd + c] = row0 + r < T ? head[int64_t(row0 + r) * stride + c] * factor : 0.0f;
    }
}

__global__ void __launch_bounds__(kThreads, 2)
    attention(float* out, float* lse, const float* qkv, int T, int NH, float scale) {
    extern __shared__ float shared[];
    float *const q = shared, *const k = q + kTile * kLd, *const v = k + kTile * kLd,
                 *const p = v + kTile * kLd;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, C = NH * HS;
    const int query0 = (gridDim.y - 1 - blockIdx.y) * kTile;
    const float* const head = qkv + int64_t(b) * T * 3 * C + h * HS;

    load_tile(q, head, query0, T, 3 * C, scale);
    float o[4][4] = {}, largest[4], total[4] = {};
    for (int i = 0; i < 4; ++i) largest[i] = -INFINITY;
    for (int key0 = 0; key0 <= query0; key0 += kTile) {
        __syncthreads();  // the tile before has been used
        load_tile(k, head + C, key0, T, 3 * C, 1.0f);
        load_tile(v, head + 2 * C, key0, T, 3 * C, 1.0f);
        __syncthreads();
        float s[4][4] = {};
#pragma unroll 8
        for (int c = 0; c < HS; ++c) {
            float a[4], w[4];
            for (int i = 0; i < 4; ++i) a[i] = q[(4 * y + i) * kLd + c];
            for (int j = 0; j < 4; ++j) w[j] = k[(x + 16 * j) * kLd + c];
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) s[i][j] += a[i] * w[j];
        }
        for (int i = 0; i < 4; ++i) {
            float top = largest[i];
            for (int j = 0; j < 4; ++j) {
                if (key0 + x + 16 * j > query0 + 4 * y + i) s[i][j] = -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            for (int lanes = 8; lanes > 0; lanes /= 2)
                top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
            const float correction = expf(largest[i] - top);
            largest[i] = top;
            total[i] *= correction;  // of this thread's columns; they are added up at the end
            for (int j = 0; j < 4; ++j) {
                const float e = expf(s[i][j] - top);
                total[i] += e;
                p[(4 * y + i) * kLd + x + 16 * j] = e;
                o[i][j] *= correction;
            }
        }
        __syncwarp();  // a warp reads the rows of p that it has written, and no others
#pragma unroll 8
        for (int n = 0; n < kTile; ++n) {
            float a[4], w[4];
            for (int i = 0; i < 4; ++i) a[i] = p[(4 * y + i) * kLd + n];
            for (int j = 0; j < 4; ++j) w[j] = v[n * kLd + x + 16 * j];
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) o[i][j] += a[i] * w[j];
        }
    }
    for (int i = 0; i < 4; ++i) {
        float sum = total[i];
        for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
        const int t = query0 + 4 * y + i;
        if (t >= T) continue;
        for (int j = 0; j < 4; ++j) out[(int64_t(b) * T + t) * C + h * HS + x + 16 * j] = o[i][j] / sum;
        if (x == 0) lse[int64_t(blockIdx.x) * T + t] = largest[i] + logf(sum);
    }
}

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    constexpr int bytes = 4 * kTile * kLd * sizeof(float);
    allow_shared(attention, bytes);
    attention<<<dim3(B * NH, ceil_div(T, kTile)), kThreads, bytes>>>(out, lse, qkv, T, NH, 0.125f);
}
