// What a backend need not write itself: the fused ops composed of primitives, and a Readback that waits at once.
#include "core/backend.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "core/dims.h"

namespace llmc {

std::unique_ptr<Readback> Backend::make_readback(std::size_t bytes) {
    struct Waiting final : Readback {
        Backend& backend;
        std::vector<char> kept;
        std::size_t size = 0;
        Waiting(Backend& backend, std::size_t bytes) : backend(backend), kept(bytes) {}
        void queue(Tensor inp) override {
            size = static_cast<std::size_t>(inp.bytes());
            LLMC_CHECK(size <= kept.size(), "{} bytes for a Readback of {}", size, kept.size());
            backend.to_host(kept.data(), inp);
        }
        void wait(void* host) override { std::copy_n(kept.data(), size, static_cast<char*>(host)); }
    };
    return std::make_unique<Waiting>(*this, bytes);
}

std::unique_ptr<Stopwatch> Backend::make_stopwatch() {
    struct HostClock final : Stopwatch {
        std::chrono::steady_clock::time_point begin{}, end{};
        void start() override { begin = end = std::chrono::steady_clock::now(); }
        void stop() override { end = std::chrono::steady_clock::now(); }
        double seconds() override { return std::chrono::duration<double>(end - begin).count(); }
    };
    return std::make_unique<HostClock>();
}

void Backend::set_option(const std::string& name, const std::string&) {
    throw ArgumentError(filled("{} has no option '{}'", info().name, name));
}

void Backend::fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd,
                                               Tensor a, Tensor b, Tensor weight, Tensor bias) {
    residual_forward(residual, a, b);
    layernorm_forward(out, mean, rstd, residual, weight, bias);
}

void Backend::matmul_gelu_forward(Tensor out, Tensor pre, Tensor inp, Tensor weight, Tensor bias) {
    matmul_forward(pre, inp, weight, bias);
    gelu_forward(out, pre);
}

void Backend::matmul_gelu_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                   Tensor weight, Tensor pre, bool accumulate) {
    matmul_backward(dinp, dweight, dbias, dout, inp, weight, accumulate);
    if (dinp && pre) gelu_backward(dinp, pre, dinp);
}

void Backend::fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V) {
    crossentropy_forward(losses, logits, targets, V);
    crossentropy_softmax_backward(logits, targets, dloss, V);
}

void Backend::adamw(Tensor param, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor factor,
                    const AdamWStep& step) {
    const AdamWOperands one{param, master, m, v, grad, step.weight_decay, step.seed, step.first};
    adamw_many({&one, 1}, factor, step);
}

void Backend::gradient_norm_squared(Tensor out, std::span<const Tensor> gradients) {
    norm_dims(out, gradients);
    const Tensor unit = out.view({kNormDigits}).slice(kUnitDigit, kUnitDigit + 1);
    for (const Tensor& gradient : gradients) global_norm_squared(unit, gradient);
}

// Of the quintic iteration (Jordan et al. 2024): the slope a at 0 is as steep as it can be, for which singular values end
// somewhere between 0.7 and 1.2, not at 1.
static constexpr float kSchulzA = 3.4445f, kSchulzB = -4.7750f, kSchulzC = 2.0315f;
// A matrix of a smaller norm is not scaled up to norm 1, but by the reciprocal of this.
static constexpr float kLeastNorm = 1e-7f;

// P = a I + b A + c A^2 of the smaller gram matrix A, and X = P X or X P: one pass over X, where the formula as it stands
// takes two. A and P are symmetric, so a transposed product is as good.
void Backend::newton_schulz(Tensor out, Tensor inp, Tensor gram, Tensor polynomial, Tensor norms, int steps) {
    const NewtonSchulzDims d = newton_schulz_dims(out, inp, gram, polynomial, norms, steps);
    const Tensor squared = norms.slice(0, kNormDigits), norm = norms.slice(kNormDigits, kNormDigits + 1),
                 factor = norms.slice(kNormDigits + 1, kNormDigits + 2), none;
    zero(squared);
    gradient_norm_squared(squared, {&inp, 1});
    clip_factor(norm, factor, squared, kLeastNorm);                  // kLeastNorm / max(norm, kLeastNorm)
    Tensor x = steps % 2 ? inp : out, next = steps % 2 ? out : inp;  // the last step writes to out
    scale(x, inp, factor, 1.0f / kLeastNorm);
    const bool wide = d.R <= d.C;
    for (int step = 0; step < steps; ++step, std::swap(x, next)) {
        if (wide)
            matmul_forward(gram, x, x, none);  // X X^T
        else
            matmul_backward(none, gram, none, x, x, gram, false);  // X^T X
        matmul_forward(polynomial, gram, gram, none);
        shifted_sum(polynomial, gram, polynomial, kSchulzA, kSchulzB, kSchulzC);
        if (wide)
            matmul_backward(next, none, none, polynomial, none, x, false);  // P X
        else
            matmul_forward(next, x, polynomial, none);  // X P
    }
}

void Backend::sample(Tensor tokens, Tensor logits, Tensor coins, std::int64_t V,
                     const SamplerOptions& options) {
    const ClassifierDims d = sample_dims(tokens, logits, coins, V);
    check_sampler(V, options);
    std::vector<float> rows(static_cast<std::size_t>(logits.numel())), coin(static_cast<std::size_t>(d.N));
    std::vector<std::int32_t> chosen(coin.size());
    to_host(rows.data(), logits);
    to_host(coin.data(), coins);
    for (std::size_t i = 0; i < chosen.size(); ++i)
        if (coin[i] >= 0.0f)
            chosen[i] =
                token_or_fault(rows.data() + static_cast<std::int64_t>(i) * d.Vp, V, options, coin[i]);
    from_host(tokens, chosen.data());
}

}  // namespace llmc
