// Row by row, the gradient in place of the logits
//
// All three steps run on one row before the next is touched: a row of 50,304 logits is 201 KB and stays in the L2 cache, so
// memory is read once and written once. Nothing needs the logits once their gradient is there, so it takes their place, and
// the probabilities are never stored: (p - 1 at the target) / N comes straight from the exponentials.
//
// The loss is log(total) - (x_target - highest), not -log(p_target): p_target underflows to 0 where the loss exceeds 103,
// and its logarithm is then infinite.
#include <algorithm>

#include "kernel.h"

KERNEL void run(float* losses, float* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    const float dloss = 1.0f / static_cast<float>(N);
    for (int64_t n = 0; n < N; ++n) {
        float* x = logits + n * Vp;
        float highest = x[0];
        for (int64_t v = 1; v < V; ++v) highest = std::max(highest, x[v]);
        const float at_target = x[targets[n]] - highest;
        double total = 0.0;  // in float, 50,257 additions one after the other would lose three digits
        for (int64_t v = 0; v < V; ++v) {
            x[v] = std::exp(x[v] - highest);
            total += x[v];
        }
        losses[n] = static_cast<float>(std::log(total)) - at_target;
        const float factor = dloss / static_cast<float>(total);
        for (int64_t v = 0; v < V; ++v) x[v] *= factor;
        x[targets[n]] -= dloss;
        for (int64_t v = V; v < Vp; ++v) x[v] = 0.0f;
    }
}
