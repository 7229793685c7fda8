// Included last by each kernels_<isa>.cpp, after the Vec of the set and its constants:
//   kMR, kNV      the micro-kernel's tile: MR rows, NV vectors. Accumulators + NV + 1 must fit the register file.
//   kPart         at most so many units of the reduction are summed in registers: a strip of B, kPart * NR * 4 bytes, stays
//                 in an L1 of 32 KB. A result is the sum of its parts, so the size of L1 must not change it
//   kStretch      units of the reduction in a block of A, which stays in L2
//   MultiplyBf16  the policy for bf16 (gemm.h)
#pragma once

#include "cpu/simd/peak.h"

namespace {

template <class P>
constexpr llmc::TypedKernels<typename P::T> typed_kernels() {
    using T = typename P::T;
    llmc::TypedKernels<T> t{};
    t.add = add<T>;
    t.gelu_forward = gelu_forward<T>;
    t.gelu_backward = gelu_backward<T>;
    t.accumulate = accumulate<T>;
    t.add_into = add_into<T>;
    t.sum_squares = sum_squares<T>;
    t.to_f32 = to_f32<T>;
    t.from_f32 = from_f32<T>;
    t.scale = scale<T>;
    t.shifted_sum = shifted_sum<T>;
    t.layernorm_forward = layernorm_forward<T>;
    t.residual_layernorm_forward = residual_layernorm_forward<T>;
    t.layernorm_backward = layernorm_backward<T>;
    t.column_sum = column_sum<T>;
    t.classifier = classifier<T>;
    t.gemm = gemm<P>;
    t.gemm_scratch = gemm_scratch<P>;
    t.gemm_task = gemm_task<P>;
    t.matvec = matvec<P>;
    t.few_rows = 32;
    t.multiply_adds = multiply_adds<P>;
    t.attention_forward = attention_forward<P>;
    t.attention_forward_scratch = attention_forward_scratch<P>;
    t.attention_backward = attention_backward<P>;
    t.attention_backward_scratch = attention_backward_scratch<P>;
    t.attention_decode = attention_decode<T>;
    return t;
}

constexpr llmc::Kernels make_kernels(const char* isa) {
    llmc::Kernels k{};
    k.isa = isa;
    k.bf16_arithmetic = MultiplyBf16::kPerUnit == 2;
    k.f32 = typed_kernels<MultiplyF32>();
    k.bf16_ = typed_kernels<MultiplyBf16>();
    k.sum_f32 = sum_f32;
    k.adamw_f32 = adamw_f32;
    k.adamw_bf16 = adamw_bf16<bf16>;
    k.adamw_bf16_grad_f32 = adamw_bf16<float>;
    k.muon_momentum_f32 = muon_momentum<float, float>;
    k.muon_momentum_bf16 = muon_momentum<bf16, bf16>;
    k.muon_momentum_bf16_grad_f32 = muon_momentum<bf16, float>;
    k.muon_update_f32 = muon_update_f32;
    k.muon_update_bf16 = muon_update_bf16;
    return k;
}

}  // namespace
