// out = inp weight^T + bias, and GELU of it, for up to 16 rows: generation. Time is that of reading the weights once,
// and of the steps that wait for each other. A block takes 8 columns of out, or several times 8, and its warps share
// out K among them; their sums are added in shared memory, in order. A lane holds 16 bytes of a column's weights at a
// time and asks for all of its own at once, before it waits for the kernels that compute inp.
//
// bf16 goes through tensor cores, with the rows as the 16 rows of A, and 8 columns' weights as B. A sum may run over
// k in any order, if both operands have the same: so the 8 neighbours that a lane loads are those that two mma take
// from it, and nothing passes through shared memory. f32 is multiplied by the same lanes, one row after the other.
#include "cuda/cuda_backend.h"
#include "cuda/gelu.cuh"

namespace llmc {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kColumns = 8;  // of a tile
constexpr int kQuad = 4;     // lanes that share a column

struct FewRows {
    void *out, *pre;  // pre: if gelu, its argument
    const void *inp, *weight, *bias;
    int N, K;
    i64 OC;
    bool gelu;
    bool early;  // weight and bias may be read before the wait
};

// The sums of a warp over its part of K: of `Tiles` times 8 columns, and R rows.
template <class T, int R, int Tiles>
struct Sums;

template <int R, int Tiles>
struct Sums<bf16, R, Tiles> {
    static constexpr int kChains = Tiles == 1 ? 4 : 2;  // sums that do not wait for each other
    float d[Tiles][kChains][4] = {};

    template <int Steps>
    __device__ __forceinline__ void add(const Packed<8, bf16> (&w)[Tiles][Steps], const bf16* inp, int N,
                                        int K, int k0, int step) {
        const int g = static_cast<int>(threadIdx.x) % kWarp / kQuad;
        Packed<8, bf16> x[Steps][2] = {};
#pragma unroll
        for (int s = 0; s < Steps; ++s)
#pragma unroll
            for (int half = 0; half < R / 8; ++half) {
                const int k = k0 + s * step, row = g + 8 * half;
                if (k < K && row < N) x[s][half].load(inp + row * K + k);
            }
        __syncwarp();  // all loads are under way: the compiler would put them off until they are needed, to save registers
#pragma unroll
        for (int s = 0; s < Steps; ++s)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const std::uint32_t a[4] = {x[s][0].words[2 * m], x[s][1].words[2 * m],
                                            x[s][0].words[2 * m + 1], x[s][1].words[2 * m + 1]};
#pragma unroll
                for (int t = 0; t < Tiles; ++t)
                    ptx::mma_bf16(d[t][(2 * s + m) % kChains], a, w[t][s].words[2 * m],
                                  w[t][s].words[2 * m + 1]);
            }
    }
    template <class Store>
    __device__ __forceinline__ void store(Store to) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / kQuad, i = lane % kQuad;
#pragma unroll
        for (int t = 0; t < Tiles; ++t)
#pragma unroll
            for (int j = 0; j < R / 4; ++j) {
                float sum = d[t][0][j];
#pragma unroll
                for (int c = 1; c < kChains; ++c) sum += d[t][c][j];
                to(g + 8 * (j / 2), t * kColumns + 2 * i + j % 2, sum);
            }
    }
};

template <int R, int Tiles>
struct Sums<float, R, Tiles> {
    float d[Tiles][R] = {};

    template <int Steps>
    __device__ __forceinline__ void add(const Packed<4, float> (&w)[Tiles][Steps], const float* inp, int N,
                                        int K, int k0, int step) {
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
            const int k = k0 + s * step;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (r >= N || k >= K) continue;
                const Floats<4> x = load<4>(inp + r * K + k);
#pragma unroll
                for (int t = 0; t < Tiles; ++t) {
                    const Floats<4> v = w[t][s].floats();
#pragma unroll
                    for (int j = 0; j < 4; ++j) d[t][r] = fmaf(v[j], x[j], d[t][r]);
                }
            }
        }
    }
    template <class Store>
    __device__ __forceinline__ void store(Store to) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
        for (int t = 0; t < Tiles; ++t)
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float sum = d[t][r];
                sum += __shfl_xor_sync(kAllLanes, sum, 1);
                sum += __shfl_xor_sync(kAllLanes, sum, 2);
                if (lane % kQuad == 0) to(r, t * kColumns + lane / kQuad, sum);
            }
    }
};

// N <= R. Steps: how often a lane loads 16 bytes of each tile before it computes.
template <class T, class Out, int R, int Tiles, int Steps>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(FewRows p) {
    constexpr int W = 16 / sizeof(T), kStep = kQuad * W;
    constexpr int kWidth = Tiles * kColumns, kPadded = kWidth + 2;
    LLMC_SHARED(partial, float[kWarps][R][kPadded]);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const i64 column0 = static_cast<i64>(blockIdx.x) * kWidth;
    const T* const weight = static_cast<const T*>(p.weight);
    Packed<W, T> w[Tiles][Steps];
    // Columns past the end are read from the last one, and not stored.
    const T* rows[Tiles];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
        const i64 column = column0 + t * kColumns + lane / kQuad;
        rows[t] = weight + (column < p.OC ? column : p.OC - 1) * p.K;
    }
    int k0 = warp * kStep + lane % kQuad * W;
    const auto load_weights = [&] {
#pragma unroll
        for (int t = 0; t < Tiles; ++t)
#pragma unroll
            for (int s = 0; s < Steps; ++s) {
                const int k = k0 + s * kWarps * kStep;
                w[t][s] = k < p.K ? load_packed<W>(rows[t] + k) : Packed<W, T>{};
            }
    };
    if (!p.early) {
#pragma unroll
        for (int t = 0; t < Tiles; ++t)
            for (int k = k0; k < p.K; k += kWarps * kStep) ptx::prefetch(rows[t] + k);
        overlap_kernels();
    }
    load_weights();
    // In the end a thread has one column, of all rows or some.
    static_assert(kThreads % kWidth == 0);
    const int c = static_cast<int>(threadIdx.x) % kWidth;
    const i64 column = column0 + c;
    const float bias = p.bias && column < p.OC ? widen(static_cast<const T*>(p.bias)[column]) : 0.0f;
    if (p.early) overlap_kernels();

    const T* const inp = static_cast<const T*>(p.inp);
    Sums<T, R, Tiles> sums;
    for (;;) {
        sums.add(w, inp, p.N, p.K, k0, kWarps * kStep);
        k0 += Steps * kWarps * kStep;
        if (k0 - lane % kQuad * W >= p.K) break;
        load_weights();
    }
    sums.store([&](int row, int column, float sum) { partial[warp][row][column] = sum; });
    __syncthreads();
    if (column >= p.OC) return;
    for (int row = static_cast<int>(threadIdx.x) / kWidth; row < p.N; row += kThreads / kWidth) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < kWarps; ++v) sum += partial[v][row][c];
        Out x = narrow<Out>(sum + bias);
        const i64 at = row * p.OC + column;
        if (p.gelu) {
            static_cast<Out*>(p.pre)[at] = x;
            x = narrow<Out>(gelu(widen(x)));  // of what is stored, as gelu_forward has it
        }
        static_cast<Out*>(p.out)[at] = x;
    }
}

}  // namespace

// Returns false if the shape is not for these kernels. The choice is by shape alone: the same bits come from every GPU.
bool CudaBackend::few_rows_matmul(const Matmul& p) {
    const std::size_t vector = p.inputs == DType::bf16 ? 8 : 4;
    const auto aligned = [](const void* x) { return reinterpret_cast<std::uintptr_t>(x) % 16 == 0; };
    if (p.n == 0 || p.n > kFewRows || p.m == 0 || p.k == 0 || p.k % static_cast<i64>(vector) != 0 ||
        p.k > 1 << 20 || !aligned(p.a) || !aligned(p.b))
        return false;
    FewRows f{};
    f.out = p.d, f.pre = p.aux, f.inp = p.b, f.weight = p.a, f.bias = p.bias;
    f.N = static_cast<int>(p.n), f.K = static_cast<int>(p.k), f.OC = p.m;
    f.gelu = p.epilogue == Epilogue::gelu || p.epilogue == Epilogue::gelu_bias;
    const LaunchStream s =
        overlapping_stream({Tensor(p.d, p.output, {p.n, p.m}), Tensor(p.aux, p.output, {p.n, p.m})});
    f.early = at_rest(Tensor(const_cast<void*>(p.a), p.inputs, {p.m, p.k})) &&
              at_rest(Tensor(const_cast<void*>(p.bias), p.inputs, {p.m}));
    visit_float(p.inputs, [&](auto in) {
        using T = decltype(in);
        constexpr bool kHalf = std::is_same_v<T, bf16>;
        constexpr int kStep = kQuad * 16 / static_cast<int>(sizeof(T));
        const i64 steps = ceil_div(p.k, kStep * kWarps);
        const auto launch_as = [&](auto out, auto rows, auto tiles, auto steps_at_once) {
            constexpr int kTiles = decltype(tiles)::value;
            launch(few_rows_kernel<T, decltype(out), decltype(rows)::value, kTiles,
                                   decltype(steps_at_once)::value>,
                   blocks_for(p.m, kTiles * kColumns), kThreads, 0, s, f);
        };
        // A warp loads its weights at once, and those of two tiles if K is short.
        const auto with_rows = [&](auto out, auto rows) {
            constexpr int kShort = kHalf ? 4 : 6, kLong = 12, kTiles = kHalf ? 2 : 1;
            if (steps > kShort)
                launch_as(out, rows, std::integral_constant<int, 1>{}, std::integral_constant<int, kLong>{});
            else
                launch_as(out, rows, std::integral_constant<int, kTiles>{},
                          std::integral_constant<int, kShort>{});
        };
        const auto with_out = [&](auto out) {
            if (p.n <= 8)
                with_rows(out, std::integral_constant<int, 8>{});
            else
                with_rows(out, std::integral_constant<int, 16>{});
        };
        if (p.output == p.inputs)
            with_out(T{});
        else if constexpr (kHalf)
            with_out(float{});
    });
    return true;
}

}  // namespace llmc
