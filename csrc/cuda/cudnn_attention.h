// Attention by cuDNN, bf16 only. cudnn_attention.cpp where the build has cuDNN, no_cudnn.cpp where it has not.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>

#include "core/dims.h"

namespace llmc {

class CudnnAttention {
  public:
    virtual ~CudnnAttention() = default;
    virtual bool supports(const AttentionDims& d, const Tensor& qkv) const = 0;
    virtual void forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream) = 0;
    // deterministic: the same bits on every run; slower.
    virtual void backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                          const AttentionDims& d, bool deterministic, cudaStream_t stream) = 0;
};

// Throws Error where cuDNN is not built in or not found.
std::unique_ptr<CudnnAttention> make_cudnn_attention(int device);
// "cuDNN 9.28 (path)", or what is missing.
std::string cudnn_status();

}  // namespace llmc
