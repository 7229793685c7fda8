// Which elements of a model's parameters a rank owns when they are divided among ranks (ZeRO-1; Rajbhandari et al. 2020):
// of most tensors a piece; of those that cannot be updated in pieces, as a matrix that Muon orthogonalises, one rank owns
// all.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/exact_sum.h"
#include "core/parameter.h"
#include "core/tensor.h"

namespace llmc {

struct Range {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
};

// Pieces begin at multiples of this, so that the norm's blocks do not depend on the ranks.
constexpr std::int64_t kPieceBlock = kNormBlock;

// In place of the rank that owns a tensor: each owns a piece.
constexpr int kEachRank = -1;

// Rank `rank`'s piece of `numel` elements: as many blocks for every rank; the last one has the rest too. Any
// number divides, and nothing is padded: a tensor of less than `size` blocks is the last rank's alone.
inline Range piece_of(std::int64_t numel, int rank, int size, int owner = kEachRank) {
    if (owner != kEachRank) return {0, rank == owner ? numel : 0};
    const std::int64_t each = numel / size / kPieceBlock * kPieceBlock;
    return {each * rank, rank + 1 == size ? numel : each * (rank + 1)};
}

// A tensor that is divided among ranks.
struct Divided {
    Divided(const Tensor& tensor, int owner = kEachRank) : tensor(tensor), owner(owner) {}
    Range piece(int rank, int size) const { return piece_of(tensor.numel(), rank, size, owner); }

    Tensor tensor;
    int owner;  // a rank, or kEachRank
};

// How a model's parameters are divided. Every rank comes to the same.
class Partition {
  public:
    // whole: of which parameters each layer has one owner. The largest layers are given out first, each to the rank that has
    // the least so far, and among those to the one that has the least of its unit: so owners have about as much, and work
    // side by side.
    Partition(std::span<const Parameter> parameters, const std::vector<bool>& whole, int ranks);

    int owner(std::size_t parameter, std::int64_t layer) const;
    // A gradient as backward() names it: a layer of a parameter's. Throws ArgumentError if it is none.
    Divided divided(const Tensor& gradient) const;

  private:
    std::vector<std::vector<int>> owners_;                // by parameter and layer
    std::unordered_map<const void*, Divided> gradients_;  // by address
};

}  // namespace llmc
