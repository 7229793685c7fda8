// Causal attention, forward and backward, in blocks with the online softmax (Milakov & Gimelshein 2018; Dao
// et al. 2022): no (T, T) matrix exists, and forward leaves only out and lse, the log-sum-exp of each row of
// scores, for backward. Its matmuls run through the micro-kernel of gemm.h. Blocks of keys that no query of a
// block may see are skipped.
//
// A right operand is packed in strips of NR columns. A left operand is copied row by row, or was computed here: the
// micro-kernel's strides reach both.
#pragma once

namespace {

using llmc::AttentionHead;

constexpr i64 kQB = 48;  // queries in a block: a multiple of every MR, even for pairs
constexpr i64 kKB = 96;  // keys in a block: a multiple of kQB, of every NR and of every MR
static_assert(kQB % kMR == 0 && kKB % kQB == 0 && kKB % kNR == 0 && kKB % kMR == 0);

template <class P>
inline i64 units_of(i64 elements) {
    return (elements + P::kPerUnit - 1) / P::kPerUnit;
}

// Right operand, the reduction along the channels of a row (K of q k^T): [strip of rows][unit of HS][NR].
template <class P>
void pack_channels(typename P::Unit* out, const typename P::T* x, i64 ld, i64 rows, i64 HS) {
    for (i64 r = 0; r < rows; r += kNR)
        pack_rows<P, kNR>(out + r * units_of<P>(HS), x + r * ld, ld, smaller(kNR, rows - r), HS);
}

// Right operand, the reduction along positions (V of p v), in blocks of BLOCK positions: [block][strip of
// HS][unit][NR].
template <class P, i64 BLOCK>
i64 positions_block(i64 HS) {
    return units_of<P>(BLOCK) * round_up(HS, kNR);
}
template <class P, i64 BLOCK>
void pack_positions(typename P::Unit* out, const typename P::T* x, i64 ld, i64 rows, i64 HS) {
    for (i64 t = 0; t < rows; t += BLOCK, out += positions_block<P, BLOCK>(HS))
        for (i64 n = 0; n < HS; n += kNR)
            pack_columns<P, kNR>(out + n * units_of<P>(BLOCK), x + t * ld + n, ld, smaller(kNR, HS - n),
                                 smaller(BLOCK, rows - t));
}

// Left operand, the reduction along the channels of a row: [row][unit], in whole vectors. Rows up to a multiple of MR.
template <class P>
i64 row_units(i64 HS) {
    return round_up(units_of<P>(HS), Vec::W);
}
template <class P>
void copy_rows(typename P::Unit* out, const typename P::T* x, i64 ld, i64 rows, i64 HS) {
    constexpr i64 kStep = Vec::W * P::kPerUnit;
    float* to = reinterpret_cast<float*>(out);
    for (i64 r = 0; r < round_up(rows, kMR); ++r)
        for (i64 k = 0; k < HS; k += kStep, to += Vec::W)
            store(to,
                  r < rows ? P::load_k(x + r * ld + k, static_cast<int>(smaller(kStep, HS - k))) : zero());
}

// A block of queries against one of keys: query r sees the keys up to r + diagonal. Tiles of which no query sees a key
// are left out of all products.
struct Seen {
    i64 queries, keys, diagonal;
    i64 keys_of(i64 r) const { return smaller(keys, r + diagonal + 1); }
    i64 first_query(i64 key) const { return key > diagonal ? key - diagonal : 0; }
};

// out (kQB x kKB) = left x channels^T for the queries and keys of `seen`, in whole tiles.
template <class P>
void scores_block(float* out, const typename P::Unit* left, const typename P::Unit* channels,
                  const Seen& seen, i64 HS) {
    const i64 units = units_of<P>(HS), row = row_units<P>(HS);
    for (i64 n = 0; n < seen.keys; n += kNR)
        for (i64 r = seen.first_query(n) / kMR * kMR; r < seen.queries; r += kMR)
            micro_kernel<P, kNV>(left + r * row, row, 1, channels + n * units, kNR, out + r * kKB + n, kKB,
                                 units, Earlier{});
}

// Elements of a sum that are not 0.
struct Range {
    i64 begin, end;
};

// out (rows x HS, row stride ldo) += left x right; row i, unit k of left: left[i*row + k*step]; right: one block of
// positions. range(r): the positions at which left is not 0 in the rows [r, r + kMR).
template <class P, i64 BLOCK, class RangeOf>
void times_positions(float* out, i64 ldo, const typename P::Unit* left, i64 row, i64 step,
                     const typename P::Unit* right, i64 rows, i64 HS, RangeOf range) {
    for (i64 n = 0; n < HS; n += kNR) {
        const int nv = static_cast<int>((smaller(kNR, HS - n) + Vec::W - 1) / Vec::W);
        const typename P::Unit* const strip = right + n * units_of<P>(BLOCK);
        for (i64 r = 0; r < rows; r += kMR) {
            const Range k = range(r);
            const i64 first = k.begin / P::kPerUnit;
            micro_strip<P>(nv, left + r * row + first * step, row, step, strip + first * kNR, kNR,
                           out + r * ldo + n, ldo, units_of<P>(k.end) - first,
                           Earlier{out + r * ldo + n, ldo});
        }
    }
}

inline void clear(float* x, i64 n) {
    each(n, [=](i64 i, auto m) { store(x + i, zero(), m); });
}

// Hands out 64-byte aligned pieces of a scratch buffer; with no buffer it only counts.
struct Pieces {
    char* base;
    i64 used = 0;
    template <class U>
    U* take(i64 count) {
        U* p = reinterpret_cast<U*>(base + used);
        used += round_up(count * static_cast<i64>(sizeof(U)), 64);
        return p;
    }
};

template <class P>
struct ForwardScratch {
    using Unit = typename P::Unit;
    Pieces pieces;
    Unit *keys, *values, *queries;
    float *scores, *out, *highest, *shrink, *total;
    typename P::Left* probs;
    ForwardScratch(void* memory, i64 T_, i64 HS) : pieces{static_cast<char*>(memory)} {
        keys = pieces.take<Unit>(round_up(T_, kNR) * units_of<P>(HS));
        values = pieces.take<Unit>((T_ + kKB - 1) / kKB * positions_block<P, kKB>(HS));
        queries = pieces.take<Unit>(kQB * row_units<P>(HS));
        scores = pieces.take<float>(kQB * kKB);
        probs = pieces.take<typename P::Left>(kQB * kKB);
        out = pieces.take<float>(kQB * round_up(HS, kNR));
        highest = pieces.take<float>(kQB);
        shrink = pieces.take<float>(kQB);
        total = pieces.take<float>(kQB);
    }
};

template <class P>
i64 attention_forward_scratch(i64 T_, i64 HS) {
    return ForwardScratch<P>(nullptr, T_, HS).pieces.used;
}

template <class P>
void attention_forward(const AttentionHead<typename P::T>& h, i64 begin, i64 end, void* memory) {
    using Unit = typename P::Unit;
    const i64 HS = h.HS, ldo = round_up(HS, kNR);
    const ForwardScratch<P> s(memory, h.T_, HS);
    const Vec scale = set1(h.scale);

    pack_channels<P>(s.keys, h.k, h.ldq, end, HS);
    pack_positions<P, kKB>(s.values, h.v, h.ldq, end, HS);
    for (i64 q0 = begin; q0 < end; q0 += kQB) {
        const i64 rows = smaller(kQB, end - q0);
        copy_rows<P>(s.queries, h.q + q0 * h.ldq, h.ldq, rows, HS);
        clear(s.out, kQB * ldo);
        for (i64 r = 0; r < rows; ++r) {
            s.highest[r] = -3e38f;
            s.total[r] = 0.0f;
        }
        for (i64 k0 = 0; k0 < q0 + rows; k0 += kKB) {
            const Seen seen{rows, smaller(kKB, q0 + rows - k0), q0 - k0};
            scores_block<P>(s.scores, s.queries, s.keys + k0 * units_of<P>(HS), seen, HS);
            // All maxima first: whether a row of the output must shrink is then known when its turn comes, and the
            // exponentials of the rows follow each other without a stall.
            for (i64 r = 0; r < rows; ++r) {
                const float* x = s.scores + r * kKB;
                Vec top = set1(-3e38f);
                each(seen.keys_of(r),
                     [&](i64 i, auto m) { top = max(top, keep_first(load(x + i), m, -3e38f)); });
                s.shrink[r] = max(top);
            }
            each(rows, [=](i64 r, auto m) {
                const Vec before = load(s.highest + r, m);
                const Vec now = max(before, load(s.shrink + r, m) * scale), shrink = exp(before - now);
                store(s.highest + r, now, m);
                store(s.shrink + r, shrink, m);
                store(s.total + r, load(s.total + r, m) * shrink, m);
            });
            for (i64 r = 0; r < rows; ++r) {
                if (k0 > 0 && s.shrink[r] != 1.0f) {
                    const Vec shrink = set1(s.shrink[r]);
                    float* o = s.out + r * ldo;
                    each(ldo, [=](i64 i, auto m) { store(o + i, load(o + i, m) * shrink, m); });
                }
                const float* x = s.scores + r * kKB;
                typename P::Left* p = s.probs + r * kKB;
                const i64 keys = seen.keys_of(r);
                const Vec shift = set1(s.highest[r]);
                Vec added = zero();
                each(keys, [&](i64 i, auto m) {
                    const Vec e = keep_first(exp(load(x + i) * scale - shift), m, 0.0f);
                    added = added + e;
                    store(p + i, e);
                });
                for (i64 i = round_up(keys, Vec::W); i < seen.keys; i += Vec::W) store(p + i, zero());
                s.total[r] += sum(added);
            }
            times_positions<P, kKB>(s.out, ldo, reinterpret_cast<const Unit*>(s.probs), kKB / P::kPerUnit, 1,
                                    s.values + k0 / kKB * positions_block<P, kKB>(HS), rows, HS,
                                    [=](i64 r) { return Range{0, seen.keys_of(r + kMR - 1)}; });
        }
        for (i64 r = 0; r < rows; ++r) {
            const Vec norm = set1(1.0f / s.total[r]);
            typename P::T* o = h.out + (q0 + r) * h.ldo;
            const float* x = s.out + r * ldo;
            each(HS, [=](i64 i, auto m) { store(o + i, load(x + i, m) * norm, m); });
            h.lse[q0 + r] = s.highest[r] + logf(s.total[r]);
        }
    }
}

// ---- backward: P = exp(S - lse);  dV = P^T dO;  dP = dO V^T;  dS = P (dP - D) scale, D = rowsum(dO O);
// dQ = dS K;  dK = dS^T Q.  The outer loop is over blocks of keys, whose dK and dV stay in the cache, the inner one
// over blocks of queries; dQ accumulates over the outer loop. ----

template <class P>
struct BackwardScratch {
    using Unit = typename P::Unit;
    using Left = typename P::Left;
    Pieces pieces;
    Unit *keys, *values, *keys_right, *queries, *douts, *queries_right, *douts_right;
    float *probs, *dscores, *dq, *dk, *dv, *D;
    Left* dscores_rows;                 // dS as a left operand of dQ: [query][key]
    Unit *probs_pairs, *dscores_pairs;  // P^T and dS^T as left operands of dV and dK: [unit of queries][key]
    BackwardScratch(void* memory, i64 T_, i64 HS) : pieces{static_cast<char*>(memory)} {
        const i64 units = units_of<P>(HS), blocks = (T_ + kKB - 1) / kKB, ldo = round_up(HS, kNR);
        keys = pieces.take<Unit>(round_up(T_, kNR) * units);
        values = pieces.take<Unit>(round_up(T_, kNR) * units);
        keys_right = pieces.take<Unit>(blocks * positions_block<P, kKB>(HS));
        queries = pieces.take<Unit>(round_up(T_, kMR) * row_units<P>(HS));
        douts = pieces.take<Unit>(round_up(T_, kMR) * row_units<P>(HS));
        queries_right = pieces.take<Unit>((T_ + kQB - 1) / kQB * positions_block<P, kQB>(HS));
        douts_right = pieces.take<Unit>((T_ + kQB - 1) / kQB * positions_block<P, kQB>(HS));
        probs = pieces.take<float>(kQB * kKB);
        dscores = pieces.take<float>(kQB * kKB);
        dscores_rows = P::kPerUnit == 1 ? reinterpret_cast<Left*>(dscores) : pieces.take<Left>(kQB * kKB);
        probs_pairs =
            P::kPerUnit == 1 ? reinterpret_cast<Unit*>(probs) : pieces.take<Unit>(kQB / P::kPerUnit * kKB);
        dscores_pairs =
            P::kPerUnit == 1 ? reinterpret_cast<Unit*>(dscores) : pieces.take<Unit>(kQB / P::kPerUnit * kKB);
        dq = pieces.take<float>(round_up(T_, kMR) * ldo);
        dk = pieces.take<float>(kKB * ldo);
        dv = pieces.take<float>(kKB * ldo);
        D = pieces.take<float>(T_);
    }
};

template <class P>
i64 attention_backward_scratch(i64 T_, i64 HS) {
    return BackwardScratch<P>(nullptr, T_, HS).pieces.used;
}

template <class P>
void attention_backward(const AttentionHead<typename P::T>& h, void* memory) {
    using T = typename P::T;
    const i64 HS = h.HS, T_ = h.T_, units = units_of<P>(HS), row = row_units<P>(HS), ldo = round_up(HS, kNR);
    const BackwardScratch<P> s(memory, T_, HS);
    const Vec scale = set1(h.scale);

    pack_channels<P>(s.keys, h.k, h.ldq, T_, HS);
    pack_channels<P>(s.values, h.v, h.ldq, T_, HS);
    pack_positions<P, kKB>(s.keys_right, h.k, h.ldq, T_, HS);
    copy_rows<P>(s.queries, h.q, h.ldq, T_, HS);
    copy_rows<P>(s.douts, h.dout, h.ldo, T_, HS);
    pack_positions<P, kQB>(s.queries_right, h.q, h.ldq, T_, HS);
    pack_positions<P, kQB>(s.douts_right, h.dout, h.ldo, T_, HS);
    clear(s.dq, round_up(T_, kMR) * ldo);
    for (i64 t = 0; t < T_; ++t) {
        const T *o = h.out + t * h.ldo, *d = h.dout + t * h.ldo;
        s.D[t] = sum(reduce(HS, [=](i64 i, auto m) { return load(o + i, m) * load(d + i, m); }));
    }

    for (i64 k0 = 0; k0 < T_; k0 += kKB) {
        clear(s.dk, kKB * ldo);
        clear(s.dv, kKB * ldo);
        for (i64 q0 = k0; q0 < T_; q0 += kQB) {
            const i64 rows = smaller(kQB, T_ - q0);
            const Seen seen{rows, smaller(kKB, q0 + rows - k0), q0 - k0};
            scores_block<P>(s.probs, s.queries + q0 * row, s.keys + k0 * units, seen, HS);
            scores_block<P>(s.dscores, s.douts + q0 * row, s.values + k0 * units, seen, HS);
            for (i64 r = 0; r < rows; ++r) {
                float *p = s.probs + r * kKB, *ds = s.dscores + r * kKB;
                const i64 keys = seen.keys_of(r);
                const Vec lse = set1(h.lse[q0 + r]), D = set1(s.D[q0 + r]);
                each(keys, [=](i64 i, auto m) {
                    const Vec e = keep_first(exp(load(p + i) * scale - lse), m, 0.0f);
                    store(p + i, e);
                    store(ds + i, keep_first(e * (load(ds + i) - D) * scale, m, 0.0f));
                });
                for (i64 i = round_up(keys, Vec::W); i < seen.keys; i += Vec::W) {
                    store(p + i, zero());
                    store(ds + i, zero());
                }
            }
            if constexpr (P::kPerUnit == 2) {
                if (rows % 2) {  // the query that the last pair lacks
                    clear(s.probs + rows * kKB, kKB);
                    clear(s.dscores + rows * kKB, kKB);
                }
                for (i64 r = 0; r < rows; ++r)
                    for (i64 i = 0; i < seen.keys; i += Vec::W)
                        store(s.dscores_rows + r * kKB + i, load(s.dscores + r * kKB + i));
                for (i64 r = 0; r < rows; r += 2)
                    for (i64 i = 0; i < seen.keys; i += Vec::W) {
                        const i64 from = r * kKB + i, to = r / 2 * kKB + i;
                        P::store_pairs(s.probs_pairs + to, load(s.probs + from), load(s.probs + from + kKB));
                        P::store_pairs(s.dscores_pairs + to, load(s.dscores + from),
                                       load(s.dscores + from + kKB));
                    }
            }
            const i64 block = q0 / kQB * positions_block<P, kQB>(HS);
            const auto queries = [=](i64 key) { return Range{seen.first_query(key), rows}; };
            times_positions<P, kQB>(s.dv, ldo, s.probs_pairs, 1, kKB, s.douts_right + block, seen.keys, HS,
                                    queries);
            times_positions<P, kQB>(s.dk, ldo, s.dscores_pairs, 1, kKB, s.queries_right + block, seen.keys,
                                    HS, queries);
            times_positions<P, kKB>(
                s.dq + q0 * ldo, ldo, reinterpret_cast<const typename P::Unit*>(s.dscores_rows),
                kKB / P::kPerUnit, 1, s.keys_right + k0 / kKB * positions_block<P, kKB>(HS), rows, HS,
                [=](i64 r) { return Range{0, seen.keys_of(r + kMR - 1)}; });
        }
        for (i64 t = 0; t < smaller(kKB, T_ - k0); ++t) {
            from_f32(h.dk + (k0 + t) * h.ldq, s.dk + t * ldo, HS);
            from_f32(h.dv + (k0 + t) * h.ldq, s.dv + t * ldo, HS);
        }
    }
    for (i64 t = 0; t < T_; ++t) from_f32(h.dq + t * h.ldq, s.dq + t * ldo, HS);
}

// ---- generation: one query against n cached positions ----

template <class T>
void attention_decode(T* out, const T* q, const T* k, const T* v, i64 n, i64 HS, float scale, float* scores) {
    float highest = -3e38f;
    for (i64 t = 0; t < n; ++t) {
        const T* kt = k + t * HS;
        scores[t] = scale * sum(reduce(HS, [=](i64 i, auto m) { return load(q + i, m) * load(kt + i, m); }));
        highest = scores[t] > highest ? scores[t] : highest;
    }
    const Vec shift = set1(highest);
    Vec total = zero();
    each(n, [&](i64 i, auto m) {
        const Vec e = keep_first(exp(load(scores + i, m) - shift), m, 0.0f);
        total = total + e;
        store(scores + i, e, m);
    });
    const Vec norm = set1(1.0f / sum(total));
    each(HS, [&](i64 i, auto m) {
        Vec acc = zero();
        for (i64 t = 0; t < n; ++t) acc = fma(set1(scores[t]), load(v + t * HS + i, m), acc);
        store(out + i, acc * norm, m);
    });
}

}  // namespace
