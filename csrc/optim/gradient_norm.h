// The global norm of a model's gradients, and the factor that clips it: what an optimizer knows of all gradients
// at once. Optimizers that share the parameters of one model must go by the same norm.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "core/arena.h"
#include "core/backend.h"

namespace llmc {

class GradientNorm {
  public:
    // max_norm: the largest norm that is not clipped; <= 0: no clipping.
    GradientNorm(std::shared_ptr<Backend> backend, float max_norm)
        : backend_(std::move(backend)), max_norm_(max_norm), arena_("the norm of the gradients", 256) {
        arena_.add(squared_, "norm_squared", DType::f32, {kNormDigits});
        arena_.add(norm_, "norm", DType::f32, {1});
        arena_.add(factor_, "factor", DType::f32, {1});
        arena_.allocate(backend_);
    }

    // The first half: queues the sum of the squares of these gradients. If ranks hold a part of the gradients
    // each, squared() is to be summed over them before finish().
    void sum_squares(std::span<const Tensor> gradients) {
        backend_->zero(squared_);
        backend_->gradient_norm_squared(squared_, gradients);
    }
    const Tensor& squared() const { return squared_; }
    // The second half: queues the norm and the factor.
    void finish() { backend_->clip_factor(norm_, factor_, squared_, max_norm_); }

    // The norm before clipping. Waits.
    float value() const {
        float norm;
        backend_->to_host(&norm, norm_);
        return norm;
    }
    // What each gradient is to be multiplied by, on the device. NaN if the norm is not finite.
    const Tensor& factor() const { return factor_; }
    std::int64_t bytes() const { return arena_.bytes(); }

  private:
    std::shared_ptr<Backend> backend_;
    float max_norm_;
    Tensor squared_, norm_, factor_;
    Arena arena_;  // after its slots: its destructor still writes to them
};

}  // namespace llmc
