// The numbers of Muon's update. Free of functions, as adamw_step.h.
#pragma once

#include <cstdint>

namespace llmc {

// param -= lr (scale direction + weight_decay param)
struct MuonStep {
    float lr, scale, weight_decay;
    std::uint32_t seed;      // of stochastic rounding, used if a bf16 parameter has no master
    std::int64_t first = 0;  // the index, for that rounding, of the first element of a part of a parameter
};

}  // namespace llmc
