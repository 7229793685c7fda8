// Measures how fast the arithmetic of this machine is at most.
#pragma once

#include "core/tensor.h"

namespace llmc {

// FLOP/s of the kernel set in use, on registers alone: what no matmul can exceed (of Accelerate, whose registers are out of
// reach, products in L2). Takes about 60 ms. dtype: f32 or bf16; threads <= 0: as many as a backend would use.
double cpu_peak_flops(DType dtype, int threads);

}  // namespace llmc
