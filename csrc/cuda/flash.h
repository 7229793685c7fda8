// The flash-attention kernels on tensor cores (flash_forward.cu, flash_backward.cu). attention.cu chooses between
// these, cuDNN (cudnn_attention.h) and its own simple kernels.
#pragma once

#include <cuda_runtime.h>

#include "core/dims.h"

namespace llmc {

// True for bf16, head sizes 64, 80, 96 and 128, and qkv and out at multiples of 16 bytes.
bool flash_supports(const AttentionDims& d, const Tensor& qkv, const Tensor& out);
void flash_forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream);
// delta (B,NH,T): the row sums of dout * out.
void flash_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor lse, const float* delta,
                    const AttentionDims& d, cudaStream_t stream);

}  // namespace llmc
