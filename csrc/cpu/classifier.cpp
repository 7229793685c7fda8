// Softmax and cross-entropy over rows of logits, and their gradient in place. Fused, both run in one visit to
// a row.
#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

void CpuBackend::classifier(const char* op, Tensor losses, Tensor logits, Tensor targets, float dloss,
                            std::int64_t V, bool gradient) {
    const ClassifierDims d = classifier_dims(op, logits, targets, V);
    if (losses) check::f32_values(op, "losses", losses, d.N);
    for (std::int64_t i = 0; i < d.N; ++i)
        LLMC_CHECK(targets.as<std::int32_t>()[i] < V,
                   "{}: target {} at {} is outside of the vocabulary of {}", op,
                   targets.as<std::int32_t>()[i], i, V);
    visit_float(logits.dtype, [&](auto tag) {
        using T = decltype(tag);
        for_ranges(d.N, 4, [&](std::int64_t r, std::int64_t rows) {
            T* const x = logits.as<T>() + r * d.Vp;
            kernels<T>().classifier(losses ? losses.as<float>() + r : nullptr, x, gradient ? x : nullptr,
                                    targets.as<std::int32_t>() + r, dloss, rows, V, d.Vp);
        });
    });
}

void CpuBackend::crossentropy_forward(Tensor losses, Tensor logits, Tensor targets, std::int64_t V) {
    constexpr const char* op = "crossentropy_forward";
    check::present(op, "losses", losses);
    classifier(op, losses, logits, targets, 0.0f, V, false);
}

void CpuBackend::crossentropy_softmax_backward(Tensor logits, Tensor targets, float dloss, std::int64_t V) {
    classifier("crossentropy_softmax_backward", Tensor(), logits, targets, dloss, V, true);
}

void CpuBackend::fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V) {
    constexpr const char* op = "fused_classifier";
    check::present(op, "losses", losses);
    classifier(op, losses, logits, targets, dloss, V, true);
}

}  // namespace llmc
