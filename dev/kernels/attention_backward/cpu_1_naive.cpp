// The formula: three matrices of T x T
//
// The probabilities P, their gradient dP = dout v^T, and from both the gradient of the scores,
//   dS_ij = P_ij (dP_ij - sum_l P_il dP_il),
// each as a whole matrix. Then dv = P^T dout, dq = dS k and dk = dS^T q, times the scale of the scores. Half of P is zeros and is
// multiplied all the same.
#include <cmath>
#include <vector>

#include "kernel.h"

constexpr int64_t HS = 64;  // channels of a head, in every GPT-2

KERNEL void run(float* dqkv, const float* dout, const float* qkv, const float* out, const float* lse,
                int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS,
                  row = 3 * C;  // of qkv: the queries of all heads, then the keys, then the values
    const float scale = 1 / std::sqrt(float(HS));
    (void)out;  // what the next version takes it for is summed here from p and dp
    std::vector<float> p(T * T), dp(T * T), ds(T * T);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < NH; ++h) {
            const float *q = qkv + b * T * row + h * HS, *k = q + C, *v = k + C;
            const float *d = dout + b * T * C + h * HS, *sums = lse + (b * NH + h) * T;
            float *dq = dqkv + b * T * row + h * HS, *dk = dq + C, *dv = dk + C;
            for (int64_t i = 0; i < T; ++i)
                for (int64_t j = 0; j < T; ++j) {
                    float s = 0, g = 0;
                    for (int64_t c = 0; c < HS; ++c) {
                        s += q[i * row + c] * k[j * row + c];
                        g += d[i * C + c] * v[j * row + c];
                    }
                    p[i * T + j] = j <= i ? std::exp(s * scale - sums[i]) : 0;
                    dp[i * T + j] = g;
                }
            for (int64_t i = 0; i < T; ++i) {
                float mean = 0;
                for (int64_t j = 0; j < T; ++j) mean += p[i * T + j] * dp[i * T + j];
                for (int64_t j = 0; j < T; ++j) ds[i * T + j] = p[i * T + j] * (dp[i * T + j] - mean);
            }
            for (int64_t t = 0; t < T; ++t) {
                float x[HS] = {}, y[HS] = {}, z[HS] = {};
                for (int64_t u = 0; u < T; ++u)
                    for (int64_t c = 0; c < HS; ++c) {
                        x[c] += ds[t * T + u] * k[u * row + c];
                        y[c] += ds[u * T + t] * q[u * row + c];
                        z[c] += p[u * T + t] * d[u * C + c];
                    }
                for (int64_t c = 0; c < HS; ++c) {
                    dq[t * row + c] = x[c] * scale;
                    dk[t * row + c] = y[c] * scale;
                    dv[t * row + c] = z[c];
                }
            }
        }
}
