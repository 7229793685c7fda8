// Flash attention: blocks of queries against blocks of keys
//
// Dao et al. 2022 (arXiv:2205.14135). 64 queries take 64 keys at a time: a block of scores, 16 KB, is made, turned into
// probabilities and multiplied by the values while it lies in L1, and each key that is loaded serves 64 queries. The online
// softmax joins the blocks. Blocks above the diagonal are skipped. The keys are transposed once for each head, so that in both
// products the inner loop runs over neighbours in memory and no sum changes its order: the compiler makes vectors of all of it
// but maxima and exponentials.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"

constexpr int64_t HS = 64, BLOCK = 64;  // queries, and keys, in a block

// out (BLOCK x 64) += a (BLOCK x 64) b (64 x 64); lda and ldb are the lengths of rows in memory.
static void multiply(float (*out)[64], const float* a, int64_t lda, const float* b, int64_t ldb) {
    for (int64_t i = 0; i < BLOCK; ++i)
        for (int64_t k = 0; k < 64; ++k)
            for (int64_t j = 0; j < 64; ++j) out[i][j] += a[i * lda + k] * b[k * ldb + j];
}

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS, row = 3 * C, padded = (T + BLOCK - 1) / BLOCK * BLOCK;
    const float scale = 1 / std::sqrt(float(HS));
    // q, k transposed, and v of one head, with zeros behind the last position: so all blocks are whole.
    std::vector<float> q(padded * HS), kt(HS * padded), v(padded * HS);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < NH; ++h) {
            for (int64_t t = 0; t < T; ++t)
                for (int64_t c = 0; c < HS; ++c) {
                    const float* x = qkv + (b * T + t) * row + h * HS + c;
                    q[t * HS + c] = x[0] * scale;
                    kt[c * padded + t] = x[C];
                    v[t * HS + c] = x[2 * C];
                }
            for (int64_t i0 = 0; i0 < T; i0 += BLOCK) {
                float largest[BLOCK], total[BLOCK] = {}, o[BLOCK][HS] = {};
                std::fill(largest, largest + BLOCK, -INFINITY);
                for (int64_t j0 = 0; j0 <= i0; j0 += BLOCK) {
                    float p[BLOCK][BLOCK] = {};
                    multiply(p, &q[i0 * HS], HS, &kt[j0], padded);
                    for (int64_t i = 0; i < BLOCK; ++i) {
                        if (j0 == i0) std::fill(p[i] + i + 1, p[i] + BLOCK, -INFINITY);  // on the diagonal
                        float highest = largest[i], added = 0;
                        for (int64_t j = 0; j < BLOCK; ++j) highest = std::max(highest, p[i][j]);
                        const float correction = std::exp(largest[i] - highest);
                        for (int64_t j = 0; j < BLOCK; ++j) added += p[i][j] = std::exp(p[i][j] - highest);
                        for (int64_t c = 0; c < HS; ++c) o[i][c] *= correction;
                        total[i] = total[i] * correction + added;
                        largest[i] = highest;
                    }
                    multiply(o, p[0], BLOCK, &v[j0 * HS], HS);
                }
                for (int64_t i = 0; i < std::min(BLOCK, T - i0); ++i) {
                    for (int64_t c = 0; c < HS; ++c)
                        out[(b * T + i0 + i) * C + h * HS + c] = o[i][c] / total[i];
                    lse[(b * NH + h) * T + i0 + i] = largest[i] + std::log(total[i]);
                }
            }
        }
}
