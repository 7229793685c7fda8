// Row by row, and only the keys that a query may see
//
// The output of a query needs its own row of scores and no other, so a row of T floats is all the memory that there has to be,
// and it stays in L1. The row ends at the diagonal: half of the arithmetic is gone. The loops of the last product are exchanged:
// inside runs the channel, in whose direction values and output lie side by side, so the compiler makes vectors of it. Of the
// scores it makes none: their sum over channels would be in another order, which C++ forbids.
#include <cmath>
#include <vector>

#include "kernel.h"

constexpr int64_t HS = 64;

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS, row = 3 * C;
    const float scale = 1 / std::sqrt(float(HS));
    std::vector<float> p(T);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < NH; ++h)
            for (int64_t i = 0; i < T; ++i) {
                const float *q = qkv + (b * T + i) * row + h * HS, *k = qkv + b * T * row + C + h * HS,
                            *v = k + C;
                float largest = -INFINITY, total = 0;
                for (int64_t j = 0; j <= i; ++j) {
                    float s = 0;
                    for (int64_t c = 0; c < HS; ++c) s += q[c] * k[j * row + c];
                    p[j] = s * scale;
                    largest = std::fmax(largest, p[j]);
                }
                for (int64_t j = 0; j <= i; ++j) total += p[j] = std::exp(p[j] - largest);
                float o[HS] = {};
                for (int64_t j = 0; j <= i; ++j)
                    for (int64_t c = 0; c < HS; ++c) o[c] += p[j] * v[j * row + c];
                for (int64_t c = 0; c < HS; ++c) out[(b * T + i) * C + h * HS + c] = o[c] / total;
                lse[(b * NH + h) * T + i] = largest + std::log(total);
            }
}
