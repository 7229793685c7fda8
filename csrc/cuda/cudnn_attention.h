// Attention by cuDNN, bf16 only. Defined in cudnn_attention.cpp or, in a build without cuDNN, in no_cudnn.cpp.
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
    // Returns false, and queues nothing, if cuDNN refuses the shape. It is asked only once for each shape.
    virtual bool forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream) = 0;
    // deterministic: the same bits on every run; slower.
    virtual bool backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                          const AttentionDims& d, bool deterministic, cudaStream_t stream) = 0;
    // Bytes that backward allocates beside its tensors, and keeps.
    virtual std::int64_t workspace_bytes(const AttentionDims& d, bool deterministic) const = 0;
    // How many workspaces it has had: a recording holds the address of one.
    virtual std::int64_t workspaces() const = 0;
    // The shapes refused so far, in words; empty if there are none.
    virtual std::string refusals() const = 0;
};

// Throws Error if cuDNN is not built in or not found.
std::unique_ptr<CudnnAttention> make_cudnn_attention(int device);
// "cuDNN 9.28 (path)", or what is missing.
std::string cudnn_status();

}  // namespace llmc
