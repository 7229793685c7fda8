// The eight tile registers of AMX: 16 rows of 64 bytes each. TilesInUse configures them for its scope; tile
// numbers are template arguments because they are part of the instructions. Under LLMC_AMX_EMULATION the same
// names are plain AVX-512 (amx_tiles_emulated.h), so that the kernels run, slowly, on CPUs without AMX.
#pragma once

#if defined(LLMC_AMX_EMULATION)
#include "cpu/simd/amx_tiles_emulated.h"
#else

namespace {

struct TileConfig {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t bytes_per_row[16];
    std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
alignas(64) constexpr TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#if defined(_MSC_VER)

class TilesInUse {
  public:
    TilesInUse() { _tile_loadconfig(&kTileConfig); }
    ~TilesInUse() { _tile_release(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};
template <int TILE>
inline void tile_zero() {
    _tile_zero(TILE);
}
template <int TILE>
inline void tile_load(const void* p, i64 row_bytes) {
    _tile_loadd(TILE, p, static_cast<int>(row_bytes));
}
template <int TILE>
inline void tile_store(void* p, i64 row_bytes) {
    _tile_stored(TILE, p, static_cast<int>(row_bytes));
}
template <int C, int A, int B>
inline void tile_dot() {
    _tile_dpbf16ps(C, A, B);
}

#else

// gcc's intrinsics are assembly as well, but its loads do not say that they read memory (a store before one
// may be moved behind it), its _tile_loadconfig says 8 bytes where 64 are read, and neither takes a template
// argument. Hence our own; the order among the statements is kept by volatile.
class TilesInUse {
  public:
    TilesInUse() { asm volatile("ldtilecfg %0" : : "m"(kTileConfig)); }
    ~TilesInUse() { asm volatile("tilerelease" : : : "memory"); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};
template <int TILE>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
inline void tile_load(const void* p, i64 row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int TILE>
inline void tile_store(void* p, i64 row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(TILE) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace

#endif
