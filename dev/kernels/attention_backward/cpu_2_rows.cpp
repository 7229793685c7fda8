// Pair by pair: nothing is kept but lse
//
// The sum in dS is known before any probability is: sum_l P_il dP_il = dout_i (sum_l P_il v_l) = dout_i out_i, a product of two
// rows that are there. So each pair of query and key can be done by itself: its probability from lse, the gradient of its score,
// and what it adds to dq_i, dk_j and dv_j. There is no matrix and not even a row of one, and pairs above the diagonal are left
// out.
#include <algorithm>
#include <cmath>

#include "kernel.h"

constexpr int64_t HS = 64;

static float dot(const float* a, const float* b) {
    float sum = 0;
    for (int64_t c = 0; c < HS; ++c) sum += a[c] * b[c];
    return sum;
}

static void add(float* to, float factor, const float* x) {
    for (int64_t c = 0; c < HS; ++c) to[c] += factor * x[c];
}

KERNEL void run(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS, row = 3 * C;
    const float scale = 1 / std::sqrt(float(HS));
    std::fill(dqkv, dqkv + B * T * row, 0.0f);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < NH; ++h)
            for (int64_t i = 0; i < T; ++i) {
                const float *q = qkv + (b * T + i) * row + h * HS, *d = dout + (b * T + i) * C + h * HS;
                const float *k = qkv + b * T * row + C + h * HS, *v = k + C;
                float* dq = dqkv + (b * T + i) * row + h * HS;
                float *dk = dqkv + b * T * row + C + h * HS, *dv = dk + C;
                const float delta = dot(d, out + (b * T + i) * C + h * HS), sum = lse[(b * NH + h) * T + i];
                for (int64_t j = 0; j <= i; ++j) {
                    const float p = std::exp(dot(q, k + j * row) * scale - sum);
                    const float ds = p * (dot(d, v + j * row) - delta) * scale;
                    add(dq, ds, k + j * row);
                    add(dk + j * row, ds, q);
                    add(dv + j * row, p, d);
                }
            }
}
