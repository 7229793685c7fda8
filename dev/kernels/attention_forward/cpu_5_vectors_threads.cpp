// Vectors in registers, and a thread for each head
//
// The blocks are those of version 4. The products keep a tile of the result, MR rows of two vectors, in registers while they walk
// along the sum: a multiply-add then needs less than one load, where the compiler's loop had a load, a load and a store. Maxima,
// exponentials and corrections are done for a whole vector of keys: exp is 2^n times a polynomial. Heads share nothing, so each is a
// task for a thread, and the result has the same bits for any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

constexpr int64_t HS = 64, BLOCK = 64, W = Vec::W;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int MR = 8;  // with 32 registers: 16 for the tile
#else
constexpr int MR = 4;  // with 16
#endif

// out (BLOCK x 64) = a (BLOCK x 64) b (64 x 64), added to what is there if `add`.
template <bool add>
static void multiply(float* out, const float* a, const float* b, int64_t ldb) {
    for (int64_t j = 0; j < 64; j += 2 * W)
        for (int64_t i = 0; i < BLOCK; i += MR) {
            Vec tile[MR][2];
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
                for (int n = 0; n < 2; ++n) tile[r][n] = add ? load(out + (i + r) * 64 + j + n * W) : zero();
            for (int64_t k = 0; k < 64; ++k) {
                const Vec b0 = load(b + k * ldb + j), b1 = load(b + k * ldb + j + W);
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r) {
                    const Vec x = set1(a[(i + r) * 64 + k]);
                    tile[r][0] = fma(x, b0, tile[r][0]);
                    tile[r][1] = fma(x, b1, tile[r][1]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < MR; ++r)
                for (int n = 0; n < 2; ++n) store(out + (i + r) * 64 + j + n * W, tile[r][n]);
        }
}

// x = n ln 2 + r with |r| <= ln 2 / 2, so e^x = 2^n e^r. Taylor's polynomial of degree 7 is then exact to a rounding.
static Vec exp(Vec x) {
    x = max(x, set1(-87.0f));  // below, 2^n would leave the range of floats
    const Vec n = round(x * set1(1.44269504f));
    const Vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));  // ln 2 in two parts
    Vec p = set1(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = fma(p, r, set1(c));
    return scale2(p, n);
}

static void one_head(float* out, float* lse, const float* qkv, int64_t T, int64_t C) {
    const int64_t row = 3 * C, padded = (T + BLOCK - 1) / BLOCK * BLOCK;
    const float scale = 1 / std::sqrt(float(HS));
    std::vector<float> q(padded * HS), kt(HS * padded), v(padded * HS);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < HS; ++c) {
            const float* x = qkv + t * row + c;
            q[t * HS + c] = x[0] * scale;
            kt[c * padded + t] = x[C];
            v[t * HS + c] = x[2 * C];
        }
    for (int64_t i0 = 0; i0 < T; i0 += BLOCK) {
        float largest[BLOCK], total[BLOCK] = {}, o[BLOCK * HS] = {}, p[BLOCK * BLOCK];
        std::fill(largest, largest + BLOCK, -1e30f);  // not -infinity, which would be lost in exp's limits
        for (int64_t j0 = 0; j0 <= i0; j0 += BLOCK) {
            multiply<false>(p, &q[i0 * HS], &kt[j0], padded);
            for (int64_t i = 0; i < BLOCK; ++i) {
                float* x = p + i * BLOCK;
                if (j0 == i0) std::fill(x + i + 1, x + BLOCK, -1e30f);
                Vec top = set1(largest[i]), added = zero();
                for (int64_t j = 0; j < BLOCK; j += W) top = max(top, load(x + j));
                const float highest = max(top);
                const Vec shift = set1(highest);
                for (int64_t j = 0; j < BLOCK; j += W) {
                    const Vec e = exp(load(x + j) - shift);
                    added = added + e;
                    store(x + j, e);
                }
                if (highest != largest[i]) {  // most blocks have no new maximum
                    const float correction = std::exp(largest[i] - highest);
                    for (int64_t c = 0; c < HS; c += W)
                        store(o + i * HS + c, load(o + i * HS + c) * set1(correction));
                    total[i] *= correction;
                    largest[i] = highest;
                }
                total[i] += sum(added);
            }
            multiply<true>(o, p, &v[j0 * HS], HS);
        }
        for (int64_t i = 0; i < std::min(BLOCK, T - i0); ++i) {
            for (int64_t c = 0; c < HS; ++c) out[(i0 + i) * C + c] = o[i * HS + c] / total[i];
            lse[i0 + i] = largest[i] + std::log(total[i]);
        }
    }
}

KERNEL void run(float* out, float* lse, const float* qkv, int64_t B, int64_t T, int64_t NH) {
    const int64_t C = NH * HS;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < B * NH; ++task) {
        const int64_t b = task / NH, h = task % NH;
        one_head(out + b * T * C + h * HS, lse + task * T, qkv + b * T * 3 * C + h * HS, T, C);
    }
}
