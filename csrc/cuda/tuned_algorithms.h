// The algorithms that timing chose for matmuls, kept in a file (doc/formats.md), so that the next process computes by the
// same ones, and times nothing. Processes may share a file and add to it at once: a line is written in one piece, and one
// that is damaged all the same is passed over.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <unordered_map>

#include "cuda/cublaslt.h"

namespace llmc {

struct TunedAlgorithm {
    std::array<std::uint64_t, 8>
        words;              // a cublasLtMatmulAlgo_t, which only the same version of cuBLASLt can read
    double milliseconds;    // as timed
    std::int64_t line = 0;  // of the file; 0 if this process chose it
};

// All that the choice for a matmul depends on.
std::string matmul_in_words(const Matmul& p, bool tf32);

class TunedAlgorithms {
  public:
    // Reads the file, if there is one. An empty path: choices are kept nowhere. device: what a choice holds for, in
    // words: the card and cuBLASLt's version. tf32: as of MatmulEngine.
    TunedAlgorithms(std::filesystem::path file, std::string device, bool tf32);

    // The choice for matmuls like this one; null if there is none.
    const TunedAlgorithm* find(const Matmul& p) const;
    // Takes a choice for this process, and appends it to the file.
    void add(const Matmul& p, const TunedAlgorithm& choice);
    // Warns, once, that a choice of the file cannot be used.
    void refuse(const TunedAlgorithm& choice);

    // How many choices a file has for all devices together; 0 if there is no file.
    static std::int64_t count(const std::filesystem::path& file);

  private:
    std::filesystem::path file_;
    std::string device_;
    bool tf32_;
    std::unordered_map<std::string, TunedAlgorithm> choices_;  // of this device, by matmul in words
    bool has_warned_of_line_ = false, has_warned_of_writing_ = false;
};

}  // namespace llmc
