// llm.c's tokenizer file, for decoding: 256 uint32 (magic 20240328, version 1 or 2, vocabulary, EOT in
// version 2), then for each token a length byte and its bytes. (Python encodes, from the same file:
// llmc.data.tokenizer.)
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace llmc {

class Tokenizer {
  public:
    explicit Tokenizer(const std::filesystem::path& path);

    std::int64_t vocab_size() const { return static_cast<std::int64_t>(tokens_.size()); }
    std::int32_t eot_token() const { return eot_token_; }
    // The token's bytes, which need not be whole UTF-8 characters.
    const std::string& decode(std::int64_t token) const;

  private:
    std::vector<std::string> tokens_;
    std::int32_t eot_token_;
};

}  // namespace llmc
