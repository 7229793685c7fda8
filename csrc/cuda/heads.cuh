// The order in which attention's blocks go through heads and tiles of their rows.
#pragma once

#include "core/dims.h"
#include "cuda/device.cuh"

namespace llmc {

// Heads whose blocks run at about the same time, so that what one block reads is still in the L2 cache when the next
// one wants it: all of them, if their keys and values, or queries and gradients, are at most 16 MB, else one after another.
inline int heads_together(const AttentionDims& d) {
    constexpr i64 kBytes = i64{16} << 20;
    const i64 heads = d.B * d.NH;
    return static_cast<int>(2 * d.T * d.HS * static_cast<i64>(sizeof(bf16)) * heads <= kBytes ? heads : 1);
}

struct Place {
    i64 b, h, row;  // row: b NH + h
    int tile;
};
// The head and the tile of `rows` rows that a block computes. Among heads that run together, blocks are in the order of
// tiles, that with the most work first, so that the short ones fill the gaps at the end.
template <int rows>
__device__ __forceinline__ Place place(const AttentionDims& d, int together, bool last_first) {
    const unsigned group = static_cast<unsigned>(together), NH = static_cast<unsigned>(d.NH);
    const unsigned tiles = (static_cast<unsigned>(d.T) + rows - 1) / rows, blocks = group * tiles;
    const unsigned row = blockIdx.x / blocks * group + blockIdx.x % group,
                   order = blockIdx.x % blocks / group;
    Place p;
    p.row = row;
    p.b = row / NH, p.h = row % NH;
    p.tile = static_cast<int>(last_first ? tiles - 1 - order : order);
    return p;
}

}  // namespace llmc
