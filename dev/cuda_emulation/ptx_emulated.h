// csrc/cuda/ptx.cuh for the emulated device: the same functions, lane by lane as the PTX manual has them.
#pragma once

#include <cuda_runtime.h>

#include "core/tensor.h"

namespace llmc::ptx {

inline std::uint16_t bf16_bits(float x) { return from_float<bf16>(x).bits; }
inline std::uint32_t bf16x2_bits(float low, float high) {
    return bf16_bits(low) | static_cast<std::uint32_t>(bf16_bits(high)) << 16;
}
inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline void forget(std::uint32_t&) {}
inline void forget(std::uint16_t&) {}

namespace detail {
inline float half(std::uint32_t bits, int upper) {
    return to_float(bf16{static_cast<std::uint16_t>(bits >> 16 * upper)});
}
inline void ldmatrix(std::uint32_t (&r)[4], const void* row, bool transposed) {
    cuda_emulation::check_aligned(row, 16);
    const unsigned char* const slots = cuda_emulation::exchange(&row, sizeof row);
    const int l = cuda_emulation::lane();
    for (int j = 0; j < 4; ++j) {
        r[j] = 0;
        for (int k = 0; k < 2; ++k) {
            const int first = l / 4, second = 2 * (l % 4) + k;
            const std::uint16_t* p;
            std::memcpy(&p, slots + (8 * j + (transposed ? second : first)) * cuda_emulation::kSlot,
                        sizeof p);
            r[j] |= static_cast<std::uint32_t>(p[transposed ? first : second]) << 16 * k;
        }
    }
}
}  // namespace detail

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) { detail::ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) { detail::ldmatrix(r, row, true); }

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    struct Operands {
        std::uint32_t a[4], b[2];
    } const mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned char* const slots = cuda_emulation::exchange(&mine, sizeof mine);
    const auto of = [&](int lane) {
        Operands o;
        std::memcpy(&o, slots + lane * cuda_emulation::kSlot, sizeof o);
        return o;
    };
    const int g = cuda_emulation::lane() / 4, i = cuda_emulation::lane() % 4;
    for (int k4 = 0; k4 < 4; ++k4) {  // columns 2 k4, 2 k4 + 1 of A, and those 8 further on
        const Operands rows = of(4 * g + k4);
        for (int n = 0; n < 2; ++n) {
            const Operands column = of(4 * (2 * i + n) + k4);
            for (int far = 0; far < 2; ++far)
                for (int k = 0; k < 2; ++k) {
                    d[n] += detail::half(rows.a[2 * far], k) * detail::half(column.b[far], k);
                    d[2 + n] += detail::half(rows.a[2 * far + 1], k) * detail::half(column.b[far], k);
                }
        }
    }
}

inline std::uint32_t shared_address(const void* p) { return cuda_emulation::shared_address(p); }
inline void cp_async16(void* shared, const void* global, bool valid) {
    cuda_emulation::async_copy(shared, global, 16, valid ? 16 : 0);
}
inline void cp_async4(void* shared, const void* global, bool valid) {
    cuda_emulation::async_copy(shared, global, 4, valid ? 4 : 0);
}
inline void cp_async_commit() { cuda_emulation::async_commit(); }
template <int pending>
void cp_async_wait() {
    cuda_emulation::async_wait(pending);
}

// Kernels run one after the other here.
inline void begin_next_kernel() {}
inline void wait_for_kernels_before() {}
inline void prefetch(const void*) {}

}  // namespace llmc::ptx
