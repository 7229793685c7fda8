// The formula, with tanhf of the C library
//
// A call for each number, because the compiler has no tanh for vectors. A call takes tens of nanoseconds; a number comes from memory in
// one or two.
#include "kernel.h"

KERNEL void run(float* out, const float* inp, int64_t N) {
    for (int64_t i = 0; i < N; ++i) {
        const float x = inp[i], u = 0.7978845608f * (x + 0.044715f * x * x * x);
        out[i] = 0.5f * x * (1.0f + std::tanh(u));
    }
}
