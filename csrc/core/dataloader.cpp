#include "core/dataloader.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/check.h"
#include "core/file.h"

namespace llmc {

namespace {
constexpr std::int32_t kMagic16 = 20240520, kVersion16 = 1;
constexpr std::int32_t kMagic32 = 20240801, kVersion32 = 7;
constexpr std::int64_t kMaxBatch = std::int64_t{1} << 40;  // tokens: more than any has, and far from overflow

}  // namespace

ShardInfo inspect_shard(const std::filesystem::path& path) {
    std::ifstream file = open_for_reading(path, "token file");
    const Header header = read_header(file, path, "token file");
    ShardInfo shard{path, header[2], 2};
    std::int32_t version = kVersion16;
    if (header[0] == kMagic32) {
        shard.token_bytes = 4;
        version = kVersion32;
    } else if (header[0] != kMagic16) {
        throw Error(
            filled("{}: bad magic {} in token file, expected {} (uint16 tokens) or {} (uint32 tokens)",
                   shown(path), header[0], kMagic16, kMagic32));
    }
    if (header[1] != version)
        throw Error(filled("{}: bad version {} in token file, expected {}", shown(path), header[1], version));
    if (shard.tokens <= 0)
        throw Error(filled("{}: the header says {} tokens, expected at least 1", shown(path), shard.tokens));
    check_size(path, kHeaderBytes + shard.tokens * shard.token_bytes,
               filled("a header and {} tokens of {} bytes", shard.tokens, shard.token_bytes));
    return shard;
}

DataLoader::DataLoader(std::vector<std::filesystem::path> files, std::int64_t B, std::int64_t T, int rank,
                       int ranks, bool shuffle, std::uint32_t seed, std::int64_t vocab_size,
                       std::int64_t rows_per_sample)
    : B_(B), T_(T), vocab_size_(vocab_size), rank_(rank), ranks_(ranks), shuffle_(shuffle) {
    LLMC_CHECK(B > 0 && T > 0, "B is {} and T is {}, expected both positive", B, T);
    LLMC_CHECK(ranks > 0 && rank >= 0 && rank < ranks, "rank is {} of {}", rank, ranks);
    LLMC_CHECK(!files.empty(), "no token files");
    LLMC_CHECK(B <= kMaxBatch / T / ranks && rows_per_sample <= kMaxBatch / T,
               "B {}, T {}, {} ranks and {} rows per sample are out of range", B, T, ranks, rows_per_sample);
    state_.rows_per_sample = rows_per_sample > 0 ? rows_per_sample : B * ranks;
    state_.rng = Mt19937(seed);
    for (const auto& path : files) {
        shards_.push_back(inspect_shard(path));
        num_tokens_ += shards_.back().tokens;
        if (samples_in(shards_.back()) == 0)
            throw Error(filled("{}: {} tokens are too few for one batch: rows * T + 1 = {} * {} + 1 = "
                               "{} are needed; use "
                               "a smaller batch size or sequence length",
                               shown(path), shards_.back().tokens, state_.rows_per_sample, T,
                               state_.rows_per_sample * T + 1));
    }
    state_.shard_indices.resize(shards_.size());
    std::iota(state_.shard_indices.begin(), state_.shard_indices.end(), 0);
    state_.epoch = -1;
    reset();
}

std::int64_t DataLoader::samples_in(const ShardInfo& shard) const {
    return (shard.tokens - 1) / (state_.rows_per_sample * T_);
}

const ShardInfo& DataLoader::shard() const {
    return shards_[static_cast<std::size_t>(state_.shard_indices[static_cast<std::size_t>(state_.shard)])];
}

void DataLoader::begin_shard() {
    state_.row = 0;
    state_.sample_indices.resize(shuffle_ ? static_cast<std::size_t>(samples_in(shard())) : 0);
    std::iota(state_.sample_indices.begin(), state_.sample_indices.end(), 0);
    random_permutation(state_.sample_indices, state_.rng);
}

void DataLoader::reset() {
    ++state_.epoch;
    state_.shard = 0;
    if (shuffle_) random_permutation(state_.shard_indices, state_.rng);
    begin_shard();
}

// Skips `rows` rows, and goes on in the next shard or epoch if this one ends.
void DataLoader::advance(std::int64_t rows) {
    while (rows > 0) {
        const std::int64_t left = samples_in(shard()) * state_.rows_per_sample - state_.row;
        if (left == 0) {
            if (++state_.shard < static_cast<std::int64_t>(shards_.size()))
                begin_shard();
            else
                reset();
            continue;
        }
        const std::int64_t step = std::min(rows, left);
        state_.row += step;
        rows -= step;
    }
}

// Reads the last row that the state has moved past.
void DataLoader::read_row(std::ifstream& file, std::int32_t* inputs, std::int32_t* targets) {
    const std::int64_t row = state_.row - 1;
    const ShardInfo& shard = this->shard();
    std::int64_t sample = row / state_.rows_per_sample;
    if (shuffle_) sample = state_.sample_indices[static_cast<std::size_t>(sample)];
    const std::int64_t first = (sample * state_.rows_per_sample + row % state_.rows_per_sample) * T_;
    buffer_.resize(static_cast<std::size_t>((T_ + 1) * shard.token_bytes));
    read_at(file, shard.path, kHeaderBytes + first * shard.token_bytes, buffer_.data(),
            static_cast<std::int64_t>(buffer_.size()));
    for (std::int64_t i = 0; i <= T_; ++i) {
        std::uint32_t token = 0;
        std::memcpy(&token, buffer_.data() + i * shard.token_bytes,
                    static_cast<std::size_t>(shard.token_bytes));
        if (vocab_size_ > 0 && token >= static_cast<std::uint64_t>(vocab_size_))
            throw Error(filled("{}: token {} at position {} is outside of the model's vocabulary of {}: was "
                               "the file made with "
                               "another tokenizer?",
                               shown(shard.path), token, first + i, vocab_size_));
        if (i < T_) inputs[i] = static_cast<std::int32_t>(token);
        if (i > 0) targets[i - 1] = static_cast<std::int32_t>(token);
    }
}

void DataLoader::next_batch(std::int32_t* inputs, std::int32_t* targets) {
    advance(rank_ * B_);
    std::ifstream file;  // opened for each batch, which costs about as much as one of the B reads
    const ShardInfo* opened = nullptr;
    for (std::int64_t b = 0; b < B_; ++b) {
        advance(1);  // may step into the next shard
        if (opened != &shard()) {
            opened = &shard();
            file = open_for_reading(opened->path, "token file");
        }
        read_row(file, inputs + b * T_, targets + b * T_);
    }
    advance((ranks_ - 1 - rank_) * B_);
}

void DataLoader::set_state(const DataLoaderState& state) {
    LLMC_CHECK(state.rows_per_sample > 0 && state.rows_per_sample <= kMaxBatch / T_,
               "dataloader state: rows_per_sample is {}", state.rows_per_sample);
    LLMC_CHECK(state.shard_indices.size() == shards_.size(),
               "dataloader state: made with {} shards, now there are {}", state.shard_indices.size(),
               shards_.size());
    std::vector<bool> seen(shards_.size());
    for (const std::int32_t i : state.shard_indices) {
        LLMC_CHECK(i >= 0 && i < static_cast<std::int32_t>(shards_.size()) &&
                       !seen[static_cast<std::size_t>(i)],
                   "dataloader state: shard_indices is not a permutation (entry {})", i);
        seen[static_cast<std::size_t>(i)] = true;
    }
    LLMC_CHECK(state.shard >= 0 && state.shard < static_cast<std::int64_t>(shards_.size()),
               "dataloader state: shard {} of {}", state.shard, shards_.size());
    DataLoaderState before = std::move(state_);
    state_ = state;
    const ShardInfo& shard = this->shard();
    const std::int64_t samples = samples_in(shard);
    try {
        LLMC_CHECK(state_.row >= 0 && state_.row <= samples * state_.rows_per_sample,
                   "dataloader state: row {}, but {} has {} samples of {} rows: other data?", state_.row,
                   shown(shard.path), samples, state_.rows_per_sample);
        LLMC_CHECK(static_cast<std::int64_t>(state_.sample_indices.size()) == (shuffle_ ? samples : 0),
                   "dataloader state: an order of {} samples, but {} has {}: other data, T or shuffle?",
                   state_.sample_indices.size(), shown(shard.path), samples);
        for (const std::int32_t i : state_.sample_indices)
            LLMC_CHECK(i >= 0 && i < samples, "dataloader state: sample {} of {}", i, samples);
    } catch (...) {
        state_ = std::move(before);
        throw;
    }
}

}  // namespace llmc
