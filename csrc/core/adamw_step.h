// The numbers of an AdamW step. Kept apart, and free of functions, because the kernel files that are compiled once per
// instruction set may include nothing that the linker could merge.
#pragma once

#include <cstdint>

namespace llmc {

// What the host knows of one step of AdamW (Loshchilov & Hutter 2019).
struct AdamWStep {
    float lr;
    float beta1, beta2, eps, weight_decay;
    float correction1, correction2;  // 1 - beta^t
    std::uint32_t seed;              // of stochastic rounding, used if a bf16 parameter has no master
    std::int64_t first = 0;  // the index, for that rounding, of the first element of a part of a parameter
};

}  // namespace llmc
