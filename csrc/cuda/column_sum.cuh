// Sums over the rows of a matrix, column by column: the gradients of biases and of layernorm's parameters.
//
// A block sums a piece of kPieceRows rows for 32 W columns: thread (x, y) owns W columns and every 8th row,
// and the 8 sums meet in shared memory. The pieces' sums are added in a second kernel, in order. Pieces depend
// on the shape alone, so the bits do not depend on the GPU.
#pragma once

#include "cuda/device.cuh"

namespace llmc {

inline constexpr int kPieceRows = 256;  // 65,536 rows of 768 bf16 are 768 blocks: enough for any GPU of today
inline constexpr int kColumnLanes = 32, kRowLanes = 8;

// Terms has  template <int W> __device__ void add(Floats<W> (&sums)[K], i64 row, i64 column) const.
// partial (pieces, K, C)
template <int W, int K, class Terms>
__global__ void column_sum_kernel(float* partial, i64 N, i64 C, Terms terms) {
    LLMC_SHARED(shared, float[kRowLanes][kColumnLanes * W]);
    const int x = threadIdx.x, y = threadIdx.y;
    const i64 column = (static_cast<i64>(blockIdx.x) * kColumnLanes + x) * W;
    const i64 begin = static_cast<i64>(blockIdx.y) * kPieceRows;
    const i64 end = begin + kPieceRows < N ? begin + kPieceRows : N;
    Floats<W> sums[K];
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] = zeros<W>();
    if (column < C)
        for (i64 row = begin + y; row < end; row += kRowLanes) terms.template add<W>(sums, row, column);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < W; ++i) shared[y][i * kColumnLanes + x] = sums[k][i];
        __syncthreads();
        // Thread (x, y) finishes the values y, y + 8, .. of lane x.
        for (int i = y; i < W; i += kRowLanes) {
            float total = 0.0f;
#pragma unroll
            for (int r = 0; r < kRowLanes; ++r) total += shared[r][i * kColumnLanes + x];
            if (column < C) partial[(static_cast<i64>(blockIdx.y) * K + k) * C + column + i] = total;
        }
    }
}

constexpr int kMostSums = 3;
template <class G>
struct SumOutputs {
    G* of[kMostSums];  // (C) each
};

// outputs.of[k] (+)= sum over pieces of partial[., k], where k is blockIdx.y: thread (x, y) sums every 8th piece.
template <class G>
__global__ void add_pieces_kernel(SumOutputs<G> outputs, const float* partial, int pieces, i64 C,
                                  bool accumulate) {
    LLMC_SHARED(shared, float[kRowLanes][kColumnLanes]);
    const int x = threadIdx.x, y = threadIdx.y, k = blockIdx.y, K = gridDim.y;
    const i64 column = static_cast<i64>(blockIdx.x) * kColumnLanes + x;
    float sum = 0.0f;
    if (column < C) {
        const float* from = partial + (static_cast<i64>(y) * K + k) * C + column;
        const i64 step = static_cast<i64>(kRowLanes) * K * C;
#pragma unroll 8
        for (int piece = y; piece < pieces; piece += kRowLanes, from += step) sum += *from;
    }
    shared[y][x] = sum;
    __syncthreads();
    if (y != 0 || column >= C) return;
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowLanes; ++r) total += shared[r][x];
    // An index into a kernel's argument would put it into local memory.
    G* const out = (k == 0 ? outputs.of[0] : k == 1 ? outputs.of[1] : outputs.of[2]) + column;
    *out = narrow<G>(accumulate ? widen(*out) + total : total);
}
// partial (pieces, K, C)
template <int K, class G>
void launch_add_pieces(cudaStream_t stream, SumOutputs<G> outputs, const float* partial, i64 pieces, i64 C,
                       bool accumulate) {
    static_assert(K <= kMostSums);
    launch(add_pieces_kernel<G>, dim3(blocks_for(C, kColumnLanes), K), dim3(kColumnLanes, kRowLanes), 0,
           stream, outputs, partial, static_cast<int>(pieces), C, accumulate);
}

inline i64 column_sum_pieces(i64 N) { return ceil_div(N, kPieceRows); }
template <int K>
i64 column_sum_scratch(i64 N, i64 C) {
    return column_sum_pieces(N) * K * C * 4;
}

// partial: column_sum_scratch<K>(N, C) bytes. Rows and the memory behind `pointers` decide the width.
template <class T, int K, class G, class Terms, class... Pointers>
void launch_column_sum(cudaStream_t stream, SumOutputs<G> outputs, float* partial, i64 N, i64 C,
                       bool accumulate, const Terms& terms, Pointers... pointers) {
    const i64 pieces = column_sum_pieces(N);
    LLMC_CHECK(pieces <= 65535, "{} rows are more than a sum over rows covers", N);
    visit_width<T>(
        C,
        [&](auto width) {
            constexpr int W = decltype(width)::value;
            launch(column_sum_kernel<W, K, Terms>,
                   dim3(blocks_for(C, kColumnLanes * W), static_cast<unsigned>(pieces)),
                   dim3(kColumnLanes, kRowLanes), 0, stream, partial, N, C, terms);
        },
        pointers...);
    launch_add_pieces<K>(stream, outputs, partial, pieces, C, accumulate);
}

}  // namespace llmc
