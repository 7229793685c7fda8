// A tile of sums in registers, by vectors
//
// A tile of out is 4 rows of 2 vectors. It is summed in 8 registers, and stored once, at the end. A vector of weights that was
// loaded serves 4 rows, a value of inp 2 vectors: 6 loads for 8 multiply-adds, where the version before had 16 loads and 8
// stores. From here on vectors are named (vec.h): of the same loops over an array float sum[4][32], gcc 12 kept nothing in
// registers.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kRows = 4, kVectors = 2, kColumns = kVectors * Vec::W;

// The sums of `Rows` rows and of `columns` columns.
template <int Rows>
void tile(float* out, const float* inp, const float* transposed, const float* bias, int64_t C, int64_t OC,
          int columns) {
    // Lanes of each vector that exist: all of them but at the right edge.
    int lanes[kVectors];
    Vec sum[Rows][kVectors];
    for (int j = 0; j < kVectors; ++j) {
        lanes[j] = std::clamp(columns - j * Vec::W, 0, Vec::W);
        for (int i = 0; i < Rows; ++i) sum[i][j] = load(bias + j * Vec::W, lanes[j]);
    }
    for (int64_t c = 0; c < C; ++c) {
        Vec w[kVectors];
        for (int j = 0; j < kVectors; ++j) w[j] = load(transposed + c * OC + j * Vec::W, lanes[j]);
        for (int i = 0; i < Rows; ++i)
            for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(set1(inp[i * C + c]), w[j], sum[i][j]);
    }
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) store(out + i * OC + j * Vec::W, sum[i][j], lanes[j]);
}

}  // namespace

KERNEL void run(float* out, const float* inp, const float* weight, const float* bias, int64_t N, int64_t C,
                int64_t OC) {
    std::vector<float> transposed(C * OC);
    for (int64_t o = 0; o < OC; ++o)
        for (int64_t c = 0; c < C; ++c) transposed[c * OC + o] = weight[o * C + c];

    for (int64_t o = 0; o < OC; o += kColumns) {
        const int columns = std::min<int64_t>(kColumns, OC - o);
        const float* const w = transposed.data() + o;
        int64_t n = 0;
        for (; n + kRows <= N; n += kRows)
            tile<kRows>(out + n * OC + o, inp + n * C, w, bias + o, C, OC, columns);
        for (; n < N; ++n) tile<1>(out + n * OC + o, inp + n * C, w, bias + o, C, OC, columns);
    }
}
