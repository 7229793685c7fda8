// The inner loops, one table per instruction set. Each simd/kernels_<isa>.cpp compiles simd/table.h for its
// set and offers the result; cpu_backend chooses one at run time. The op files (layernorm.cpp, matmul.cpp,
// ...) own shapes, work splitting and threads, and call these on ranges of elements or rows, or on blocks of the
// result of a matmul.
//
// T is the storage type, float or bf16. All sums are f32 unless the type says double. There are declarations
// only: the files of an instruction set may include no function that the linker could merge with another file's.
#pragma once

#include <cstdint>

#include "core/adamw_step.h"
#include "core/bf16.h"
#include "core/muon_step.h"

namespace llmc {

using i64 = std::int64_t;

// One matmul: C (M,N) = A (M,K) B (K,N), and what is done to each value before it is stored. A and B are T.
struct Gemm {
    i64 M, N, K;
    const void* a;
    i64 lda;
    bool a_kmajor;  // false: A(m,k) = a[m*lda + k];  true: a[k*lda + m]
    const void* b;
    i64 ldb;
    bool b_kmajor;  // false: B(k,n) = b[n*ldb + k];  true: b[k*ldb + n]
    void* c;
    i64 ldc;
    bool c_f32;        // C is f32, else T
    bool accumulate;   // C += instead of C =
    const void* bias;  // (N) T, added to every row; or null
    void* pre;         // T, laid out as C: pre = A B + bias and C = gelu(pre); or null
    const void*
        dgelu;  // T, laid out as C: C = (A B) * gelu'(dgelu); or null. One of accumulate, pre and dgelu
    const void* packed;  // B as pack_weight made it; or null
    i64 l2, l3;          // bytes of these caches that a thread may count on; they change no bit of C
};

// The tasks that a kernel set wants a matmul cut into: blocks of C of at most `rows` x `columns`, multiples of their
// units. To give every thread enough tasks, blocks are made smaller, down to `least_rows` x `least_columns`; below that only
// if there were fewer tasks than threads, and along no side whose least is its most.
struct GemmTask {
    i64 rows, columns, row_unit, column_unit, least_rows, least_columns;
};

// One head of one sequence. q, k, v, dq, dk, dv have row stride ldq, out and dout ldo.
template <class T>
struct AttentionHead {
    i64 T_, HS, ldq, ldo;
    const T *q, *k, *v;
    T* out;
    float* lse;
    const T* dout;
    T *dq, *dk, *dv;
    float scale;  // 1 / sqrt(HS)
};

// A step, with the divisions done and the clip factor read.
struct AdamWKernelStep : AdamWStep {
    float inv_correction1, inv_correction2;  // 1 / correction1, 1 / correction2
    float factor;                            // by which gradients are multiplied, to clip them
};

template <class T>
struct TypedKernels {
    // ---- ranges of elements ----
    void (*add)(T* out, const T* a, const T* b, i64 n);
    void (*gelu_forward)(T* out, const T* inp, i64 n);
    void (*gelu_backward)(T* dinp, const T* inp, const T* dout, i64 n);
    void (*accumulate)(float* sum, const T* x, i64 n);  // sum += x
    void (*add_into)(T* x, const float* sum, i64 n);    // x += sum
    double (*sum_squares)(const T* x, i64 n);
    void (*to_f32)(float* out, const T* inp, i64 n);
    void (*from_f32)(T* out, const float* inp, i64 n);
    void (*scale)(T* out, const T* inp, float factor, i64 n);
    void (*shifted_sum)(T* out, const T* x, const T* y, float a, float b, float c, i64 begin, i64 rows,
                        i64 N);  // rows [begin, begin + rows)
    // ---- ranges of rows of C channels ----
    void (*layernorm_forward)(T* out, float* mean, float* rstd, const T* inp, const T* weight, const T* bias,
                              i64 rows, i64 C);
    void (*residual_layernorm_forward)(T* residual, T* out, float* mean, float* rstd, const T* a, const T* b,
                                       const T* weight, const T* bias, i64 rows, i64 C);
    // dinp += ; dweight, dbias (C) f32 +=
    void (*layernorm_backward)(T* dinp, float* dweight, float* dbias, const T* dout, const T* inp,
                               const T* weight, const float* mean, const float* rstd, i64 rows, i64 C);
    void (*column_sum)(float* sum, const T* x, i64 rows, i64 ld, i64 cols);  // sum (cols) += sum of the rows
    // losses and dlogits may be null: then that half is not done
    void (*classifier)(float* losses, T* logits, T* dlogits, const std::int32_t* targets, float dloss,
                       i64 rows, i64 V, i64 Vp);
    // ---- matmuls ----
    // The block [m0,m1) x [n0,n1) of g, cut as gemm_task says. scratch: gemm_scratch(...) bytes, 64-byte
    // aligned.
    void (*gemm)(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1, void* scratch);
    i64 (*gemm_scratch)(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1);
    GemmTask (*gemm_task)(const Gemm& g);
    // Both null, unless the set is faster if B is packed before the matmul (AMX): the size of the packed copy, and
    // the packing of rows [begin,end) of B's memory, begin a multiple of 32. gemm then reads B from g.packed.
    i64 (*packed_bytes)(i64 K, i64 N);
    void (*pack_weight)(void* packed, const Gemm& g, i64 begin, i64 end);
    // gemm for few rows of A, as in generation: reads B, which must not be k-major, once and unpacked. Columns
    // [n0,n1) of g.
    void (*matvec)(const Gemm& g, i64 n0, i64 n1);
    i64 few_rows;  // matvec is faster than gemm up to this many rows of A
    // To measure the peak: `rounds` of multiply-adds on registers alone. operands: 64 zeros, which are overwritten.
    // Returns the number of floating-point operations.
    double (*multiply_adds)(i64 rounds, float* operands);
    // ---- attention ----
    void (*attention_forward)(const AttentionHead<T>& head, i64 begin, i64 end,
                              void* scratch);  // queries [begin,end)
    i64 (*attention_forward_scratch)(i64 T_, i64 HS);
    void (*attention_backward)(const AttentionHead<T>& head, void* scratch);
    i64 (*attention_backward_scratch)(i64 T_, i64 HS);
    // out (HS) = softmax(q K^T scale) V over n cached positions. scores: scratch of n floats
    void (*attention_decode)(T* out, const T* q, const T* k, const T* v, i64 n, i64 HS, float scale,
                             float* scores);
};

struct Kernels {
    const char* isa;
    bool bf16_arithmetic;  // else bf16 is widened to f32, which costs time
    TypedKernels<float> f32;
    TypedKernels<bf16> bf16_;
    double (*sum_f32)(const float* x, i64 n);
    // Named by the dtypes of param and grad. master: the 16 bits below a bf16 parameter, or null for stochastic
    // rounding, whose random bits depend on the element's index: begin and following.
    void (*adamw_f32)(float* p, float* m, float* v, const float* g, i64 n, const AdamWKernelStep& s);
    void (*adamw_bf16)(bf16* p, std::int16_t* master, float* m, float* v, const bf16* g, i64 begin, i64 n,
                       const AdamWKernelStep& s);
    void (*adamw_bf16_grad_f32)(bf16* p, std::int16_t* master, float* m, float* v, const float* g, i64 begin,
                                i64 n, const AdamWKernelStep& s);
    // Named by the dtypes of out and grad.
    void (*muon_momentum_f32)(float* out, float* m, const float* g, i64 n, float factor, float momentum,
                              bool nesterov);
    void (*muon_momentum_bf16)(bf16* out, float* m, const bf16* g, i64 n, float factor, float momentum,
                               bool nesterov);
    void (*muon_momentum_bf16_grad_f32)(bf16* out, float* m, const float* g, i64 n, float factor,
                                        float momentum, bool nesterov);
    void (*muon_update_f32)(float* p, const float* direction, i64 n, const MuonStep& s);
    void (*muon_update_bf16)(bf16* p, std::int16_t* master, const bf16* direction, i64 begin, i64 n,
                             const MuonStep& s);  // master, begin: as of adamw_bf16
};

// Each is null if the compiler could not build the set (cpu/simd/absent.cpp).
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_neon();
const Kernels* kernels_neon_bf16();
const Kernels* kernels_accelerate();

}  // namespace llmc
