// Flash attention: tiles in shared memory, 4 x 4 results for each thread
//
// The two kernels of version 2, but a block owns 64 queries, or 64 keys, and takes 64 rows of the others at a time. All products are of
// 64 x 64 tiles; each of 256 threads computes 4 x 4 numbers of a result, 8 loads from shared memory for 16 multiply-adds. p and ds
// pass through shared memory, where the next product reads them as they are (dq) or transposed (dk and dv).
#include "kernel.cuh"

constexpr int HS = 64, kTile = 64, kThreads = 256;
constexpr int kLd = HS + 1;  // floats from row to row: one more, so that a column lies in 32 different banks
constexpr int kSize = kTile * kLd;

__global__ void row_products(float* delta, const float* dout, const float* out, int64_t B, int64_t T,
                             int64_t NH) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= B * NH * T) return;
    const int64_t t = index % T, h = index / T % NH, b = index / (T * NH), at = ((b * T + t) * NH + h) * HS;
    float sum = 0;
    for (int c = 0; c < HS; ++c) sum += dout[at + c] * out[at + c];
    delta[index] = sum;
}

// Copies rows row0.. of a head to a tile, with zeros behind the last position.
__device__ void load_tile(float* tile, const float* head, int row0, int T, int stride) {
    for (int n = threadIdx.x; n < kTile * HS; n += kThreads) {
        const int r = n / HS, c = n % HS;
        tile[r * kLd + c] = row0 + r < T ? head[int64_t(row0 + r) * stride + c] : 0.0f;
    }
}

// The 4 x 4 numbers of thread (x, y), rows 4y.. and columns x, x + 16, .. of a product of two tiles, added to `sum`:
// of a b, of a^T b, or of a b^T.
enum Form { kPlain, kLeftTransposed, kRightTransposed };
template <Form form>
__device__ void multiply(float (&sum)[4][4], const float* a, const float* b) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll 4
    for (int n = 0; n < 64; ++n) {
        float u[4], w[4];
        for (int i = 0; i < 4; ++i)
            u[i] = form == kLeftTransposed ? a[n * kLd + 4 * y + i] : a[(4 * y + i) * kLd + n];
        for (int j = 0; j < 4; ++j)
            w[j] = form == kRightTransposed ? b[(x + 16 * j) * kLd + n] : b[n * kLd + x + 16 * j];
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) sum[i][j] += u[i] * w[j];
    }
}

__device__ void store_tile(float* head, int row0, int T, int stride, const float (&x)[4][4], float factor) {
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int t = row0 + threadIdx.x / 16 * 4 + i;
            if (t < T) head[int64_t(t) * stride + threadIdx.x % 16 + 16 * j] = x[i][j] * factor;
        }
}

template <bool owns_queries>
__global__ void __launch_bounds__(kThreads, 2)
    backward(float* dqkv, const float* dout, const float* qkv, const float* lse, const float* delta, int T,
             int NH, float scale) {
    extern __shared__ float shared[];
    float *const q = shared, *const d = q + kSize, *const k = d + kSize, *const v = k + kSize;
    float *const ds = v + kSize, *const p = ds + kSize;  // p for keys only
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const int h = blockIdx.x % NH, b = blockIdx.x / NH, C = NH * HS;
    const int tile = owns_queries ? gridDim.y - 1 - blockIdx.y : blockIdx.y;  // the longest first
    const int64_t at = int64_t(b) * T * 3 * C + h * HS;
    const float* const douts = dout + int64_t(b) * T * C + h * HS;
    lse += int64_t(blockIdx.x) * T;
    delta += int64_t(blockIdx.x) * T;

    float dq[4][4] = {}, dk[4][4] = {}, dv[4][4] = {};
    const int begin = owns_queries ? 0 : tile * kTile, end = owns_queries ? tile * kTile + 1 : T;
    for (int other = begin; other < end; other += kTile) {
        const int query0 = owns_queries ? tile * kTile : other, key0 = owns_queries ? other : tile * kTile;
        __syncthreads();  // the tiles before have been used
        if (!owns_queries || other == begin) {
            load_tile(q, qkv + at, query0, T, 3 * C);
            load_tile(d, douts, query0, T, C);
        }
        if (owns_queries || other == begin) {
            load_tile(k, qkv + at + C, key0, T, 3 * C);
            load_tile(v, qkv + at + 2 * C, key0, T, 3 * C);
        }
        __syncthreads();
        float s[4][4] = {}, dp[4][4] = {};
        multiply<kRightTransposed>(s, q, k);
        multiply<kRightTransposed>(dp, d, v);
        for (int i = 0; i < 4; ++i) {
            const int t = query0 + 4 * y + i;
            const float sum = t < T ? lse[t] : INFINITY, mean = t < T ? delta[t] : 0.0f;
            for (int j = 0; j < 4; ++j) {
                const float e = key0 + x + 16 * j <= t ? expf(s[i][j] * scale - sum) : 0.0f;
                ds[(4 * y + i) * kLd + x + 16 * j] = e * (dp[i][j] - mean);
                if (!owns_queries) p[(4 * y + i) * kLd + x + 16 * j] = e;
            }
        }
        __syncthreads();
        if (owns_queries) {
            multiply<kPlain>(dq, ds, k);
        } else {
            multiply<kLeftTransposed>(dv, p, d);
            multiply<kLeftTransposed>(dk, ds, q);
        }
    }
    float* const to = dqkv + at;
    if (owns_queries) {
        store_tile(to, tile * kTile, T, 3 * C, dq, scale);
    } else {
        store_tile(to + C, tile * kTile, T, 3 * C, dk, scale);
        store_tile(to + 2 * C, tile * kTile, T, 3 * C, dv, 1.0f);
    }
}

KERNEL void run(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                int64_t B, int64_t T, int64_t NH) {
    constexpr int bytes = kSize * sizeof(float);
    float* delta = scratch<float>(B * NH * T);
    const dim3 grid(B * NH, ceil_div(T, kTile));
    allow_shared(backward<true>, 5 * bytes);
    allow_shared(backward<false>, 6 * bytes);
    row_products<<<ceil_div(B * NH * T, 128), 128>>>(delta, dout, out, B, T, NH);
    backward<true><<<grid, kThreads, 5 * bytes>>>(dqkv, dout, qkv, lse, delta, T, NH, 0.125f);
    backward<false><<<grid, kThreads, 6 * bytes>>>(dqkv, dout, qkv, lse, delta, T, NH, 0.125f);
}
