// Causal attention by simple kernels, for any head size, f32 and bf16; and the choice between these, the
// kernels on tensor cores (flash.h, wgmma.h) and cuDNN. Only lse is kept: memory grows with T, not with its square.
//
// Forward and generation: a warp takes 32 keys at a time for one query. Lane j owns the score of key j, then
// the lanes share out the channels to add up the values, and the running maximum is corrected as in online
// softmax (Milakov & Gimelshein 2018). The warps of a block take turns at the keys of one query and merge
// their results at the end.
//
// Backward, from lse: p = exp(s - lse) is computed again, twice: for dq by the owner of a query over its keys,
// for dk and dv by the owner of a key over its queries. So no two warps ever add to one place. With
// delta = sum(dout * out) per query:
//   ds = p (dout v^T - delta) scale;   dq = sum_j ds_j k_j;   dk = sum_i ds_i q_i;   dv = sum_i p_i dout_i
#include "cuda/flash.h"

#include <cmath>
#include <limits>

#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"
#include "cuda/wgmma.h"

namespace llmc {

namespace {

constexpr int kWarps = 4;
constexpr float kLowest = -3e38f;

// The keys or values of one head: row j is at data + j * stride.
template <class T>
struct Rows {
    const T* data;
    i64 stride;
    __device__ const T* operator[](i64 j) const { return data + j * stride; }
};

// Loads W elements at a time; the sum is in the order of the elements.
template <int W = 1, class T>
__device__ float dot(const float* a, const T* b, i64 n) {
    float sum = 0.0f;
#pragma unroll 4
    for (i64 i = 0; i < n; i += W) {
        const Floats<W> x = load<W>(b + i);
#pragma unroll
        for (int k = 0; k < W; ++k) sum = fmaf(a[i + k], x[k], sum);
    }
    return sum;
}

// out (HS) = softmax(q k^T scale) v over `keys` rows, by one block of kWarps warps.
// shared: q (HS), then per warp the unscaled result (HS), then per warp maximum and sum.
template <int W, class T>
__device__ void attend(T* out, float* lse, const T* q, Rows<T> k, Rows<T> v, i64 keys, i64 HS, float scale,
                       float* shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* const query = shared;
    float* const sum = shared + HS + warp * HS;  // lane owns channels lane, lane + 32, ..
    float* const stats = shared + HS + kWarps * HS;
    for (i64 i = threadIdx.x; i < HS; i += kWarps * kWarp) query[i] = widen(q[i]) * scale;
    for (i64 i = lane; i < HS; i += kWarp) sum[i] = 0.0f;
    __syncthreads();
    float highest = kLowest, total = 0.0f;
    for (i64 begin = warp * kWarp; begin < keys; begin += kWarps * kWarp) {
        const i64 j = begin + lane;
        const float score = j < keys ? dot<W>(query, k[j], HS) : -std::numeric_limits<float>::infinity();
        const float top = Max()(warp_reduce(score, Max()), highest);
        const float p = expf(score - top), correction = expf(highest - top);
        total = total * correction + warp_reduce(p, Sum());
        highest = top;
        for (i64 first = 0; first < HS; first += kWarp) {
            const i64 i = first + lane;
            float s = i < HS ? sum[i] * correction : 0.0f;
            constexpr int kAhead = 8;  // values whose loads do not wait for each other
            for (int other = 0; other < kWarp; other += kAhead) {
                float value[kAhead];
#pragma unroll
                for (int a = 0; a < kAhead; ++a)
                    value[a] = begin + other + a < keys && i < HS ? widen(v[begin + other + a][i]) : 0.0f;
#pragma unroll
                for (int a = 0; a < kAhead; ++a) {
                    const float weight = __shfl_sync(kAllLanes, p, other + a);
                    if (begin + other + a < keys) s = fmaf(weight, value[a], s);
                }
            }
            if (i < HS) sum[i] = s;
        }
    }
    if (lane == 0) {
        stats[2 * warp] = highest;
        stats[2 * warp + 1] = total;
    }
    __syncthreads();
    float top = kLowest, all = 0.0f;
    for (int w = 0; w < kWarps; ++w) top = Max()(stats[2 * w], top);
    for (int w = 0; w < kWarps; ++w) all += stats[2 * w + 1] * expf(stats[2 * w] - top);
    for (i64 i = threadIdx.x; i < HS; i += kWarps * kWarp) {
        float x = 0.0f;
        for (int w = 0; w < kWarps; ++w) x += shared[HS + w * HS + i] * expf(stats[2 * w] - top);
        out[i] = narrow<T>(x / all);
    }
    if (lse && threadIdx.x == 0) *lse = top + logf(all);
}
std::size_t attend_shared(i64 HS) {
    const std::size_t bytes = static_cast<std::size_t>((1 + kWarps) * HS + 2 * kWarps) * sizeof(float);
    LLMC_CHECK(bytes <= 96 << 10, "a head size of {} is more than attention on a GPU takes", HS);
    return bytes;
}

// One block per (b, h, t); the longest rows first, so that the short ones fill the gaps at the end.
template <class T, int W>
__global__ void attention_forward_kernel(T* out, float* lse, const T* qkv, AttentionDims d, float scale) {
    LLMC_DYNAMIC_SHARED(shared);
    const i64 rows = d.B * d.NH, row = blockIdx.x % rows, t = d.T - 1 - blockIdx.x / rows;
    const i64 b = row / d.NH, h = row % d.NH, stride = 3 * d.C;
    const T* const head = qkv + b * d.T * stride + h * d.HS;
    attend<W>(out + (b * d.T + t) * d.C + h * d.HS, lse + row * d.T + t, head + t * stride,
              Rows<T>{head + d.C, stride}, Rows<T>{head + 2 * d.C, stride}, t + 1, d.HS, scale,
              reinterpret_cast<float*>(shared));
}

template <class T>
__global__ void cache_store_kernel(T* kcache, T* vcache, const T* qkv, const std::int32_t* start,
                                   DecodeDims d) {
    const i64 i = global_thread();
    if (i >= d.B * d.T * d.C) return;
    const i64 b = i / (d.T * d.C), t = i / d.C % d.T, h = i % d.C / d.HS, c = i % d.HS;
    const i64 position = start[b] + t;
    if (position < 0 || position >= d.maxT) return;
    const T* const row = qkv + (b * d.T + t) * 3 * d.C + h * d.HS + c;
    const i64 to = ((b * d.NH + h) * d.maxT + position) * d.HS + c;
    kcache[to] = row[d.C];
    vcache[to] = row[2 * d.C];
}

// If there is one new position per sequence, its block stores it in the caches; else they hold the new ones already.
template <class T, int W>
__global__ void attention_decode_kernel(T* out, T* kcache, T* vcache, const T* qkv, const std::int32_t* start,
                                        DecodeDims d, float scale) {
    LLMC_DYNAMIC_SHARED(shared);
    const i64 rows = d.B * d.NH, row = blockIdx.x % rows, t = d.T - 1 - blockIdx.x / rows;
    const i64 b = row / d.NH, h = row % d.NH, position = start[b] + t;
    T* const to = out + (b * d.T + t) * d.C + h * d.HS;
    if (position < 0 || position >= d.maxT) {  // the host cannot check it without waiting
        for (i64 i = threadIdx.x; i < d.HS; i += kWarps * kWarp)
            to[i] = narrow<T>(std::numeric_limits<float>::quiet_NaN());
        return;
    }
    const i64 cache = row * d.maxT * d.HS;
    const T* const q = qkv + (b * d.T + t) * 3 * d.C + h * d.HS;
    if (d.T == 1)  // attend() begins with a barrier
        for (i64 i = threadIdx.x; i < d.HS; i += kWarps * kWarp) {
            kcache[cache + position * d.HS + i] = q[d.C + i];
            vcache[cache + position * d.HS + i] = q[2 * d.C + i];
        }
    attend<W>(to, static_cast<float*>(nullptr), q, Rows<T>{kcache + cache, d.HS},
              Rows<T>{vcache + cache, d.HS}, position + 1, d.HS, scale, reinterpret_cast<float*>(shared));
}

// delta (B,NH,T): 8 lanes per row (b, t, h), in memory order.
constexpr int kDeltaLanes = 8, kDeltaThreads = 256;

template <class T, int W>
__global__ void delta_kernel(float* delta, const T* dout, const T* out, unsigned rows, unsigned T_,
                             unsigned NH, int HS) {
    const unsigned row = (blockIdx.x * kDeltaThreads + threadIdx.x) / kDeltaLanes;
    const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
    const i64 begin = static_cast<i64>(row) * HS;
    float sum = 0.0f;
    if (row < rows)
        for (int i = lane * W; i < HS; i += kDeltaLanes * W) {
            const Floats<W> a = load<W>(dout + begin + i), b = load<W>(out + begin + i);
#pragma unroll
            for (int k = 0; k < W; ++k) sum = fmaf(a[k], b[k], sum);
        }
#pragma unroll
    for (int distance = kDeltaLanes / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (row >= rows || lane != 0) return;
    const unsigned position = row / NH, h = row % NH, b = position / T_, t = position % T_;
    delta[(static_cast<i64>(b) * NH + h) * T_ + t] = sum;
}
template <class T>
void launch_delta(float* delta, const Tensor& dout, const Tensor& out, const AttentionDims& d,
                  cudaStream_t stream) {
    const i64 rows = d.B * d.T * d.NH;
    LLMC_CHECK(rows <= std::numeric_limits<int>::max() / kDeltaLanes,
               "{} rows of heads are more than attention on a GPU takes", rows);
    visit_width<T>(
        d.HS,
        [&](auto width) {
            launch(delta_kernel<T, decltype(width)::value>, blocks_for(rows * kDeltaLanes, kDeltaThreads),
                   kDeltaThreads, 0, stream, delta, dout.as<T>(), out.as<T>(), static_cast<unsigned>(rows),
                   static_cast<unsigned>(d.T), static_cast<unsigned>(d.NH), static_cast<int>(d.HS));
        },
        dout.data, out.data);
}

// Each warp owns a query (for dq) or a key (for dk and dv). shared, per warp: the two rows of what it owns, then the
// one or two rows that it adds up.
template <class T, bool owns_query>
__global__ void attention_backward_kernel(T* dqkv, const T* dout, const T* qkv, const float* lse,
                                          const float* delta, AttentionDims d, float scale) {
    LLMC_DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const i64 owner = global_thread() / kWarp, rows = d.B * d.NH;
    if (owner >= rows * d.T) return;
    const i64 row = owner % rows, order = owner / rows;
    const i64 owned = owns_query ? d.T - 1 - order : order;  // the longest first
    const i64 b = row / d.NH, h = row % d.NH, stride = 3 * d.C, HS = d.HS;
    const T* const q = qkv + b * d.T * stride + h * HS;
    const T *const k = q + d.C, *const v = q + 2 * d.C;
    const T* const dy = dout + b * d.T * d.C + h * HS;
    const float *const lse_row = lse + row * d.T, *const delta_row = delta + row * d.T;

    float* const a = reinterpret_cast<float*>(shared) + warp * 4 * HS;  // of what is owned: q, or k
    float* const a2 = a + HS;                                           // dout, or v
    float *const sum = a + 2 * HS, *const sum2 = a + 3 * HS;            // dq; or dk, dv
    for (i64 i = lane; i < HS; i += kWarp) {
        a[i] = widen((owns_query ? q : k)[owned * stride + i]);
        a2[i] = owns_query ? widen(dy[owned * d.C + i]) : widen(v[owned * stride + i]);
        sum[i] = sum2[i] = 0.0f;
    }
    __syncwarp();
    const i64 first = owns_query ? 0 : owned, end = owns_query ? owned + 1 : d.T;
    for (i64 begin = first; begin < end; begin += kWarp) {
        const i64 j = begin + lane;  // a key if the warp owns a query, else a query
        float p = 0.0f, ds = 0.0f;
        if (j < end) {
            const i64 query = owns_query ? owned : j;
            const float s = dot(a, (owns_query ? k : q) + j * stride, HS);
            const float dp = owns_query ? dot(a2, v + j * stride, HS) : dot(a2, dy + j * d.C, HS);
            p = expf(s * scale - lse_row[query]);
            ds = p * (dp - delta_row[query]) * scale;
        }
        for (i64 base = 0; base < HS; base += kWarp) {
            const i64 i = base + lane;
            float x = i < HS ? sum[i] : 0.0f, x2 = i < HS ? sum2[i] : 0.0f;
            for (int other = 0; other < kWarp; ++other) {
                const float weight = __shfl_sync(kAllLanes, ds, other);
                const float weight2 = __shfl_sync(kAllLanes, p, other);
                if (begin + other >= end || i >= HS) continue;
                x = fmaf(weight, widen((owns_query ? k : q)[(begin + other) * stride + i]), x);
                if (!owns_query) x2 = fmaf(weight2, widen(dy[(begin + other) * d.C + i]), x2);
            }
            if (i < HS) sum[i] = x, sum2[i] = x2;
        }
    }
    T* const to = dqkv + (b * d.T + owned) * stride + h * HS;
    for (i64 i = lane; i < HS; i += kWarp) {
        if (owns_query) {
            to[i] = narrow<T>(sum[i]);
        } else {
            to[d.C + i] = narrow<T>(sum[i]);
            to[2 * d.C + i] = narrow<T>(sum2[i]);
        }
    }
}

float scale_of(i64 HS) { return 1.0f / std::sqrt(static_cast<float>(HS)); }

}  // namespace

// All kernels keep the same lse, so forward and backward of one step may use different ones.

CudnnAttention* CudaBackend::cudnn(const AttentionDims& d, const Tensor& qkv) {
    using Attention = CudaOptions::Attention;
    const bool automatic = options_.attention == Attention::automatic;
    if ((!automatic && options_.attention != Attention::cudnn) || qkv.dtype != DType::bf16) return nullptr;
    // Training has one shape; evaluations have many, and cuDNN takes tenths of a second for a new one.
    if (automatic && (d.T % 64 != 0 || wgmma(d, qkv, qkv))) return nullptr;
    if (!cudnn_ && cudnn_absence_.empty()) {
        try {
            cudnn_ = make_cudnn_attention(device_);
        } catch (const Error& e) {
            cudnn_absence_ = e.what();
        }
    }
    return cudnn_ && cudnn_->supports(d, qkv) ? cudnn_.get() : nullptr;
}

bool CudaBackend::wgmma(const AttentionDims& d, const Tensor& qkv, const Tensor& out) const {
    using Attention = CudaOptions::Attention;
    const Attention chosen = options_.attention;
    return has_wgmma_ && chosen != Attention::flash && chosen != Attention::simple &&
           wgmma_supports(d, qkv, out);
}

bool CudaBackend::flash(const AttentionDims& d, const Tensor& qkv, const Tensor& out) const {
    return options_.attention != CudaOptions::Attention::simple && flash_supports(d, qkv, out);
}

void CudaBackend::attention_forward(Tensor out, Tensor lse, Tensor qkv, std::int64_t NH) {
    const AttentionDims d = attention_training_dims("attention_forward", out, lse, qkv, NH);
    CudnnAttention* const by_cudnn = cudnn(d, qkv);
    if (by_cudnn && by_cudnn->forward(out, lse, qkv, d, stream())) return;
    if (wgmma(d, qkv, out)) return wgmma_forward(out, lse, qkv, d, stream());
    if (flash(d, qkv, out)) return flash_forward(out, lse, qkv, d, stream());
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        visit_width<T>(
            d.HS,
            [&](auto width) {
                launch(attention_forward_kernel<T, decltype(width)::value>, blocks_for(d.B * d.NH * d.T, 1),
                       kWarps * kWarp, attend_shared(d.HS), stream(), out.as<T>(), lse.as<float>(),
                       qkv.as<T>(), d, scale_of(d.HS));
            },
            qkv.data);
    });
}

void CudaBackend::attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                                     std::int64_t NH) {
    constexpr const char* op = "attention_backward";
    const AttentionDims d = attention_training_dims(op, out, lse, qkv, NH);
    check::like(op, "dqkv", dqkv, qkv);
    check::like(op, "dout", dout, out);
    CudnnAttention* const by_cudnn = cudnn(d, qkv);
    if (by_cudnn && by_cudnn->backward(dqkv, dout, qkv, out, lse, d, options_.deterministic, stream()))
        return;
    const i64 rows = d.B * d.NH * d.T;
    float* const delta = static_cast<float*>(scratch(rows * 4));
    const unsigned blocks = blocks_for(rows, kWarps);
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch_delta<T>(delta, dout, out, d, stream());
        if (wgmma(d, qkv, out) && wgmma(d, dqkv, dout))
            return wgmma_backward(dqkv, dout, qkv, lse, delta, d, stream());
        if (flash(d, qkv, out) && flash(d, dqkv, dout))
            return flash_backward(dqkv, dout, qkv, lse, delta, d, stream());
        const std::size_t shared = static_cast<std::size_t>(kWarps * 4 * d.HS) * sizeof(float);
        LLMC_CHECK(shared <= 96 << 10, "a head size of {} is more than attention on a GPU takes", d.HS);
        for (const auto kernel : {attention_backward_kernel<T, true>, attention_backward_kernel<T, false>})
            launch(kernel, blocks, kWarps * kWarp, shared, stream(), dqkv.as<T>(), dout.as<T>(), qkv.as<T>(),
                   lse.as<float>(), delta, d, scale_of(d.HS));
    });
}

void CudaBackend::attention_decode(Tensor out, Tensor kcache, Tensor vcache, Tensor qkv, Tensor start,
                                   std::int64_t NH) {
    const DecodeDims d = attention_decode_dims(out, kcache, vcache, qkv, start, NH);
    if (attention_decode_in_chunks(d, out, kcache, vcache, qkv, start)) return;
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        constexpr int kThreads = 256;
        if (d.T > 1)
            launch(cache_store_kernel<T>, blocks_for(d.B * d.T * d.C, kThreads), kThreads, 0, stream(),
                   kcache.as<T>(), vcache.as<T>(), qkv.as<T>(), start.as<std::int32_t>(), d);
        visit_width<T>(
            d.HS,
            [&](auto width) {
                launch(attention_decode_kernel<T, decltype(width)::value>, blocks_for(d.B * d.NH * d.T, 1),
                       kWarps * kWarp, attend_shared(d.HS), stream(), out.as<T>(), kcache.as<T>(),
                       vcache.as<T>(), qkv.as<T>(), start.as<std::int32_t>(), d, scale_of(d.HS));
            },
            kcache.data, vcache.data);
    });
}

}  // namespace llmc
