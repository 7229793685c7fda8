#include "core/bpe.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <tuple>
#include <unordered_set>

#include "core/check.h"

namespace llmc {

namespace {

constexpr std::size_t kLongestToken = 255;  // llm.c's tokenizer file has a length of one byte

// The words in a row, as tokens. A token of n bytes takes n places: its id is at the first and at the last, and kInside between them. So
// both neighbours of a token are found without links: the one after it begins n places on, the one before it ends one place before.
class Symbols {
  public:
    Symbols(const std::vector<std::string>& words, const std::vector<std::string>& tokens) : tokens_(tokens) {
        std::size_t size = 1;
        for (const std::string& word : words) size += word.size() + 1;
        LLMC_CHECK(size < std::numeric_limits<std::int32_t>::max(),
                   "the words have {} bytes, too many to learn from", size);
        at_.reserve(size);
        at_.push_back(kEnd);
        for (const std::string& word : words) {
            for (const char byte : word) at_.push_back(static_cast<unsigned char>(byte));
            at_.push_back(kEnd);
        }
    }

    static constexpr std::int32_t kEnd = -1;  // between words
    static constexpr std::int32_t kInside = -2;

    std::int32_t size() const { return static_cast<std::int32_t>(at_.size()); }
    std::int32_t operator[](std::int32_t place) const { return at_[static_cast<std::size_t>(place)]; }
    // The first place after the token at `place`, and the first place of the token that ends before it.
    std::int32_t after(std::int32_t place) const { return place + length((*this)[place]); }
    std::int32_t before(std::int32_t place) const { return place - length((*this)[place - 1]); }

    // Puts `token`, which is the token at `place` and the one after it, in place of both.
    void merge(std::int32_t place, std::int32_t token) {
        const std::int32_t middle = after(place), end = after(middle);
        set(middle - 1, kInside);
        set(middle, kInside);
        set(place, token);
        set(end - 1, token);
    }

  private:
    std::int32_t length(std::int32_t token) const {
        return token == kEnd ? 1 : static_cast<std::int32_t>(tokens_[static_cast<std::size_t>(token)].size());
    }
    void set(std::int32_t place, std::int32_t token) { at_[static_cast<std::size_t>(place)] = token; }

    const std::vector<std::string>& tokens_;
    std::vector<std::int32_t> at_;
};

using Pair = std::uint64_t;  // two ids; pairs are ordered by the first, then by the second

Pair pair_of(std::int32_t left, std::int32_t right) {
    return static_cast<Pair>(left) << 32 | static_cast<std::uint32_t>(right);
}

struct Occurrences {
    std::int64_t count = 0;            // each word as often as it occurs
    std::vector<std::int32_t> places;  // in ascending order; some may be out of date
};

struct Candidate {
    std::int64_t count;  // as it was when the candidate was pushed; by now it may be less, never more
    Pair pair;
    bool operator<(const Candidate& other) const {
        return count != other.count ? count < other.count : pair > other.pair;
    }
};

std::size_t index_of_two(std::string_view bytes) {
    return static_cast<std::size_t>(static_cast<unsigned char>(bytes[0])) << 8 |
           static_cast<unsigned char>(bytes[1]);
}

}  // namespace

std::vector<std::string> train_bpe(const std::vector<std::string>& words,
                                   const std::vector<std::int64_t>& counts, std::size_t size,
                                   const std::function<void(std::size_t)>& progress) {
    LLMC_CHECK(words.size() == counts.size(), "{} words and {} counts", words.size(), counts.size());
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    std::unordered_set<std::string> known(tokens.begin(), tokens.end());

    Symbols symbols(words, tokens);
    std::vector<std::int32_t> ends;  // where each word ends
    ends.reserve(words.size());
    for (const std::string& word : words)
        ends.push_back((ends.empty() ? 1 : ends.back() + 1) + static_cast<std::int32_t>(word.size()));
    const auto count_of = [&](std::int32_t place) {  // of the word that the place is in
        return counts[static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), place) -
                                               ends.begin())];
    };

    std::unordered_map<Pair, Occurrences> pairs;
    std::size_t word = 0;
    for (std::int32_t place = 1; place + 1 < symbols.size(); ++place) {
        if (symbols[place] == Symbols::kEnd) {
            ++word;
        } else if (symbols[place + 1] != Symbols::kEnd) {
            Occurrences& found = pairs[pair_of(symbols[place], symbols[place + 1])];
            found.count += counts[word];
            found.places.push_back(place);
        }
    }
    std::priority_queue<Candidate> candidates;
    for (const auto& [pair, found] : pairs) candidates.push({found.count, pair});

    std::size_t visited = 0;
    while (tokens.size() < size && !candidates.empty()) {
        const auto [count, pair] = candidates.top();
        candidates.pop();
        const auto entry = pairs.find(pair);
        if (entry->second.count != count) {  // other merges took some of its places
            if (entry->second.count > 0)
                candidates.push({entry->second.count, pair});
            else
                pairs.erase(entry);
            continue;
        }
        if (count < 2) break;
        const auto left = static_cast<std::int32_t>(pair >> 32);
        const auto right = static_cast<std::int32_t>(pair & 0xFFFFFFFF);
        const std::vector<std::int32_t> places = std::move(entry->second.places);
        std::string merged = tokens[static_cast<std::size_t>(left)] + tokens[static_cast<std::size_t>(right)];
        // Two ids must not have the same bytes. No new places of such a pair can come: those come with new tokens.
        if (merged.size() > kLongestToken || !known.insert(merged).second) continue;
        const auto token = static_cast<std::int32_t>(tokens.size());
        tokens.push_back(std::move(merged));

        std::vector<Pair> fresh;
        const auto add = [&](Pair added, std::int32_t place, std::int64_t times) {
            const auto [found, inserted] = pairs.try_emplace(added);
            found->second.count += times;
            found->second.places.push_back(place);
            if (inserted) fresh.push_back(added);
        };
        const auto take = [&](Pair taken, std::int64_t times) {
            if (const auto found = pairs.find(taken); found != pairs.end()) found->second.count -= times;
        };
        for (const std::int32_t place : places) {
            if (symbols[place] != left || symbols[symbols.after(place)] != right) continue;
            const std::int64_t times = count_of(place);
            const std::int32_t previous = symbols[place - 1],
                               next = symbols[symbols.after(symbols.after(place))];
            if (previous != Symbols::kEnd) {
                take(pair_of(previous, left), times);
                add(pair_of(previous, token), symbols.before(place), times);
            }
            if (next != Symbols::kEnd) {
                take(pair_of(right, next), times);
                add(pair_of(token, next), place, times);
            }
            symbols.merge(place, token);
        }
        pairs.erase(pair);
        // Of the pairs of a new token there are never more than now. So those that occur once, which are most, are forgotten.
        for (const Pair added : fresh) {
            if (const auto found = pairs.find(added); found->second.count >= 2)
                candidates.push({found->second.count, added});
            else
                pairs.erase(found);
        }

        visited += places.size() + 1000;
        if (visited > 1'000'000) {
            visited = 0;
            progress(tokens.size());
        }
    }
    return tokens;
}

BpeEncoder::BpeEncoder(std::vector<std::string> tokens, std::size_t eot) : tokens_(std::move(tokens)) {
    ids_.reserve(tokens_.size());
    of_two_.assign(1 << 16, kNone);
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
        if (i == eot) continue;
        if (!ids_.emplace(tokens_[i], static_cast<std::uint32_t>(i)).second) continue;  // the smallest id
        longest_ = std::max(longest_, tokens_[i].size());
        if (tokens_[i].size() == 2) of_two_[index_of_two(tokens_[i])] = static_cast<std::uint32_t>(i);
    }
    for (int byte = 0; byte < 256; ++byte)
        LLMC_CHECK(id_of(std::string(1, static_cast<char>(byte))) != kNone, "byte {} has no token", byte);
}

std::uint32_t BpeEncoder::id_of(std::string_view bytes) const {
    if (bytes.size() == 2) return of_two_[index_of_two(bytes)];
    if (bytes.size() > longest_) return kNone;
    const auto found = ids_.find(bytes);
    return found == ids_.end() ? kNone : found->second;
}

std::vector<std::uint32_t> BpeEncoder::encode(std::string_view word) const {
    if (const std::uint32_t id = id_of(word); id != kNone) return {id};
    LLMC_CHECK(word.size() < std::numeric_limits<std::uint32_t>::max(), "a word of {} bytes is too long",
               word.size());
    const auto n = static_cast<std::uint32_t>(word.size());
    // For the first byte of each part of the word, where the part ends; for the byte before its end, where it begins. A part that was
    // merged into the one before it has the end 0.
    std::vector<std::uint32_t> end(n), begin(n);
    for (std::uint32_t i = 0; i < n; ++i) end[i] = (begin[i] = i) + 1;

    struct Merge {
        std::uint32_t id, begin, end;
        bool operator<(const Merge& other) const {
            return std::tie(id, begin) > std::tie(other.id, other.begin);
        }
    };
    std::vector<Merge> possible;
    const auto candidate = [&](std::uint32_t from) {  // the part that begins at `from` and the one after it
        const std::uint32_t to = end[end[from]];
        return Merge{id_of(word.substr(from, to - from)), from, to};
    };
    for (std::uint32_t i = 0; i + 1 < n; ++i)
        if (const Merge merge = candidate(i); merge.id != kNone) possible.push_back(merge);
    std::make_heap(possible.begin(), possible.end());
    const auto push = [&](std::uint32_t from) {
        if (const Merge merge = candidate(from); merge.id != kNone) {
            possible.push_back(merge);
            std::push_heap(possible.begin(), possible.end());
        }
    };
    while (!possible.empty()) {
        std::pop_heap(possible.begin(), possible.end());
        const Merge merge = possible.back();
        possible.pop_back();
        const std::uint32_t middle = end[merge.begin];
        // It is out of date if one of its parts has been merged with another since.
        if (middle == 0 || middle >= merge.end || end[middle] != merge.end) continue;
        end[middle] = 0;
        end[merge.begin] = merge.end;
        begin[merge.end - 1] = merge.begin;
        if (merge.begin > 0) push(begin[merge.begin - 1]);
        if (merge.end < n) push(merge.begin);
    }
    std::vector<std::uint32_t> ids;
    for (std::uint32_t i = 0; i < n; i = end[i]) ids.push_back(id_of(word.substr(i, end[i] - i)));
    return ids;
}

}  // namespace llmc
