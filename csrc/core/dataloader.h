// Token shards and the batches cut from them.
//
// A shard is a llm.c token file: 256 little-endian int32 (magic, version, number of tokens, zeros), then the
// tokens: uint16 with magic 20240520 version 1, uint32 with magic 20240801 version 7.
//
// Order, as llm.c's: a shard is a sequence of samples of rows_per_sample rows of T tokens, where
// rows_per_sample is B times the number of ranks; the tail that fills no sample is not used. With shuffle the
// shards, and the samples within each, are permuted by Mt19937(seed), anew each epoch. Rows keep their order
// within a sample. Each rank takes B of every B*ranks rows. (llm.c seeds each rank differently, so ranks may read
// different shards and rows be read twice; here all share one order.)
//
// Apart from rows_per_sample, the order of rows does not depend on B or the number of ranks: to continue a run that
// began with other values, pass its rows_per_sample.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "core/random.h"

namespace llmc {

struct DataLoaderState {
    std::int64_t rows_per_sample = 0;
    std::int64_t epoch = 0;
    std::int64_t shard = 0;  // position in shard_indices
    std::int64_t row = 0;    // rows served of that shard, all ranks together
    std::vector<std::int32_t> shard_indices;
    std::vector<std::int32_t> sample_indices;
    Mt19937 rng;
};

struct ShardInfo {
    std::filesystem::path path;
    std::int64_t tokens = 0;
    int token_bytes = 2;
};

// Opens and checks one file. Throws Error naming what was expected and what came.
ShardInfo inspect_shard(const std::filesystem::path& path);

class DataLoader {
  public:
    // files: in order; patterns are expanded by the caller. vocab_size > 0: a token outside of it is an error.
    // rows_per_sample 0: B * ranks.
    DataLoader(std::vector<std::filesystem::path> files, std::int64_t B, std::int64_t T, int rank, int ranks,
               bool shuffle, std::uint32_t seed, std::int64_t vocab_size, std::int64_t rows_per_sample = 0);

    // Fills inputs and targets, (B, T) each; targets are the inputs moved on by one token. No file stays open in
    // between: while one is open, Windows lets nobody replace, rename or delete it, and forked processes share its
    // position.
    void next_batch(std::int32_t* inputs, std::int32_t* targets);
    // To the start of a new epoch (which draws a new order if shuffle is on).
    void reset();

    DataLoaderState state() const { return state_; }
    // Throws ArgumentError if the state does not fit these files.
    void set_state(const DataLoaderState& state);

    std::int64_t B() const { return B_; }
    std::int64_t T() const { return T_; }
    std::int64_t num_tokens() const { return num_tokens_; }
    const std::vector<ShardInfo>& shards() const { return shards_; }

  private:
    std::int64_t samples_in(const ShardInfo& shard) const;
    const ShardInfo& shard() const;  // the shard that the state is in
    void begin_shard();
    void advance(std::int64_t rows);
    void read_row(std::ifstream& file, std::int32_t* inputs, std::int32_t* targets);

    std::vector<ShardInfo> shards_;
    std::int64_t B_, T_, num_tokens_ = 0, vocab_size_;
    int rank_, ranks_;
    bool shuffle_;
    DataLoaderState state_;
    std::vector<char> buffer_;
};

}  // namespace llmc
