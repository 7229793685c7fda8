// Decoder: what a family keeps for one KVCache, keys and values, and its schedule of a step of generation.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace llmc {

class Decoder {
  public:
    virtual ~Decoder() = default;
    virtual std::int64_t bytes() const = 0;  // of the keys and values
    // Appends tokens (count, T) to the sequences [b, b + count), of which start (count) positions are there
    // already; both are on the device. Returns the final layernorm's output (count, T, C), which the next call
    // overwrites.
    virtual Tensor decode(std::int64_t b, const Tensor& tokens, const Tensor& start) = 0;
};

}  // namespace llmc
