// The shape of a GPT-2 or GPT-3 model, and the table of its parameters.
#pragma once

#include <cstdint>
#include <string>

#include "model/parameters.h"

namespace llmc {

struct GPT2Config {
    std::int64_t max_seq_len = 1024;
    std::int64_t vocab_size = 50257;
    std::int64_t num_layers = 12;
    std::int64_t num_heads = 12;
    std::int64_t channels = 768;

    // Rows of wte: the vocabulary rounded up to a multiple of 128. The rows past vocab_size stay zero: their
    // logits are left out of the softmax, so nothing is learned for them and they are never sampled.
    std::int64_t padded_vocab_size = 50304;

    void validate() const;  // throws ArgumentError
    bool operator==(const GPT2Config&) const = default;
};

inline std::int64_t padded_vocab(std::int64_t vocab_size) { return (vocab_size + 127) / 128 * 128; }

// llm.c's 16 tensors, in the order of its file. Throws ArgumentError if the config is impossible.
ParameterTable gpt2_parameters(const GPT2Config& config);

// llm.c's descriptors: "d12" or "gpt2:d12" (depth; max_seq_len 1024), "gpt3:c768" (channels; max_seq_len
// 2048). A depth N that llm.c has not has 64 N channels in N heads.
GPT2Config gpt2_config_from_descriptor(const std::string& descriptor);

}  // namespace llmc
