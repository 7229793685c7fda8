// What every model family shares: the choices that do not change what is computed but how, and the memory that
// follows from them.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace llmc {

// What backward computes again instead of keeping it. llm.c's -r.
enum class Recompute : int { nothing = 0, gelu = 1, gelu_and_layernorm = 2 };

struct ModelOptions {
    DType dtype = DType::f32;       // of parameters and activations
    DType grad_dtype = DType::f32;  // of parameters' gradients
    Recompute recompute = Recompute::gelu;
    std::int64_t classifier_rows = 1024;  // rows of logits that exist at a time

    void validate() const {  // throws ArgumentError
        LLMC_CHECK(is_float(dtype) && is_float(grad_dtype),
                   "dtype is {} and grad_dtype is {}, expected f32 or bf16", dtype, grad_dtype);
        LLMC_CHECK(dtype == DType::bf16 || grad_dtype == DType::f32,
                   "grad_dtype is {}, but an f32 model has f32 gradients", grad_dtype);
        const int level = static_cast<int>(recompute);
        LLMC_CHECK(level >= 0 && level <= 2, "recompute is {}, expected 0, 1 or 2", level);
        LLMC_CHECK(classifier_rows > 0, "classifier_rows is {}, expected positive", classifier_rows);
    }
};

// Bytes by purpose, before anything is allocated.
struct MemoryPlan {
    std::int64_t parameters, gradients, optimizer, activations;
    std::int64_t total() const { return parameters + gradients + optimizer + activations; }
};

}  // namespace llmc
