#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llmc {

double cpu_peak_flops(DType dtype, int threads) {
    LLMC_CHECK(is_float(dtype), "dtype is {}, expected f32 or bf16", dtype);
    const Kernels& k = *choose_isa().kernels;
    const auto multiply_adds = dtype == DType::f32 ? k.f32.multiply_adds : k.bf16_.multiply_adds;
    if (threads <= 0) threads = default_threads();
    constexpr i64 kLine = 64;  // floats: a thread's own cache lines
    std::vector<float> zeros(static_cast<std::size_t>(threads * kLine));
    std::vector<double> done(static_cast<std::size_t>(threads));
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };

    // Short bursts, the best of which no other process disturbed.
    double best = 0;
    const Clock::time_point start = Clock::now();
    int bursts = 0;
    for (i64 rounds = 1000; bursts < 8 || seconds(Clock::now() - start) < 0.06;) {
        const Clock::time_point begin = Clock::now();
        parallel_for(threads, threads, [&](std::int64_t task, int) {
            done[static_cast<std::size_t>(task)] = multiply_adds(rounds, zeros.data() + task * kLine);
        });
        const double elapsed = seconds(Clock::now() - begin);
        double flops = 0;
        for (const double d : done) flops += d;
        if (elapsed < 1e-3) {
            rounds *= 2;
            continue;
        }
        best = std::max(best, flops / elapsed);
        ++bursts;
    }
    return best;
}

}  // namespace llmc
