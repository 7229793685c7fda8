// The order in which attention's blocks go through heads and tiles of their rows.
#pragma once

#include <algorithm>

#include "core/dims.h"
#include "cuda/device.cuh"

namespace llmc {

// Heads whose blocks run at about the same time, so that what one block reads is still in the L2 cache when the next
// one wants it: those whose keys and values, or queries and gradients, are 8 MB.
inline int heads_together(const AttentionDims& d) {
    constexpr i64 kBytes = i64{8} << 20;
    const i64 bytes_of_head = 2 * d.T * d.HS * static_cast<i64>(sizeof(bf16));
    return static_cast<int>(std::max<i64>(std::min(kBytes / std::max<i64>(bytes_of_head, 1), d.B * d.NH), 1));
}

struct Place {
    i64 b, h, row;  // row: b NH + h
    int tile;
};
// The head and the tile of `rows` rows that a block computes. Among heads that run together, blocks are in the order of
// tiles, that with the most work first, so that the short ones fill the gaps at the end.
template <int rows>
__device__ __forceinline__ Place place(const AttentionDims& d, int together, bool last_first) {
    const unsigned heads = static_cast<unsigned>(d.B * d.NH), NH = static_cast<unsigned>(d.NH);
    const unsigned tiles = (static_cast<unsigned>(d.T) + rows - 1) / rows;
    const unsigned in_group = static_cast<unsigned>(together), blocks = in_group * tiles;
    const unsigned first = blockIdx.x / blocks * in_group, left = heads - first;
    const unsigned group = left < in_group ? left : in_group;  // the last group may be smaller
    const unsigned row = first + blockIdx.x % blocks % group, order = blockIdx.x % blocks / group;
    Place p;
    p.row = row;
    p.b = row / NH, p.h = row % NH;
    p.tile = static_cast<int>(last_first ? tiles - 1 - order : order);
    return p;
}

}  // namespace llmc
