// The operands of each op are checked here. Every backend first calls the function named after the op, and works with the
// extents that it returns. An operand that this function does not take is checked by those of namespace check.
// The function also tells the profile that the op has begun (profile.h), so an op calls it once.
#pragma once

#include <cstdint>
#include <span>

#include "core/backend.h"
#include "core/exact_sum.h"
#include "core/profile.h"
#include "core/tensor.h"

namespace llmc {

// What an op demands of one operand. Each throws ArgumentError, which names the op, the operand, what was expected and
// what came.
namespace check {
inline void present(const char* op, const char* name, const Tensor& t) {
    LLMC_CHECK(t || t.numel() == 0, "{}: {} is missing", op, name);
}
inline void float_dtype(const char* op, const char* name, const Tensor& t) {
    present(op, name, t);
    LLMC_CHECK(is_float(t.dtype), "{}: {} is {}, expected f32 or bf16", op, name, t);
}
inline void dtype(const char* op, const char* name, const Tensor& t, DType expected) {
    present(op, name, t);
    LLMC_CHECK(t.dtype == expected, "{}: {} is {}, expected {}", op, name, t, expected);
}
inline void shape(const char* op, const char* name, const Tensor& t,
                  std::initializer_list<std::int64_t> expected) {
    present(op, name, t);
    LLMC_CHECK(t.is(expected), "{}: {} is {}, expected {}", op, name, t, Tensor(nullptr, t.dtype, expected));
}
// n values in f32, in any shape.
inline void f32_values(const char* op, const char* name, const Tensor& t, std::int64_t n) {
    dtype(op, name, t, DType::f32);
    LLMC_CHECK(t.numel() == n, "{}: {} is {}, expected {} elements", op, name, t, n);
}
// The dtype and shape of `other`.
inline void like(const char* op, const char* name, const Tensor& t, const Tensor& other) {
    present(op, name, t);
    LLMC_CHECK(t.is_like(other) && t.dtype == other.dtype, "{}: {} is {}, expected {}", op, name, t, other);
}
// N rows of C columns, if all leading extents of t are taken together as its rows.
inline void matrix(const char* op, const char* name, const Tensor& t, DType expected, std::int64_t N,
                   std::int64_t C) {
    dtype(op, name, t, expected);
    LLMC_CHECK(t.rows() == N && t.cols() == C, "{}: {} is {}, expected ({}, {})", op, name, t, N, C);
}
// All of one dtype, with as many elements as `out`.
inline void alike(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) {
    float_dtype(op, "out", out);
    for (const Tensor& t : {out, a, b}) {
        present(op, "an operand", t);
        LLMC_CHECK(t.dtype == out.dtype && t.numel() == out.numel(),
                   "{}: operands are {}, {} and {}, expected alike", op, out, a, b);
    }
}
}  // namespace check

inline void zero_dims(const Tensor& x) {
    check::present("zero", "x", x);
    op_begins("zero", {x.numel()});
}

// from_host and to_host.
inline void host_copy_dims(const char* op, const Tensor& x) {
    check::present(op, "the tensor", x);
    op_begins(op, {x.numel()});
}

inline void copy_dims(const Tensor& out, const Tensor& inp) {
    check::present("copy", "out", out);
    check::present("copy", "inp", inp);
    LLMC_CHECK(out.numel() == inp.numel(), "copy: out is {}, inp is {}", out, inp);
    LLMC_CHECK(out.dtype == inp.dtype || (is_float(out.dtype) && is_float(inp.dtype)),
               "copy: cannot convert {} to {}", inp, out);
    op_begins("copy", {out.numel()});
}

struct EncoderDims {
    std::int64_t B, T, C, Vp, maxT;
};
inline EncoderDims encoder_dims(const char* op, const Tensor& out, const Tensor& inp, const Tensor& wte,
                                const Tensor& wpe) {
    check::dtype(op, "inp", inp, DType::i32);
    LLMC_CHECK(inp.rank == 2, "{}: inp is {}, expected (B, T)", op, inp);
    LLMC_CHECK(wte.rank == 2 && wpe.rank == 2 && wte.shape[1] == wpe.shape[1],
               "{}: wte is {} and wpe is {}, expected (Vp, C) and (maxT, C)", op, wte, wpe);
    const EncoderDims d{inp.shape[0], inp.shape[1], wte.shape[1], wte.shape[0], wpe.shape[0]};
    check::float_dtype(op, "wte", wte);
    check::dtype(op, "wpe", wpe, wte.dtype);
    check::shape(op, "out", out, {d.B, d.T, d.C});
    check::float_dtype(op, "out", out);
    LLMC_CHECK(d.T <= d.maxT, "{}: T is {}, but wpe has {} positions", op, d.T, d.maxT);
    op_begins(op, {d.B, d.T, d.C, d.Vp, d.maxT});
    return d;
}

struct LayerNormDims {
    std::int64_t N, C;
};
// What forward and backward have in common.
inline LayerNormDims layernorm_dims(const char* op, const Tensor& out, const Tensor& mean, const Tensor& rstd,
                                    const Tensor& inp, const Tensor& weight) {
    const LayerNormDims d{inp.rows(), inp.cols()};
    check::float_dtype(op, "inp", inp);
    check::shape(op, "weight", weight, {d.C});
    check::dtype(op, "weight", weight, inp.dtype);
    check::matrix(op, "out", out, inp.dtype, d.N, d.C);
    check::f32_values(op, "mean", mean, d.N);
    check::f32_values(op, "rstd", rstd, d.N);
    op_begins(op, {d.N, d.C});
    return d;
}
inline LayerNormDims layernorm_forward_dims(const char* op, const Tensor& out, const Tensor& mean,
                                            const Tensor& rstd, const Tensor& inp, const Tensor& weight,
                                            const Tensor& bias) {
    const LayerNormDims d = layernorm_dims(op, out, mean, rstd, inp, weight);
    check::like(op, "bias", bias, weight);
    return d;
}
inline LayerNormDims fused_residual_layernorm_forward_dims(const Tensor& residual, const Tensor& out,
                                                           const Tensor& mean, const Tensor& rstd,
                                                           const Tensor& a, const Tensor& b,
                                                           const Tensor& weight, const Tensor& bias) {
    constexpr const char* op = "fused_residual_layernorm_forward";
    const LayerNormDims d = layernorm_forward_dims(op, out, mean, rstd, residual, weight, bias);
    check::alike(op, residual, a, b);
    return d;
}
inline LayerNormDims layernorm_backward_dims(const Tensor& dinp, const Tensor& dweight, const Tensor& dbias,
                                             const Tensor& dinp_sum, const Tensor& dout, const Tensor& inp,
                                             const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
    constexpr const char* op = "layernorm_backward";
    const LayerNormDims d = layernorm_dims(op, dinp, mean, rstd, inp, weight);
    check::matrix(op, "dout", dout, inp.dtype, d.N, d.C);
    check::shape(op, "dweight", dweight, {d.C});
    check::float_dtype(op, "dweight", dweight);
    check::like(op, "dbias", dbias, dweight);
    if (dinp_sum) check::like(op, "dinp_sum", dinp_sum, dweight);
    return d;
}

struct MatmulDims {
    std::int64_t N, C, OC;
};
// Of matmul_forward and matmul_gelu_forward.
inline MatmulDims matmul_forward_dims(const char* op, const Tensor& out, const Tensor& inp,
                                      const Tensor& weight, const Tensor& bias) {
    LLMC_CHECK(weight && weight.rank == 2, "{}: weight is {}, expected (OC, C)", op, weight);
    const MatmulDims d{inp.rows(), weight.shape[1], weight.shape[0]};
    check::float_dtype(op, "inp", inp);
    check::dtype(op, "weight", weight, inp.dtype);
    check::matrix(op, "inp", inp, inp.dtype, d.N, d.C);
    LLMC_CHECK(out.dtype == inp.dtype || out.dtype == DType::f32, "{}: out is {}, expected {} or f32", op,
               out, inp.dtype);
    check::matrix(op, "out", out, out.dtype, d.N, d.OC);
    if (bias) {
        check::shape(op, "bias", bias, {d.OC});
        check::dtype(op, "bias", bias, weight.dtype);
    }
    op_begins(op, {d.N, d.C, d.OC});
    return d;
}
inline MatmulDims matmul_backward_dims(const char* op, const Tensor& dinp, const Tensor& dweight,
                                       const Tensor& dbias, const Tensor& dout, const Tensor& inp,
                                       const Tensor& weight) {
    LLMC_CHECK(weight && weight.rank == 2, "{}: weight is {}, expected (OC, C)", op, weight);
    const MatmulDims d{dout.rows(), weight.shape[1], weight.shape[0]};
    check::float_dtype(op, "dout", dout);
    check::matrix(op, "dout", dout, weight.dtype, d.N, d.OC);
    if (dinp) check::matrix(op, "dinp", dinp, weight.dtype, d.N, d.C);
    if (dweight) {
        check::matrix(op, "inp", inp, weight.dtype, d.N, d.C);
        check::shape(op, "dweight", dweight, {d.OC, d.C});
        check::float_dtype(op, "dweight", dweight);
    }
    if (dbias) {
        check::shape(op, "dbias", dbias, {d.OC});
        check::float_dtype(op, "dbias", dbias);
    }
    op_begins(op, {d.N, d.C, d.OC});
    return d;
}

struct AttentionDims {
    std::int64_t B, T, C, NH, HS;
};
inline AttentionDims attention_dims(const char* op, const Tensor& out, const Tensor& qkv, std::int64_t NH) {
    LLMC_CHECK(qkv && qkv.rank == 3 && qkv.shape[2] % 3 == 0, "{}: qkv is {}, expected (B, T, 3C)", op, qkv);
    AttentionDims d{qkv.shape[0], qkv.shape[1], qkv.shape[2] / 3, NH, 0};
    LLMC_CHECK(NH > 0 && d.C % NH == 0, "{}: C = {} is not divisible by NH = {}", op, d.C, NH);
    d.HS = d.C / NH;
    check::float_dtype(op, "qkv", qkv);
    check::shape(op, "out", out, {d.B, d.T, d.C});
    check::dtype(op, "out", out, qkv.dtype);
    op_begins(op, {d.B, d.T, d.C, d.NH});
    return d;
}
inline AttentionDims attention_training_dims(const char* op, const Tensor& out, const Tensor& lse,
                                             const Tensor& qkv, std::int64_t NH) {
    const AttentionDims d = attention_dims(op, out, qkv, NH);
    check::shape(op, "lse", lse, {d.B, d.NH, d.T});
    check::dtype(op, "lse", lse, DType::f32);
    return d;
}
struct DecodeDims {
    std::int64_t B, T, C, NH, HS, maxT;
};
inline DecodeDims attention_decode_dims(const Tensor& out, const Tensor& kcache, const Tensor& vcache,
                                        const Tensor& qkv, const Tensor& start, std::int64_t NH) {
    constexpr const char* op = "attention_decode";
    const AttentionDims a = attention_dims(op, out, qkv, NH);
    LLMC_CHECK(kcache.rank == 4, "{}: kcache is {}, expected (B, NH, maxT, HS)", op, kcache);
    const DecodeDims d{a.B, a.T, a.C, a.NH, a.HS, kcache.shape[2]};
    check::shape(op, "kcache", kcache, {d.B, d.NH, d.maxT, d.HS});
    check::dtype(op, "kcache", kcache, qkv.dtype);
    check::like(op, "vcache", vcache, kcache);
    check::shape(op, "start", start, {d.B});
    check::dtype(op, "start", start, DType::i32);
    LLMC_CHECK(d.T <= d.maxT, "{}: {} new positions, but the cache holds {}", op, d.T, d.maxT);
    return d;
}

// Elementwise ops: all operands have one dtype and as many elements.
inline std::int64_t elementwise_numel(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) {
    check::alike(op, out, a, b);
    op_begins(op, {out.numel()});
    return out.numel();
}

struct ClassifierDims {
    std::int64_t N, V, Vp;
};
inline ClassifierDims classifier_dims(const char* op, const Tensor& logits, const Tensor& targets,
                                      std::int64_t V) {
    const ClassifierDims d{logits.rows(), V, logits.cols()};
    check::float_dtype(op, "logits", logits);
    check::dtype(op, "targets", targets, DType::i32);
    LLMC_CHECK(targets.numel() == d.N, "{}: targets is {}, expected {} elements", op, targets, d.N);
    LLMC_CHECK(0 < V && V <= d.Vp, "{}: V is {}, but logits have {} columns", op, V, d.Vp);
    op_begins(op, {d.N, d.V, d.Vp});
    return d;
}

inline ClassifierDims sample_dims(const Tensor& tokens, const Tensor& logits, const Tensor& coins,
                                  std::int64_t V) {
    const ClassifierDims d = classifier_dims("sample", logits, tokens, V);
    check::dtype("sample", "logits", logits, DType::f32);
    check::f32_values("sample", "coins", coins, d.N);
    return d;
}

inline void reduction_dims(const char* op, const Tensor& out, const Tensor& inp) {
    check::float_dtype(op, "inp", inp);
    check::f32_values(op, "out", out, 1);
    op_begins(op, {inp.numel()});
}

inline void norm_dims(const Tensor& out, std::span<const Tensor> gradients) {
    constexpr const char* op = "gradient_norm_squared";
    check::f32_values(op, "out", out, kNormDigits);
    std::int64_t n = 0;
    for (const Tensor& gradient : gradients) {
        check::float_dtype(op, "a gradient", gradient);
        n += gradient.numel();
    }
    op_begins(op, {n});
}

inline void clip_factor_dims(const Tensor& norm, const Tensor& factor, const Tensor& norm_squared) {
    constexpr const char* op = "clip_factor";
    check::f32_values(op, "norm", norm, 1);
    check::f32_values(op, "factor", factor, 1);
    check::dtype(op, "norm_squared", norm_squared, DType::f32);
    const std::int64_t n = norm_squared.numel();
    LLMC_CHECK(n == 1 || n == kNormDigits, "{}: norm_squared is {}, expected 1 element or {}", op,
               norm_squared, kNormDigits);
    op_begins(op, {n});
}

inline void adamw_many_dims(std::span<const AdamWOperands> operands, const Tensor& factor) {
    constexpr const char* op = "adamw";
    check::f32_values(op, "factor", factor, 1);
    std::int64_t total = 0;
    for (const AdamWOperands& o : operands) {
        check::float_dtype(op, "param", o.param);
        check::float_dtype(op, "grad", o.grad);
        const std::int64_t n = o.param.numel();
        check::f32_values(op, "m", o.m, n);
        check::f32_values(op, "v", o.v, n);
        LLMC_CHECK(o.grad.numel() == n, "{}: grad is {}, expected {} elements", op, o.grad, n);
        LLMC_CHECK(o.param.dtype == DType::bf16 || o.grad.dtype == DType::f32,
                   "{}: param is f32, but grad is {}", op, o.grad.dtype);
        if (o.master) {
            check::dtype(op, "master", o.master, DType::i16);
            LLMC_CHECK(o.param.dtype == DType::bf16 && o.master.numel() == n, "{}: master is {}, param is {}",
                       op, o.master, o.param);
        }
        total += n;
    }
    op_begins("adamw_many", {total});
}

inline std::int64_t muon_momentum_dims(const Tensor& out, const Tensor& m, const Tensor& grad,
                                       const Tensor& factor) {
    constexpr const char* op = "muon_momentum";
    check::float_dtype(op, "out", out);
    check::float_dtype(op, "grad", grad);
    check::f32_values(op, "factor", factor, 1);
    const std::int64_t n = out.numel();
    check::f32_values(op, "m", m, n);
    LLMC_CHECK(grad.numel() == n, "{}: grad is {}, expected {} elements", op, grad, n);
    LLMC_CHECK(out.dtype == DType::bf16 || grad.dtype == DType::f32, "{}: out is f32, but grad is {}", op,
               grad.dtype);
    op_begins(op, {n});
    return n;
}

inline std::int64_t muon_update_dims(const Tensor& param, const Tensor& master, const Tensor& direction,
                                     const Tensor& factor) {
    constexpr const char* op = "muon_update";
    check::float_dtype(op, "param", param);
    check::f32_values(op, "factor", factor, 1);
    const std::int64_t n = param.numel();
    check::dtype(op, "direction", direction, param.dtype);
    LLMC_CHECK(direction.numel() == n, "{}: direction is {}, expected {} elements", op, direction, n);
    if (master) {
        check::dtype(op, "master", master, DType::i16);
        LLMC_CHECK(param.dtype == DType::bf16 && master.numel() == n, "{}: master is {}, param is {}", op,
                   master, param);
    }
    op_begins(op, {n});
    return n;
}

inline std::int64_t scale_dims(const Tensor& out, const Tensor& inp, const Tensor& factor) {
    check::f32_values("scale", "factor", factor, 1);
    return elementwise_numel("scale", out, inp, inp);
}

// The rows and columns of a square matrix.
inline std::int64_t shifted_sum_dims(const Tensor& out, const Tensor& x, const Tensor& y) {
    constexpr const char* op = "shifted_sum";
    const std::int64_t N = out.cols();
    check::float_dtype(op, "out", out);
    check::shape(op, "out", out, {N, N});
    check::like(op, "x", x, out);
    check::like(op, "y", y, out);
    op_begins(op, {N});
    return N;
}

struct NewtonSchulzDims {
    std::int64_t R, C;
};
inline NewtonSchulzDims newton_schulz_dims(const Tensor& out, const Tensor& inp, const Tensor& gram,
                                           const Tensor& polynomial, const Tensor& norms, int steps) {
    constexpr const char* op = "newton_schulz";
    check::float_dtype(op, "inp", inp);
    LLMC_CHECK(inp.rank == 2, "{}: inp is {}, expected (R, C)", op, inp);
    const NewtonSchulzDims d{inp.shape[0], inp.shape[1]};
    const std::int64_t k = d.R < d.C ? d.R : d.C;
    check::like(op, "out", out, inp);
    LLMC_CHECK(out.data != inp.data || out.numel() == 0, "{}: out and inp are the same memory", op);
    check::shape(op, "gram", gram, {k, k});
    check::dtype(op, "gram", gram, inp.dtype);
    check::like(op, "polynomial", polynomial, gram);
    check::shape(op, "norms", norms, {kNormDigits + 2});
    check::dtype(op, "norms", norms, DType::f32);
    LLMC_CHECK(steps > 0, "{}: steps is {}, expected 1 or more", op, steps);
    op_begins(op, {d.R, d.C});
    return d;
}

}  // namespace llmc
