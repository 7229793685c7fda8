// Token and position embeddings. Backward is a scatter: many positions may add to one row of dwte. Positions
// are sorted by token on the device (stably, so a token's positions stay in order), and the sorted list is cut
// into chunks. A block sums the rows of its chunk in f32, token by token. A token whose positions all lie in
// one chunk is added to dwte at once; a token that goes on in the next chunk leaves its share in scratch
// memory, and the block in whose chunk it begins collects the shares in a second kernel, in order. No atomics,
// the same bits on every run and every GPU, one rounding per row.
//
// A token or position out of range, which the host cannot see without waiting, gives NaN forward and nothing
// backward: never a stray access.
#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"
#include "cuda/sort.h"

namespace llmc {

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 32;  // sorted positions of a block: 2,048 blocks for 65,536 tokens

template <class T, int W>
__global__ void encoder_forward_kernel(T* out, const std::int32_t* inp, const T* wte, const T* wpe,
                                       const std::int32_t* start, i64 N, i64 T_, i64 C, i64 Vp, i64 maxT) {
    overlap_kernels();
    const i64 i = global_thread() * W;
    const i64 row = i / C, c = i % C;
    if (row >= N) return;
    const i64 token = inp[row];
    const i64 position = row % T_ + (start ? start[row / T_] : 0);
    Floats<W> x = zeros<W>();
    if (token < 0 || token >= Vp || position < 0 || position >= maxT) {
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = std::numeric_limits<float>::quiet_NaN();
    } else {
        x = load<W>(wte + token * C + c);
        const Floats<W> p = load<W>(wpe + position * C + c);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] += p[k];
    }
    store(out + i, x);
}

// The input of the sort: tokens as keys (Vp for all that are out of range), and their positions.
__global__ void sort_input_kernel(std::int32_t* keys, std::int32_t* positions, const std::int32_t* tokens,
                                  i64 N, i64 Vp) {
    const i64 i = global_thread();
    if (i >= N) return;
    keys[i] = static_cast<std::int32_t>(tokens[i] >= 0 && tokens[i] < Vp ? tokens[i] : Vp);
    positions[i] = static_cast<std::int32_t>(i);
}

template <int W, class G>
__device__ void add_to_row(G* dwte, i64 token, i64 C, i64 Vp, i64 c, const Floats<W>& sum) {
    if (token >= Vp) return;
    Floats<W> x = load<W>(dwte + token * C + c);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] += sum[k];
    store(dwte + token * C + c, x);
}

// shares (chunks, 2, C), of tokens that lie in several chunks: [0] of the chunk's first token, if it began in an
// earlier chunk; [1] of its last token, if that begins here and goes on in the next chunk.
template <class T, class G, int W>
__global__ void wte_chunk_kernel(G* dwte, float* shares, const T* dout, const std::int32_t* keys,
                                 const std::int32_t* positions, i64 N, i64 C, i64 Vp) {
    const i64 begin = static_cast<i64>(blockIdx.x) * kChunk;
    const i64 end = begin + kChunk < N ? begin + kChunk : N;
    for (i64 c = threadIdx.x * W; c < C; c += static_cast<i64>(blockDim.x) * W) {
        Floats<W> sum = zeros<W>();
        bool from_before = begin > 0 && keys[begin - 1] == keys[begin];
        for (i64 i = begin; i < end; ++i) {
            const Floats<W> d = load<W>(dout + positions[i] * C + c);
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] += d[k];
            const std::int32_t token = keys[i];
            const bool goes_on = i + 1 < N && keys[i + 1] == token;
            if (goes_on && i + 1 < end) continue;
            if (from_before || goes_on)
                store(shares + (blockIdx.x * i64{2} + (from_before ? 0 : 1)) * C + c, sum);
            else
                add_to_row<W>(dwte, token, C, Vp, c, sum);
            sum = zeros<W>();
            from_before = false;
        }
    }
}

template <class G, int W>
__global__ void wte_shares_kernel(G* dwte, const float* shares, const std::int32_t* keys, i64 N, i64 C,
                                  i64 Vp) {
    const i64 begin = static_cast<i64>(blockIdx.x) * kChunk, end = begin + kChunk;
    if (end >= N || keys[end] != keys[end - 1]) return;         // its last token ends with it
    if (begin > 0 && keys[begin - 1] == keys[end - 1]) return;  // its last token began earlier
    const std::int32_t token = keys[end - 1];
    for (i64 c = threadIdx.x * W; c < C; c += static_cast<i64>(blockDim.x) * W) {
        Floats<W> sum = load<W>(shares + (blockIdx.x * i64{2} + 1) * C + c);
        for (i64 chunk = blockIdx.x + i64{1}; chunk * kChunk < N && keys[chunk * kChunk] == token; ++chunk) {
            const Floats<W> share = load<W>(shares + chunk * 2 * C + c);
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] += share[k];
        }
        add_to_row<W>(dwte, token, C, Vp, c, sum);
    }
}

template <class T, class G, int W>
__global__ void wpe_backward_kernel(G* dwpe, const T* dout, i64 B, i64 T_, i64 C) {
    const i64 i = global_thread() * W;
    if (i >= T_ * C) return;
    Floats<W> sum = zeros<W>();
    for (i64 b = 0; b < B; ++b) {
        const Floats<W> d = load<W>(dout + b * T_ * C + i);
#pragma unroll
        for (int k = 0; k < W; ++k) sum[k] += d[k];
    }
    Floats<W> x = load<W>(dwpe + i);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] += sum[k];
    store(dwpe + i, x);
}

i64 aligned_bytes(i64 bytes) { return ceil_div(bytes, 256) * 256; }

}  // namespace

void CudaBackend::encoder_forward(Tensor out, Tensor inp, Tensor wte, Tensor wpe, Tensor start) {
    constexpr const char* op = "encoder_forward";
    const auto [B, T_, C, Vp, maxT] = encoder_dims(op, out, inp, wte, wpe);
    check::dtype(op, "out", out, wte.dtype);
    if (start) {
        check::dtype(op, "start", start, DType::i32);
        check::shape(op, "start", start, {B});
    }
    if (out.numel() == 0) return;
    visit_float(wte.dtype, [&, B = B, T_ = T_, C = C, Vp = Vp, maxT = maxT](auto tag) {
        using T = decltype(tag);
        visit_width<T>(
            C,
            [&](auto width) {
                constexpr int W = decltype(width)::value;
                launch(encoder_forward_kernel<T, W>, blocks_for(B * T_ * C / W, kThreads), kThreads, 0,
                       overlapping_stream({out}), out.as<T>(), inp.as<std::int32_t>(), wte.as<T>(),
                       wpe.as<T>(), start.as<std::int32_t>(), B * T_, T_, C, Vp, maxT);
            },
            out.data, wte.data, wpe.data);
    });
}

void CudaBackend::encoder_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor inp) {
    constexpr const char* op = "encoder_backward";
    const auto [B, T_, C, Vp, maxT] = encoder_dims(op, dout, inp, dwte, dwpe);
    const i64 N = B * T_, chunks = ceil_div(N, kChunk);
    LLMC_CHECK(N <= std::numeric_limits<std::int32_t>::max(), "{}: {} tokens are too many for one call", op,
               N);
    if (N == 0) return;

    // keys and positions, unsorted and sorted; the chunks' shares; what the sort needs.
    const cudaStream_t s = stream();  // first: cub, too, asks which device is current
    const i64 list = aligned_bytes(N * 4), shares_bytes = aligned_bytes(chunks * 2 * C * 4);
    const int bits = sort_bits(Vp);
    char* const memory = static_cast<char*>(scratch(4 * list + shares_bytes + sort_scratch(N, bits)));
    std::int32_t* const keys_in = reinterpret_cast<std::int32_t*>(memory);
    std::int32_t* const positions_in = reinterpret_cast<std::int32_t*>(memory + list);
    std::int32_t* const keys = reinterpret_cast<std::int32_t*>(memory + 2 * list);
    std::int32_t* const positions = reinterpret_cast<std::int32_t*>(memory + 3 * list);
    float* const shares = reinterpret_cast<float*>(memory + 4 * list);
    void* const sort_memory = memory + 4 * list + shares_bytes;
    launch(sort_input_kernel, blocks_for(N, kThreads), kThreads, 0, s, keys_in, positions_in,
           inp.as<std::int32_t>(), N, Vp);
    sort_pairs(keys, positions, keys_in, positions_in, N, bits, sort_memory, s);

    visit_float(dout.dtype, [&, B = B, T_ = T_, C = C, Vp = Vp](auto tag) {
        using T = decltype(tag);
        visit_float(dwte.dtype, [&](auto grad_tag) {
            using G = decltype(grad_tag);
            visit_width<T>(
                C,
                [&](auto width) {
                    constexpr int W = decltype(width)::value;
                    const i64 lanes = ceil_div(ceil_div(C, W), kWarp) * kWarp;
                    const unsigned threads = static_cast<unsigned>(lanes < kThreads ? lanes : kThreads);
                    const unsigned blocks = static_cast<unsigned>(chunks);
                    launch(wte_chunk_kernel<T, G, W>, blocks, threads, 0, s, dwte.as<G>(), shares,
                           dout.as<T>(), keys, positions, N, C, Vp);
                    launch(wte_shares_kernel<G, W>, blocks, threads, 0, s, dwte.as<G>(), shares, keys, N, C,
                           Vp);
                    launch(wpe_backward_kernel<T, G, W>, blocks_for(T_ * C / W, kThreads), kThreads, 0, s,
                           dwpe.as<G>(), dout.as<T>(), B, T_, C);
                },
                dwte.data, dwpe.data, dout.data);
        });
    });
}

}  // namespace llmc
