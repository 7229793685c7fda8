// The online softmax: one pass over the keys, no row of scores
//
// Milakov & Gimelshein 2018 (arXiv:1805.02867): a running maximum, and a sum and an output that belong to it. If a score exceeds
// the maximum, what was added so far is multiplied by exp(old - new). Keys and values are read once and nothing is stored between.
// It is no faster on a CPU, whose L1 held the row anyway; it is the idea on which the blocks of the next version rest.
#include <cmath>

#include "kernel.h"

constexpr int64_t HS = 64;

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS, row = 3 * C;
    const float scale = 1 / std::sqrt(float(HS));
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < NH; ++h)
            for (int64_t i = 0; i < T; ++i) {
                const float *q = qkv + (b * T + i) * row + h * HS, *k = qkv + b * T * row + C + h * HS,
                            *v = k + C;
                float largest = -INFINITY, total = 0, o[HS] = {};
                for (int64_t j = 0; j <= i; ++j) {
                    float s = 0;
                    for (int64_t c = 0; c < HS; ++c) s += q[c] * k[j * row + c];
                    s *= scale;
                    if (s > largest) {  // the first key always comes here: exp(-infinity) is 0
                        const float correction = std::exp(largest - s);
                        largest = s;
                        total *= correction;
                        for (int64_t c = 0; c < HS; ++c) o[c] *= correction;
                    }
                    const float p = std::exp(s - largest);
                    total += p;
                    for (int64_t c = 0; c < HS; ++c) o[c] += p * v[j * row + c];
                }
                for (int64_t c = 0; c < HS; ++c) out[(b * T + i) * C + h * HS + c] = o[c] / total;
                lse[(b * NH + h) * T + i] = largest + std::log(total);
            }
}
