// Attention on Hopper's warpgroup matmul: wgmma_forward.cu and wgmma_backward.cu or, in a build without code for
// sm_90, no_wgmma.cpp. attention.cu chooses.
#pragma once

#include <cuda_runtime.h>

#include "core/dims.h"

namespace llmc {

// True if the kernels are built in and the device is of compute capability 9.0, which alone has the instructions.
bool wgmma_runs_on(int device);
// True for bf16, head size 64, and qkv and out at multiples of 16 bytes.
bool wgmma_supports(const AttentionDims& d, const Tensor& qkv, const Tensor& out);
void wgmma_forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream);
// delta (B,NH,T): the row sums of dout * out.
void wgmma_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor lse, const float* delta,
                    const AttentionDims& d, cudaStream_t stream);

}  // namespace llmc
