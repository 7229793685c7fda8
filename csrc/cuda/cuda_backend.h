// An NVIDIA GPU as a Backend. Each op is defined in the file named after it.
//
// All work goes into one stream, in call order. The host waits only in to_host, in synchronize and for a
// Readback, and in from_host if it is several copies ahead of the device.
#pragma once

#include <memory>
#include <string>

#include "core/backend.h"
#include "cuda/cublaslt.h"
#include "cuda/cudnn_attention.h"
#include "cuda/runtime.h"

namespace llmc {

// What a user may choose, by set_option or an environment variable (doc/cuda.md).
struct CudaOptions {
    // What one does not support, the next in this list computes. automatic begins with cudnn, but only if T is a
    // multiple of 64, as in training.
    enum class Attention { automatic, cudnn, wgmma, flash, simple };
    enum class Switch { off, on, automatic };

    Attention attention = Attention::automatic;
    bool tf32 = false;                      // f32 matrices are multiplied in TF32
    bool deterministic = true;              // of cuDNN's attention backward
    bool tune = false;                      // matmul algorithms are chosen by timing them
    bool bias_in_matmul = false;            // dbias is computed by the matmul of dweight
    Switch fused_gelu = Switch::automatic;  // GELU in matmul epilogues; automatic: in bf16, from sm_90 on
};

class CudaBackend final : public Backend {
  public:
    explicit CudaBackend(int device);
    ~CudaBackend() override;

    DeviceInfo info() const override;
    void* allocate(std::size_t bytes) override;
    void release(void* memory) noexcept override;
    void zero(Tensor x) override;
    void copy(Tensor out, Tensor inp) override;
    void from_host(Tensor out, const void* host) override;
    void to_host(void* host, Tensor inp) override;
    void synchronize() override;
    std::unique_ptr<Readback> make_readback(std::size_t bytes) override;
    bool runs_ahead() const override { return true; }
    std::int64_t workspace_bytes(std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t NH,
                                 DType dtype) override;
    void set_option(const std::string& name, const std::string& value) override;

    void encoder_forward(Tensor out, Tensor inp, Tensor wte, Tensor wpe, Tensor start) override;
    void encoder_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor inp) override;
    void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                           Tensor bias) override;
    void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, Tensor weight,
                            Tensor mean, Tensor rstd) override;
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
    void adamw(Tensor param, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor factor,
               const AdamWStep& step) override;

    void fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a,
                                          Tensor b, Tensor weight, Tensor bias) override;
    void matmul_gelu_forward(Tensor out, Tensor pre, Tensor inp, Tensor weight, Tensor bias) override;
    void matmul_gelu_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                              Tensor weight, Tensor pre, bool accumulate) override;
    void fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V) override;
    void sample(Tensor tokens, Tensor logits, Tensor coins, std::int64_t V,
                const SamplerOptions& options) override;

    int device() const { return device_; }
    // The stream of all ops; makes this backend's device the calling thread's current one.
    cudaStream_t stream();

  private:
    // Memory for one op, valid until the next call.
    void* scratch(std::int64_t bytes);

    void matmul(const Matmul& p);
    bool fused_matmul(const Matmul& p);
    void count_plain_matmul(const Matmul& p);
    void bias_gradient(Tensor dbias, Tensor dout, bool accumulate);
    void classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V, bool gradient);
    MatmulEngine& engine();
    CudnnAttention* cudnn(const AttentionDims& d, const Tensor& qkv);  // null: cuDNN is not to be used
    bool wgmma(const AttentionDims& d, const Tensor& qkv, const Tensor& out) const;
    bool flash(const AttentionDims& d, const Tensor& qkv, const Tensor& out) const;

    // Pinned buffers, used in turn, through which host data goes to the device.
    struct Staging {
        void* memory = nullptr;
        cudaEvent_t read = nullptr;  // the device has read it
    };
    static constexpr int kStagings = 8;
    static constexpr std::size_t kStagingBytes = std::size_t{1} << 20;

    // The pinned buffer through which data comes back. It grows with the copies, up to kReturnBytes.
    static constexpr std::size_t kReturnBytes = std::size_t{64} << 20;
    void* return_ = nullptr;
    std::size_t return_bytes_ = 0;

    int device_;
    cudaStream_t stream_ = nullptr;
    CudaOptions options_;
    bool fuse_gelu_by_default_ = false;
    bool has_wgmma_ = false;
    Staging staging_[kStagings];
    int next_staging_ = 0;
    void* scratch_ = nullptr;
    std::int64_t scratch_bytes_ = 0;
    std::unique_ptr<MatmulEngine> engine_;
    std::int64_t plain_matmuls_ = 0;  // matmuls that cuBLASLt had no algorithm for
    double largest_plain_flops_ = 0.0;
    std::string largest_plain_;
    std::unique_ptr<CudnnAttention> cudnn_;
    std::string cudnn_absence_;  // why cudnn_ could not be made, once that was tried
};

}  // namespace llmc
