// Another order of the loops: a row of sums at a time
//
// The loop over o moves to the inside. Its sums do not wait for each other, so the compiler computes a vector of them with one
// instruction, and every sum still has its order. For that, neighbours in o have to be neighbours in memory: the weight is
// transposed first, which costs C OC moves for N C OC multiply-adds. Now each multiply-add loads a weight and a sum, and
// stores the sum: the CPU is busy with moving data.
#include <vector>

#include "kernel.h"

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    std::vector<float> transposed(C * OC);
    for (int64_t o = 0; o < OC; ++o)
        for (int64_t c = 0; c < C; ++c) transposed[c * OC + o] = weight[o * C + c];

    for (int64_t n = 0; n < N; ++n) {
        float* const sum = out + n * OC;
        for (int64_t o = 0; o < OC; ++o) sum[o] = bias[o];
        for (int64_t c = 0; c < C; ++c) {
            const float x = inp[n * C + c];
            const float* const w = transposed.data() + c * OC;
            for (int64_t o = 0; o < OC; ++o) sum[o] += x * w[o];
        }
    }
}
