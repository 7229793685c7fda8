// The one validation of each op: what was expected, what came. Every backend calls the op's function first
// and works with the extents that it returns.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace llmc {

namespace detail {
inline void check_present(const char* op, const char* name, const Tensor& t) {
    LLMC_CHECK(t || t.numel() == 0, "{}: {} is missing", op, name);
}
inline void check_float(const char* op, const char* name, const Tensor& t) {
    check_present(op, name, t);
    LLMC_CHECK(is_float(t.dtype), "{}: {} is {}, expected f32 or bf16", op, name, t);
}
inline void check_dtype(const char* op, const char* name, const Tensor& t, DType dtype) {
    check_present(op, name, t);
    LLMC_CHECK(t.dtype == dtype, "{}: {} is {}, expected {}", op, name, t, dtype);
}
inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<std::int64_t> shape) {
    check_present(op, name, t);
    LLMC_CHECK(t.is(shape), "{}: {} is {}, expected {}", op, name, t, Tensor(nullptr, t.dtype, shape));
}
// A vector of statistics: f32, one value per row however the rows are arranged.
inline void check_stat(const char* op, const char* name, const Tensor& t, std::int64_t n) {
    check_dtype(op, name, t, DType::f32);
    LLMC_CHECK(t.numel() == n, "{}: {} is {}, expected {} elements", op, name, t, n);
}
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& other) {
    check_present(op, name, t);
    LLMC_CHECK(t.is_like(other) && t.dtype == other.dtype, "{}: {} is {}, expected {}", op, name, t, other);
}
// Of the same rows and columns and dtype, however the rows are arranged.
inline void check_matrix(const char* op, const char* name, const Tensor& t, DType dtype, std::int64_t N,
                         std::int64_t C) {
    check_dtype(op, name, t, dtype);
    LLMC_CHECK(t.rows() == N && t.cols() == C, "{}: {} is {}, expected ({}, {})", op, name, t, N, C);
}
}  // namespace detail

inline void copy_dims(const Tensor& out, const Tensor& inp) {
    detail::check_present("copy", "out", out);
    detail::check_present("copy", "inp", inp);
    LLMC_CHECK(out.numel() == inp.numel(), "copy: out is {}, inp is {}", out, inp);
    LLMC_CHECK(out.dtype == inp.dtype || (is_float(out.dtype) && is_float(inp.dtype)),
               "copy: cannot convert {} to {}", inp, out);
}

struct EncoderDims {
    std::int64_t B, T, C, Vp, maxT;
};
inline EncoderDims encoder_dims(const char* op, const Tensor& out, const Tensor& inp, const Tensor& wte,
                                const Tensor& wpe) {
    detail::check_dtype(op, "inp", inp, DType::i32);
    LLMC_CHECK(inp.rank == 2, "{}: inp is {}, expected (B, T)", op, inp);
    LLMC_CHECK(wte.rank == 2 && wpe.rank == 2 && wte.shape[1] == wpe.shape[1],
               "{}: wte is {} and wpe is {}, expected (Vp, C) and (maxT, C)", op, wte, wpe);
    const EncoderDims d{inp.shape[0], inp.shape[1], wte.shape[1], wte.shape[0], wpe.shape[0]};
    detail::check_float(op, "wte", wte);
    detail::check_dtype(op, "wpe", wpe, wte.dtype);
    detail::check_shape(op, "out", out, {d.B, d.T, d.C});
    detail::check_float(op, "out", out);
    LLMC_CHECK(d.T <= d.maxT, "{}: T is {}, but wpe has {} positions", op, d.T, d.maxT);
    return d;
}

struct LayerNormDims {
    std::int64_t N, C;
};
inline LayerNormDims layernorm_dims(const char* op, const Tensor& out, const Tensor& mean, const Tensor& rstd,
                                    const Tensor& inp, const Tensor& weight) {
    const LayerNormDims d{inp.rows(), inp.cols()};
    detail::check_float(op, "inp", inp);
    detail::check_shape(op, "weight", weight, {d.C});
    detail::check_dtype(op, "weight", weight, inp.dtype);
    detail::check_matrix(op, "out", out, inp.dtype, d.N, d.C);
    detail::check_stat(op, "mean", mean, d.N);
    detail::check_stat(op, "rstd", rstd, d.N);
    return d;
}

struct MatmulDims {
    std::int64_t N, C, OC;
};
inline MatmulDims matmul_forward_dims(const Tensor& out, const Tensor& inp, const Tensor& weight,
                                      const Tensor& bias) {
    constexpr const char* op = "matmul_forward";
    LLMC_CHECK(weight && weight.rank == 2, "{}: weight is {}, expected (OC, C)", op, weight);
    const MatmulDims d{inp.rows(), weight.shape[1], weight.shape[0]};
    detail::check_float(op, "inp", inp);
    detail::check_dtype(op, "weight", weight, inp.dtype);
    detail::check_matrix(op, "inp", inp, inp.dtype, d.N, d.C);
    LLMC_CHECK(out.dtype == inp.dtype || out.dtype == DType::f32, "{}: out is {}, expected {} or f32", op,
               out, inp.dtype);
    detail::check_matrix(op, "out", out, out.dtype, d.N, d.OC);
    if (bias) {
        detail::check_shape(op, "bias", bias, {d.OC});
        detail::check_dtype(op, "bias", bias, weight.dtype);
    }
    return d;
}
inline MatmulDims matmul_backward_dims(const Tensor& dinp, const Tensor& dweight, const Tensor& dbias,
                                       const Tensor& dout, const Tensor& inp, const Tensor& weight) {
    constexpr const char* op = "matmul_backward";
    LLMC_CHECK(weight && weight.rank == 2, "{}: weight is {}, expected (OC, C)", op, weight);
    const MatmulDims d{dout.rows(), weight.shape[1], weight.shape[0]};
    detail::check_float(op, "dout", dout);
    detail::check_matrix(op, "dout", dout, weight.dtype, d.N, d.OC);
    if (dinp) detail::check_matrix(op, "dinp", dinp, weight.dtype, d.N, d.C);
    if (dweight) {
        detail::check_matrix(op, "inp", inp, weight.dtype, d.N, d.C);
        detail::check_shape(op, "dweight", dweight, {d.OC, d.C});
        detail::check_float(op, "dweight", dweight);
    }
    if (dbias) {
        detail::check_shape(op, "dbias", dbias, {d.OC});
        detail::check_float(op, "dbias", dbias);
    }
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
    detail::check_float(op, "qkv", qkv);
    detail::check_shape(op, "out", out, {d.B, d.T, d.C});
    detail::check_dtype(op, "out", out, qkv.dtype);
    return d;
}
inline AttentionDims attention_training_dims(const char* op, const Tensor& out, const Tensor& lse,
                                             const Tensor& qkv, std::int64_t NH) {
    const AttentionDims d = attention_dims(op, out, qkv, NH);
    detail::check_shape(op, "lse", lse, {d.B, d.NH, d.T});
    detail::check_dtype(op, "lse", lse, DType::f32);
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
    detail::check_shape(op, "kcache", kcache, {d.B, d.NH, d.maxT, d.HS});
    detail::check_dtype(op, "kcache", kcache, qkv.dtype);
    detail::check_like(op, "vcache", vcache, kcache);
    detail::check_shape(op, "start", start, {d.B});
    detail::check_dtype(op, "start", start, DType::i32);
    LLMC_CHECK(d.T <= d.maxT, "{}: {} new positions, but the cache holds {}", op, d.T, d.maxT);
    return d;
}

// Elementwise ops: all operands alike in dtype and number of elements.
inline std::int64_t elementwise_numel(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) {
    detail::check_float(op, "out", out);
    for (const Tensor& t : {out, a, b}) {
        detail::check_present(op, "an operand", t);
        LLMC_CHECK(t.dtype == out.dtype && t.numel() == out.numel(),
                   "{}: operands are {}, {} and {}, expected alike", op, out, a, b);
    }
    return out.numel();
}

struct ClassifierDims {
    std::int64_t N, V, Vp;
};
inline ClassifierDims classifier_dims(const char* op, const Tensor& logits, const Tensor& targets,
                                      std::int64_t V) {
    const ClassifierDims d{logits.rows(), V, logits.cols()};
    detail::check_float(op, "logits", logits);
    detail::check_dtype(op, "targets", targets, DType::i32);
    LLMC_CHECK(targets.numel() == d.N, "{}: targets is {}, expected {} elements", op, targets, d.N);
    LLMC_CHECK(0 < V && V <= d.Vp, "{}: V is {}, but logits have {} columns", op, V, d.Vp);
    return d;
}

inline ClassifierDims sample_dims(const Tensor& tokens, const Tensor& logits, const Tensor& coins,
                                  std::int64_t V) {
    const ClassifierDims d = classifier_dims("sample", logits, tokens, V);
    detail::check_dtype("sample", "logits", logits, DType::f32);
    detail::check_stat("sample", "coins", coins, d.N);
    return d;
}

inline void reduction_dims(const char* op, const Tensor& out, const Tensor& inp) {
    detail::check_float(op, "inp", inp);
    detail::check_stat(op, "out", out, 1);
}

inline std::int64_t adamw_numel(const Tensor& param, const Tensor& master, const Tensor& m, const Tensor& v,
                                const Tensor& grad, const Tensor& factor) {
    constexpr const char* op = "adamw";
    detail::check_float(op, "param", param);
    detail::check_float(op, "grad", grad);
    const std::int64_t n = param.numel();
    detail::check_stat(op, "m", m, n);
    detail::check_stat(op, "v", v, n);
    detail::check_stat(op, "factor", factor, 1);
    LLMC_CHECK(grad.numel() == n, "{}: grad is {}, expected {} elements", op, grad, n);
    if (master) {
        detail::check_dtype(op, "master", master, DType::i16);
        LLMC_CHECK(param.dtype == DType::bf16 && master.numel() == n, "{}: master is {}, param is {}", op,
                   master, param);
    }
    return n;
}

}  // namespace llmc
