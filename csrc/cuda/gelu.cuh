// gelu, the tanh form, as x sigmoid(2u): one exponential, and none of the cancellation of 1 + tanh u at
// negative x.
#pragma once

#include "cuda/device.cuh"

namespace llmc {

inline constexpr float kGelu1 = 1.5957691216f;  // 2 sqrt(2/pi)
inline constexpr float kGelu3 = 1.5957691216f * 0.044715f;

__device__ __forceinline__ float gelu_exponential(float x) {  // e^-2u
    return expf(-x * fmaf(x * x, kGelu3, kGelu1));
}
__device__ __forceinline__ float gelu(float x) { return x * ptx::reciprocal(1.0f + gelu_exponential(x)); }

}  // namespace llmc
