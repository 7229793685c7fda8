// Causal attention of bf16 on AMX (amx_gemm.h has the tiles and the strips). Forward keeps the scores of 32
// queries against up to 1024 keys and rescales between such blocks of keys (Milakov & Gimelshein 2018), so up
// to T = 1024 the softmax is the plain one. Blocks of 32 x 32 above the diagonal are skipped.
//
// What limits it is the exponential and the conversions between f32 scores and bf16 operands, not the tiles.
// So 2^x is computed by a function of its own, without clamping. And backward computes dK and dV transposed: P and dS
// are then right operands, which consist of pairs of their rows, so neither is ever transposed.
#pragma once

namespace {

constexpr i64 kForwardKeys = 1024;  // scores of 32 queries: 128 KB, in L2
constexpr i64 kBackwardQueries = 128, kBackwardKeys = 64;
constexpr i64 kBlock = kSide * kSide;
constexpr float kHidden = -1e30f;  // the score of a key that the query may not see
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^x, accurate to an ulp, and exactly 1 at 0. scale2 saturates.
inline Vec exp2(Vec x) {
    const Vec n = round(x), f = x - n;
    Vec p = set1(1.53533618e-4f);
    p = fma(p, f, set1(1.33988745e-3f));
    p = fma(p, f, set1(9.61843736e-3f));
    p = fma(p, f, set1(5.55033247e-2f));
    p = fma(p, f, set1(2.40226479e-1f));
    p = fma(p, f, set1(6.93147203e-1f));
    return scale2(fma(p, f, set1(1.0f)), n);
}

alignas(64) constexpr std::uint16_t kPairsOfHalves[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                          21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// pack_by_rows makes strips of 32 rows of x (left: queries, right: keys), pack_by_channels strips of 32 channels, with
// the reduction along the rows. A strip holds the whole reduction, padded.
template <Side SIDE>
void pack_by_rows(bf16* out, const bf16* x, i64 ld, i64 rows, i64 HS) {
    for (i64 t = 0; t < rows; t += kSide)
        pack_strip<SIDE>(out + t * round_up(HS, kSide), x + t * ld, ld, false, smaller(kSide, rows - t), HS);
}
template <Side SIDE>
void pack_by_channels(bf16* out, const bf16* x, i64 ld, i64 rows, i64 HS) {
    for (i64 d = 0; d < HS; d += kSide)
        pack_strip<SIDE>(out + d * round_up(rows, kSide), x + d, ld, true, smaller(kSide, HS - d), rows);
}

// Stores a row of 32 channels, of which n exist.
inline void put_row(bf16* p, Vec low, Vec high, i64 n) {
    _mm512_mask_storeu_epi16(p, _bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), line_of(low, high));
}

// ---- forward ----

struct TileForwardScratch {
    Pieces pieces;
    bf16 *keys, *values, *queries, *probs;
    float *scores, *out, *top, *sum, *highest, *total;
    TileForwardScratch(void* memory, i64 T_, i64 HS) : pieces{static_cast<char*>(memory)} {
        const i64 rows = round_up(T_, kSide), width = round_up(HS, kSide),
                  block = smaller(rows, kForwardKeys);
        keys = pieces.take<bf16>(rows * width);
        values = pieces.take<bf16>(rows * width);
        queries = pieces.take<bf16>(kSide * width);
        probs = pieces.take<bf16>(kSide * block);
        scores = pieces.take<float>(kSide * block);
        out = pieces.take<float>(kSide * width);
        top = pieces.take<float>(kSide * Vec::W);
        sum = pieces.take<float>(kSide * Vec::W);
        highest = pieces.take<float>(kSide);
        total = pieces.take<float>(kSide);
    }
};

i64 tile_attention_forward_scratch(i64 T_, i64 HS) { return TileForwardScratch(nullptr, T_, HS).pieces.used; }

// Hides the scores above the diagonal, and raises `top` to the highest score of each query so far, lane by lane.
inline void raise_top(float* scores, float* top, bool diagonal) {
    for (int r = 0; r < kSide; ++r, scores += kSide, top += Vec::W) {
        Vec a = load(scores), b = load(scores + 16);
        if (diagonal) {
            store(scores, a = keep_first(a, r + 1, kHidden));
            store(scores + 16, b = keep_first(b, r - 15, kHidden));
        }
        store(top, max(max(a, b), load(top)));
    }
}

// probs = 2^(scores factor - highest), laid out as a step of a left strip; sum += probs, lane by lane.
inline void softmax_block(bf16* probs, float* sum, const float* scores, const float* highest, Vec factor) {
    for (int r = 0; r < kSide; ++r) {
        const Vec shift = set1(-highest[r]);
        const Vec a = exp2(fma(load(scores + r * kSide), factor, shift));
        const Vec b = exp2(fma(load(scores + r * kSide + 16), factor, shift));
        store(sum + r * Vec::W, load(sum + r * Vec::W) + (a + b));
        store_line(probs + r * kSide, line_of(a, b));
    }
}

void tile_attention_forward(const AttentionHead<bf16>& h, i64 begin, i64 end, void* memory) {
    const TilesInUse tiles;
    const TileForwardScratch s(memory, h.T_, h.HS);
    const i64 HS = h.HS, width = round_up(HS, kSide), keys = round_up(end, kSide);
    const float factor = h.scale * kLog2e;

    pack_by_rows<Side::right>(s.keys, h.k, h.ldq, end, HS);
    pack_by_channels<Side::right>(s.values, h.v, h.ldq, end, HS);
    for (i64 q0 = begin; q0 < end; q0 += kSide) {
        const i64 rows = smaller(kSide, end - q0);
        pack_by_rows<Side::left>(s.queries, h.q + q0 * h.ldq, h.ldq, rows, HS);
        for (i64 k0 = 0; k0 <= q0; k0 += kForwardKeys) {
            const i64 blocks = (smaller(kForwardKeys, q0 + kSide - k0) + kSide - 1) / kSide;
            for (i64 i = 0; i < kSide * Vec::W; i += Vec::W) {
                store(s.top + i, set1(kHidden));
                store(s.sum + i, zero());
            }
            for (i64 j = 0; j < blocks; ++j) {
                float* const scores = s.scores + j * kBlock;
                multiply_block(scores, packed_strip(s.queries), s.keys + (k0 + j * kSide) * width,
                               width / kSide, false);
                raise_top(scores, s.top, k0 + j * kSide == q0);
            }
            for (i64 r = 0; r < kSide; ++r) {
                const float now = max(load(s.top + r * Vec::W)) * factor;
                if (k0 == 0) {
                    s.highest[r] = now;
                    s.total[r] = 0.0f;
                } else if (now > s.highest[r]) {
                    const Vec shrink = exp2(set1(s.highest[r] - now));
                    for (i64 d = 0; d < width; d += kSide)
                        for (int half = 0; half < 2; ++half) {
                            float* const o = s.out + d * kSide + r * kSide + half * 16;
                            store(o, load(o) * shrink);
                        }
                    s.total[r] *= first_lane(shrink);
                    s.highest[r] = now;
                }
            }
            for (i64 j = 0; j < blocks; ++j)
                softmax_block(s.probs + j * kBlock, s.sum, s.scores + j * kBlock, s.highest, set1(factor));
            for (i64 r = 0; r < kSide; ++r) s.total[r] += sum(load(s.sum + r * Vec::W));
            for (i64 d = 0; d < width; d += kSide)
                multiply_block(s.out + d * kSide, packed_strip(s.probs), s.values + d * keys + k0 * kSide,
                               blocks, k0 > 0);
        }
        for (i64 r = 0; r < rows; ++r) {
            const Vec norm = set1(1.0f / s.total[r]);
            for (i64 d = 0; d < HS; d += kSide) {
                const float* const o = s.out + d * kSide + r * kSide;
                put_row(h.out + (q0 + r) * h.ldo + d, load(o) * norm, load(o + 16) * norm,
                        smaller(kSide, HS - d));
            }
            h.lse[q0 + r] = s.highest[r] * kLn2 + logf(s.total[r]);
        }
    }
}

// ---- backward: the formulas are in attention.h. Blocks of queries outside: dQ of a block is complete after its
// keys; dK and dV, transposed and in f32, add up over the blocks. ----

struct TileBackwardScratch {
    Pieces pieces;
    bf16 *keys, *values, *keys_by_channels;                           // of the head
    bf16 *queries, *douts, *queries_by_channels, *douts_by_channels;  // of a block of queries
    bf16 *probs_right, *dscores_right, *dscores_left;                 // of a block of queries x keys
    float *scores, *dprobs, *dq, *dk, *dv, *lse, *D;
    TileBackwardScratch(void* memory, i64 T_, i64 HS) : pieces{static_cast<char*>(memory)} {
        const i64 width = round_up(HS, kSide), whole = round_up(T_, kSide) * width;
        const i64 some = kBackwardQueries * width, block = kBackwardQueries * kBackwardKeys;
        keys = pieces.take<bf16>(whole);
        values = pieces.take<bf16>(whole);
        keys_by_channels = pieces.take<bf16>(whole);
        queries = pieces.take<bf16>(some);
        douts = pieces.take<bf16>(some);
        queries_by_channels = pieces.take<bf16>(some);
        douts_by_channels = pieces.take<bf16>(some);
        probs_right = pieces.take<bf16>(block);
        dscores_right = pieces.take<bf16>(block);
        dscores_left = pieces.take<bf16>(block);
        scores = pieces.take<float>(kBlock);
        dprobs = pieces.take<float>(kBlock);
        dq = pieces.take<float>(some);
        dk = pieces.take<float>(whole);
        dv = pieces.take<float>(whole);
        lse = pieces.take<float>(kBackwardQueries);
        D = pieces.take<float>(kBackwardQueries);
    }
};

i64 tile_attention_backward_scratch(i64 T_, i64 HS) {
    return TileBackwardScratch(nullptr, T_, HS).pieces.used;
}

// Computes P and dS of a block, two queries at a time, and stores each as a step of a right strip (columns: keys), and
// dS also as a step of a left strip (rows: queries).
inline void score_gradients(const TileBackwardScratch& s, bf16* probs_right, bf16* dscores_right,
                            bf16* dscores_left, i64 first_query, bool diagonal, float scale) {
    const __m512i halves = _mm512_load_si512(kPairsOfHalves);
    const __m512i low = _mm512_load_si512(kPairsLow), high = _mm512_load_si512(kPairsHigh);
    const Vec factor = set1(scale * kLog2e), vscale = set1(scale);
    for (int r = 0; r < kSide; r += 2) {
        Vec p[2][2], ds[2][2];
        LLMC_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Vec lse = set1(-s.lse[first_query + r + i]), D = set1(s.D[first_query + r + i]);
            LLMC_UNROLL
            for (int half = 0; half < 2; ++half) {
                const i64 at = (r + i) * kSide + half * 16;
                Vec e = exp2(fma(load(s.scores + at), factor, lse));
                if (diagonal) e = keep_first(e, r + i + 1 - half * 16, 0.0f);
                p[i][half] = e;
                ds[i][half] = e * vscale * (load(s.dprobs + at) - D);
            }
        }
        LLMC_UNROLL
        for (int half = 0; half < 2; ++half)
            store_line(probs_right + half * 512 + r * 16,
                       _mm512_permutexvar_epi16(halves, line_of(p[0][half], p[1][half])));
        const __m512i even = line_of(ds[0][0], ds[0][1]), odd = line_of(ds[1][0], ds[1][1]);
        store_line(dscores_left + r * kSide, even);
        store_line(dscores_left + (r + 1) * kSide, odd);
        store_line(dscores_right + r * 16, _mm512_permutex2var_epi16(even, low, odd));
        store_line(dscores_right + 512 + r * 16, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// Stores 32 rows x 32 channels of a block that holds them transposed.
inline void put_transposed(bf16* out, i64 ld, const float* block, i64 rows, i64 channels) {
    for (int half = 0; half < 2; ++half) {
        Vec low[16], high[16];
        for (int i = 0; i < 16; ++i) {
            low[i] = load(block + i * kSide + half * 16);
            high[i] = load(block + (16 + i) * kSide + half * 16);
        }
        transpose(low);
        transpose(high);
        for (int i = 0; i < 16 && half * 16 + i < rows; ++i)
            put_row(out + (half * 16 + i) * ld, low[i], high[i], channels);
    }
}

void tile_attention_backward(const AttentionHead<bf16>& h, void* memory) {
    const TilesInUse tiles;
    const TileBackwardScratch s(memory, h.T_, h.HS);
    const i64 HS = h.HS, T_ = h.T_, width = round_up(HS, kSide), steps = width / kSide;
    const i64 padded_T = round_up(T_, kSide);

    pack_by_rows<Side::right>(s.keys, h.k, h.ldq, T_, HS);
    pack_by_rows<Side::right>(s.values, h.v, h.ldq, T_, HS);
    pack_by_channels<Side::right>(s.keys_by_channels, h.k, h.ldq, T_, HS);
    for (i64 q0 = 0; q0 < T_; q0 += kBackwardQueries) {
        const i64 rows = smaller(kBackwardQueries, T_ - q0), blocks = (rows + kSide - 1) / kSide;
        const bf16 *const q = h.q + q0 * h.ldq, *const dout = h.dout + q0 * h.ldo;
        pack_by_rows<Side::left>(s.queries, q, h.ldq, rows, HS);
        pack_by_rows<Side::left>(s.douts, dout, h.ldo, rows, HS);
        pack_by_channels<Side::left>(s.queries_by_channels, q, h.ldq, rows, HS);
        pack_by_channels<Side::left>(s.douts_by_channels, dout, h.ldo, rows, HS);
        for (i64 r = 0; r < kBackwardQueries; ++r) {
            const bf16 *const o = h.out + (q0 + r) * h.ldo, *const d = dout + r * h.ldo;
            // Queries that do not exist get probability 0.
            s.lse[r] = r < rows ? h.lse[q0 + r] * kLog2e : -kHidden;
            s.D[r] = r < rows ? sum(reduce(
                                    HS, [=](i64 i, auto m) { return load(o + i, m) * load(d + i, m); }))
                              : 0.0f;
        }
        for (i64 k0 = 0; k0 < q0 + rows; k0 += kBackwardKeys) {
            for (i64 j = 0; j < kBackwardKeys / kSide; ++j) {
                const i64 key = k0 + j * kSide;
                const i64 first = key > q0 ? (key - q0) / kSide : 0;  // block of queries that sees these keys
                for (i64 i = first; i < blocks; ++i) {
                    const i64 query = i * kSide;
                    multiply_block(s.scores, packed_strip(s.queries + query * width), s.keys + key * width,
                                   steps, false);
                    multiply_block(s.dprobs, packed_strip(s.douts + query * width), s.values + key * width,
                                   steps, false);
                    const i64 right = j * kBackwardQueries * kSide + i * kStepSize;
                    score_gradients(s, s.probs_right + right, s.dscores_right + right,
                                    s.dscores_left + i * kBackwardKeys * kSide + j * kStepSize, query,
                                    key == q0 + query, h.scale);
                }
                if (first >= blocks) continue;
                const i64 right = j * kBackwardQueries * kSide + first * kStepSize;
                for (i64 d = 0; d < width; d += kSide) {
                    const i64 left = d * round_up(rows, kSide) + first * kStepSize,
                              sum_at = key * width + d * kSide;
                    multiply_block(s.dv + sum_at, packed_strip(s.douts_by_channels + left),
                                   s.probs_right + right, blocks - first, key < q0);
                    multiply_block(s.dk + sum_at, packed_strip(s.queries_by_channels + left),
                                   s.dscores_right + right, blocks - first, key < q0);
                }
            }
            for (i64 i = 0; i < blocks; ++i) {
                if (q0 + i * kSide < k0) continue;
                const i64 seen = smaller(kBackwardKeys / kSide, (q0 + i * kSide - k0) / kSide + 1);
                for (i64 d = 0; d < width; d += kSide)
                    multiply_block(s.dq + i * kSide * width + d * kSide,
                                   packed_strip(s.dscores_left + i * kBackwardKeys * kSide),
                                   s.keys_by_channels + d * padded_T + k0 * kSide, seen, k0 > 0);
            }
        }
        for (i64 r = 0; r < rows; ++r)
            for (i64 d = 0; d < HS; d += kSide) {
                const float* const x = s.dq + r / kSide * kSide * width + d * kSide + r % kSide * kSide;
                put_row(h.dq + (q0 + r) * h.ldq + d, load(x), load(x + 16), smaller(kSide, HS - d));
            }
    }
    for (i64 t = 0; t < T_; t += kSide)
        for (i64 d = 0; d < HS; d += kSide) {
            const i64 at = t * width + d * kSide, rows = smaller(kSide, T_ - t),
                      channels = smaller(kSide, HS - d);
            put_transposed(h.dk + t * h.ldq + d, h.ldq, s.dk + at, rows, channels);
            put_transposed(h.dv + t * h.ldq + d, h.ldq, s.dv + at, rows, channels);
        }
}

}  // namespace
