// Which elements of a tensor a rank owns when the tensor is spread over the ranks (ZeRO-1; Rajbhandari et al. 2020).
#pragma once

#include <cstdint>

#include "core/exact_sum.h"

namespace llmc {

struct Range {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
};

// Pieces begin at multiples of this, so that the norm's blocks do not depend on the ranks.
constexpr std::int64_t kPieceBlock = kNormBlock;

// Rank `rank`'s piece of `numel` elements: as many blocks for every rank; the last one has the rest too. Any
// number divides, and nothing is padded: a tensor of less than `size` blocks is the last rank's alone.
inline Range piece_of(std::int64_t numel, int rank, int size) {
    const std::int64_t each = numel / size / kPieceBlock * kPieceBlock;
    return {each * rank, rank + 1 == size ? numel : each * (rank + 1)};
}

}  // namespace llmc
