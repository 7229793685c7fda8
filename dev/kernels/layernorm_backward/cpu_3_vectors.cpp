// Vectors spelled out: parameters' gradients in the first loop
//
// dweight and dbias need dout and n, which the first loop has at hand, too: there they hide in the time in which it waits for its sums. The
// second is left with dinp. This is what csrc/cpu/simd/rows.h does.
#include "vectors.h"

KERNEL void run(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                const float* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    for (int64_t r = 0; r < N; ++r) {
        const float *dy = dout + r * C, *x = inp + r * C;
        float* dx = dinp + r * C;
        const Vec m = set1(mean[r]), s = set1(rstd[r]);
        Vec sum_g = zero(), sum_gn = zero();
        for_vectors(C, [&](int64_t i, int k) {
            const Vec d = load(dy + i, k), n = (load(x + i, k) - m) * s, g = d * load(weight + i, k);
            sum_g = sum_g + g;  // beyond the row, d and g are 0
            sum_gn = fma(g, n, sum_gn);
            store(dweight + i, fma(d, n, load(dweight + i, k)), k);
            store(dbias + i, load(dbias + i, k) + d, k);
        });
        const Vec avg_g = set1(sum(sum_g) / static_cast<float>(C));
        const Vec avg_gn = set1(sum(sum_gn) / static_cast<float>(C));
        for_vectors(C, [&](int64_t i, int k) {
            const Vec n = (load(x + i, k) - m) * s, g = load(dy + i, k) * load(weight + i, k);
            store(dx + i, fma(s, g - avg_g - n * avg_gn, load(dx + i, k)), k);
        });
    }
}
