// Flash attention: blocks of keys against blocks of queries
//
// 64 keys stay, with dk and dv of their block, while the queries from the diagonal on pass by, 64 at a time: five products
// of 64 x 64 blocks instead of five products of single rows. Two of the left operands, P and dS, are needed as they are and
// transposed; k and v are transposed beforehand, so that the inner loop always runs along a row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"

constexpr int64_t HS = 64, BLOCK = 64;

// out (64 x 64) += a (64 x 64) b (64 x 64), where a[i * row + k * step] is element (i, k) of a.
static void multiply(float* out, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb) {
    for (int64_t i = 0; i < 64; ++i)
        for (int64_t k = 0; k < 64; ++k)
            for (int64_t j = 0; j < 64; ++j) out[i * 64 + j] += a[i * row + k * step] * b[k * ldb + j];
}

static void one_head(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                     int64_t T, int64_t C) {
    const int64_t row = 3 * C, padded = (T + BLOCK - 1) / BLOCK * BLOCK;
    const float scale = 1 / std::sqrt(float(HS));
    // With zeros behind the last position, and lse = infinity there, so that the probabilities are 0.
    std::vector<float> q(padded * HS), k(padded * HS), d(padded * HS), kt(HS * padded), vt(HS * padded);
    std::vector<float> dq(padded * HS), delta(padded), sums(padded, INFINITY);
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
                for (int64_t j = 0; j < BLOCK; ++j) {
                    float &x = p[i * BLOCK + j], &y = ds[i * BLOCK + j];
                    x = j0 + j <= i0 + i ? std::exp(x * scale - sums[i0 + i]) : 0;
                    y = x * (y - delta[i0 + i]) * scale;
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
    for (int64_t task = 0; task < B * NH; ++task) {
        const int64_t b = task / NH, h = task % NH, at = b * T * C + h * HS, at3 = b * T * 3 * C + h * HS;
        one_head(dqkv + at3, dout + at, qkv + at3, out + at, lse + task * T, T, C);
    }
}
