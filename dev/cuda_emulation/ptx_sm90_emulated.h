// csrc/cuda/ptx_sm90.cuh for the emulated device, as the PTX manual has it. What a GPU leaves undefined is NaNs, or an error:
// emulator.cpp.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx.cuh"

namespace llmc::ptx {

inline void fence_async_proxy() { cuda_emulation::fence_async_proxy(); }
inline void wgmma_fence() { cuda_emulation::fence_registers(); }
inline void wgmma_commit() { cuda_emulation::commit_matmuls(); }
template <int pending>
void wgmma_wait() {
    cuda_emulation::wait_matmuls(pending);
}
inline void hold(float (&)[8][4]) {}

namespace detail {
// A matrix in shared memory (PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts", 128-byte swizzling).
// K-major: ((8,m),(T,2k)):((8T,SBO),(1,T)), MN-major: ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), T = 8 bf16; then
// Swizzle<3,4,3>: bits 4 to 6 of the address are XORed with bits 7 to 9.
class SharedMatrix {
  public:
    SharedMatrix(std::uint32_t lower_half, bool k_major) : k_major_(k_major) {
        const std::uint64_t descriptor = lower_half | std::uint64_t{kTileUpperHalf} << 32;
        const auto field = [&](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
        start_ = field(0), leading_ = field(16), stride_ = field(32);
        constexpr std::uint64_t kElsewhere =
            ~(std::uint64_t{0x3fff} | std::uint64_t{0x3fff} << 16 | std::uint64_t{0x3fff} << 32);
        if ((descriptor & kElsewhere) != std::uint64_t{1} << 62)
            cuda_emulation::fail("a descriptor without the 128-byte swizzle, or with a base offset");
    }
    float operator()(unsigned mn, unsigned k) const {
        const unsigned at =
            start_ + (k_major_ ? mn % 8 * 128 + mn / 8 * stride_ + k * 2
                               : mn % 64 * 2 + mn / 64 * leading_ + k % 8 * 128 + k / 8 * stride_);
        return to_float(bf16{cuda_emulation::shared_bf16(at ^ (at >> 7 & 7) << 4)});
    }

  private:
    unsigned start_, leading_, stride_;
    bool k_major_;
};

struct WgmmaOperands {
    std::uint32_t a[4];            // if it is in registers
    std::uint32_t a_tile, b_tile;  // the lower halves of descriptors
    bool in_registers, accumulate;
};

// B is the rows of a tile if A is in registers, else they are its columns.
inline void wgmma(float (&d)[8][4], const WgmmaOperands& mine) {
    const unsigned char* const slots = cuda_emulation::exchange_in_group(&mine, sizeof mine);
    const auto of = [&](int thread) {
        WgmmaOperands o;
        std::memcpy(&o, slots + thread * cuda_emulation::kSlot, sizeof o);
        return o;
    };
    for (int thread = 0; thread < 128; ++thread) {
        const WgmmaOperands o = of(thread);
        if (o.a_tile != mine.a_tile || o.b_tile != mine.b_tile || o.in_registers != mine.in_registers ||
            o.accumulate != mine.accumulate)
            cuda_emulation::fail("the threads of a warpgroup start different matmuls");
    }
    const int thread = cuda_emulation::thread_in_group();
    const unsigned row = static_cast<unsigned>(thread / 32 * 16 + thread % 32 / 4),
                   i = static_cast<unsigned>(thread % 4);
    struct Rows {
        float at[2][16];  // rows g and g + 8 of A
    } rows{};
    if (mine.in_registers)
        for (int k4 = 0; k4 < 4; ++k4) {
            const WgmmaOperands o = of(thread / 4 * 4 + k4);
            for (int r = 0; r < 4; ++r)
                for (int k = 0; k < 2; ++k) rows.at[r % 2][r / 2 * 8 + 2 * k4 + k] = half(o.a[r], k);
        }
    cuda_emulation::start_matmul(&d[0][0], 32, mine.accumulate, [=](float* product) mutable {
        if (!mine.in_registers) {
            const SharedMatrix a(mine.a_tile, true);
            for (unsigned k = 0; k < 16; ++k)
                for (unsigned half = 0; half < 2; ++half) rows.at[half][k] = a(row + 8 * half, k);
        }
        const SharedMatrix b(mine.b_tile, !mine.in_registers);
        for (unsigned t = 0; t < 8; ++t)
            for (unsigned n = 0; n < 2; ++n) {
                float sum[2] = {0.0f, 0.0f};
                for (unsigned k = 0; k < 16; ++k) {
                    const float column = b(8 * t + 2 * i + n, k);
                    for (int half = 0; half < 2; ++half) sum[half] += rows.at[half][k] * column;
                }
                product[4 * t + n] = sum[0];
                product[4 * t + 2 + n] = sum[1];
            }
    });
}
}  // namespace detail

inline void wgmma(float (&d)[8][4], std::uint32_t a, std::uint32_t b, bool accumulate) {
    detail::wgmma(d, {{}, a, b, false, accumulate});
}
inline void wgmma_transposed(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint32_t b) {
    detail::wgmma(d, {{a[0], a[1], a[2], a[3]}, 0, b, true, true});
}

}  // namespace llmc::ptx
