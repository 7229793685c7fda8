// Two passes, and leave for the compiler to reorder the sums
//
// `omp simd reduction` allows what C++ forbids: as many partial sums as a vector has lanes, added up at the end. That is the step that
// counts, because now an addition takes 8 or 16 numbers. It is also more exact: each partial sum has fewer roundings. The bits depend
// on the width of the CPU's vectors.
#include "kernel.h"

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    for (int64_t r = 0; r < N; ++r) {
        const float* x = inp + r * C;
        float* y = out + r * C;
        float m = 0.0f;
#pragma omp simd reduction(+ : m)
        for (int64_t c = 0; c < C; ++c) m += x[c];
        m /= static_cast<float>(C);
        float v = 0.0f;
#pragma omp simd reduction(+ : v)
        for (int64_t c = 0; c < C; ++c) v += (x[c] - m) * (x[c] - m);
        v /= static_cast<float>(C);
        const float s = 1.0f / std::sqrt(v + 1e-5f);
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) y[c] = (x[c] - m) * s * weight[c] + bias[c];
        mean[r] = m;
        rstd[r] = s;
    }
}
