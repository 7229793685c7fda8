// Three passes over all rows, probabilities kept
//
// The formulas as they are written in a book, one loop nest each, as in llm.c's train_gpt2.c: softmax makes the
// probabilities, cross-entropy reads one of each row, and the gradient reads all of them again. The probabilities are a
// second array of the size of the logits: three arrays go through memory where one would do.
#include <algorithm>
#include <vector>

#include "kernel.h"

namespace {

void softmax_forward(float* probs, const float* logits, int64_t N, int64_t V, int64_t Vp) {
    for (int64_t n = 0; n < N; ++n) {
        const float* x = logits + n * Vp;
        float* p = probs + n * Vp;
        float highest = x[0];
        for (int64_t v = 1; v < V; ++v) highest = std::max(highest, x[v]);
        double total = 0.0;  // in float, 50,257 additions one after the other would lose three digits
        for (int64_t v = 0; v < V; ++v) {
            p[v] = std::exp(x[v] - highest);  // at most 1: e^x alone is infinite from x = 89 on
            total += p[v];
        }
        for (int64_t v = 0; v < V; ++v) p[v] /= static_cast<float>(total);
    }
}

void crossentropy_forward(float* losses, const float* probs, const int32_t* targets, int64_t N, int64_t Vp) {
    for (int64_t n = 0; n < N; ++n) losses[n] = -std::log(probs[n * Vp + targets[n]]);
}

void crossentropy_softmax_backward(float* dlogits, const float* probs, const int32_t* targets, float dloss,
                                   int64_t N, int64_t V, int64_t Vp) {
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t v = 0; v < V; ++v)
            dlogits[n * Vp + v] = (probs[n * Vp + v] - (v == targets[n] ? 1.0f : 0.0f)) * dloss;
        for (int64_t v = V; v < Vp; ++v) dlogits[n * Vp + v] = 0.0f;
    }
}

}  // namespace

KERNEL void run(float* losses, float* logits, const int32_t* targets, int64_t N, int64_t V, int64_t Vp) {
    static std::vector<float> probs;
    probs.resize(N * Vp);
    softmax_forward(probs.data(), logits, N, V, Vp);
    crossentropy_forward(losses, probs.data(), targets, N, Vp);
    crossentropy_softmax_backward(logits, probs.data(), targets, 1.0f / static_cast<float>(N), N, V, Vp);
}
