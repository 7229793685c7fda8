// Matmuls of bf16 on AMX, in blocks of 32 x 32 of C: four tiles of C, for two tiles of A and two of B.
//
// Operands come in strips, 32 rows of A (left) or 32 columns of B (right), along the reduction in steps of
// 32. A step is two tiles of 1 KB:
//   left    [half][16 rows][32 k]                 a row-major A in memory is the same, with a longer row stride
//   right   [half][16 pairs of k][16 columns][2]
//
//   for a block of rows                           a task owns a range of rows and columns of C
//     for a stretch of the reduction              the block of A stays in L2
//       for a strip of B
//         for kL1Steps of it                      16 KB, which stay in L1, and the next 16 KB are prefetched
//           for each 32 rows: multiply_block       C goes through scratch between stretches and L1 blocks
//             at the end: the epilogue
//
// Tiles sum in f32, in the order of k in whole steps: the order of every sum depends on K alone. Strips are
// padded with zeros, so only packing and the epilogue know about edges.
#pragma once

namespace {

constexpr i64 kSide = 32;               // rows and columns of a block of C, and elements of a step
constexpr i64 kStepSize = 2 * 16 * 32;  // elements of a step of a strip
constexpr i64 kL1Steps = 8;

// ---- lines: 32 bf16 ----

inline __m512i load_line(const bf16* p, i64 n) {  // the elements from n on are 0
    return _mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), p);
}
inline void store_line(bf16* p, __m512i line) { _mm512_storeu_si512(p, line); }
inline __m512i line_of(Vec low, Vec high) {
#if !defined(LLMC_KERNEL_AVX512_BF16)
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
#elif defined(_MSC_VER) && !defined(__clang__)
    return _mm512_cvtne2ps_pbh(high.v, low.v);  // there __m512bh is __m512i
#else
    return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
#endif
}
inline Vec low_of(__m512i line) { return {widen(_mm512_castsi512_si256(line))}; }
inline Vec high_of(__m512i line) { return {widen(_mm512_extracti64x4_epi64(line, 1))}; }

// Indices that interleave two lines a and b: pairs (a[i], b[i]) of the first 16 elements, and of the last 16.
alignas(64) constexpr std::uint16_t kPairsLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                     37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
alignas(64) constexpr std::uint16_t kPairsHigh[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21,
                                                      53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                                      27, 59, 28, 60, 29, 61, 30, 62, 31, 63};

// ---- strips ----

enum class Side { left, right };

// Packs a strip of `width` <= 32 rows or columns, with `elements` along the reduction, out of a matrix that is
// contiguous along the reduction (or, if kmajor, across it).
template <Side SIDE>
void pack_strip(bf16* out, const bf16* src, i64 ld, bool kmajor, i64 width, i64 elements) {
    for (i64 k = 0; k < elements; k += kSide, out += kStepSize) {
        const i64 left = smaller(kSide, elements - k);
        Vec tiles[2][16];
        if (kmajor) {
            const __m512i low = _mm512_load_si512(kPairsLow), high = _mm512_load_si512(kPairsHigh);
            for (i64 p = 0; p < 16; ++p) {
                const bf16* row = src + (k + 2 * p) * ld;
                const __m512i a = 2 * p < left ? load_line(row, width) : _mm512_setzero_si512();
                const __m512i b = 2 * p + 1 < left ? load_line(row + ld, width) : _mm512_setzero_si512();
                tiles[0][p].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
                tiles[1][p].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
            }
        } else {
            for (i64 i = 0; i < 32; ++i)
                tiles[i / 16][i % 16].v = _mm512_castsi512_ps(i < width ? load_line(src + i * ld + k, left)
                                                                        : _mm512_setzero_si512());
        }
        for (int half = 0; half < 2; ++half) {
            if (kmajor == (SIDE == Side::left)) transpose(tiles[half]);
            for (int i = 0; i < 16; ++i)
                store_line(out + half * 512 + i * 32, _mm512_castps_si512(tiles[half][i].v));
        }
    }
}

// A left strip. Distances in elements: `row` from a row of a tile to the next, `step` from a step to the next, `below`
// from the upper 16 rows to the lower.
struct LeftStrip {
    const bf16* p;
    i64 row, step, below;
};
inline LeftStrip packed_strip(const bf16* p) { return {p, 32, kStepSize, 512}; }
inline LeftStrip strip_in_memory(const bf16* p, i64 ld) { return {p, ld, kSide, 16 * ld}; }

// What multiply_block fetches into L2 meanwhile: `lines` cache lines per step.
struct Ahead {
    const char* next = nullptr;
    i64 stride = 0;
    i64 lines = 0;
};

// c (32 x 32, dense) = or += a b over `steps`. Between the loads of an operand's two
// tiles there is a multiplication: back to back, the loads would wait for the tiles.
inline void multiply_block(float* c, LeftStrip a, const bf16* b, i64 steps, bool accumulate, Ahead& ahead) {
    constexpr i64 kRow = kSide * 4, kTile = 16 * 4;  // bytes of a row of C, and of a tile's part of it
    char* const upper = reinterpret_cast<char*>(c);
    char* const lower = upper + 16 * kRow;
    if (accumulate) {
        tile_load<0>(upper, kRow);
        tile_load<1>(upper + kTile, kRow);
        tile_load<2>(lower, kRow);
        tile_load<3>(lower + kTile, kRow);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    const bf16 *a_upper = a.p, *a_lower = a.p + a.below;
    for (i64 k = 0; k < steps; ++k) {
        tile_load<6>(b, 64);
        tile_load<4>(a_upper, 2 * a.row);
        tile_dot<0, 4, 6>();
        tile_load<7>(b + 512, 64);
        tile_dot<1, 4, 7>();
        for (i64 i = 0; i < ahead.lines; ++i, ahead.next += ahead.stride) prefetch(ahead.next);
        tile_load<5>(a_lower, 2 * a.row);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
        a_upper += a.step;
        a_lower += a.step;
        b += kStepSize;
    }
    tile_store<0>(upper, kRow);
    tile_store<1>(upper + kTile, kRow);
    tile_store<2>(lower, kRow);
    tile_store<3>(lower + kTile, kRow);
}
inline void multiply_block(float* c, LeftStrip a, const bf16* b, i64 steps, bool accumulate) {
    Ahead nothing;
    multiply_block(c, a, b, steps, accumulate, nothing);
}

// ---- the epilogue of gemm.h for a block of 32 full columns: a row of bf16 is one cache line ----

inline void put(bf16* p, __m512i line, bool past_caches) {
    if (past_caches)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
    else
        store_line(p, line);
}
inline void put(bf16* p, Vec low, Vec high, bool past_caches) { put(p, line_of(low, high), past_caches); }
inline void put(float* p, Vec low, Vec high, bool past_caches) {
    if (past_caches) {
        stream(p, low);
        stream(p + 16, high);
    } else {
        store(p, low);
        store(p + 16, high);
    }
}

template <class G>
void finish_block(const Gemm& g, const float* c, i64 m, i64 n, i64 rows, bool past_caches) {
    const bf16* bias = g.bias ? static_cast<const bf16*>(g.bias) + n : nullptr;
    const Vec bias_low = bias ? load(bias) : zero(), bias_high = bias ? load(bias + 16) : zero();
    bf16* const pre = static_cast<bf16*>(g.pre);
    const bf16* const dgelu = static_cast<const bf16*>(g.dgelu);
    const bool accumulate = g.accumulate;
    const i64 ldc = g.ldc;
    for (i64 r = 0; r < rows; ++r) {
        const i64 at = (m + r) * ldc + n;
        G* const out = static_cast<G*>(g.c) + at;
        Vec low = load(c + r * kSide), high = load(c + r * kSide + 16);
        if (bias) low = low + bias_low, high = high + bias_high;
        if (accumulate) low = load(out) + low, high = load(out + 16) + high;
        if (pre) {
            const __m512i line = line_of(low, high);
            put(pre + at, line, past_caches);
            low = gelu<bf16>(low_of(line)), high = gelu<bf16>(high_of(line));
        }
        if (dgelu) {
            const __m512i line = line_of(low, high);
            low = low_of(line) * gelu_gradient(load(dgelu + at));
            high = high_of(line) * gelu_gradient(load(dgelu + at + 16));
        }
        put(out, low, high, past_caches);
    }
}

// An ordinary store first reads the line, which is most of the cost of a large output. A small output is left in the
// caches for its reader.
inline bool goes_past_caches(const Gemm& g) {
    const i64 size = g.c_f32 ? 4 : 2;
    const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; };
    return !g.accumulate && g.M * g.N * size > (8 << 20) && aligned(g.c) && aligned(g.pre) &&
           g.ldc * size % 64 == 0;
}

// ---- matmuls ----

// Rows and stretch of a block of A, which stays in L2. If A is k-major (dweight), A and B are both packed: then a
// stretch is only as long as the part of B that L1 holds, and more rows use it.
inline i64 block_rows(const Gemm& g) { return g.a_kmajor ? 384 : 256; }
inline i64 stretch_of(const Gemm& g) { return g.a_kmajor ? kL1Steps * kSide : 768; }

llmc::GemmTask tile_gemm_task(const Gemm& g) {
    // If the reduction takes several stretches, all of the task's C is in scratch, which is to stay in L2 beside A.
    return {block_rows(g), g.K > stretch_of(g) ? 768 : i64{1} << 40, kSide, kSide, block_rows(g), 192};
}

// Whether A is read in place. It is packed if its rows are too far apart for the TLB and the sets of the caches, or
// end within a step.
inline bool read_in_memory(const Gemm& g) { return !g.a_kmajor && g.K % kSide == 0 && g.lda * 2 < 8192; }

struct TileScratch {
    bf16 *left, *right;
    float* c;
    i64 bytes;
    TileScratch(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1, void* memory) {
        const i64 rows = round_up(smaller(block_rows(g), m1 - m0), kSide), stretch = stretch_of(g);
        const i64 strips = g.K <= stretch ? 1 : (n1 - n0 + kSide - 1) / kSide;
        const i64 left_size = (read_in_memory(g) ? kSide : rows) * stretch;
        left = static_cast<bf16*>(memory);
        right = left + left_size;
        c = reinterpret_cast<float*>(right + kL1Steps * kStepSize);
        bytes = (left_size + kL1Steps * kStepSize) * 2 + strips * rows * kSide * 4;
    }
};

i64 tile_gemm_scratch(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1) {
    return TileScratch(g, m0, m1, n0, n1, nullptr).bytes;
}

void tile_gemm(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1, void* scratch) {
    const TilesInUse tiles;
    const TileScratch s(g, m0, m1, n0, n1, scratch);
    const bf16 *const a = static_cast<const bf16*>(g.a), *const b = static_cast<const bf16*>(g.b);
    const bf16* const packed = static_cast<const bf16*>(g.packed);
    const i64 stretch = stretch_of(g), padded_K = round_up(g.K, kSide);
    const bool in_memory = read_in_memory(g), past_caches = goes_past_caches(g);

    for (i64 m = m0; m < m1; m += block_rows(g)) {
        const i64 rows = smaller(block_rows(g), m1 - m), padded_rows = round_up(rows, kSide);
        const i64 first_packed = in_memory ? rows / kSide * kSide : 0;
        const i64 packed_stretch = in_memory ? 0 : stretch;  // one strip at most, or all of them
        for (i64 ks = 0; ks == 0 || ks < g.K; ks += stretch) {
            const i64 elements = smaller(stretch, g.K - ks), steps = (elements + kSide - 1) / kSide;
            for (i64 r = first_packed; r < rows; r += kSide)
                pack_strip<Side::left>(s.left + r * packed_stretch,
                                       g.a_kmajor ? a + ks * g.lda + m + r : a + (m + r) * g.lda + ks, g.lda,
                                       g.a_kmajor, smaller(kSide, rows - r), elements);
            for (i64 n = n0; n < n1; n += kSide) {
                const i64 columns = smaller(kSide, n1 - n);
                float* const c_strip = s.c + (g.K <= stretch ? 0 : (n - n0) * padded_rows);
                for (i64 ki = 0; ki == 0 || ki < steps; ki += kL1Steps) {
                    const i64 count = smaller(kL1Steps, steps - ki), k = ks + ki * kSide;
                    const bool last = ki + count == steps && ks + elements == g.K;
                    const bf16* right = s.right;
                    const i64 lines =
                        (1024 + padded_rows - 1) / padded_rows;  // 32 per step, spread over the rows
                    Ahead ahead;
                    if (packed) {
                        right = packed + n * padded_K + k * kSide;
                        const bf16* next = right + count * kStepSize;
                        if (ki + count == steps) next = packed + (n + kSide) * padded_K + ks * kSide;
                        ahead = {reinterpret_cast<const char*>(next), 64, lines};
                    } else {
                        pack_strip<Side::right>(s.right, g.b_kmajor ? b + k * g.ldb + n : b + n * g.ldb + k,
                                                g.ldb, g.b_kmajor, columns,
                                                smaller(kL1Steps * kSide, g.K - k));
                        if (g.b_kmajor)
                            ahead = {reinterpret_cast<const char*>(b + k * g.ldb + n + kSide), 2 * g.ldb,
                                     lines};
                    }
                    for (i64 r = 0; r < rows; r += kSide) {
                        const LeftStrip left =
                            r < first_packed ? strip_in_memory(a + (m + r) * g.lda + k, g.lda)
                                             : packed_strip(s.left + r * packed_stretch + ki * kStepSize);
                        float* const c = c_strip + r * kSide;
                        multiply_block(c, left, right, count, k > 0, ahead);
                        if (!last) continue;
                        const i64 height = smaller(kSide, rows - r);
                        if (columns < kSide && g.c_f32)
                            epilogue<bf16, float>(g, c, kSide, m + r, n, height, columns);
                        else if (columns < kSide)
                            epilogue<bf16, bf16>(g, c, kSide, m + r, n, height, columns);
                        else if (g.c_f32)
                            finish_block<float>(g, c, m + r, n, height, past_caches);
                        else
                            finish_block<bf16>(g, c, m + r, n, height, past_caches);
                    }
                }
            }
        }
    }
    if (past_caches) fence();
}

// The peak of the tiles: multiply_adds of simd/peak.h.
double tile_multiply_adds(i64 rounds, float* operands) {
    const TilesInUse tiles;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
    for (i64 round = 0; round < rounds; ++round) {
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
    }
    (void)operands;
    return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(rounds);
}

// ---- a weight packed ahead: all strips of B, one after the other ----

i64 packed_weight_bytes(i64 K, i64 N) { return round_up(K, kSide) * round_up(N, kSide) * 2; }

void pack_weight(void* packed, const Gemm& g, i64 begin, i64 end) {
    const i64 padded_K = round_up(g.K, kSide);
    const bf16* const b = static_cast<const bf16*>(g.b);
    bf16* const out = static_cast<bf16*>(packed);
    for (i64 row = begin; row < end; row += kSide) {
        if (!g.b_kmajor)
            pack_strip<Side::right>(out + row * padded_K, b + row * g.ldb, g.ldb, false,
                                    smaller(kSide, g.N - row), g.K);
        else
            for (i64 n = 0; n < g.N; n += kSide)
                pack_strip<Side::right>(out + n * padded_K + row * kSide, b + row * g.ldb + n, g.ldb, true,
                                        smaller(kSide, g.N - n), smaller(kSide, g.K - row));
    }
}

}  // namespace
