// Byte-level BPE (Sennrich et al. 2016): learning merges from words, and encoding one long word by them. Both take n log n steps in a
// word's length. Ordinary text is encoded by the package tiktoken (llmc.data.tokenizer), whose results for long words these are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace llmc {

// Learns tokens: the 256 bytes, then a merge of two tokens after the other, until there are `size` or no pair occurs twice. The most
// frequent pair of neighbours is merged first; of pairs equally frequent, the one with the smaller ids. Pairs are counted as "aaa" has two
// of (a, a), and merged from left to right. A pair whose bytes are a token already, or more than 255, is passed over.
//
// `words` are bytes, `counts` says how often each occurs. `progress` is called now and then with the number of tokens so far, and may throw.
std::vector<std::string> train_bpe(const std::vector<std::string>& words,
                                   const std::vector<std::int64_t>& counts, std::size_t size,
                                   const std::function<void(std::size_t)>& progress);

// Encodes a word: the two neighbours are merged whose bytes are the token with the smallest id, the leftmost of equals, until none are.
class BpeEncoder {
  public:
    // `tokens` are the bytes of each id; the token `eot` stands for no bytes. Every single byte is a token.
    BpeEncoder(std::vector<std::string> tokens, std::size_t eot);

    std::vector<std::uint32_t> encode(std::string_view word) const;

  private:
    static constexpr std::uint32_t kNone = 0xFFFFFFFF;
    std::uint32_t id_of(std::string_view bytes) const;

    std::vector<std::string> tokens_;
    std::unordered_map<std::string_view, std::uint32_t> ids_;  // views of tokens_
    std::vector<std::uint32_t> of_two_;                        // ids of two bytes, most of what is looked for
    std::size_t longest_ = 0;
};

}  // namespace llmc
