// bf16 on tile registers (AMX)
// needs: __AMX_BF16__
//
// AMX has 8 registers of 16 rows of 64 bytes, and an instruction that multiplies two of them: a tile of 16 x 32 bf16 by one of
// 32 x 16, into 16 x 16 sums in f32. That is 16,384 FLOP in 16 cycles, in which two AVX-512 multiply-adds a cycle make 1,024. Four
// tiles hold the sums of a block of 32 x 32: 4 tiles of operands are loaded for 4 products, each of them used twice.
//
// The left operand is 16 rows of 32 elements, as they lie in inp. The right one has the elements 2 p and 2 p + 1 of its 16 columns in
// row p. So both are packed alike, and of the right one each tile is transposed, in units of such pairs.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "vectors.h"

using i64 = int64_t;
#include "cpu/simd/amx_tiles.h"

namespace {

constexpr i64 kSide = 32;         // of a block of out, and elements of a step along the reduction
constexpr i64 kTile = 16 * 32;    // elements of a tile
constexpr i64 kStep = 2 * kTile;  // elements of a strip in a step
constexpr i64 kBlock = 256;       // rows whose strips stay in L2

// `rows` <= 32 rows, in steps of [two tiles][16 rows][32 elements], with zeros for what does not exist.
void pack_left(bf16* strip, const bf16* from, i64 rows, i64 C) {
    for (i64 c = 0; c < C; c += kSide, strip += kStep)
        for (i64 i = 0; i < kSide; ++i) {
            const i64 n = i < rows ? std::min(kSide, C - c) : 0;
            if (n == kSide) {
                std::memcpy(strip + i * kSide, from + i * C + c, 2 * kSide);  // one load, one store
            } else {
                std::memset(strip + i * kSide, 0, 2 * kSide);
                std::copy(from + i * C + c, from + i * C + c + n, strip + i * kSide);
            }
        }
}

// `columns` <= 32 columns, in steps of [two tiles][16 pairs][16 columns][2].
void pack_right(bf16* strip, const bf16* from, i64 columns, i64 C) {
    pack_left(strip, from, columns, C);
    for (bf16* tile = strip; tile < strip + (C + kSide - 1) / kSide * kStep; tile += kTile) {
        float* const pairs = reinterpret_cast<float*>(tile);  // 16 x 16 of them, whose bits are moved only
        Vec rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = load(pairs + i * 16);
        transpose(rows);
        for (int i = 0; i < 16; ++i) store(pairs + i * 16, rows[i]);
    }
}

// sums (32 x 32) = left right, over all steps.
void multiply(float* sums, const bf16* left, const bf16* right, i64 steps) {
    constexpr i64 kRow = 4 * kSide;  // bytes
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (i64 k = 0; k < steps; ++k, left += kStep, right += kStep) {
        tile_load<6>(right, 64);
        tile_load<4>(left, 64);
        tile_dot<0, 4, 6>();
        tile_load<7>(right + kTile, 64);
        tile_dot<1, 4, 7>();
        tile_load<5>(left + kTile, 64);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
    }
    tile_store<0>(sums, kRow);
    tile_store<1>(sums + 16, kRow);
    tile_store<2>(sums + 16 * kSide, kRow);
    tile_store<3>(sums + 16 * kSide + 16, kRow);
}

// out (rows x columns) = sums + bias, rounded to bf16.
void finish(bf16* out, i64 ld, const float* sums, const bf16* bias, i64 rows, i64 columns) {
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < columns; j += Vec::W) {
            const int n = static_cast<int>(std::min<i64>(Vec::W, columns - j));
            store(out + i * ld + j, load(sums + i * kSide + j) + load(bias + j, n), n);
        }
}

}  // namespace

KERNEL void run(bf16* out, const bf16* inp, const bf16* weight, const bf16* bias, int64_t N, int64_t C,
                int64_t OC) {
    syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */,
            18 /* XFEATURE_XTILEDATA */);  // Linux wants to be asked
    const i64 steps = (C + kSide - 1) / kSide, strip = steps * kStep;
    std::vector<bf16> right((OC + kSide - 1) / kSide * strip);
#pragma omp parallel
    {
        const TilesInUse tiles;
        std::vector<bf16> left(kBlock / kSide * strip);
        alignas(64) float sums[kSide * kSide];
#pragma omp for
        for (i64 o = 0; o < OC; o += kSide)
            pack_right(right.data() + o / kSide * strip, weight + o * C, std::min(kSide, OC - o), C);
#pragma omp for schedule(dynamic)
        for (i64 block = 0; block < N; block += kBlock) {
            const i64 end = std::min(N, block + kBlock);
            for (i64 n = block; n < end; n += kSide)
                pack_left(left.data() + (n - block) / kSide * strip, inp + n * C, std::min(kSide, end - n),
                          C);
            for (i64 o = 0; o < OC; o += kSide)
                for (i64 n = block; n < end; n += kSide) {
                    multiply(sums, left.data() + (n - block) / kSide * strip,
                             right.data() + o / kSide * strip, steps);
                    finish(out + n * OC + o, OC, sums, bias + o, std::min(kSide, end - n),
                           std::min(kSide, OC - o));
                }
        }
    }
}
