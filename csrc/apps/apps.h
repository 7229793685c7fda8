// What the two programs share: their command line and the lines they begin with.
#pragma once

#include <cstdio>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
// which must come before
#include <shellapi.h>
#pragma comment(lib, "shell32")
#endif

#include "backends.h"
#include "core/check.h"
#include "core/file.h"
#include "model/checkpoint.h"
#include "model/gpt2.h"

namespace llmc {

// The arguments in UTF-8, and a console that takes UTF-8 as long as this lives. On Windows both would have
// the system's code page, which lacks characters that file names and tokens have.
#ifdef _WIN32
class CommandLine {
  public:
    CommandLine(int, char**) : before_(GetConsoleOutputCP()) {
        SetConsoleOutputCP(CP_UTF8);
        int count = 0;
        wchar_t** const words = CommandLineToArgvW(GetCommandLineW(), &count);
        for (int i = 1; i < count; ++i) arguments.push_back(shown(words[i]));
        LocalFree(words);
    }
    ~CommandLine() { SetConsoleOutputCP(before_); }
    CommandLine(const CommandLine&) = delete;
    CommandLine& operator=(const CommandLine&) = delete;
    std::vector<std::string> arguments;

  private:
    const UINT before_;
};
#else
struct CommandLine {
    CommandLine(int argc, char** argv) : arguments(argv + 1, argv + argc) {}
    const std::vector<std::string> arguments;
};
#endif

inline std::filesystem::path path_of(const std::string& utf8) {
#ifdef _WIN32
    return std::u8string(utf8.begin(), utf8.end());
#else
    return utf8;
#endif
}

// Pairs of flag and value, llm.c's way, after at most `max_names` file names. `flags` has their defaults.
class Arguments {
  public:
    Arguments(const std::vector<std::string>& words, std::map<std::string, std::string> flags,
              std::size_t max_names = 0)
        : values_(std::move(flags)) {
        for (std::size_t i = 0; i < words.size(); ++i) {
            const std::string& flag = words[i];
            if (names_.size() < max_names && !flag.empty() && flag[0] != '-') {
                names_.push_back(flag);
                continue;
            }
            std::string known;
            for (const auto& [name, value] : values_) known += " " + name;
            if (values_.find(flag) == values_.end())
                throw ArgumentError(filled("unknown argument '{}': expected one of{}", flag, known));
            if (i + 1 == words.size()) throw ArgumentError(filled("{} needs a value", flag));
            values_[flag] = words[++i];
        }
    }
    const std::string& text(const std::string& flag) const { return values_.at(flag); }
    std::filesystem::path path(const std::string& flag) const { return path_of(text(flag)); }
    template <class T>
    T number(const std::string& flag) const {
        std::istringstream in(text(flag));
        T value{};
        if (!(in >> value) || in.peek() != std::istringstream::traits_type::eof())
            throw ArgumentError(filled("{} is '{}', expected a number", flag, text(flag)));
        return value;
    }
    std::int64_t integer(const std::string& flag) const { return number<std::int64_t>(flag); }
    std::filesystem::path name(std::size_t i, const std::string& otherwise) const {
        return path_of(i < names_.size() ? names_[i] : otherwise);
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
inline std::unique_ptr<GPT2> load_model(const std::filesystem::path& path, const std::string& device,
                                        const ModelOptions& options) {
    const CheckpointInfo info = inspect_checkpoint(path);
    auto model = std::make_unique<GPT2>(info.config, make_backend(device, 0), options);
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
