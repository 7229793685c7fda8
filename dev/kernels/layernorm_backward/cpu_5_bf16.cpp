// Half of the bytes: bf16 in memory, f32 in registers
//
// The gradients of the parameters stay in f32: a bf16 sum has 8 bits, and loses what is smaller than 1/256 of it. dinp is a residual
// stream's gradient, to which each layer adds once.
#include <vector>

#include "vectors.h"

static void backward(bf16* dinp, float* dweight, float* dbias, const bf16* dout, const bf16* inp,
                     const bf16* weight, const float* mean, const float* rstd, int64_t rows, int64_t C) {
    for (int64_t r = 0; r < rows; ++r) {
        const bf16 *dy = dout + r * C, *x = inp + r * C;
        bf16* dx = dinp + r * C;
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

KERNEL void run(bf16* dinp, float* dweight, float* dbias, const bf16* dout, const bf16* inp,
                const bf16* weight, const float* mean, const float* rstd, int64_t N, int64_t C) {
    constexpr int64_t block_rows = 128;
    const int64_t blocks = (N + block_rows - 1) / block_rows;
    std::vector<float> sums(static_cast<std::size_t>(blocks * 2 * C));
#pragma omp parallel for
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t r = block * block_rows, rows = N - r < block_rows ? N - r : block_rows;
        float* dw = sums.data() + block * 2 * C;
        backward(dinp + r * C, dw, dw + C, dout + r * C, inp + r * C, weight, mean + r, rstd + r, rows, C);
    }
    for (int64_t block = 0; block < blocks; ++block) {
        const float* dw = sums.data() + block * 2 * C;
        for_vectors(C, [=](int64_t i, int k) {
            store(dweight + i, load(dweight + i, k) + load(dw + i, k), k);
            store(dbias + i, load(dbias + i, k) + load(dw + C + i, k), k);
        });
    }
}
