// AdamW (Loshchilov & Hutter 2019; bias-corrected, decoupled decay), with clipping by the global norm.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "optim/optimizer.h"

namespace llmc {

struct AdamWOptions : OptimizerOptions {
    float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.0f;
    bool decay_all = false;  // decay every tensor, as llm.c's CPU program does

    void validate() const;  // throws ArgumentError
};

class AdamW : public Optimizer {
  public:
    AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const AdamWOptions& options,
          Sharding sharding = {});

    // m and v, and a master if there is one.
    static std::int64_t bytes_per_parameter(DType dtype, bool master_weights) {
        return Optimizer::bytes_per_parameter(dtype, master_weights, kMoments);
    }

  protected:
    // Of an optimizer that updates some of the parameters in a way of its own, and keeps other moments of them.
    AdamW(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const AdamWOptions& options,
          Treatment (*treatment)(const Parameter&), Sharding sharding);
    void begin_update(float lr) override;
    void update_parts(std::span<const Part> parts) override;
    std::uint32_t seed_of(std::size_t parameter) const { return seeds_[parameter]; }
    static constexpr int kMoments = 2;  // m, v

  private:
    AdamWOptions options_;
    AdamWStep step_{};                  // of the update that is under way
    std::vector<std::uint32_t> seeds_;  // by parameter
};

}  // namespace llmc
