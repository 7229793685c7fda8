// Matmuls by cuBLASLt, which is opened at first use. The emulated build defines the class by plain loops
// instead.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "core/tensor.h"

namespace llmc {

// What is done to the result of a matmul before it is stored.
enum class Epilogue {
    none,
    bias,       // D = A B + bias
    gelu_bias,  // aux = A B + bias;  D = gelu(aux)
    gelu,       // aux = A B;  D = gelu(aux)
    dgelu,      // D = (A B) gelu'(aux)
    bgradb,     // D = A B;  bias = the sums of op(B) over k
};

// D (m,n) = op(A) (m,k) op(B) (k,n), or += if accumulate; column-major, as BLAS has it: a row-major matrix
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
    const void* bias = nullptr;  // (m), read; for bgradb (n), of D's type, written
    void* aux = nullptr;         // as D
};

// The largest power of two up to 256 that divides the address: algorithms differ in what they require.
inline std::uint32_t alignment_of(const void* p) {
    const auto address = reinterpret_cast<std::uintptr_t>(p) | 256;
    return static_cast<std::uint32_t>(address & (~address + 1));
}

class MatmulEngine {
  public:
    // What NVIDIA recommends for Hopper, and enough for any split-k of older GPUs.
    static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

    // How the algorithm for a shape is chosen by timing several when the shape first comes, unless the file has the
    // choice already. file: empty for none. device: the name of the card and of its kind of code.
    struct Tuning {
        std::filesystem::path file;
        std::string device;
    };

    // tf32: f32 matrices are multiplied in TF32. tuning: null if the heuristic of cuBLASLt chooses. Throws Error if
    // cuBLASLt is not found.
    MatmulEngine(bool tf32, const Tuning* tuning);
    ~MatmulEngine();

    // Queues the matmul. Returns false, and queues nothing, if the library has no algorithm for it.
    bool run(const Matmul& p, cudaStream_t stream);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace llmc
