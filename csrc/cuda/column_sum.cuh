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

// out_k (+)= sum over pieces of partial[., k]
template <int K, class G>
__global__ void add_pieces_kernel(G* out0, G* out1, const float* partial, i64 pieces, i64 C,
                                  bool accumulate) {
    const i64 column = global_thread();
    if (column >= C) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        G* const out = (k == 0 ? out0 : out1) + column;
        float total = 0.0f;
        for (i64 piece = 0; piece < pieces; ++piece) total += partial[(piece * K + k) * C + column];
        *out = narrow<G>(accumulate ? widen(*out) + total : total);
    }
}

inline i64 column_sum_pieces(i64 N) { return ceil_div(N, kPieceRows); }
template <int K>
i64 column_sum_scratch(i64 N, i64 C) {
    return column_sum_pieces(N) * K * C * 4;
}

// partial: column_sum_scratch<K>(N, C) bytes. Rows and the memory behind `pointers` decide the width.
template <class T, int K, class G, class Terms, class... Pointers>
void launch_column_sum(cudaStream_t stream, G* out0, G* out1, float* partial, i64 N, i64 C, bool accumulate,
                       const Terms& terms, Pointers... pointers) {
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
    constexpr int kThreads = 128;
    launch(add_pieces_kernel<K, G>, blocks_for(C, kThreads), kThreads, 0, stream, out0, out1, partial, pieces,
           C, accumulate);
}

}  // namespace llmc
