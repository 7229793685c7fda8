// The weight packed in strips
//
// In the transposed weight the rows that a tile reads are OC floats apart: each in another page of memory, and if OC is a
// multiple of 1024, all of them compete for the same few places of the L1 cache. Here the columns of a tile are copied side
// by side, [c][columns], once for all rows of inp: a tile reads one strip from its begin to its end. A strip at the
// edge is filled with zeros, so that only its last stores know that there is an edge.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kRows = 4, kVectors = 2, kColumns = kVectors * Vec::W;

template <int Rows>
void tile(float* out, const float* inp, const float* strip, const float* bias, int64_t C, int64_t OC,
          int columns) {
    Vec sum[Rows][kVectors];
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
    for (int64_t c = 0; c < C; ++c) {
        Vec w[kVectors];
        for (int j = 0; j < kVectors; ++j) w[j] = load(strip + c * kColumns + j * Vec::W);
        for (int i = 0; i < Rows; ++i)
            for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(set1(inp[i * C + c]), w[j], sum[i][j]);
    }
    for (int j = 0; j < kVectors; ++j) {
        const int lanes = std::clamp(columns - j * Vec::W, 0, Vec::W);
        for (int i = 0; i < Rows; ++i)
            store(out + i * OC + j * Vec::W, sum[i][j] + load(bias + j * Vec::W, lanes), lanes);
    }
}

}  // namespace

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    std::vector<float> strip(C * kColumns);
    for (int64_t o = 0; o < OC; o += kColumns) {
        const int columns = std::min<int64_t>(kColumns, OC - o);
        for (int64_t c = 0; c < C; ++c)
            for (int j = 0; j < kColumns; ++j)
                strip[c * kColumns + j] = j < columns ? weight[(o + j) * C + c] : 0.0f;
        int64_t n = 0;
        for (; n + kRows <= N; n += kRows)
            tile<kRows>(out + n * OC + o, inp + n * C, strip.data(), bias + o, C, OC, columns);
        for (; n < N; ++n) tile<1>(out + n * OC + o, inp + n * C, strip.data(), bias + o, C, OC, columns);
    }
}
