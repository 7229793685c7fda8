#include "optim/optimizer.h"

#include <cmath>
#include <utility>

namespace llmc {

static bool has_master(DType dtype, bool master_weights) { return dtype == DType::bf16 && master_weights; }

void OptimizerOptions::validate() const {
    LLMC_CHECK(!std::isnan(grad_clip), "grad_clip is {}", grad_clip);
    LLMC_CHECK(seed != 0, "seed is 0, which xorshift cannot leave");
}

Optimizer::Optimizer(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters,
                     const OptimizerOptions& options, int moments)
    : backend_(std::move(backend)), parameters_(std::move(parameters)), norm_(backend_, options.grad_clip),
      rng_{options.seed}, arena_("the optimizer's moments and master weights", 256) {
    state_.resize(parameters_.size());
    for (std::size_t i = 0; i < state_.size(); ++i) {
        const Tensor& p = parameters_[i].value;
        State& s = state_[i];
        s.name = parameters_[i].name;
        s.moments.resize(static_cast<std::size_t>(moments));
        for (Tensor& moment : s.moments) arena_.add(moment, "moment", DType::f32, {p.numel()});
        if (has_master(p.dtype, options.master_weights))
            arena_.add(s.master, "master", DType::i16, {p.numel()});
    }
    arena_.allocate(backend_);
    // A master of zero bits is the weight that the bf16 parameter stands for: nothing to initialise.
}

std::int64_t Optimizer::bytes_per_parameter(DType dtype, bool master_weights, int moments) {
    return moments * size_of(DType::f32) + (has_master(dtype, master_weights) ? size_of(DType::i16) : 0);
}

void Optimizer::measure() {
    norm_.sum_squares(parameters_);
    norm_.finish();
    measured_ = true;
}

void Optimizer::apply(float lr) {
    LLMC_CHECK(measured_, "apply() without a measure() before it");
    measured_ = false;
    update(lr);
    ++step_count_;
}

void Optimizer::step(float lr) {
    measure();
    apply(lr);
}

void Optimizer::set_step_count(std::int64_t count) {
    LLMC_CHECK(count >= 0 && count < std::int64_t{1} << 53, "step_count is {}, expected 0 to 2^53 - 1",
               count);
    step_count_ = count;
}

void Optimizer::set_rng_state(std::uint64_t state) {
    LLMC_CHECK(state != 0, "rng_state is 0, which xorshift cannot leave");
    rng_.state = state;
}

}  // namespace llmc
