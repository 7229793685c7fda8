// Parameter: what an optimizer needs to know of one of a model's tensors.
#pragma once

#include <cstdint>
#include <string>

#include "core/tensor.h"

namespace llmc {

struct Parameter {
    std::string name;
    Tensor value, grad;
    bool decay;  // weight decay applies: to matrices and embeddings, not to biases and layernorms
    std::int64_t layers = 1;      // value and grad are those of so many layers, stacked
    std::int64_t first_unit = 0;  // layer l is of unit first_unit + l (comm/arrivals.h)
    // Each layer's value is so many matrices of equal shape, one below the other, that Muon orthogonalises apart (q, k and v);
    // 0: it is none that Muon takes, but an embedding or a vector.
    std::int64_t matrices = 0;
};

}  // namespace llmc
