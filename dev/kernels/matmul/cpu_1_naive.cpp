// The formula: a dot product for each element
//
// Both rows are read in order, so the caches have little to complain of. The time goes into the sum: each addition waits for
// the one before it, 4 cycles, in which the CPU could do 64 or more. The compiler may not make several sums of one, because
// addition of floats is not associative: that would give other bits.
#include "kernel.h"

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t o = 0; o < OC; ++o) {
            float sum = bias[o];
            for (int64_t c = 0; c < C; ++c) sum += inp[n * C + c] * weight[o * C + c];
            out[n * OC + o] = sum;
        }
    }
}
