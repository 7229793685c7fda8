// The table of a model's parameters: what is known of each before there is memory for it. A family has one
// table, and from it follow the tensors, their initial values, which of them decay, and every count of bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/backend.h"

namespace llmc {

enum class Initial { zeros, ones, normal };

struct ParameterSpec {
    std::string name;                 // llm.c's
    std::vector<std::int64_t> shape;  // with the number of layers first if per_layer
    bool per_layer;                   // one for each layer, stacked in one tensor
    Initial initial;
    float std;              // of a normal initial value
    bool decay;             // weight decay applies: to matrices and embeddings, not to biases and layernorms
    std::int64_t padding;   // so many of the last rows are zero and stay so
    std::int64_t matrices;  // of each layer, as of Parameter

    std::int64_t numel() const;
};

// In the order of the model's file.
using ParameterTable = std::vector<ParameterSpec>;

std::int64_t count_parameters(const ParameterTable& table);

// Gives the tensors of the table, in its order, their initial values. Random numbers are drawn in the order of
// PyTorch's modules, which is llm.c's: what stands before the layers, then layer by layer, then the rest.
void init_parameters(Backend& backend, const ParameterTable& table, const std::vector<Tensor>& tensors,
                     std::uint32_t seed);

}  // namespace llmc
