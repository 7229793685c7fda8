#include "model/checkpoint.h"

#include <algorithm>
#include <vector>

namespace llmc {

namespace {
constexpr std::int32_t kMagic = 20240326, kF32 = 3, kBf16 = 5;
constexpr std::int64_t kChunk = 1 << 22;  // elements held in host memory at a time
}  // namespace

CheckpointInfo inspect_checkpoint(const std::filesystem::path& path) {
    std::ifstream file = open_for_reading(path, "model checkpoint");
    const Header h = read_header(file, path, "model checkpoint");
    if (h[0] != kMagic)
        throw Error(filled("{}: bad magic {} in model checkpoint, expected {}", shown(path), h[0], kMagic));
    if (h[1] != kF32 && h[1] != kBf16)
        throw Error(filled(
            "{}: bad version {} in model checkpoint, expected {} (f32) or {} (bf16); older versions have no "
            "padded vocabulary: export the model again",
            shown(path), h[1], kF32, kBf16));
    CheckpointInfo info{GPT2Config{h[2], h[3], h[4], h[5], h[6], h[7]},
                        h[1] == kF32 ? DType::f32 : DType::bf16, 0};
    try {
        info.config.validate();
    } catch (const ArgumentError& e) {
        throw Error(filled("{}: the header does not describe a model: {}", shown(path), e.what()));
    }
    info.num_parameters = count_parameters(gpt2_parameters(info.config));
    check_size(path, kHeaderBytes + info.num_parameters * size_of(info.dtype),
               filled("a header and {} {} parameters", info.num_parameters, info.dtype));
    return info;
}

void load_checkpoint(GPT2& model, const std::filesystem::path& path) {
    const CheckpointInfo info = inspect_checkpoint(path);
    LLMC_CHECK(info.config == model.config(), "{}: holds a model of another shape", shown(path));
    std::ifstream file = open_for_reading(path, "model checkpoint");
    model.arrivals()->wait();
    const Tensor all = model.all_parameters();
    std::vector<float> wide;
    std::vector<bf16> narrow;
    for (std::int64_t at = 0; at < all.numel(); at += kChunk) {
        const std::int64_t n = std::min(kChunk, all.numel() - at);
        const Tensor piece = all.slice(at, at + n);
        wide.resize(static_cast<std::size_t>(n));
        narrow.resize(static_cast<std::size_t>(n));
        char* const raw = info.dtype == DType::f32 ? reinterpret_cast<char*>(wide.data())
                                                   : reinterpret_cast<char*>(narrow.data());
        read_at(file, path, kHeaderBytes + at * size_of(info.dtype), raw, n * size_of(info.dtype));
        if (info.dtype == DType::f32 && model.dtype() == DType::bf16)
            std::transform(wide.begin(), wide.end(), narrow.begin(),
                           [](float x) { return from_float<bf16>(x); });
        if (info.dtype == DType::bf16 && model.dtype() == DType::f32)
            std::transform(narrow.begin(), narrow.end(), wide.begin(), [](bf16 x) { return to_float(x); });
        if (model.dtype() == DType::f32)
            model.backend()->from_host(piece, wide.data());
        else
            model.backend()->from_host(piece, narrow.data());
    }
    model.weights_changed();
}

Header checkpoint_header(const GPT2Config& config, DType dtype) {
    Header h{};
    h[0] = kMagic;
    h[1] = dtype == DType::f32 ? kF32 : kBf16;
    h[2] = static_cast<std::int32_t>(config.max_seq_len);
    h[3] = static_cast<std::int32_t>(config.vocab_size);
    h[4] = static_cast<std::int32_t>(config.num_layers);
    h[5] = static_cast<std::int32_t>(config.num_heads);
    h[6] = static_cast<std::int32_t>(config.channels);
    h[7] = static_cast<std::int32_t>(config.padded_vocab_size);
    return h;
}

void save_checkpoint(const GPT2& model, const std::filesystem::path& path) {
    model.arrivals()->wait();
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    if (!file) throw Error(filled("{}: cannot create this file", shown(path)));
    const Header header = checkpoint_header(model.config(), model.dtype());
    file.write(reinterpret_cast<const char*>(header.data()), kHeaderBytes);
    const Tensor all = model.all_parameters();
    std::vector<char> chunk;
    for (std::int64_t at = 0; at < all.numel() && file; at += kChunk) {
        const Tensor piece = all.slice(at, std::min(all.numel(), at + kChunk));
        chunk.resize(static_cast<std::size_t>(piece.bytes()));
        model.backend()->to_host(chunk.data(), piece);
        file.write(chunk.data(), piece.bytes());
    }
    file.close();
    if (!file) throw Error(filled("{}: cannot write this file: is the disk full?", shown(path)));
}

}  // namespace llmc
