// MatmulEngine for the emulated device: loops over the definition, with the conditions that cuBLASLt has for
// epilogues. It has one algorithm, so tuning chooses nothing, but the choice is kept and taken as cuBLASLt's is.
#include <cmath>
#include <optional>

#include "cuda/cublaslt.h"
#include "cuda/tuned_algorithms.h"

namespace llmc {

struct MatmulEngine::State {
    bool tf32;
    std::optional<TunedAlgorithms> tuned;
};
MatmulEngine::MatmulEngine(bool tf32, const Tuning* tuning) : state_(new State{tf32, std::nullopt}) {
    if (tuning) state_->tuned.emplace(tuning->file, tuning->device + ", emulated cuBLASLt", tf32);
}
MatmulEngine::~MatmulEngine() = default;

namespace {

constexpr TunedAlgorithm kAlgorithm{{1, 2, 3, 4, 5, 6, 7, 0xfedcba9876543210}, 0.125};

float read(const void* p, DType type, std::int64_t i) {
    return type == DType::f32 ? static_cast<const float*>(p)[i] : to_float(static_cast<const bf16*>(p)[i]);
}
void write(void* p, DType type, std::int64_t i, float x) {
    if (type == DType::f32)
        static_cast<float*>(p)[i] = x;
    else
        static_cast<bf16*>(p)[i] = from_float<bf16>(x);
}
// 10 bits of mantissa, rounded to nearest.
float as_tf32(float x) {
    const unsigned u = (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
    return __uint_as_float(u);
}

void compute(const Matmul& p, bool tf32) {
    const bool bgradb = p.epilogue == Epilogue::bgradb;
    for (std::int64_t n = 0; bgradb && n < p.n; ++n) {
        double sum = 0.0;
        for (std::int64_t k = 0; k < p.k; ++k)
            sum += read(p.b, p.inputs, p.transpose_b ? k * p.ldb + n : n * p.ldb + k);
        write(const_cast<void*>(p.bias), p.output, n, static_cast<float>(sum));
    }
    for (std::int64_t n = 0; n < p.n; ++n)
        for (std::int64_t m = 0; m < p.m; ++m) {
            double sum = 0.0;
            for (std::int64_t k = 0; k < p.k; ++k) {
                float a = read(p.a, p.inputs, p.transpose_a ? m * p.lda + k : k * p.lda + m);
                float b = read(p.b, p.inputs, p.transpose_b ? k * p.ldb + n : n * p.ldb + k);
                if (tf32 && p.inputs == DType::f32) a = as_tf32(a), b = as_tf32(b);
                sum += static_cast<double>(a) * b;
            }
            const std::int64_t at = n * p.ldd + m;
            double x = sum + (p.bias && !bgradb ? read(p.bias, p.inputs, m) : 0.0);
            if (p.accumulate) x += read(p.d, p.output, at);
            const auto u = [](double v) { return 0.7978845608028654 * (v + 0.044715 * v * v * v); };
            if (p.epilogue == Epilogue::gelu || p.epilogue == Epilogue::gelu_bias) {
                write(p.aux, p.inputs, at, static_cast<float>(x));
                x = 0.5 * x * (1.0 + std::tanh(u(x)));
            } else if (p.epilogue == Epilogue::dgelu) {
                const double v = read(p.aux, p.inputs, at), t = std::tanh(u(v));
                x *= 0.5 * (1.0 + t) +
                     0.5 * v * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * v * v);
            }
            write(p.d, p.output, at, static_cast<float>(x));
        }
}

}  // namespace

bool MatmulEngine::run(const Matmul& p, cudaStream_t stream) {
    if (p.k % 7 == 0) return false;  // now and then "no algorithm", so that what comes then is tested too
    if (p.epilogue != Epilogue::none && p.epilogue != Epilogue::bgradb && p.output != p.inputs) return false;
    const auto misaligned = [](const void* q) { return reinterpret_cast<std::uintptr_t>(q) % 16 != 0; };
    if (p.aux && (p.ldd % 8 != 0 || misaligned(p.aux) || misaligned(p.d))) return false;
    if (state_->tuned) {
        const TunedAlgorithm* const kept = state_->tuned->find(p);
        const bool usable = kept && kept->words == kAlgorithm.words;
        if (kept && !usable) state_->tuned->refuse(*kept);
        if (!usable) state_->tuned->add(p, kAlgorithm);
    }
    cuda_emulation::enqueue(stream, [p, tf32 = state_->tf32] { compute(p, tf32); });
    return true;
}

}  // namespace llmc
