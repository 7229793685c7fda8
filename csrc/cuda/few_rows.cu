// out = inp weight^T + bias, and GELU of it, for up to 16 rows: generation. Time is that of reading the weights once,
// and of the steps that wait for each other. A block takes 8 columns of out, or several times 8, and its warps share
// out K among them; their sums are added in shared memory, in order. A lane holds 16 bytes of a column's weights at a
// time and asks for all of its own at once, before it waits for the kernels that compute inp.
//
// bf16 goes through tensor cores, with the rows as the 16 rows of A, and 8 columns' weights as B. A sum may run over
// k in any order, if both operands have the same: so the 8 neighbours that a lane loads are those that two mma take
// from it, and nothing passes through shared memory. f32 is multiplied by the same lanes, one row after the other.
#include "core/dims.h"
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
    // With layernorm: inp = layernorm(a + b), or of a if b is absent.
    const void *a, *b, *ln_weight, *ln_bias;
    void* residual;
};

// layernorm in the same kernel. Every block computes it, which is worth its while for so few rows alone.
constexpr int kNormRows = 4;
constexpr float kEps = 1e-5f;

// A row of up to V times 32 W columns, by a warp.
template <class T, int V>
struct Norm {
    static constexpr int W = 16 / sizeof(T);
    Packed<W, T> weight[V] = {}, bias[V] = {};

    __device__ __forceinline__ static int column(int v) {
        return (v * kWarp + static_cast<int>(threadIdx.x) % kWarp) * W;
    }
    __device__ __forceinline__ void load_weights(const FewRows& p) {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (const int c = column(v); c < p.K) {
                weight[v].load(static_cast<const T*>(p.ln_weight) + c);
                bias[v].load(static_cast<const T*>(p.ln_bias) + c);
            }
    }
    // a, b and residual of the row; out in shared memory. residual may be absent.
    __device__ __forceinline__ void compute(T* out, T* residual, const T* a, const T* b, int K) const {
        Packed<W, T> x[V] = {}, y[V] = {};
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (const int c = column(v); c < K) {
                x[v].load(a + c);
                if (b) y[v].load(b + c);
            }
        __syncwarp();  // all loads are under way
        Floats<W> f[V];
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            f[v] = x[v].floats();
            if (b) {
                const Floats<W> other = y[v].floats();
#pragma unroll
                for (int k = 0; k < W; ++k) f[v][k] += other[k];
                x[v] = Packed<W, T>::of(f[v]);
                f[v] = x[v].floats();  // rounded, as a later reader will see it
                if (residual && column(v) < K) x[v].store(residual + column(v));
            }
#pragma unroll
            for (int k = 0; k < W; ++k) sum += f[v][k];
        }
        const float mean = warp_reduce(sum, Sum()) / static_cast<float>(K);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int k = 0; k < W; ++k)
                if (column(v) < K) squares += (f[v][k] - mean) * (f[v][k] - mean);
        const float rstd = 1.0f / sqrtf(warp_reduce(squares, Sum()) / static_cast<float>(K) + kEps);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Floats<W> scale = weight[v].floats(), shift = bias[v].floats();
#pragma unroll
            for (int k = 0; k < W; ++k) f[v][k] = fmaf((f[v][k] - mean) * rstd, scale[k], shift[k]);
            if (column(v) < K) llmc::store(out + column(v), f[v]);
        }
    }
};

// How often a lane loads 16 bytes of a column before it computes: all of K = 768 in bf16 and f32, or of 3072 in bf16. (A loop
// goes on from there.)
template <class T>
constexpr int kShort = std::is_same_v<T, bf16> ? 4 : 6;
constexpr int kLong = 12;

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

// N <= R. Steps: how often a lane loads 16 bytes of each tile before it computes. With layernorm, that is all of K.
template <class T, class Out, int R, int Tiles, int Steps, bool norm = false>
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
    using Layernorm = Norm<T, norm ? Steps : 1>;
    Layernorm layernorm;
    if (norm && warp < p.N) layernorm.load_weights(p);
    if (p.early) overlap_kernels();

    const T* inp = static_cast<const T*>(p.inp);
    if constexpr (norm) {
        LLMC_SHARED(normed, Packed<Steps * kWarp * W, T>[kNormRows]);
        T* const rows_of_inp = reinterpret_cast<T*>(normed);
        if (warp < p.N) {
            const i64 row = warp * p.K;
            layernorm.compute(rows_of_inp + row,
                              p.residual && blockIdx.x == 0 ? static_cast<T*>(p.residual) + row : nullptr,
                              static_cast<const T*>(p.a) + row,
                              p.b ? static_cast<const T*>(p.b) + row : nullptr, p.K);
        }
        __syncthreads();
        inp = rows_of_inp;
    }
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

i64 vector_of(DType dtype) { return dtype == DType::bf16 ? 8 : 4; }
bool aligned(const void* x) { return reinterpret_cast<std::uintptr_t>(x) % 16 == 0; }

}  // namespace

// Returns false if the shape is not for these kernels. The choice is by shape alone: the same bits come from every GPU.
bool CudaBackend::few_rows_matmul(const Matmul& p) {
    if (p.n == 0 || p.n > kFewRows || p.m == 0 || p.k == 0 || p.k % vector_of(p.inputs) != 0 ||
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
        // A warp loads its weights at once. With more than 8 rows inp is as much to load as the weights, so a block
        // takes two tiles with it.
        const auto with_rows = [&](auto out, auto rows) {
            constexpr int kTiles = kHalf && decltype(rows)::value > 8 ? 2 : 1;
            if (steps > kShort<T>)
                launch_as(out, rows, std::integral_constant<int, 1>{}, std::integral_constant<int, kLong>{});
            else
                launch_as(out, rows, std::integral_constant<int, kTiles>{},
                          std::integral_constant<int, kShort<T>>{});
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

void CudaBackend::fused_layernorm_matmul_forward(Tensor out, Tensor pre, Tensor residual, Tensor ln,
                                                 Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                                 Tensor ln_weight, Tensor ln_bias, Tensor weight,
                                                 Tensor bias) {
    constexpr const char* op = "fused_layernorm_matmul_forward";
    layernorm_forward_dims(op, ln, mean, rstd, a, ln_weight, ln_bias);
    if (b) elementwise_numel(op, residual, a, b);
    const MatmulDims d = matmul_forward_dims(out, ln, weight, bias);
    if (pre) check::like(op, "pre", pre, out);
    const bool fits =
        d.N > 0 && d.N <= kNormRows && d.OC > 0 && d.C % vector_of(a.dtype) == 0 &&
        d.C <= kWarp * vector_of(a.dtype) * (a.dtype == DType::bf16 ? kShort<bf16> : kShort<float>);
    bool wide = true;
    for (const Tensor& x : {a, b, residual, ln_weight, ln_bias, weight}) wide = wide && aligned(x.data);
    // One block writes residual while others read a and b.
    if (!fits || !wide || out.dtype != a.dtype || (b && (residual.data == a.data || residual.data == b.data)))
        return Backend::fused_layernorm_matmul_forward(out, pre, residual, ln, mean, rstd, a, b, ln_weight,
                                                       ln_bias, weight, bias);
    FewRows f{};
    f.out = out.data, f.pre = pre.data, f.weight = weight.data, f.bias = bias.data;
    f.N = static_cast<int>(d.N), f.K = static_cast<int>(d.C), f.OC = d.OC;
    f.gelu = static_cast<bool>(pre);
    f.a = a.data, f.b = b.data, f.residual = b ? residual.data : nullptr;
    f.ln_weight = ln_weight.data, f.ln_bias = ln_bias.data;
    const LaunchStream s = overlapping_stream({out, pre, b ? residual : Tensor()});
    f.early = at_rest(weight) && at_rest(bias) && at_rest(ln_weight) && at_rest(ln_bias);
    visit_float(a.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch(few_rows_kernel<T, T, 8, 1, kShort<T>, true>, blocks_for(d.OC, kColumns), kThreads, 0, s, f);
    });
}

}  // namespace llmc
