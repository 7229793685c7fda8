// Two loops over each row
//
// The formula as it stands: the first loop makes the two averages of the row, the second all gradients. The sums of the first cannot be
// reordered, so they are made number by number.
#include "kernel.h"

KERNEL void run(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                const float* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    for (int64_t r = 0; r < N; ++r) {
        const float *dy = dout + r * C, *x = inp + r * C;
        float* dx = dinp + r * C;
        const float m = mean[r], s = rstd[r];
        float avg_g = 0.0f, avg_gn = 0.0f;
        for (int64_t c = 0; c < C; ++c) {
            const float n = (x[c] - m) * s, g = dy[c] * weight[c];
            avg_g += g;
            avg_gn += g * n;
        }
        avg_g /= static_cast<float>(C);
        avg_gn /= static_cast<float>(C);
        for (int64_t c = 0; c < C; ++c) {
            const float n = (x[c] - m) * s, g = dy[c] * weight[c];
            dweight[c] += dy[c] * n;
            dbias[c] += dy[c];
            dx[c] += s * (g - avg_g - n * avg_gn);
        }
    }
}
