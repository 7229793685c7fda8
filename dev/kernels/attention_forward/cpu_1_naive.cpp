// The formula: a matrix of T x T scores
//
// For each head: all scores q k^T, those of later positions set to -infinity, a softmax of each row, and the product with the
// values. Half of the scores are computed to be thrown away, and the matrix, 4 MB for T = 1024, does not fit into the caches
// near the core. It is the reference for reading; everything after it computes the same.
#include <cmath>
#include <vector>

#include "kernel.h"

constexpr int64_t HS = 64;  // channels of a head, in every GPT-2

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS,
                  row = 3 * C;  // of qkv: the queries of all heads, then the keys, then the values
    const float scale = 1 / std::sqrt(float(HS));
    std::vector<float> p(T * T);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < NH; ++h) {
            const float *q = qkv + b * T * row + h * HS, *k = q + C, *v = k + C;
            for (int64_t i = 0; i < T; ++i)
                for (int64_t j = 0; j < T; ++j) {
                    float s = 0;
                    for (int64_t c = 0; c < HS; ++c) s += q[i * row + c] * k[j * row + c];
                    p[i * T + j] = j <= i ? s * scale : -INFINITY;
                }
            for (int64_t i = 0; i < T; ++i) {
                float largest = -INFINITY, total = 0;
                for (int64_t j = 0; j < T; ++j) largest = std::fmax(largest, p[i * T + j]);
                for (int64_t j = 0; j < T; ++j) total += p[i * T + j] = std::exp(p[i * T + j] - largest);
                for (int64_t j = 0; j < T; ++j) p[i * T + j] /= total;
                lse[(b * NH + h) * T + i] = largest + std::log(total);
            }
            for (int64_t i = 0; i < T; ++i)
                for (int64_t c = 0; c < HS; ++c) {
                    float o = 0;
                    for (int64_t j = 0; j < T; ++j) o += p[i * T + j] * v[j * row + c];
                    out[(b * T + i) * C + h * HS + c] = o;
                }
        }
}
