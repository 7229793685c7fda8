#include "cpu/peak.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llmc {

namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// The median of short bursts, because another process interrupts only few of them. Each thread times itself, so it does
// not matter if it was woken late.
double flops_of_this_thread(double (*multiply_adds)(i64, float*), float* operands) {
    std::array<double, 256> rates;
    std::size_t count = 0;
    const Clock::time_point start = Clock::now();
    for (i64 rounds = 1000; count < 8 || (count < rates.size() && seconds_since(start) < 0.06);) {
        const Clock::time_point begin = Clock::now();
        const double flops = multiply_adds(rounds, operands);
        const double elapsed = seconds_since(begin);
        if (elapsed < 2e-4)
            rounds *= 2;
        else
            rates[count++] = flops / elapsed;
    }
    const auto middle = rates.begin() + count / 2;
    std::nth_element(rates.begin(), middle, rates.begin() + count);
    return *middle;
}

}  // namespace

double cpu_peak_flops(DType dtype, int threads) {
    LLMC_CHECK(is_float(dtype), "dtype is {}, expected f32 or bf16", dtype);
    const Kernels& k = *choose_isa().kernels;
    const auto multiply_adds = dtype == DType::f32 ? k.f32.multiply_adds : k.bf16_.multiply_adds;
    if (threads <= 0) threads = default_threads();
    threads = std::min(threads, usable_cpus());  // threads that share a CPU would each count all of it
    constexpr std::size_t kLine = 64;            // floats: a thread's own cache lines
    std::vector<float> zeros(static_cast<std::size_t>(threads) * kLine);
    std::vector<double> flops(static_cast<std::size_t>(threads));
    parallel_for(threads, threads, [&](std::int64_t task, int) {
        const std::size_t i = static_cast<std::size_t>(task);
        flops[i] = flops_of_this_thread(multiply_adds, zeros.data() + i * kLine);
    });
    return std::accumulate(flops.begin(), flops.end(), 0.0);
}

}  // namespace llmc
