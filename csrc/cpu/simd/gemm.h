// Matmuls: C = A B in blocks that fit the caches.
//
//   for a stretch of the reduction                       (a task owns a range of rows and columns of C)
//     for a block of rows of C                           A's block stays in L2
//       for a strip of NR columns                        B's strips are packed for the first block, and pass through L3
//         for a part of the stretch                      a strip's part stays in L1, and the next one is prefetched
//           for each panel of MR rows: the micro-kernel  an MR x NR tile of C in registers
//             at the end: the epilogue                   bias, GELU, accumulate, rounding
//
// A policy P, of which each set has one for f32 and one for bf16, says how elements are multiplied: their storage type
// T, the Unit that the micro-kernel broadcasts (a float, or a pair of bf16 adjacent in the reduction), and
// multiply-add.
//
// Packed operands are padded with zeros, so only packing and the epilogue know about edges. The order of every sum
// depends on K alone: not on the tasks, so not on the number of threads, and not on the sizes of the caches.
#pragma once

namespace {

using llmc::Gemm;

constexpr int kNR = kNV * Vec::W;

struct MultiplyF32 {
    using T = float;
    using Unit = float;
    using Left = float;  // how attention stores a left operand that it computes
    static constexpr int kPerUnit = 1;
    static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
    static Vec multiply_add(const Unit* a, Vec b, Vec c) { return fma(set1(*a), b, c); }
    static Vec load_k(const T* p, int n) { return n == Vec::W ? load(p) : load(p, n); }  // units along k
    static Vec load_n(const T* p, i64, int, int n) {
        return n == Vec::W ? load(p) : load(p, n);
    }  // one unit per column
};

// bf16 in memory, f32 in the registers: for sets that have no bf16 arithmetic, and for CPUs where it is slow.
struct MultiplyWidened {
    using T = bf16;
    using Unit = float;
    using Left = float;
    static constexpr int kPerUnit = 1;
    static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
    static Vec multiply_add(const Unit* a, Vec b, Vec c) { return fma(set1(*a), b, c); }
    static Vec load_k(const T* p, int n) { return n == Vec::W ? load(p) : load(p, n); }
    static Vec load_n(const T* p, i64, int, int n) { return n == Vec::W ? load(p) : load(p, n); }
};

// out[k][i] = src[i][k] for WIDTH rows, of which `rows` exist, and `elements` along k, in whole units. What does not
// exist is 0.
template <class P, int WIDTH>
inline void pack_rows(typename P::Unit* out, const typename P::T* src, i64 ld, i64 rows, i64 elements) {
    constexpr int W = Vec::W;
    const i64 units = (elements + P::kPerUnit - 1) / P::kPerUnit;
    for (int group = 0; group < WIDTH; group += W) {
        constexpr int kLast = WIDTH % W == 0 ? W : WIDTH % W;
        const int width = group + W <= WIDTH ? W : kLast;
        for (i64 k = 0; k < units; k += W) {
            Vec t[W];
            const i64 left = elements - k * P::kPerUnit;
            const int n = left < W * P::kPerUnit ? static_cast<int>(left) : W * P::kPerUnit;
            if (n == W * P::kPerUnit && group + W <= rows) {
                for (int i = 0; i < W; ++i)
                    t[i] = P::load_k(src + (group + i) * ld + k * P::kPerUnit, W * P::kPerUnit);
            } else {
                for (int i = 0; i < W; ++i)
                    t[i] = group + i < rows ? P::load_k(src + (group + i) * ld + k * P::kPerUnit, n) : zero();
            }
            transpose(t);
            float* dst = reinterpret_cast<float*>(out) + k * WIDTH + group;
            const i64 count = units - k < W ? units - k : W;
            if (width == W && count == W) {
                for (int i = 0; i < W; ++i) store(dst + i * WIDTH, t[i]);
            } else {
                for (i64 i = 0; i < count; ++i) store(dst + i * WIDTH, t[i], width);
            }
        }
    }
}

// The same from a k-major matrix, out[k][i] = src[k][i], of whose WIDTH columns `columns` exist.
template <class P, int WIDTH>
inline void pack_columns(typename P::Unit* out, const typename P::T* src, i64 ld, i64 columns, i64 elements) {
    constexpr int W = Vec::W;
    const i64 units = (elements + P::kPerUnit - 1) / P::kPerUnit;
    for (i64 k = 0; k < units; ++k) {
        const i64 left = elements - k * P::kPerUnit;
        const int present = left < P::kPerUnit ? static_cast<int>(left) : P::kPerUnit;
        const typename P::T* row = src + k * P::kPerUnit * ld;
        float* dst = reinterpret_cast<float*>(out) + k * WIDTH;
        for (int group = 0; group < WIDTH; group += W) {
            const int width = WIDTH - group < W ? WIDTH - group : W;
            const i64 valid = columns - group;
            const int n = valid >= width ? width : valid > 0 ? static_cast<int>(valid) : 0;
            const Vec v = n > 0 ? P::load_n(row + group, ld, present, n) : zero();
            if (width == W)
                store(dst + group, v);
            else
                store(dst + group, v, width);
        }
    }
}

template <class P, int WIDTH>
inline void pack(typename P::Unit* out, const typename P::T* src, i64 ld, bool kmajor, i64 width,
                 i64 elements) {
    if (kmajor)
        pack_columns<P, WIDTH>(out, src, ld, width, elements);
    else
        pack_rows<P, WIDTH>(out, src, ld, width, elements);
}

// What is added to a tile of sums: the sum of earlier parts, or null. Row stride ld.
struct Earlier {
    const float* sum = nullptr;
    i64 ld = 0;
};

// c (MR x NV vectors, row stride ldc) = a b over K units, and what came earlier. Row i, unit k of A: a[i*row + k*step]. b:
// [K][ldb]. Not inlined, because gcc then spills an accumulator in one place or another: half the speed.
template <class P, int NV>
LLMC_NOINLINE void micro_kernel(const typename P::Unit* a, i64 row, i64 step, const typename P::Unit* b,
                                i64 ldb, float* c, i64 ldc, i64 K, Earlier earlier) {
    Vec acc[kMR][NV];
    LLMC_UNROLL
    for (int i = 0; i < kMR; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < NV; ++j) acc[i][j] = zero();
    }
    const float* bf = reinterpret_cast<const float*>(b);
    for (i64 k = 0; k < K; ++k) {
        Vec bv[NV];
        LLMC_UNROLL
        for (int j = 0; j < NV; ++j) bv[j] = load(bf + j * Vec::W);
        LLMC_UNROLL
        for (int i = 0; i < kMR; ++i) {
            LLMC_UNROLL
            for (int j = 0; j < NV; ++j) acc[i][j] = P::multiply_add(a + i * row, bv[j], acc[i][j]);
        }
        bf += ldb;
        a += step;
    }
    if (earlier.sum) {
        LLMC_UNROLL
        for (int i = 0; i < kMR; ++i) {
            LLMC_UNROLL
            for (int j = 0; j < NV; ++j)
                acc[i][j] = load(earlier.sum + i * earlier.ld + j * Vec::W) + acc[i][j];
        }
    }
    LLMC_UNROLL
    for (int i = 0; i < kMR; ++i) {
        LLMC_UNROLL
        for (int j = 0; j < NV; ++j) store(c + i * ldc + j * Vec::W, acc[i][j]);
    }
}

// micro_kernel with only as many vectors (nv) as the columns of a narrow strip need.
template <class P>
inline void micro_strip(int nv, const typename P::Unit* a, i64 row, i64 step, const typename P::Unit* b,
                        i64 ldb, float* c, i64 ldc, i64 K, Earlier earlier) {
    if (nv == kNV) return micro_kernel<P, kNV>(a, row, step, b, ldb, c, ldc, K, earlier);
    if constexpr (kNV > 2) {
        if (nv == 2) return micro_kernel<P, 2>(a, row, step, b, ldb, c, ldc, K, earlier);
    }
    micro_kernel<P, 1>(a, row, step, b, ldb, c, ldc, K, earlier);
}

inline i64 round_up(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }
inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// each() for the columns of a strip. A whole one is unrolled, so that its vectors are computed side by side.
template <class Body>
inline void each_column(i64 columns, Body body) {
    if (columns != kNR) return each(columns, body);
    LLMC_UNROLL
    for (int j = 0; j < kNV; ++j) body(j * Vec::W, All{});
}

// What is done to one strip of C, rows x columns, on its way from scratch (row stride lds) to memory.
template <class T, class G>
void epilogue(const Gemm& g, float* strip, i64 lds, i64 m0, i64 n0, i64 rows, i64 columns) {
    const T* const bias = g.bias ? static_cast<const T*>(g.bias) + n0 : nullptr;
    for (i64 r = 0; r < rows; ++r) {
        float* const s = strip + r * lds;
        const i64 at = (m0 + r) * g.ldc + n0;
        G* const c = static_cast<G*>(g.c) + at;
        const auto sum = [=](i64 i, auto m) {
            return bias ? load(s + i, m) + load(bias + i, m) : load(s + i, m);
        };
        if (g.pre) {
            T* const pre = static_cast<T*>(g.pre) + at;
            each_column(columns, [=](i64 i, auto m) {
                const Vec v = as_stored<T>(sum(i, m));
                store(pre + i, v, m);
                store(c + i, gelu<T>(v), m);
            });
        } else if (g.dgelu) {  // to c in a second pass, below
            const T* const dgelu = static_cast<const T*>(g.dgelu) + at;
            each_column(columns, [=](i64 i, auto m) {
                store(s + i, as_stored<T>(sum(i, m)) * gelu_gradient(load(dgelu + i, m)), m);
            });
        } else if (g.accumulate) {
            each_column(columns, [=](i64 i, auto m) { store(c + i, load(c + i, m) + sum(i, m), m); });
        } else {
            each_column(columns, [=](i64 i, auto m) { store(c + i, sum(i, m), m); });
        }
    }
    if (!g.dgelu) return;
    // Rows of C and of dgelu are often a multiple of 4096 bytes apart. A load of the next row of dgelu would then wait for
    // a store to C of which the CPU first compares the low 12 bits of the address.
    for (i64 r = 0; r < rows; ++r) {
        G* const c = static_cast<G*>(g.c) + (m0 + r) * g.ldc + n0;
        const float* const s = strip + r * lds;
        each_column(columns, [=](i64 i, auto m) { store(c + i, load(s + i, m), m); });
    }
}

// A is packed in groups of panels that fill whole vectors: [k][panels][MR].
constexpr int least_common_multiple(int a, int b) {
    int m = a;
    while (m % b) m += a;
    return m;
}
constexpr int kGroup = least_common_multiple(kMR, Vec::W);

// Whether the micro-kernel reads A in place, unpacked. If rows are a multiple of 4096 bytes apart it does not, because
// they would compete for the same sets of L1.
template <class P>
bool read_in_place(const Gemm& g) {
    constexpr i64 size = sizeof(typename P::T);
    return sizeof(typename P::Unit) == P::kPerUnit * size && !g.a_kmajor && g.K % P::kPerUnit == 0 &&
           g.lda * size % 4096 != 0;
}

// How a task [m0,m1) x [n0,n1) is cut, and its scratch memory. Lengths along the reduction are in units. The order of a
// sum is that of the parts, so they depend on K alone; the caches decide on the rest.
template <class P>
struct Blocks {
    i64 part;     // of a strip of B in L1, for which a tile of C stays in registers
    i64 stretch;  // whole parts: of a block of A in L2
    i64 rows;     // of such a block
    bool keep_b;  // several blocks of rows use the strips of B: they stay packed until the next stretch
    i64 a_units, b_units, c_rows, c_floats;
    Blocks(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1) {
        const i64 units = (g.K + P::kPerUnit - 1) / P::kPerUnit, strips = (n1 - n0 + kNR - 1) / kNR;
        stretch = g.K == 0 ? 1 : smaller(kStretch, units);
        const i64 parts = (stretch + kPart - 1) / kPart;
        part = parts > 1 ? round_up((stretch + parts - 1) / parts, 16) : stretch;
        // Two thirds of L2: strips of B and C pass through the rest.
        const i64 groups = g.l2 * 2 / 3 / (4 * stretch * kGroup),
                  most = groups > 1 ? groups * kGroup : kGroup, all = round_up(m1 - m0, kGroup),
                  blocks = (all + most - 1) / most;
        rows = round_up((m1 - m0 + blocks - 1) / blocks, kGroup);
        keep_b = blocks > 1;
        // Memory is for `most` rows: the even blocks of a task at the edge may have more rows than those of a whole one.
        // C is in scratch from a part to the next: one tile, one strip of a block, or all of the task.
        c_rows = units > stretch ? all : smaller(all, most);
        a_units = round_up(smaller(all, most) * stretch, 16);
        b_units = keep_b ? strips * stretch * kNR : part * kNR;
        c_floats = (units > stretch ? strips : 1) * c_rows * kNR;
    }
    i64 bytes() const { return (a_units + b_units + c_floats) * 4; }
};

template <class P>
i64 gemm_scratch(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1) {
    return Blocks<P>(g, m0, m1, n0, n1).bytes();
}

// Tasks consist of whole groups and whole strips. The strips that a task keeps pass through L3, of which they take half.
// Each task packs its rows of A again, so if A is packed, tasks are wider.
template <class P>
llmc::GemmTask gemm_task(const Gemm& g) {
    constexpr i64 kMost = 2048 / kNR * kNR, kLeast = 8 * kNR;
    const i64 columns = smaller(kMost, g.l3 / 2 / (4 * kStretch) / kNR * kNR);
    return {1024 / kGroup * kGroup,
            columns > kLeast ? columns : kLeast,
            kGroup,
            kNR,
            192,
            round_up(read_in_place<P>(g) ? 64 : 384, kNR)};
}

// Memory to fetch into L2 while something else is computed: `rows` of `lines` cache lines.
struct NextStrip {
    const char* row = nullptr;
    i64 stride = 0, rows = 0, lines = 0, line = 0;
    void fetch(i64 count) {
        for (; count > 0 && rows > 0; --count) {
            prefetch(row + 64 * line);
            if (++line == lines) line = 0, row += stride, --rows;
        }
    }
};
// The strip of B at (k, n), of `elements` along the reduction.
template <class P>
NextStrip strip_of_b(const Gemm& g, i64 k, i64 n, i64 elements, i64 columns) {
    constexpr i64 size = sizeof(typename P::T);
    const i64 rows = g.b_kmajor ? elements : columns, length = g.b_kmajor ? columns : elements;
    const char* b = static_cast<const char*>(g.b);
    return {b + (g.b_kmajor ? k * g.ldb + n : n * g.ldb + k) * size, g.ldb * size, rows,
            (length * size + 63) / 64};
}

// Fetches what the epilogue will read or write: a store to a line that is not in the cache has to wait for it.
template <class T>
void fetch_c(const Gemm& g, i64 m, i64 n, i64 rows, i64 columns) {
    const i64 c_size = g.c_f32 ? 4 : sizeof(T);
    for (i64 r = 0; r < rows; ++r) {
        const i64 at = (m + r) * g.ldc + n;
        const auto fetch = [=](const void* p, i64 size) {
            if (!p) return;
            const char* first = static_cast<const char*>(p) + at * size;
            for (i64 i = 0; i < columns * size; i += 64) prefetch(first + i);
            prefetch(first + columns * size - 1);
        };
        fetch(g.c, c_size);
        fetch(g.pre, sizeof(T));
        fetch(g.dgelu, sizeof(T));
    }
}

template <class P>
void gemm(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1, void* scratch) {
    using T = typename P::T;
    using Unit = typename P::Unit;
    const Blocks<P> s(g, m0, m1, n0, n1);
    Unit* const a_panels = static_cast<Unit*>(scratch);
    Unit* const b_strips = a_panels + s.a_units;
    float* const c_strips = reinterpret_cast<float*>(b_strips + s.b_units);
    const T* const a = static_cast<const T*>(g.a);
    const T* const b = static_cast<const T*>(g.b);
    const bool in_place = read_in_place<P>(g);
    // Then the micro-kernel itself stores whole tiles of C.
    const bool plain = (g.c_f32 || sizeof(T) == 4) && !g.bias && !g.accumulate && !g.pre && !g.dgelu;
    const i64 stretch = s.stretch * P::kPerUnit, part = s.part * P::kPerUnit;

    for (i64 ks = 0; ks == 0 || ks < g.K; ks += stretch) {
        const i64 k_end = smaller(ks + stretch, g.K);
        const i64 units = (k_end - ks + P::kPerUnit - 1) / P::kPerUnit;
        for (i64 m = m0; m < m1; m += s.rows) {
            const i64 rows = smaller(s.rows, m1 - m);
            const i64 first_packed = in_place ? rows / kMR * kMR : 0;
            for (i64 r = first_packed / kGroup * kGroup; r < rows && first_packed < rows; r += kGroup) {
                const T* src = g.a_kmajor ? a + ks * g.lda + m + r : a + (m + r) * g.lda + ks;
                pack<P, kGroup>(a_panels + r * units, src, g.lda, g.a_kmajor, smaller(kGroup, rows - r),
                                k_end - ks);
            }
            for (i64 n = n0; n < n1; n += kNR) {
                const i64 columns = smaller(kNR, n1 - n), strip = (n - n0) / kNR;
                const int nv = static_cast<int>((columns + Vec::W - 1) / Vec::W);
                float* const c_strip = c_strips + (g.K <= stretch ? 0 : strip * s.c_rows + m - m0) * kNR;
                for (i64 k = ks; k == ks || k < k_end; k += part) {
                    const i64 elements = smaller(part, k_end - k),
                              count = (elements + P::kPerUnit - 1) / P::kPerUnit;
                    const T* src = g.b_kmajor ? b + k * g.ldb + n : b + n * g.ldb + k;
                    Unit* const b_strip =
                        b_strips + (s.keep_b ? (strip * s.stretch + (k - ks) / P::kPerUnit) * kNR : 0);
                    const bool packed = s.keep_b && m > m0;
                    if (!packed) pack<P, kNR>(b_strip, src, g.ldb, g.b_kmajor, columns, elements);
                    NextStrip next;  // not of packed strips: the hardware sees that they are a stream
                    if (!packed && k + part < k_end)
                        next = strip_of_b<P>(g, k + part, n, smaller(part, k_end - k - part), columns);
                    else if (!packed && n + kNR < n1)
                        next = strip_of_b<P>(g, ks, n + kNR, smaller(part, k_end - ks),
                                             smaller(kNR, n1 - n - kNR));
                    const i64 share =
                        (next.rows * next.lines * kMR + rows - 1) / rows;  // to fetch for each panel

                    for (i64 r = 0; r < rows; r += kMR) {
                        const bool last = k + elements >= g.K;
                        const i64 height = smaller(kMR, rows - r);
                        next.fetch(share);
                        if (last) fetch_c<T>(g, m + r, n, height, columns);
                        float* const tile = c_strip + (g.K <= part ? 0 : r * kNR);
                        const Earlier earlier = k > 0 ? Earlier{tile, kNR} : Earlier{};
                        const bool direct = last && plain && height == kMR && columns == kNR;
                        float* const out = direct ? static_cast<float*>(g.c) + (m + r) * g.ldc + n : tile;
                        const i64 ldc = direct ? g.ldc : kNR;
                        if (r < first_packed)
                            micro_strip<P>(nv, reinterpret_cast<const Unit*>(a + (m + r) * g.lda + k),
                                           g.lda / P::kPerUnit, 1, b_strip, kNR, out, ldc, count, earlier);
                        else
                            micro_strip<P>(nv,
                                           a_panels + r / kGroup * kGroup * units +
                                               (k - ks) / P::kPerUnit * kGroup + r % kGroup,
                                           1, kGroup, b_strip, kNR, out, ldc, count, earlier);
                        if (!last || direct) continue;
                        if (g.c_f32)
                            epilogue<T, float>(g, tile, kNR, m + r, n, height, columns);
                        else
                            epilogue<T, T>(g, tile, kNR, m + r, n, height, columns);
                    }
                }
            }
        }
    }
}

// ---- few rows of A: dot products along the rows of B in place, so that each weight is read from memory once ----

// The dot products of ROWS rows of A with 4 of B, to out[row * 64 + column]. Meanwhile the next 4 rows of B are
// fetched, because rows are too short for the hardware's prefetcher.
template <class P, int ROWS>
void dot_products(float* out, const typename P::T* x, i64 ldx, const typename P::T* w, i64 ldw, i64 columns,
                  i64 K) {
    constexpr int COLS = 4, kStep = Vec::W * P::kPerUnit;
    constexpr i64 kLine = 64 / sizeof(typename P::T);
    Vec acc[ROWS * COLS];
    LLMC_UNROLL
    for (int i = 0; i < ROWS * COLS; ++i) acc[i] = zero();
    const typename P::T* row[COLS];
    for (int j = 0; j < COLS; ++j) row[j] = w + smaller(j, columns - 1) * ldw;
    const auto step = [&](i64 k, int n) {
        Vec wv[COLS];
        LLMC_UNROLL
        for (int j = 0; j < COLS; ++j) wv[j] = P::load_k(row[j] + k, n);
        LLMC_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const Vec xv = P::load_k(x + i * ldx + k, n);
            LLMC_UNROLL
            for (int j = 0; j < COLS; ++j) acc[i * COLS + j] = P::multiply_add(xv, wv[j], acc[i * COLS + j]);
        }
    };
    i64 k = 0, fetched = 0;
    for (; k + kStep <= K; k += kStep) {
        for (; fetched < k + kStep; fetched += kLine) {
            LLMC_UNROLL
            for (int j = 0; j < COLS; ++j) prefetch(row[j] + COLS * ldw + fetched);
        }
        step(k, kStep);
    }
    if (k < K) step(k, static_cast<int>(K - k));
    if constexpr (ROWS * COLS % Vec::W == 0) {
        float sums[ROWS * COLS];
        for (int i = 0; i < ROWS * COLS; i += Vec::W) store(sums + i, sums_of(acc + i));
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < COLS; ++j) out[i * 64 + j] = sums[i * COLS + j];
    } else {
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < COLS; ++j) out[i * 64 + j] = sum(acc[i * COLS + j]);
    }
}

template <class P, int ROWS>
void matvec_rows(const Gemm& g, i64 m, i64 n0, i64 n1) {
    using T = typename P::T;
    alignas(64) float strip[ROWS * 64];
    for (i64 n = n0; n < n1; n += 64) {
        const i64 columns = smaller(64, n1 - n);
        for (i64 j = 0; j < columns; j += 4)
            dot_products<P, ROWS>(strip + j, static_cast<const T*>(g.a) + m * g.lda, g.lda,
                                  static_cast<const T*>(g.b) + (n + j) * g.ldb, g.ldb,
                                  smaller(4, columns - j), g.K);
        if (g.c_f32)
            epilogue<T, float>(g, strip, 64, m, n, ROWS, columns);
        else
            epilogue<T, T>(g, strip, 64, m, n, ROWS, columns);
    }
}

// Four rows of A at a time: the columns [n0,n1) of B come from memory for the first four, and then from L2.
template <class P>
void matvec(const Gemm& g, i64 n0, i64 n1) {
    i64 m = 0;
    for (; m + 4 <= g.M; m += 4) matvec_rows<P, 4>(g, m, n0, n1);
    for (; m + 2 <= g.M; m += 2) matvec_rows<P, 2>(g, m, n0, n1);
    if (m < g.M) matvec_rows<P, 1>(g, m, n0, n1);
}

}  // namespace
