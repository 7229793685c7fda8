// Leave for the compiler to reorder the sums
//
// As in forward, that is most of it. `restrict` says that the arrays do not overlap: else every store to dweight might change what is
// read next, and the compiler checks for that at run time, if it vectorises at all.
#include "kernel.h"

KERNEL void run(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                const float* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    float* __restrict dw = dweight, * __restrict db = dbias;
    for (int64_t r = 0; r < N; ++r) {
        const float *dy = dout + r * C, *x = inp + r * C;
        float* __restrict dx = dinp + r * C;
        const float m = mean[r], s = rstd[r];
        float avg_g = 0.0f, avg_gn = 0.0f;
#pragma omp simd reduction(+ : avg_g, avg_gn)
        for (int64_t c = 0; c < C; ++c) {
            const float n = (x[c] - m) * s, g = dy[c] * weight[c];
            avg_g += g;
            avg_gn += g * n;
        }
        avg_g /= static_cast<float>(C);
        avg_gn /= static_cast<float>(C);
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
            const float n = (x[c] - m) * s, g = dy[c] * weight[c];
            dw[c] += dy[c] * n;
            db[c] += dy[c];
            dx[c] += s * (g - avg_g - n * avg_gn);
        }
    }
}
