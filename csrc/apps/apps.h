// What the two programs share: their command line and the lines they begin with.
#pragma once

#include <cstdio>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "core/check.h"
#include "model/checkpoint.h"
#include "model/gpt2.h"

namespace llmc {

// Pairs of flag and value, llm.c's way, after at most `max_names` file names. `flags` has their defaults.
class Arguments {
  public:
    Arguments(int argc, char** argv, std::map<std::string, std::string> flags, std::size_t max_names = 0)
        : values_(std::move(flags)) {
        for (int i = 1; i < argc; ++i) {
            const std::string flag = argv[i];
            if (names_.size() < max_names && !flag.empty() && flag[0] != '-') {
                names_.push_back(flag);
                continue;
            }
            std::string known;
            for (const auto& [name, value] : values_) known += " " + name;
            if (values_.find(flag) == values_.end())
                throw ArgumentError(filled("unknown argument '{}': expected one of{}", flag, known));
            if (i + 1 == argc) throw ArgumentError(filled("{} needs a value", flag));
            values_[flag] = argv[++i];
        }
    }
    const std::string& text(const std::string& flag) const { return values_.at(flag); }
    template <class T>
    T number(const std::string& flag) const {
        std::istringstream in(text(flag));
        T value{};
        if (!(in >> value) || in.peek() != std::istringstream::traits_type::eof())
            throw ArgumentError(filled("{} is '{}', expected a number", flag, text(flag)));
        return value;
    }
    std::int64_t integer(const std::string& flag) const { return number<std::int64_t>(flag); }
    std::string name(std::size_t i, const std::string& otherwise) const {
        return i < names_.size() ? names_[i] : otherwise;
    }

  private:
    std::map<std::string, std::string> values_;
    std::vector<std::string> names_;
};

inline DType dtype_of(const std::string& name) {
    if (name == "f32" || name == "bf16") return name == "f32" ? DType::f32 : DType::bf16;
    throw ArgumentError(filled("dtype is '{}', expected f32 or bf16", name));
}

// Prints the header as llm.c does, and loads the model.
inline std::unique_ptr<GPT2> load_model(const std::string& path, const std::string& device, DType dtype) {
    const CheckpointInfo info = inspect_checkpoint(path);
    auto model = std::make_unique<GPT2>(make_backend(device, 0), info.config, dtype, dtype);
    load_checkpoint(*model, path);
    const GPT2Config& c = info.config;
    std::printf("[GPT-2]\nmax_seq_len: %lld\nvocab_size: %lld\npadded_vocab_size: %lld\nnum_layers: "
                "%lld\nnum_heads: %lld\n"
                "channels: %lld\nnum_parameters: %lld\n",
                static_cast<long long>(c.max_seq_len), static_cast<long long>(c.vocab_size),
                static_cast<long long>(c.padded_vocab_size), static_cast<long long>(c.num_layers),
                static_cast<long long>(c.num_heads), static_cast<long long>(c.channels),
                static_cast<long long>(model->num_parameters()));
    return model;
}

}  // namespace llmc
