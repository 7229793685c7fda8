// Parameter: what an optimizer needs to know of one of a model's tensors.
#pragma once

#include <string>

#include "core/tensor.h"

namespace llmc {

struct Parameter {
    std::string name;
    Tensor value, grad;
    bool decay;  // weight decay applies: to matrices and embeddings, not to biases and layernorms
};

}  // namespace llmc
