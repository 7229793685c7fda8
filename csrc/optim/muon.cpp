#include "optim/muon.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace llmc {

void MuonOptions::validate() const {
    AdamWOptions::validate();
    LLMC_CHECK(momentum >= 0 && momentum < 1, "momentum is {}, expected in [0, 1)", momentum);
    LLMC_CHECK(ns_steps >= 1 && ns_steps < 100, "ns_steps is {}, expected 1 to 99", ns_steps);
    LLMC_CHECK(lr_ratio > 0 && std::isfinite(lr_ratio), "lr_ratio is {}, expected positive and finite",
               lr_ratio);
}

namespace {

// Before anything is allocated.
const MuonOptions& validated(const MuonOptions& options) {
    options.validate();
    return options;
}

// The shape of each of a parameter's matrices.
struct MatrixShape {
    std::int64_t R, C;
    explicit MatrixShape(const Parameter& p)
        : R(p.value.rows() / (p.layers * p.matrices)), C(p.value.cols()) {}
    std::int64_t numel() const { return R * C; }
    float adjusted(MuonAdjust adjust) const {
        const double r = static_cast<double>(R), c = static_cast<double>(C);
        return static_cast<float>(adjust == MuonAdjust::original ? std::sqrt(std::max(1.0, r / c))
                                                                 : 0.2 * std::sqrt(std::max(r, c)));
    }
};

}  // namespace

Muon::Muon(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters, const MuonOptions& options,
           Sharding sharding)
    : AdamW(
          std::move(backend), std::move(parameters), validated(options),
          [](const Parameter& p) {
              return p.matrices ? Treatment{kMatrixMoments, true} : Treatment{kMoments};
          },
          std::move(sharding)),
      options_(options), scratch_("Muon's matrix at a time", 256) {
    std::int64_t numel = 0, gram = 0;
    DType dtype = DType::f32;
    for (const Parameter& p : this->parameters()) {
        if (!p.matrices) continue;
        const MatrixShape shape(p);
        const std::int64_t k = std::min(shape.R, shape.C);
        dtype = p.value.dtype;
        numel = std::max(numel, shape.numel());
        gram = std::max(gram, k * k);
    }
    scratch_.add(momentum_, "momentum", dtype, {numel});
    scratch_.add(direction_, "direction", dtype, {numel});
    scratch_.add(gram_, "gram", dtype, {gram});
    scratch_.add(polynomial_, "polynomial", dtype, {gram});
    scratch_.add(norms_, "norms", DType::f32, {kNormDigits + 2});
    scratch_.allocate(this->backend());
}

void Muon::begin_update(float lr) {
    AdamW::begin_update(lr);
    lr_ = lr * options_.lr_ratio;
}

void Muon::update_parts(std::span<const Part> parts) {
    std::vector<Part> rest;
    for (const Part& part : parts)
        if (parameters()[part.parameter].matrices)
            update_matrices(part);
        else
            rest.push_back(part);
    AdamW::update_parts(rest);
}

// A part is of whole matrices.
void Muon::update_matrices(const Part& part) {
    const Parameter& p = parameters()[part.parameter];
    const MatrixShape shape(p);
    const std::int64_t n = shape.numel(), k = std::min(shape.R, shape.C);
    const Tensor momentum = momentum_.prefix({shape.R, shape.C}),
                 direction = direction_.prefix({shape.R, shape.C}), gram = gram_.prefix({k, k}),
                 polynomial = polynomial_.prefix({k, k});
    const float decay = p.decay ? options_.weight_decay : 0.0f;
    for (std::int64_t begin = 0; begin < part.value.numel(); begin += n) {
        const auto matrix = [&](const Tensor& t) { return t ? t.slice(begin, begin + n) : t; };
        ops().muon_momentum(momentum, matrix(part.moments[0]), matrix(part.grad), clip_factor(),
                            options_.momentum, options_.nesterov);
        ops().newton_schulz(direction, momentum, gram, polynomial, norms_, options_.ns_steps);
        ops().muon_update(
            matrix(part.value), matrix(part.master), direction, clip_factor(),
            {lr_, shape.adjusted(options_.adjust), decay, seed_of(part.parameter), part.first + begin});
    }
}

}  // namespace llmc
