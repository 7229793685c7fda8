// Mean and variance in one pass, from sums of x - shift and of its square
//
// variance = avg(x^2) - avg(x)^2 needs one pass and no division, but cancels: with a mean of 1000 and a deviation of 1, avg(x^2) is
// 1000001, and f32 keeps seven digits. The variance does not change if the same number is taken from all x, and a number near the
// mean leaves little to cancel: here the mean of the first few. (One number alone may be an outlier.) Both sums are made side by side,
// so they cost what one of them costs.
#include "kernel.h"

KERNEL void run(float* out, float* mean, float* rstd, const float* inp, const float* weight,
                const float* bias, int64_t N, int64_t C) {
    for (int64_t r = 0; r < N; ++r) {
        const float* x = inp + r * C;
        float* y = out + r * C;
        const int64_t few = C < 16 ? C : 16;
        float shift = 0.0f;
        for (int64_t c = 0; c < few; ++c) shift += x[c] / static_cast<float>(few);
        float sum = 0.0f, squares = 0.0f;
        for (int64_t c = 0; c < C; ++c) {
            const float d = x[c] - shift;
            sum += d;
            squares += d * d;
        }
        const float d = sum / static_cast<float>(C), m = shift + d;
        const float v = squares / static_cast<float>(C) - d * d;
        const float s = 1.0f / std::sqrt((v > 0.0f ? v : 0.0f) + 1e-5f);  // rounding may make it negative
        for (int64_t c = 0; c < C; ++c) y[c] = (x[c] - m) * s * weight[c] + bias[c];
        mean[r] = m;
        rstd[r] = s;
    }
}
