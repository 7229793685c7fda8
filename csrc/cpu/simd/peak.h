// The arithmetic alone, without a load: the ceiling that products are compared with (cpu/peak.h).
#pragma once

namespace {

// A product of two constants would be taken out of the loop, so the sums are also what is multiplied.
// operands: 64 zeros, written to, so that the compiler keeps the work. Gives the floating-point operations done.
template <class P>
double multiply_adds(i64 rounds, float* operands) {
    Vec acc[kMR][kNV];
    LLMC_UNROLL
    for (int i = 0; i < kMR; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < kNV; ++j) acc[i][j] = load(operands + i * kNV + j);
    }
    const typename P::Unit a = *reinterpret_cast<const typename P::Unit*>(operands);
    const Vec b = load(operands);
    for (i64 round = 0; round < rounds; ++round) {
        LLMC_UNROLL
        for (int i = 0; i < kMR; ++i) {
            LLMC_UNROLL
            for (int j = 0; j < kNV; ++j) acc[i][j] = P::multiply_add(&a, acc[i][j], b);
        }
    }
    LLMC_UNROLL
    for (int i = 0; i < kMR; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < kNV; ++j) store(operands, load(operands) + acc[i][j]);
    }
    return 2.0 * P::kPerUnit * Vec::W * kMR * kNV * static_cast<double>(rounds);
}

}  // namespace
