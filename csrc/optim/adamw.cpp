#include "optim/adamw.h"

#include <cmath>

namespace llmc {

AdamW::AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, AdamWOptions options)
    : backend_(std::move(backend)), parameters_(std::move(parameters)), options_(options), rng_{options.seed},
      arena_("AdamW's moments and master weights", 256) {
    LLMC_CHECK(options_.beta1 >= 0 && options_.beta1 < 1 && options_.beta2 >= 0 && options_.beta2 < 1,
               "betas are {} and {}, expected in [0, 1)", options_.beta1, options_.beta2);
    LLMC_CHECK(options_.eps > 0, "eps is {}, expected positive", options_.eps);
    LLMC_CHECK(options_.seed != 0, "seed is 0, which xorshift cannot leave");
    const std::size_t count = parameters_.size();
    m_.resize(count);
    v_.resize(count);
    master_.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
        const Tensor& p = parameters_[i].value;
        arena_.add(m_[i], "m", DType::f32, {p.numel()});
        arena_.add(v_[i], "v", DType::f32, {p.numel()});
        if (p.dtype == DType::bf16 && options_.master_weights)
            arena_.add(master_[i], "master", DType::i16, {p.numel()});
    }
    arena_.add(norm_squared_, "norm_squared", DType::f32, {1});
    arena_.add(norm_, "norm", DType::f32, {1});
    arena_.add(factor_, "factor", DType::f32, {1});
    arena_.allocate(backend_);
    // A master of zero bits is the weight that the bf16 parameter stands for: nothing to initialise.
}

void AdamW::measure() {
    backend_->zero(norm_squared_);
    for (const Parameter& p : parameters_) backend_->global_norm_squared(norm_squared_, p.grad);
    backend_->clip_factor(norm_, factor_, norm_squared_, options_.grad_clip);
}

void AdamW::apply(float lr) {
    const double t = static_cast<double>(step_count_ + 1);
    AdamWStep s{};
    s.lr = lr;
    s.beta1 = options_.beta1;
    s.beta2 = options_.beta2;
    s.eps = options_.eps;
    s.correction1 = static_cast<float>(1.0 - std::pow(static_cast<double>(options_.beta1), t));
    s.correction2 = static_cast<float>(1.0 - std::pow(static_cast<double>(options_.beta2), t));
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
        const Parameter& p = parameters_[i];
        s.weight_decay = p.decay || options_.decay_all ? options_.weight_decay : 0.0f;
        s.seed = rng_.randint32();
        backend_->adamw(p.value, master_[i], m_[i], v_[i], p.grad, factor_, s);
        backend_->weights_changed(p.value);
    }
    ++step_count_;
}

void AdamW::step(float lr) {
    measure();
    apply(lr);
}

float AdamW::norm() const {
    float norm;
    backend_->to_host(&norm, norm_);
    return norm;
}

void AdamW::set_step_count(std::int64_t count) {
    LLMC_CHECK(count >= 0, "step_count is {}, expected 0 or more", count);
    step_count_ = count;
}

void AdamW::set_rng_state(std::uint64_t state) {
    LLMC_CHECK(state != 0, "rng_state is 0, which xorshift cannot leave");
    rng_.state = state;
}

std::vector<AdamW::State> AdamW::state() const {
    std::vector<State> rows;
    for (std::size_t i = 0; i < parameters_.size(); ++i)
        rows.push_back({parameters_[i].name, m_[i], v_[i], master_[i]});
    return rows;
}

}  // namespace llmc
