// Tiles for testing the AMX kernels on a CPU without AMX. The arithmetic is the instruction's, bit for bit
// (checked against Bochs, see CONTRIBUTING.md): per element of C, the products of the even and of the odd
// elements along k are summed apart, in order, by fused multiply-adds that start from 0; their total is added
// to C. Everything rounds to nearest even, and denormals count as zero, as they do in every task of
// parallel_for, whose mode this arithmetic relies on.
#pragma once

namespace {

alignas(64) thread_local float emulated_tiles[8][16][16];

// The real one zeroes the tiles. This one fills them with garbage, so that a tile used before it is set is noticed.
class TilesInUse {
  public:
    TilesInUse() {
        for (auto& tile : emulated_tiles)
            for (auto& row : tile) _mm512_store_ps(row, _mm512_set1_ps(3e30f));
    }
};

template <int TILE>
inline void tile_zero() {
    for (auto& row : emulated_tiles[TILE]) _mm512_store_ps(row, _mm512_setzero_ps());
}
template <int TILE>
inline void tile_load(const void* p, i64 row_bytes) {
    for (int i = 0; i < 16; ++i)
        _mm512_store_ps(emulated_tiles[TILE][i],
                        _mm512_loadu_ps(static_cast<const char*>(p) + i * row_bytes));
}
template <int TILE>
inline void tile_store(void* p, i64 row_bytes) {
    for (int i = 0; i < 16; ++i)
        _mm512_storeu_ps(static_cast<char*>(p) + i * row_bytes, _mm512_load_ps(emulated_tiles[TILE][i]));
}
template <int C, int A, int B>
inline void tile_dot() {
    __m512 b[2][16];
    for (int k = 0; k < 16; ++k) {
        const __m512i row = _mm512_load_si512(emulated_tiles[B][k]);
        b[0][k] = _mm512_castsi512_ps(_mm512_slli_epi32(row, 16));
        b[1][k] = _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(-65536)));
    }
    for (int m = 0; m < 16; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < 16; ++k) {
            const __m512i pair = _mm512_castps_si512(_mm512_set1_ps(emulated_tiles[A][m][k]));
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), b[0][k], even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536))),
                                  b[1][k], odd);
        }
        float* c = emulated_tiles[C][m];
        _mm512_store_ps(c, _mm512_add_ps(_mm512_load_ps(c), _mm512_add_ps(even, odd)));
    }
}

}  // namespace
