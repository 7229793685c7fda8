// Causal attention, forward, backward and for generation. A head of a sequence is a task (in forward, a
// stretch of its queries): its keys and values are packed once and its scores never leave the cache
// (simd/attention.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

namespace {

// Queries in a task of the forward pass: whole blocks of 48, and of the 32 of AMX. Each task packs the keys that it sees: T=1024 is one.
constexpr std::int64_t kStretch = 1056;

template <class T>
AttentionHead<T> head_of(const AttentionDims& d, std::int64_t b, std::int64_t h, Tensor qkv, Tensor out,
                         Tensor lse) {
    AttentionHead<T> head{};
    head.T_ = d.T, head.HS = d.HS, head.ldq = 3 * d.C, head.ldo = d.C;
    head.q = qkv.as<T>() + b * d.T * 3 * d.C + h * d.HS;
    head.k = head.q + d.C;
    head.v = head.q + 2 * d.C;
    head.out = out.as<T>() + b * d.T * d.C + h * d.HS;
    head.lse = lse.as<float>() + (b * d.NH + h) * d.T;
    head.scale = 1.0f / std::sqrt(static_cast<float>(d.HS));
    return head;
}

}  // namespace

void CpuBackend::attention_forward(Tensor out, Tensor lse, Tensor qkv, std::int64_t NH) {
    const AttentionDims d = attention_training_dims("attention_forward", out, lse, qkv, NH);
    const std::int64_t stretches = ceil_div(d.T, kStretch);
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        reserve_thread_scratch(kernels<T>().attention_forward_scratch(d.T, d.HS));
        parallel_for(threads_, d.B * NH * stretches, [&](std::int64_t task, int thread) {
            const std::int64_t begin = task % stretches * kStretch, bh = task / stretches;
            const AttentionHead<T> head = head_of<T>(d, bh / NH, bh % NH, qkv, out, lse);
            kernels<T>().attention_forward(head, begin, std::min(d.T, begin + kStretch),
                                           thread_scratch(thread));
        });
    });
}

void CpuBackend::attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                                    std::int64_t NH) {
    constexpr const char* op = "attention_backward";
    const AttentionDims d = attention_training_dims(op, out, lse, qkv, NH);
    check::like(op, "dqkv", dqkv, qkv);
    check::like(op, "dout", dout, out);
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        reserve_thread_scratch(kernels<T>().attention_backward_scratch(d.T, d.HS));
        parallel_for(threads_, d.B * NH, [&](std::int64_t bh, int thread) {
            AttentionHead<T> head = head_of<T>(d, bh / NH, bh % NH, qkv, out, lse);
            head.dout = dout.as<T>() + (head.out - out.as<T>());
            head.dq = dqkv.as<T>() + (head.q - qkv.as<T>());
            head.dk = head.dq + d.C;
            head.dv = head.dq + 2 * d.C;
            kernels<T>().attention_backward(head, thread_scratch(thread));
        });
    });
}

void CpuBackend::attention_decode(Tensor out, Tensor kcache, Tensor vcache, Tensor qkv, Tensor start,
                                  std::int64_t NH) {
    const DecodeDims d = attention_decode_dims(out, kcache, vcache, qkv, start, NH);
    const std::int32_t* const first = start.as<std::int32_t>();
    for (std::int64_t b = 0; b < d.B; ++b)
        LLMC_CHECK(first[b] >= 0 && first[b] + d.T <= d.maxT,
                   "attention_decode: positions {}..{}, but the cache holds {}", first[b], first[b] + d.T,
                   d.maxT);
    reserve_thread_scratch(d.maxT * 4);
    visit_float(qkv.dtype, [&](auto tag) {
        using T = decltype(tag);
        const float scale = 1.0f / std::sqrt(static_cast<float>(d.HS));
        parallel_for(threads_, d.B * NH, [&](std::int64_t bh, int thread) {
            const std::int64_t b = bh / NH, h = bh % NH, p = first[b];
            T* const k = kcache.as<T>() + bh * d.maxT * d.HS;
            T* const v = vcache.as<T>() + bh * d.maxT * d.HS;
            for (std::int64_t t = 0; t < d.T; ++t) {
                const T* const q = qkv.as<T>() + (b * d.T + t) * 3 * d.C + h * d.HS;
                std::memcpy(k + (p + t) * d.HS, q + d.C, static_cast<std::size_t>(d.HS) * sizeof(T));
                std::memcpy(v + (p + t) * d.HS, q + 2 * d.C, static_cast<std::size_t>(d.HS) * sizeof(T));
                kernels<T>().attention_decode(out.as<T>() + (b * d.T + t) * d.C + h * d.HS, q, k, v,
                                              p + t + 1, d.HS, scale,
                                              static_cast<float*>(thread_scratch(thread)));
            }
        });
    });
}

}  // namespace llmc
