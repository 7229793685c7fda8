// Attention on Hopper's warpgroup matmul, forward. A block owns 64 queries of a head and walks over the keys up to the
// diagonal in tiles of 64, as in flash_forward.cu. Scores are in the registers of the warpgroup, and so are, as the left
// operand of the matmul with the values, the weights.
#include <cmath>
#include <limits>

#include "cuda/wgmma.cuh"
#include "cuda/wgmma.h"

namespace llmc {

namespace {

using namespace hopper;

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int kBlocks = 5;  // of a multiprocessor

// Online softmax of rows g and g + 8.
struct Softmax {
    float highest[2] = {kLowest, kLowest}, total[2] = {0.0f, 0.0f};  // the lane's share of the sum

    // Makes weights of scores, and corrects o if it was made with another maximum.
    __device__ __forceinline__ void weigh(Product& s, Product& o, float scale_log2e) {
        float top[2], sum[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float even = highest[half], odd = s[1][2 * half];
#pragma unroll
            for (int n = 0; n < kRows / 8; ++n) {
                float& x = n % 2 ? odd : even;
                x = Max()(Max()(s[n][2 * half], s[n][2 * half + 1]), x);
            }
            top[half] = Max()(even, odd);
        }
#pragma unroll
        for (int distance = 1; distance <= 2; distance *= 2)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                top[half] = Max()(__shfl_xor_sync(kAllLanes, top[half], distance), top[half]);
        // A maximum that has hardly grown is left as it is: weights of up to 2^kSlack do no harm.
        constexpr float kSlack = 8.0f;
        if (__any_sync(kAllLanes, (top[0] - highest[0]) * scale_log2e > kSlack ||
                                      (top[1] - highest[1]) * scale_log2e > kSlack)) {
            float correction[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                correction[half] = ptx::exp2((highest[half] - top[half]) * scale_log2e);
                highest[half] = top[half];
                total[half] *= correction[half];
            }
#pragma unroll
            for (int n = 0; n < kHS / 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) o[n][j] *= correction[j / 2];
        }
        const float shift[2] = {highest[0] * scale_log2e, highest[1] * scale_log2e};
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half][0] = total[half], sum[half][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                s[n][j] = ptx::exp2(fmaf(s[n][j], scale_log2e, -shift[j / 2]));
                sum[j / 2][j % 2] += s[n][j];
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) total[half] = sum[half][0] + sum[half][1];
    }
};

__global__ void __launch_bounds__(kThreads, kBlocks)
    wgmma_forward_kernel(bf16* out, float* lse, const bf16* qkv, AttentionDims d, int together,
                         float scale_log2e) {
    LLMC_DYNAMIC_TILES(shared);
    bf16* const queries = reinterpret_cast<bf16*>(shared);
    bf16 *const keys = queries + kTile, *const values = keys + 2 * kTile;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, i = lane % 4;
    const Place at = place<kRows>(d, together, true);
    const int T_ = static_cast<int>(d.T), C = static_cast<int>(d.C), stride = 3 * C, query0 = at.tile * kRows;
    const bf16* const q = qkv + at.b * d.T * stride + at.h * kHS;
    const auto fetch = [&](int tile) {
        load_tile(keys + tile % 2 * kTile, q + C, stride, tile * kRows, T_);
        load_tile(values + tile % 2 * kTile, q + 2 * C, stride, tile * kRows, T_);
        ptx::cp_async_commit();
    };
    load_tile(queries, q, stride, query0, T_);
    fetch(0);

    Product o;
    clear(o);
    Softmax softmax;
    for (int tile = 0; tile <= at.tile; ++tile) {
        arrive();
        if (tile < at.tile) fetch(tile + 1);
        Product s;
        ptx::wgmma_fence();
        start_rows(s, ptx::tile_descriptor(queries), ptx::tile_descriptor(keys + tile % 2 * kTile));
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::hold(s);
        if (tile == at.tile) mask<false>(s, warp * 16 + g, 2 * i, kLowest);
        softmax.weigh(s, o, scale_log2e);
        Operand p;
        as_operand(p, s);
        ptx::wgmma_fence();
        start_values(o, p, ptx::tile_descriptor(values + tile % 2 * kTile));
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::hold(o);
    }

    float share[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = softmax.total[half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        share[half] = 1.0f / sum;
        const int t = query0 + warp * 16 + g + half * 8;
        if (i == 0 && t < T_)
            lse[at.row * d.T + t] = (softmax.highest[half] * scale_log2e + log2f(sum)) * kLn2;
    }
    store_rows(out + at.b * d.T * C + at.h * kHS, C, query0, T_, queries, o, share);
}

}  // namespace

bool wgmma_runs_on(int device) {
    cudaDeviceProp p{};
    CUDA_CHECK(cudaGetDeviceProperties(&p, device));
    return p.major == 9 && p.minor == 0;
}

bool wgmma_supports(const AttentionDims& d, const Tensor& qkv, const Tensor& out) {
    const auto aligned = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0; };
    constexpr i64 kInt =
        std::numeric_limits<int>::max();  // the kernels' offsets within a tile, and positions
    return qkv.dtype == DType::bf16 && d.HS == kHS && 3 * d.C <= kInt / kRows && d.T <= kInt - kRows &&
           aligned(qkv) && aligned(out);
}

void wgmma_forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream) {
    launch(wgmma_forward_kernel, blocks_for(d.B * d.NH * ceil_div(d.T, kRows), 1), kThreads,
           (1 + 2 + 2) * kTile * sizeof(bf16), stream, out.as<bf16>(), lse.as<float>(), qkv.as<bf16>(), d,
           heads_together(d), kLog2e / std::sqrt(static_cast<float>(d.HS)));
}

}  // namespace llmc
