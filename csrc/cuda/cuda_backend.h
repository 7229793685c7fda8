// An NVIDIA GPU as a Backend. Each op is defined in the file named after it.
//
// All work goes into one stream, in call order; only the parts of one op may go into two (Fork). The host waits
// only in to_host, in synchronize and for a Readback, and in from_host if it is several copies ahead of the device.
#pragma once

#include <atomic>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "cuda/cublaslt.h"
#include "cuda/cudnn_attention.h"
#include "cuda/runtime.h"

namespace llmc {

// What a user may choose, by set_option or an environment variable (doc/cuda.md).
struct CudaOptions {
    // What one does not support, the next in this list computes. automatic is wgmma where it can be, else begins with
    // cudnn, but only if T is a multiple of 64, as in training.
    enum class Attention { automatic, cudnn, wgmma, flash, simple };
    enum class Switch { off, on, automatic };

    Attention attention = Attention::automatic;
    bool tf32 = false;                      // f32 matrices are multiplied in TF32
    bool deterministic = true;              // of cuDNN's attention backward
    bool tune = false;                      // matmul algorithms are chosen by timing them
    std::string tune_file;                  // where these choices are kept, in UTF-8; empty for nowhere
    bool bias_in_matmul = false;            // dbias is computed by the matmul of dweight
    Switch fused_gelu = Switch::automatic;  // GELU in matmul epilogues; automatic: in bf16, from sm_90 on
    Switch graphs = Switch::automatic;      // repeated ops are recorded; automatic: those of generation
    bool overlap = false;                   // weights' gradients are computed beside the input's
};

class CudaBackend final : public Backend {
  public:
    // tune_file: the first value of that option.
    CudaBackend(int device, std::string tune_file);
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
    std::unique_ptr<Stopwatch> make_stopwatch() override;
    bool runs_ahead() const override { return true; }
    std::int64_t workspace_bytes(std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t NH,
                                 DType dtype) override;
    void set_option(const std::string& name, const std::string& value) override;
    void repeat(std::unique_ptr<Recording>& kept, Phase phase, std::initializer_list<std::int64_t> key,
                const std::function<void()>& ops) override;

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
    void sample(Tensor tokens, Tensor logits, Tensor coins, std::int64_t V,
                const SamplerOptions& options) override;

    int device() const { return device_; }
    // The stream of all ops; makes this backend's device the calling thread's current one.
    cudaStream_t stream();
    // The same, for a kernel that may overlap with the one before (device.cuh), if that one, too, was launched here: a
    // chain of kernels, which ends with any other use of the stream. `writes`: what this one writes.
    LaunchStream overlapping_stream(std::initializer_list<Tensor> writes);
    // True if no kernel of the chain writes to x, so that a kernel may read it before its wait.
    bool at_rest(const Tensor& x) const;
    // Throws Error while ops are recorded, for what may not be among them.
    void refuse_in_recording(const char* what) const;

  private:
    class Graph;
    void record(Graph& graph, const std::function<void()>& ops);
    // True in the thread that records; others may release memory meanwhile.
    bool recording() const { return recorder_ == std::this_thread::get_id(); }
    // Changes with whatever makes recordings stale.
    std::int64_t epoch() const { return epoch_ + (cudnn_ ? cudnn_->workspaces() : 0); }

    // What work is queued into, and what belongs to it.
    struct Lane {
        cudaStream_t stream = nullptr;
        cudaEvent_t reached = nullptr;  // for the other lane
        void* scratch = nullptr;
        std::int64_t scratch_bytes = 0;
        void* counters = nullptr;
        std::unique_ptr<MatmulEngine> engine;  // for its workspace
    };
    Lane& lane() { return lanes_[lane_]; }
    // Two lanes for the parts of one op, if `wanted`: what comes after other() goes to the second lane, which begins
    // with what was queued before the fork. After join() everything goes to the first lane again, and waits for both.
    class Fork {
      public:
        Fork(CudaBackend& backend, bool wanted);
        ~Fork();  // joins, if an exception came before join()
        Fork(const Fork&) = delete;
        Fork& operator=(const Fork&) = delete;
        void other();
        void join();

      private:
        CudaBackend& backend_;
        bool open_;
    };

    // Memory for one op, valid until the next call in this lane.
    void* scratch(std::int64_t bytes);
    // kCounters zeros of this lane, which a kernel that counts its blocks leaves as zeros.
    static constexpr std::int64_t kCounters = 4096;
    unsigned* counters();

    void matmul(const Matmul& p);
    bool fused_matmul(const Matmul& p);
    void launch_gelu_forward(Tensor out, Tensor inp);  // in a matmul that has none in its epilogue, too
    void launch_gelu_backward(Tensor dinp, Tensor inp, Tensor dout);
    bool few_rows_matmul(const Matmul& p);
    void count_plain_matmul(const Matmul& p);
    void bias_gradient(Tensor dbias, Tensor dout, bool accumulate);
    void classifier(const char* op, Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V,
                    bool gradient);
    MatmulEngine& engine();
    CudnnAttention* cudnn(const AttentionDims& d, const Tensor& qkv);  // null: cuDNN is not to be used
    bool wgmma(const AttentionDims& d, const Tensor& qkv, const Tensor& out) const;
    bool flash(const AttentionDims& d, const Tensor& qkv, const Tensor& out) const;
    bool attention_decode_in_chunks(const DecodeDims& d, Tensor out, Tensor kcache, Tensor vcache, Tensor qkv,
                                    Tensor start);

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
    Lane lanes_[2];
    int lane_ = 0;
    CudaOptions options_;
    bool fuse_gelu_by_default_ = false;
    bool has_wgmma_ = false;
    bool kernels_overlap_ = false;  // from sm_90 on, a kernel may begin before the one before it has ended
    bool chain_ = false;            // the last kernel was launched in overlapping_stream()
    std::vector<std::pair<const char*, const char*>> chain_writes_;  // beginnings and ends
    Staging staging_[kStagings];
    int next_staging_ = 0;
    std::int64_t plain_matmuls_ = 0;  // matmuls that cuBLASLt had no algorithm for
    double largest_plain_flops_ = 0.0;
    std::string largest_plain_;
    std::atomic<std::int64_t> epoch_ = 0;
    std::atomic<std::thread::id> recorder_{};
    std::vector<void*> released_;                 // by the thread that records, and not freed yet
    std::int64_t recorded_ = 0, unrecorded_ = 0;  // how often ops were recorded, and could not be
    std::string first_unrecorded_;
    std::unique_ptr<CudnnAttention> cudnn_;
    std::string cudnn_absence_;  // why cudnn_ could not be made, once that was tried
};

}  // namespace llmc
