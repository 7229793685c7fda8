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

AdamW::AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const AdamWOptions& options,
             Sharding sharding)
    : AdamW(
          std::move(backend), std::move(parameters), options,
          [](const Parameter&) { return Treatment{kMoments}; }, std::move(sharding)) {}

AdamW::AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const AdamWOptions& options,
             Treatment (*treatment)(const Parameter&), Sharding sharding)
    : Optimizer(std::move(backend), std::move(parameters), validated(options), treatment,
                std::move(sharding)),
      options_(options) {}

void AdamW::begin_update(float lr) {
    const double t = static_cast<double>(step_count() + 1);
    step_.lr = lr;
    step_.beta1 = options_.beta1;
    step_.beta2 = options_.beta2;
    step_.eps = options_.eps;
    step_.correction1 = static_cast<float>(1.0 - std::pow(static_cast<double>(options_.beta1), t));
    step_.correction2 = static_cast<float>(1.0 - std::pow(static_cast<double>(options_.beta2), t));
    seeds_.resize(parameters().size());
    for (std::uint32_t& seed : seeds_) seed = next_seed();
}

void AdamW::update_parts(std::span<const Part> parts) {
    std::vector<AdamWOperands> operands;
    for (const Part& part : parts) {
        const bool decays = parameters()[part.parameter].decay || options_.decay_all;
        operands.push_back({part.value, part.master, part.moments[0], part.moments[1], part.grad,
                            decays ? options_.weight_decay : 0.0f, seeds_[part.parameter], part.first});
    }
    ops().adamw_many(operands, clip_factor(), step_);
}

}  // namespace llmc
