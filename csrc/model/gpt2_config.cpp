#include "model/gpt2_config.h"

#include <cmath>
#include <optional>
#include <string>

#include "core/check.h"

namespace llmc {

void GPT2Config::validate() const {
    LLMC_CHECK(max_seq_len > 0 && vocab_size > 0 && num_layers > 0 && num_heads > 0 && channels > 0,
               "max_seq_len {}, vocab_size {}, num_layers {}, num_heads {} and channels {} must be positive",
               max_seq_len, vocab_size, num_layers, num_heads, channels);
    LLMC_CHECK(channels % num_heads == 0, "channels {} is not divisible by num_heads {}", channels,
               num_heads);
    LLMC_CHECK(padded_vocab_size >= vocab_size, "padded_vocab_size {} is smaller than vocab_size {}",
               padded_vocab_size, vocab_size);
    // Far beyond any model, and far below overflow of a byte count.
    LLMC_CHECK(max_seq_len <= 1 << 24 && padded_vocab_size <= 1 << 28 && num_layers <= 1 << 12 &&
                   channels <= 1 << 20,
               "max_seq_len {}, padded_vocab_size {}, num_layers {} and channels {} are out of range",
               max_seq_len, padded_vocab_size, num_layers, channels);
    LLMC_CHECK(num_layers * channels <= (std::int64_t{1} << 42) / channels,
               "{} layers of {} channels are out of range", num_layers, channels);
}

// Random weights are normal(0, 0.02), those of projections into the residual stream by 1/sqrt(2L) smaller
// (Radford et al. 2019). Weight decay is for matrices and embeddings, as in llm.c's train_gpt2.cu and nanoGPT.
ParameterTable gpt2_parameters(const GPT2Config& config) {
    config.validate();
    const std::int64_t L = config.num_layers, C = config.channels, Vp = config.padded_vocab_size;
    const std::int64_t padding = Vp - config.vocab_size;
    const float std_ = 0.02f;
    const float residual_std = std_ * (1.0f / std::sqrt(2.0f * static_cast<float>(L)));
    constexpr Initial zeros = Initial::zeros, ones = Initial::ones, normal = Initial::normal;
    // clang-format off
    return {
        // name       shape                    per layer  initial  std        decay  padding  matrices
        {"wte",      {Vp, C},                  false, normal, std_,         true,  padding, 0},
        {"wpe",      {config.max_seq_len, C},  false, normal, std_,         true,  0,       0},
        {"ln1w",     {L, C},                   true,  ones,   0.0f,         false, 0,       0},
        {"ln1b",     {L, C},                   true,  zeros,  0.0f,         false, 0,       0},
        {"qkvw",     {L, 3 * C, C},            true,  normal, std_,         true,  0,       3},
        {"qkvb",     {L, 3 * C},               true,  zeros,  0.0f,         false, 0,       0},
        {"attprojw", {L, C, C},                true,  normal, residual_std, true,  0,       1},
        {"attprojb", {L, C},                   true,  zeros,  0.0f,         false, 0,       0},
        {"ln2w",     {L, C},                   true,  ones,   0.0f,         false, 0,       0},
        {"ln2b",     {L, C},                   true,  zeros,  0.0f,         false, 0,       0},
        {"fcw",      {L, 4 * C, C},            true,  normal, std_,         true,  0,       1},
        {"fcb",      {L, 4 * C},               true,  zeros,  0.0f,         false, 0,       0},
        {"fcprojw",  {L, C, 4 * C},            true,  normal, residual_std, true,  0,       1},
        {"fcprojb",  {L, C},                   true,  zeros,  0.0f,         false, 0,       0},
        {"lnfw",     {C},                      false, ones,   0.0f,         false, 0,       0},
        {"lnfb",     {C},                      false, zeros,  0.0f,         false, 0,       0},
    };
    // clang-format on
}

GPT2Config gpt2_config_from_descriptor(const std::string& descriptor) {
    constexpr std::int64_t kDeepest = 1000;  // beyond 1024 validate() has no room for the channels
    struct Row {
        const char* name;
        std::int64_t L, C, NH;
    };
    // GPT-2 by depth (d6, d60 to d84 are llm.c's own), GPT-3 by channels (Brown et al. 2020, table 2.1).
    static const Row kGpt2[] = {{"6", 6, 384, 6},     {"12", 12, 768, 12},  {"24", 24, 1024, 16},
                                {"36", 36, 1280, 20}, {"48", 48, 1600, 25}, {"60", 60, 1920, 30},
                                {"72", 72, 2880, 30}, {"84", 84, 3456, 36}};
    static const Row kGpt3[] = {{"384", 6, 384, 6},     {"768", 12, 768, 12},    {"1024", 24, 1024, 16},
                                {"1536", 24, 1536, 16}, {"2048", 24, 2048, 16},  {"2560", 32, 2560, 32},
                                {"4096", 32, 4096, 32}, {"12288", 96, 12288, 96}};
    const auto known = [](const auto& rows) {
        std::string names;
        for (const Row& row : rows) names += (names.empty() ? "" : ", ") + std::string(row.name);
        return names;
    };
    const auto find = [](const auto& rows, const std::string& name, std::int64_t max_seq_len) {
        std::optional<GPT2Config> found;
        for (const Row& row : rows)
            if (row.name == name) found = GPT2Config{max_seq_len, 50257, row.L, row.NH, row.C, 50304};
        return found;
    };
    if (descriptor.rfind("gpt3:c", 0) == 0) {
        if (const auto config = find(kGpt3, descriptor.substr(6), 2048)) return *config;
        if (descriptor == "gpt3:c5140")
            throw ArgumentError("model descriptor 'gpt3:c5140' (GPT-3 13B) cannot be built: 5140 channels "
                                "are not divisible by its 128 per head; "
                                "give num_layers, num_heads and channels instead");
        throw ArgumentError(filled("unknown model descriptor '{}': expected gpt3:cN, N channels, N one of {}",
                                   descriptor, known(kGpt3)));
    }
    const std::string name = descriptor.substr(descriptor.rfind("gpt2:", 0) == 0 ? 5 : 0);
    if (name.rfind('d', 0) == 0) {
        const std::string depth = name.substr(1);
        if (const auto config = find(kGpt2, depth, 1024)) return *config;
        // Any other depth has heads of 64 channels, like those up to 48, and as many of them as layers, like d6 and d12.
        const bool number = !depth.empty() && depth.size() <= 4 && depth[0] != '0' &&
                            depth.find_first_not_of("0123456789") == std::string::npos;
        if (const std::int64_t L = number ? std::stoi(depth) : 0; L > 0 && L <= kDeepest)
            return GPT2Config{1024, 50257, L, L, 64 * L, 50304};
    }
    throw ArgumentError(filled(
        "unknown model descriptor '{}': expected dN, N layers: {} as published, any other N up to {} with "
        "64 N channels in N heads; or gpt3:cN, N channels: {}",
        descriptor, known(kGpt2), kDeepest, known(kGpt3)));
}

}  // namespace llmc
