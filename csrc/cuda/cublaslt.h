// Matrix products by cuBLASLt, which is opened at first use. The emulated build has another body for this
// class: plain loops.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/tensor.h"

namespace llmc {

// What happens to a product on its way into memory.
enum class Epilogue {
    none,
    bias,       // D = A B + bias
    gelu_bias,  // aux = A B + bias;  D = gelu(aux)
    gelu,       // aux = A B;  D = gelu(aux)
    dgelu,      // D = (A B) gelu'(aux)
    bgradb,     // D = A B;  bias = the sums of op(B) over k
};

// D (m,n) = op(A) (m,k) op(B) (k,n), or += where accumulate; column-major, as BLAS has it: a row-major matrix
// (rows, cols) is a column-major (cols, rows) with leading extent cols.
struct Matmul {
    std::int64_t m, n, k;
    const void* a;
    std::int64_t lda;
    bool transpose_a;
    const void* b;
    std::int64_t ldb;
    bool transpose_b;
    void* d;
    std::int64_t ldd;
    DType inputs, output;  // of A, B, bias and aux; of D
    bool accumulate = false;
    Epilogue epilogue = Epilogue::none;
    const void* bias = nullptr;  // (m); of bgradb (n), of D's type, and written
    void* aux = nullptr;         // as D
};

class MatmulEngine {
  public:
    // What NVIDIA recommends for Hopper, and enough for any split-k of older GPUs.
    static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

    // tf32: products of f32 matrices in TF32. tune: each product's algorithm by the clock, when it first comes.
    // Throws Error where the library is not there.
    MatmulEngine(bool tf32, bool tune);
    ~MatmulEngine();

    // Queues the product. False, and nothing queued, where the library has no algorithm for it.
    bool run(const Matmul& p, cudaStream_t stream);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace llmc
