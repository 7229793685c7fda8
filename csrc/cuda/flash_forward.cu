// Flash attention, forward. A block owns 64 queries of a head, in registers, and walks over the keys up to the
// diagonal in tiles of 64: scores, online softmax (per row a running maximum and sum, over the 4 lanes that
// share the row), and the scores as they lie in registers are the left operand of the matmul with the values.
#include "cuda/flash.cuh"

#include <cmath>
#include <limits>

namespace llmc {

namespace {

using namespace flash;

constexpr int kKeys = 64;  // of a tile

// The number of blocks that are to fit on a multiprocessor, for which the compiler saves registers. 4 needs no
// spilling for head size 64; 0 leaves it to the compiler.
template <int HS>
constexpr int kBlocks = HS == 64 ? 4 : 0;

template <int HS>
__global__ void __launch_bounds__(kThreads, kBlocks<HS>)
    flash_forward_kernel(bf16* out, float* lse, const bf16* qkv, AttentionDims d, int together,
                         float scale_log2e) {
    LLMC_DYNAMIC_SHARED(shared);
    constexpr int kTile = kKeys * kLd<HS>;
    bf16 *const keys = reinterpret_cast<bf16*>(shared), *const values = keys + 2 * kTile;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, i = lane % 4;
    const Place at = place<kRows>(d, together, true);
    const int T_ = static_cast<int>(d.T), stride = static_cast<int>(3 * d.C), query0 = at.tile * kRows;
    const bf16* const q = qkv + at.b * d.T * stride + at.h * HS;
    const bf16 *const k = q + d.C, *const v = q + 2 * d.C;

    // The queries pass through the second buffer of keys, which is free until the loop begins.
    load_tile<HS, kRows>(keys + kTile, q, stride, query0, T_);
    load_tile<HS, kKeys>(keys, k, stride, 0, T_);
    load_tile<HS, kKeys>(values, v, stride, 0, T_);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    std::uint32_t query[HS / 16][4];
#pragma unroll
    for (int c = 0; c < HS / 16; ++c) load_a<HS>(query[c], keys + kTile + warp * 16 * kLd<HS>, c);
    __syncthreads();

    float o[HS / 8][4];
    clear(o);
    float highest[2] = {-std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
    float total[2] = {0.0f, 0.0f};           // this lane's share
    const int row = query0 + warp * 16 + g;  // and row + 8
    const int last = query0 + kRows < T_ ? query0 + kRows : T_;
    const int tiles = (last + kKeys - 1) / kKeys;
    for (int tile = 0; tile < tiles; ++tile) {
        const int buffer = tile % 2;
        if (tile + 1 < tiles) {
            load_tile<HS, kKeys>(keys + (1 - buffer) * kTile, k, stride, (tile + 1) * kKeys, T_);
            load_tile<HS, kKeys>(values + (1 - buffer) * kTile, v, stride, (tile + 1) * kKeys, T_);
        }
        ptx::cp_async_commit();  // empty at the end, so that the count below is right there too
        ptx::cp_async_wait<1>();
        __syncthreads();

        float s[kKeys / 8][4];
        clear(s);
        multiply_rows<HS, kKeys>(
            s,
            [&](std::uint32_t (&a)[4], int c) {
#pragma unroll
                for (int r = 0; r < 4; ++r) a[r] = query[c][r];
            },
            keys + buffer * kTile);

        const int key0 = tile * kKeys;
        if (key0 + kKeys > query0) {  // on the diagonal
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (key0 + n * 8 + 2 * i + j % 2 > row + j / 2 * 8)
                        s[n][j] = -std::numeric_limits<float>::infinity();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows g and g + 8
            float top = highest[half];
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) top = Max()(Max()(s[n][2 * half], s[n][2 * half + 1]), top);
            top = Max()(__shfl_xor_sync(kAllLanes, top, 1), top);
            top = Max()(__shfl_xor_sync(kAllLanes, top, 2), top);
            const float correction = ptx::exp2((highest[half] - top) * scale_log2e);
            const float shift = top * scale_log2e;
            highest[half] = top;
            total[half] *= correction;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; ++j) {
                    s[n][j] = ptx::exp2(fmaf(s[n][j], scale_log2e, -shift));
                    total[half] += s[n][j];
                }
#pragma unroll
            for (int n = 0; n < HS / 8; ++n) {
                o[n][2 * half] *= correction;
                o[n][2 * half + 1] *= correction;
            }
        }
        multiply_values<HS, kKeys>(o, s, values + buffer * kTile);
        __syncthreads();  // before this buffer is filled again
    }
    ptx::cp_async_wait<0>();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int t = row + half * 8;
        if (t >= T_) continue;
        bf16* const to = out + (at.b * d.T + t) * d.C + at.h * HS + 2 * i;
#pragma unroll
        for (int n = 0; n < HS / 8; ++n)
            store(to + n * 8, Floats<2>{o[n][2 * half] / sum, o[n][2 * half + 1] / sum});
        if (i == 0) lse[at.row * d.T + t] = (highest[half] * scale_log2e + log2f(sum)) * kLn2;
    }
}

}  // namespace

bool flash_supports(const AttentionDims& d, const Tensor& qkv, const Tensor& out) {
    const auto aligned = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0; };
    constexpr i64 kInt =
        std::numeric_limits<int>::max();  // the kernels' offsets within a tile, and positions
    return qkv.dtype == DType::bf16 && (d.HS == 64 || d.HS == 80 || d.HS == 96 || d.HS == 128) &&
           3 * d.C <= kInt / flash::kRows && d.T <= kInt - flash::kRows && aligned(qkv) && aligned(out);
}

void flash_forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream) {
    flash::visit_head_size(d.HS, [&](auto head_size) {
        constexpr int HS = decltype(head_size)::value;
        constexpr std::size_t shared = 4 * kKeys * flash::kLd<HS> * sizeof(bf16);
        launch(flash_forward_kernel<HS>, blocks_for(d.B * d.NH * ceil_div(d.T, flash::kRows), 1),
               flash::kThreads, shared, stream, out.as<bf16>(), lse.as<float>(), qkv.as<bf16>(), d,
               heads_together(d), flash::kLog2e / std::sqrt(static_cast<float>(d.HS)));
    });
}

}  // namespace llmc
