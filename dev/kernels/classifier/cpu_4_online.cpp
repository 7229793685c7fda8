// Maximum and sum in one pass (online softmax)
//
// The sum of e^(x - highest) seems to need the maximum first. But what has been summed so far can be made relative to a
// larger maximum when one turns up: total *= e^(old - new) (Milakov and Gimelshein 2018). So one pass gives both. Each lane
// has a maximum and a sum of its own, and they are brought together at the end.
//
// The price is arithmetic: a second exponential to rescale the sum, and a third in the last pass, because the first pass cannot
// leave e^(x - highest) in the row when it does not know highest yet. A CPU that finds the row in its L2 cache computes longer
// than it reads, so this version is slower than the last. A GPU is in the other case: cuda_3_online.cu.
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

KERNEL void run(float* losses, float* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    const float dloss = 1.0f / static_cast<float>(N);
    for (int64_t n = 0; n < N; ++n) {
        float* x = logits + n * Vp;
        Vec highest = set1(kLowest), sums = zero();  // of each lane
        for_vectors(V, [&](int64_t v, int lanes) {
            const Vec a = keep_first(load(x + v, lanes), lanes, kLowest), higher = max(highest, a);
            sums = fma(sums, exponential(highest - higher), keep_first(exponential(a - higher), lanes, 0.0f));
            highest = higher;
        });
        const Vec shift = set1(max(highest));
        const float total = sum(sums * exponential(highest - shift));
        losses[n] = std::log(total) - (x[targets[n]] - max(shift));
        const Vec factor = set1(dloss / total);
        for_vectors(V, [&](int64_t v, int lanes) {
            store(x + v, exponential(load(x + v, lanes) - shift) * factor, lanes);
        });
        x[targets[n]] -= dloss;
        for (int64_t v = V; v < Vp; ++v) x[v] = 0.0f;
    }
}
