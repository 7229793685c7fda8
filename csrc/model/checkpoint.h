// llm.c's model files: 256 int32 (magic 20240326, version 3 f32 or 5 bf16, max_seq_len, V, L, NH, C, Vp),
// then the 16 parameter tensors in order, packed.
#pragma once

#include <filesystem>

#include "core/file.h"
#include "model/gpt2.h"

namespace llmc {

struct CheckpointInfo {
    GPT2Config config;
    DType dtype;
    std::int64_t num_parameters;
};

// Reads and checks header and size; throws Error naming what was expected and what came.
CheckpointInfo inspect_checkpoint(const std::filesystem::path& path);
// Fills the model's parameters, converting between f32 and bf16 if the file's type is the other.
void load_checkpoint(GPT2& model, const std::filesystem::path& path);
Header checkpoint_header(const GPT2Config& config, DType dtype);
// Writes the model in its own dtype. Not crash-safe: Python's Trainer saves through llmc.checkpoint instead.
void save_checkpoint(const GPT2& model, const std::filesystem::path& path);

}  // namespace llmc
