// The CPU as a Backend. Each op is defined in the file named after it.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "core/backend.h"
#include "cpu/caches.h"
#include "cpu/kernels.h"
#include "cpu/packed_weights.h"
#include "cpu/parallel.h"

namespace llmc {

inline constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

class CpuBackend final : public Backend {
  public:
    explicit CpuBackend(int threads);
    ~CpuBackend() override;

    DeviceInfo info() const override;
    bool adds_in_rank_order() const override { return true; }
    void* allocate(std::size_t bytes) override;
    void release(void* memory) noexcept override;
    void zero(Tensor x) override;
    void copy(Tensor out, Tensor inp) override;
    void from_host(Tensor out, const void* host) override;
    void to_host(void* host, Tensor inp) override;
    void synchronize() override {}
    void weights_changed(Tensor weights) override;

    void encoder_forward(Tensor out, Tensor inp, Tensor wte, Tensor wpe, Tensor start) override;
    void encoder_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor inp) override;
    void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                           Tensor bias) override;
    void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dinp_sum, Tensor dout,
                            Tensor inp, Tensor weight, Tensor mean, Tensor rstd) override;
    void matmul_forward(Tensor out, Tensor inp, Tensor weight, Tensor bias) override;
    void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, Tensor weight,
                         bool accumulate) override;
    void attention_forward(Tensor out, Tensor lse, Tensor qkv, std::int64_t NH) override;
    void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                            std::int64_t NH) override;
    void attention_decode(Tensor out, Tensor kcache, Tensor vcache, Tensor qkv, Tensor start,
                          std::int64_t NH) override;
    void gelu_forward(Tensor out, Tensor inp) override;
    void gelu_backward(Tensor dinp, Tensor inp, Tensor dout) override;
    void residual_forward(Tensor out, Tensor a, Tensor b) override;
    void crossentropy_forward(Tensor losses, Tensor logits, Tensor targets, std::int64_t V) override;
    void crossentropy_softmax_backward(Tensor logits, Tensor targets, float dloss, std::int64_t V) override;
    void sum(Tensor out, Tensor inp, float scale) override;
    void global_norm_squared(Tensor out, Tensor inp) override;
    void clip_factor(Tensor norm, Tensor factor, Tensor norm_squared, float max_norm) override;
    void muon_momentum(Tensor out, Tensor m, Tensor grad, Tensor factor, float momentum,
                       bool nesterov) override;
    void muon_update(Tensor param, Tensor master, Tensor direction, Tensor factor,
                     const MuonStep& step) override;
    void scale(Tensor out, Tensor inp, Tensor factor, float scale) override;
    void shifted_sum(Tensor out, Tensor x, Tensor y, float a, float b, float c) override;

    void fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a,
                                          Tensor b, Tensor weight, Tensor bias) override;
    void matmul_gelu_forward(Tensor out, Tensor pre, Tensor inp, Tensor weight, Tensor bias) override;
    void matmul_gelu_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                              Tensor weight, Tensor pre, bool accumulate) override;
    void fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V) override;
    void adamw_many(std::span<const AdamWOperands> operands, Tensor factor, const AdamWStep& step) override;
    void gradient_norm_squared(Tensor out, std::span<const Tensor> gradients) override;

  private:
    // Calls body(begin, count) on pieces of at most `grain` elements of n.
    template <class Body>
    void for_ranges(std::int64_t n, std::int64_t grain, Body&& body) {
        parallel_for(threads_, ceil_div(n, grain), [&](std::int64_t task, int) {
            const std::int64_t begin = task * grain;
            body(begin, n - begin < grain ? n - begin : grain);
        });
    }
    // The same for each of many items, in one parallel loop: body(item, begin, count, thread).
    template <class Item, class Body>
    void for_ranges_of_all(std::span<const Item> items, std::int64_t grain, Body&& body) {
        std::vector<std::int64_t> ends;  // of each item's tasks
        for (const Item& item : items)
            ends.push_back((ends.empty() ? 0 : ends.back()) + ceil_div(elements_of(item), grain));
        parallel_for(threads_, ends.empty() ? 0 : ends.back(), [&](std::int64_t task, int thread) {
            const auto end = std::upper_bound(ends.begin(), ends.end(), task);
            const Item& item = items[static_cast<std::size_t>(end - ends.begin())];
            const std::int64_t n = elements_of(item), tasks = ceil_div(n, grain);
            const std::int64_t begin = (task - (*end - tasks)) * grain;
            body(item, begin, n - begin < grain ? n - begin : grain, thread);
        });
    }
    static std::int64_t elements_of(const Tensor& x) { return x.numel(); }
    static std::int64_t elements_of(const AdamWOperands& o) { return o.param.numel(); }
    template <class T>
    const TypedKernels<T>& kernels() const {
        if constexpr (std::is_same_v<T, float>)
            return kernels_->f32;
        else
            return kernels_->bf16_;
    }
    // 64-byte aligned memory for one op: a buffer for each thread, and one that all threads share.
    void* thread_scratch(int thread) { return scratch_[static_cast<std::size_t>(thread)].data; }
    void reserve_thread_scratch(std::int64_t bytes);
    void* shared_scratch(std::int64_t bytes);

    // Every op that may be given a weight to write calls this: packed copies of the memory are dropped.
    void drop_packed_copies(Tensor memory);

    void run_gemm(Gemm g, DType dtype);
    const void* packed_weight(const Gemm& g, DType dtype);
    void bias_gradient(Tensor dbias, Tensor dout, bool accumulate);
    void classifier(const char* op, Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V,
                    bool gradient);

    struct Scratch {
        void* data = nullptr;
        std::int64_t bytes = 0;
    };
    void grow(Scratch& scratch, std::int64_t bytes);

    const Kernels* kernels_;
    Caches caches_;
    int threads_;
    std::vector<Scratch> scratch_;
    Scratch shared_;
    std::unique_ptr<PackedWeights> weights_;  // null if the kernel set keeps no packed weights
};

// Calls body with a value of the C++ type of a float dtype: visit_float(x.dtype, [&](auto tag) { using T =
// decltype(tag); ... }).
template <class Body>
void visit_float(DType dtype, Body&& body) {
    if (dtype == DType::f32)
        body(float{});
    else
        body(bf16{});
}

// Elements in a task of an elementwise op: few enough to keep all threads busy to the end, and so many that handing out
// a task costs nothing beside it.
inline constexpr std::int64_t kGrain = 16384;

}  // namespace llmc
