// Logits in bf16
//
// Half the bytes, and half the room in the caches. bf16 has 8 bits of precision, so the arithmetic stays in float32, and a row must
// not keep e^(x - highest) between two passes: that would round the gradient twice. The last pass computes the exponentials
// again from the logits, as csrc/cpu/simd/rows.h does for bf16, and rounds once. So does the gradient at the target,
// which is found before its logit is overwritten.
#include <initializer_list>

#include "vectors.h"

namespace {

constexpr float kLowest = -3e38f;

// The polynomial of Cephes' expf. ln 2 is two constants, so that n ln 2 is taken from x without rounding.
Vec exponential(Vec x) {
    x = max(x, set1(-87.0f));  // below, 2^n would not be a normal number; above 0 there is nothing
    const Vec n = round(x * set1(1.44269504f));
    const Vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
    Vec p = set1(1.9875691500e-4f);
    for (const float c :
         {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, set1(c));
    return scale2(fma(p * r, r, r) + set1(1.0f), n);
}

}  // namespace

KERNEL void run(float* losses, bf16* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    const float dloss = 1.0f / static_cast<float>(N);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        bf16* x = logits + n * Vp;
        Vec highest = set1(kLowest);
        for_vectors(V, [&](int64_t v, int lanes) {
            highest = max(highest, keep_first(load(x + v, lanes), lanes, kLowest));
        });
        highest = set1(max(highest));
        const float at_target = to_float(x[targets[n]]) - max(highest);
        Vec sums = zero();
        for_vectors(V, [&](int64_t v, int lanes) {
            sums = sums + keep_first(exponential(load(x + v, lanes) - highest), lanes, 0.0f);
        });
        const float total = sum(sums);
        losses[n] = std::log(total) - at_target;
        const Vec factor = set1(dloss / total);
        for_vectors(V, [&](int64_t v, int lanes) {
            store(x + v, exponential(load(x + v, lanes) - highest) * factor, lanes);
        });
        x[targets[n]] = to_bf16((std::exp(at_target) / total - 1.0f) * dloss);
        for (int64_t v = V; v < Vp; ++v) x[v] = bf16{0};
    }
}
