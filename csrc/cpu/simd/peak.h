// The arithmetic of a matmul alone, without loads: the peak that matmuls are compared with (cpu/peak.h).
#pragma once

namespace {

// The sums are also a factor, or the compiler would multiply once, before the loop. operands: 64 zeros, which are
// overwritten, so that the compiler keeps the work. Returns the number of floating-point operations.
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
