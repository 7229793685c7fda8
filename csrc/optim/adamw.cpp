#include "optim/adamw.h"

#include <cmath>
#include <utility>

namespace llmc {

void AdamWOptions::validate() const {
    OptimizerOptions::validate();
    LLMC_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "betas are {} and {}, expected in [0, 1)",
               beta1, beta2);
    LLMC_CHECK(eps > 0, "eps is {}, expected positive", eps);
    LLMC_CHECK(weight_decay >= 0 && std::isfinite(weight_decay),
               "weight_decay is {}, expected 0 or more and finite", weight_decay);
}

// Before anything is allocated.
static const AdamWOptions& validated(const AdamWOptions& options) {
    options.validate();
    return options;
}

AdamW::AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const AdamWOptions& options)
    : Optimizer(std::move(backend), std::move(parameters), validated(options), kMoments), options_(options) {}

void AdamW::update(float lr) {
    const double t = static_cast<double>(step_count() + 1);
    AdamWStep s{};
    s.lr = lr;
    s.beta1 = options_.beta1;
    s.beta2 = options_.beta2;
    s.eps = options_.eps;
    s.correction1 = static_cast<float>(1.0 - std::pow(static_cast<double>(options_.beta1), t));
    s.correction2 = static_cast<float>(1.0 - std::pow(static_cast<double>(options_.beta2), t));
    for (std::size_t i = 0; i < parameters().size(); ++i) {
        const Parameter& p = parameters()[i];
        const State& kept = state()[i];
        s.weight_decay = p.decay || options_.decay_all ? options_.weight_decay : 0.0f;
        s.seed = next_seed();
        ops().adamw(p.value, kept.master, kept.moments[0], kept.moments[1], p.grad, clip_factor(), s);
        ops().weights_changed(p.value);
    }
}

}  // namespace llmc
