// Vectors spelled out, four partial sums
//
// An addition takes about four cycles, but two can begin in each. So one vector of partial sums keeps the adders an eighth busy; four
// vectors, independent of each other, four times as much. This is what csrc/cpu/simd/rows.h does.
#include "vectors.h"

// The sum of term(i, n) over `count` elements: n is W, but in the last vector.
template <class Term>
static float sum_of(int64_t count, Term term) {
    Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    int64_t i = 0;
    for (; i + 4 * Vec::W <= count; i += 4 * Vec::W) {
        s0 = s0 + term(i, Vec::W);
        s1 = s1 + term(i + Vec::W, Vec::W);
        s2 = s2 + term(i + 2 * Vec::W, Vec::W);
        s3 = s3 + term(i + 3 * Vec::W, Vec::W);
    }
    for_vectors(count - i, [&](int64_t k, int n) { s0 = s0 + term(i + k, n); });
    return sum((s0 + s1) + (s2 + s3));
}

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    for (int64_t r = 0; r < N; ++r) {
        const float* x = inp + r * C;
        float* y = out + r * C;
        const float m = sum_of(C, [=](int64_t i, int n) { return load(x + i, n); }) / static_cast<float>(C);
        const Vec mu = set1(m);
        const float v = sum_of(C, [=](int64_t i, int n) {
            const Vec d = keep_first(load(x + i, n) - mu, n, 0.0f);  // beyond the row, 0 - mean would count
            return d * d;
        });
        const float s = 1.0f / std::sqrt(v / static_cast<float>(C) + 1e-5f);
        const Vec rs = set1(s);
        for_vectors(C, [=](int64_t i, int n) {
            store(y + i, fma((load(x + i, n) - mu) * rs, load(weight + i, n), load(bias + i, n)), n);
        });
        mean[r] = m;
        rstd[r] = s;
    }
}
