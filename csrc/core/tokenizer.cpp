#include "core/tokenizer.h"

#include "core/check.h"
#include "core/file.h"

namespace llmc {

Tokenizer::Tokenizer(const std::filesystem::path& path) {
    std::ifstream file = open_for_reading(path, "tokenizer file");
    const Header header = read_header(file, path, "tokenizer file");
    if (header[0] != 20240328)
        throw Error(filled("{}: bad magic {} in tokenizer file, expected 20240328", shown(path), header[0]));
    if (header[1] != 1 && header[1] != 2)
        throw Error(filled("{}: bad version {} in tokenizer file, expected 1 or 2", shown(path), header[1]));
    const std::int64_t vocab = header[2];
    if (header[1] == 1 && vocab != 50257)
        throw Error(filled("{}: a tokenizer file of version 1 has 50257 tokens, this one says {}",
                           shown(path), vocab));
    const std::int64_t payload = static_cast<std::int64_t>(std::filesystem::file_size(path)) - kHeaderBytes;
    if (vocab <= 0 || vocab > payload / 2)  // a token takes two bytes at the least
        throw Error(filled("{}: {} bytes cannot hold the {} tokens that the header announces", shown(path),
                           payload, vocab));
    eot_token_ = header[1] == 1 ? 50256 : header[3];
    if (eot_token_ < 0 || eot_token_ >= vocab)
        throw Error(filled("{}: end-of-text token {} is outside of the vocabulary of {}", shown(path),
                           eot_token_, vocab));
    tokens_.reserve(static_cast<std::size_t>(vocab));
    for (std::int64_t i = 0; i < vocab; ++i) {
        const int length = file.get();
        if (length == std::ifstream::traits_type::eof())
            throw Error(filled("{}: truncated: {} tokens of {}", shown(path), i, vocab));
        if (length == 0) throw Error(filled("{}: token {} is empty", shown(path), i));
        std::string token(static_cast<std::size_t>(length), '\0');
        if (!file.read(token.data(), length))
            throw Error(filled("{}: truncated: {} tokens of {}", shown(path), i, vocab));
        tokens_.push_back(std::move(token));
    }
    if (file.get() != std::ifstream::traits_type::eof())
        throw Error(filled("{}: bytes follow the {} tokens that the header announces", shown(path), vocab));
}

const std::string& Tokenizer::decode(std::int64_t token) const {
    LLMC_CHECK(token >= 0 && token < vocab_size(), "token {} is outside of the vocabulary of {}", token,
               vocab_size());
    return tokens_[static_cast<std::size_t>(token)];
}

}  // namespace llmc
