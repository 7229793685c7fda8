// Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for everything else: embeddings, the head, biases and
// layernorms. A matrix is updated by its momentum, made orthogonal: all its singular values become about equal.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/arena.h"
#include "optim/adamw.h"

namespace llmc {

// How the learning rate of a matrix of R rows and C columns follows from its shape, as PyTorch's adjust_lr_fn:
enum class MuonAdjust {
    original,         // times sqrt(max(1, R / C)) (Jordan et al. 2024)
    match_rms_adamw,  // times 0.2 sqrt(max(R, C)), so that AdamW's learning rate and decay fit (Liu et al. 2025)
};

// Those of AdamW hold for what AdamW updates; weight_decay, grad_clip, master_weights and seed for matrices too.
struct MuonOptions : AdamWOptions {
    float momentum = 0.95f;
    bool nesterov = true;
    int ns_steps = 5;       // of the Newton-Schulz iteration
    float lr_ratio = 1.0f;  // the learning rate of matrices, as a multiple of AdamW's
    MuonAdjust adjust = MuonAdjust::match_rms_adamw;

    void validate() const;  // throws ArgumentError
};

class Muon final : public AdamW {
  public:
    Muon(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const MuonOptions& options,
         Sharding sharding = {});

    std::int64_t bytes() const override { return AdamW::bytes() + scratch_.bytes(); }

  private:
    void begin_update(float lr) override;
    void update_parts(std::span<const Part> parts) override;
    void update_matrices(const Part& part);

    static constexpr int kMatrixMoments = 1;
    MuonOptions options_;
    float lr_ = 0.0f;  // of matrices, in the update that is under way
    // Of a matrix at a time, as large as the largest needs.
    Tensor momentum_, direction_, gram_, polynomial_, norms_;
    Arena scratch_;  // after its slots: its destructor still writes to them
};

}  // namespace llmc
