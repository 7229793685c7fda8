// Vectors in registers, and a thread for each head
//
// Version 3 with the products and the exponential of attention_forward's version 5: a tile of the result stays in registers
// while the sum goes on, and exp, mask and dS are computed for a whole vector of keys. All sums
// are within a head, so each head is a task for a thread, and the result has the same bits for any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

constexpr int64_t HS = 64, BLOCK = 64, W = Vec::W;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int MR = 8;  // with 32 registers: 16 for the tile
#else
constexpr int MR = 4;  // with 16
#endif

// out (64 x 64) += a (64 x 64) b (64 x 64), where a[i * row + k * step] is element (i, k) of a.
static void multiply(float* out, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb) {
    for (int64_t j = 0; j < 64; j += 2 * W)
        for (int64_t i = 0; i < 64; i += MR) {
            Vec tile[MR][2];
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
                for (int n = 0; n < 2; ++n) tile[r][n] = load(out + (i + r) * 64 + j + n * W);
            for (int64_t k = 0; k < 64; ++k) {
                const Vec b0 = load(b + k * ldb + j), b1 = load(b + k * ldb + j + W);
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r) {
                    const Vec x = set1(a[(i + r) * row + k * step]);
                    tile[r][0] = fma(x, b0, tile[r][0]);
                    tile[r][1] = fma(x, b1, tile[r][1]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
                for (int n = 0; n < 2; ++n) store(out + (i + r) * 64 + j + n * W, tile[r][n]);
        }
}

// As in attention_forward/cpu_5_vectors.cpp.
static Vec exp(Vec x) {
    x = max(x, set1(-87.0f));
    const Vec n = round(x * set1(1.44269504f));
    const Vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
    Vec p = set1(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = fma(p, r, set1(c));
    return scale2(p, n);
}

static void one_head(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                     int64_t T, int64_t C) {
    const int64_t row = 3 * C, padded = (T + BLOCK - 1) / BLOCK * BLOCK;
    const float scale = 1 / std::sqrt(float(HS));
    // With zeros behind the last position. The probabilities there may be anything: what they are multiplied by is 0.
    std::vector<float> q(padded * HS), k(padded * HS), d(padded * HS), kt(HS * padded), vt(HS * padded);
    std::vector<float> dq(padded * HS), delta(padded), sums(padded);
    for (int64_t t = 0; t < T; ++t) {
        for (int64_t c = 0; c < HS; ++c) {
            const float* x = qkv + t * row + c;
            q[t * HS + c] = x[0];
            k[t * HS + c] = kt[c * padded + t] = x[C];
            vt[c * padded + t] = x[2 * C];
            d[t * HS + c] = dout[t * C + c];
            delta[t] += dout[t * C + c] * out[t * C + c];
        }
        sums[t] = lse[t];
    }
    for (int64_t j0 = 0; j0 < T; j0 += BLOCK) {
        float dk[BLOCK * HS] = {}, dv[BLOCK * HS] = {};
        for (int64_t i0 = j0; i0 < T; i0 += BLOCK) {
            float p[BLOCK * BLOCK] = {}, ds[BLOCK * BLOCK] = {};
            multiply(p, &q[i0 * HS], HS, 1, &kt[j0], padded);
            multiply(ds, &d[i0 * HS], HS, 1, &vt[j0], padded);
            for (int64_t i = 0; i < BLOCK; ++i)
                for (int64_t j = 0; j < BLOCK; j += W) {
                    float *x = p + i * BLOCK + j, *y = ds + i * BLOCK + j;
                    Vec e = exp(fma(load(x), set1(scale), set1(-sums[i0 + i])));
                    if (i0 == j0)
                        e = keep_first(e, static_cast<int>(std::clamp(i + 1 - j, int64_t{0}, W)), 0.0f);
                    store(x, e);
                    store(y, e * (load(y) - set1(delta[i0 + i])) * set1(scale));
                }
            multiply(dv, p, 1, BLOCK, &d[i0 * HS], HS);
            multiply(dk, ds, 1, BLOCK, &q[i0 * HS], HS);
            multiply(&dq[i0 * HS], ds, BLOCK, 1, &k[j0 * HS], HS);
        }
        for (int64_t t = j0; t < std::min(j0 + BLOCK, T); ++t)
            for (int64_t c = 0; c < HS; ++c) {
                dqkv[t * row + C + c] = dk[(t - j0) * HS + c];
                dqkv[t * row + 2 * C + c] = dv[(t - j0) * HS + c];
            }
    }
    for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < HS; ++c) dqkv[t * row + c] = dq[t * HS + c];
}

KERNEL void run(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < B * NH; ++task) {
        const int64_t b = task / NH, h = task % NH, at = b * T * C + h * HS, at3 = b * T * 3 * C + h * HS;
        one_head(dqkv + at3, dout + at, qkv + at3, out + at, lse + task * T, T, C);
    }
}
