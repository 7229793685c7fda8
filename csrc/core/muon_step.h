// The numbers of Muon's ops. Free of functions, as adamw_step.h.
#pragma once

#include <cstdint>

namespace llmc {

// The coefficients of the quintic iteration a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al. 2024): the slope at 0 is as steep
// as it can be, for which singular values end somewhere between 0.7 and 1.2, not at 1.
inline constexpr float kNewtonSchulzA = 3.4445f, kNewtonSchulzB = -4.7750f, kNewtonSchulzC = 2.0315f;
// A matrix whose norm is smaller is not scaled up to norm 1, but by the reciprocal of this.
inline constexpr float kNewtonSchulzLeastNorm = 1e-7f;

// param -= lr (scale direction + weight_decay param)
struct MuonStep {
    float lr, scale, weight_decay;
    std::uint32_t seed;      // of stochastic rounding, used if a bf16 parameter has no master
    std::int64_t first = 0;  // the index, for that rounding, of the first element of a part of a parameter
};

}  // namespace llmc
