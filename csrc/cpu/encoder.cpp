// Token and position embeddings. Backward is a scatter: many positions may add to one row of dwte. Positions
// are sorted by token, and each token that occurs is one task, which sums its rows in f32 in the order of
// positions: no atomics, the same bits on every run, and one rounding per row however often a token occurs.
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/dims.h"
#include "cpu/cpu_backend.h"

namespace llmc {

namespace {

void check_tokens(const char* op, const std::int32_t* tokens, std::int64_t n, std::int64_t Vp) {
    for (std::int64_t i = 0; i < n; ++i)
        LLMC_CHECK(tokens[i] >= 0 && tokens[i] < Vp,
                   "{}: token {} at position {} is outside of the vocabulary of {}", op, tokens[i], i, Vp);
}

}  // namespace

void CpuBackend::encoder_forward(Tensor out, Tensor inp, Tensor wte, Tensor wpe, Tensor start) {
    constexpr const char* op = "encoder_forward";
    const auto [B, T, C, Vp, maxT] = encoder_dims(op, out, inp, wte, wpe);
    check::dtype(op, "out", out, wte.dtype);
    check_tokens(op, inp.as<std::int32_t>(), B * T, Vp);
    if (start) {
        check::dtype(op, "start", start, DType::i32);
        check::shape(op, "start", start, {B});
        for (std::int64_t b = 0; b < B; ++b) {
            const std::int64_t s = start.as<std::int32_t>()[b];
            LLMC_CHECK(s >= 0 && s + T <= maxT, "{}: positions {}..{}, but wpe has {}", op, s, s + T, maxT);
        }
    }
    visit_float(wte.dtype, [&, B = B, T_ = T, C = C](auto tag) {
        using T = decltype(tag);
        for_ranges(B * T_, 16, [&](std::int64_t row, std::int64_t count) {
            for (std::int64_t r = row; r < row + count; ++r) {
                const std::int64_t token = inp.as<std::int32_t>()[r];
                const std::int64_t position = r % T_ + (start ? start.as<std::int32_t>()[r / T_] : 0);
                kernels<T>().add(out.as<T>() + r * C, wte.as<T>() + token * C, wpe.as<T>() + position * C, C);
            }
        });
    });
}

void CpuBackend::encoder_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor inp) {
    constexpr const char* op = "encoder_backward";
    const auto [B, T, C, Vp, maxT] = encoder_dims(op, dout, inp, dwte, dwpe);
    const std::int32_t* const tokens = inp.as<std::int32_t>();
    check_tokens(op, tokens, B * T, Vp);

    std::vector<std::int32_t> order(static_cast<std::size_t>(B * T));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [=](std::int32_t a, std::int32_t b) { return tokens[a] < tokens[b]; });
    std::vector<std::int64_t> runs;  // where each token's positions begin in `order`
    for (std::int64_t i = 0; i < B * T; ++i)
        if (i == 0 || tokens[order[i]] != tokens[order[i - 1]]) runs.push_back(i);
    const std::int64_t count = static_cast<std::int64_t>(runs.size());
    runs.push_back(B * T);

    reserve_thread_scratch(C * 4);
    visit_float(dout.dtype, [&, B = B, T_ = T, C = C](auto tag) {
        using T = decltype(tag);
        visit_float(dwte.dtype, [&](auto grad_tag) {
            using G = decltype(grad_tag);
            // The sum of the rows of dout that `row(0..n-1)` names, added to `into`. (Its type is not called G:
            // cl.exe loses this alias in a generic lambda inside.)
            const auto scatter = [&]<class Into>(int thread, Into* into, std::int64_t n, auto row) {
                float* const sum = static_cast<float*>(thread_scratch(thread));
                std::fill(sum, sum + C, 0.0f);
                for (std::int64_t i = 0; i < n; ++i)
                    kernels<T>().accumulate(sum, dout.as<T>() + row(i) * C, C);
                kernels<Into>().add_into(into, sum, C);
            };
            parallel_for(threads_, count, [&](std::int64_t run, int thread) {
                const std::int64_t begin = runs[run];
                scatter(thread, dwte.as<G>() + tokens[order[begin]] * C, runs[run + 1] - begin,
                        [&](std::int64_t i) { return order[begin + i]; });
            });
            parallel_for(threads_, T_, [&](std::int64_t t, int thread) {
                scatter(thread, dwpe.as<G>() + t * C, B, [&](std::int64_t b) { return b * T_ + t; });
            });
        });
    });
}

}  // namespace llmc
