// Three loops over each row: mean, variance, output
//
// The formula as it stands. The compiler may not reorder the sums, so they are made number by number: each addition waits for the one
// before it, about four cycles, in which the CPU could have added a hundred numbers.
#include "kernel.h"

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    for (int64_t r = 0; r < N; ++r) {
        const float* x = inp + r * C;
        float* y = out + r * C;
        float m = 0.0f;
        for (int64_t c = 0; c < C; ++c) m += x[c];
        m /= static_cast<float>(C);
        float v = 0.0f;
        for (int64_t c = 0; c < C; ++c) {
            const float d = x[c] - m;
            v += d * d;
        }
        v /= static_cast<float>(C);
        const float s = 1.0f / std::sqrt(v + 1e-5f);
        for (int64_t c = 0; c < C; ++c) y[c] = (x[c] - m) * s * weight[c] + bias[c];
        mean[r] = m;
        rstd[r] = s;
    }
}
