// THE contract. A Backend is a device: it owns memory, orders work, and implements every op of training and
// generation. The model's schedule (csrc/model) is written once over this interface; csrc/cpu and csrc/cuda
// implement it.
//
// Reading a declaration: outputs first, then inputs, then scalars. "=" overwrites, "+=" accumulates:
// activations' gradients are overwritten unless said otherwise, parameters' gradients accumulate. float
// tensors are f32 or bf16; arithmetic is in f32 and only the store rounds. Statistics (mean, rstd, lse,
// losses, m, v) are f32 always. Shapes are checked once, by the function of the op's name in dims.h. Ops are
// queued in call order; only to_host, synchronize and a Readback wait.
//
// Letters: B batch, T time, C channels, OC output channels, NH heads, HS = C/NH head size, V vocabulary, Vp
// padded V, N any number of rows (all leading extents of a tensor taken together).
//
// Primitive ops are pure virtual: a backend that forgets one does not compile. Fused ops have a default body
// in backend.cpp, composed of primitives, which is also the oracle that a backend's own fused kernel is
// tested against.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "core/adamw_step.h"
#include "core/exact_sum.h"
#include "core/muon_step.h"
#include "core/sampler.h"
#include "core/tensor.h"

namespace llmc {

struct DeviceInfo {
    std::string name;           // "cpu", "cuda:0"
    std::string description;    // the hardware, in words
    std::string uuid;           // of a GPU: the same for all who use it, and for no other
    std::string isa;            // the kernel set chosen: "avx512", "sm_90"
    int threads = 1;            // CPU threads that ops use
    std::string pinning;        // how those threads are bound to CPUs, in words
    std::int64_t l1_bytes = 0;  // the data caches of a CPU, whoever shares them; 0 if unknown
    std::int64_t l2_bytes = 0;
    std::int64_t l3_bytes = 0;
    bool bf16_arithmetic = true;   // whether bf16 is multiplied as it is, or as f32 into which it is widened
    std::int64_t total_bytes = 0;  // memory of the device; 0 if unknown
    std::int64_t free_bytes = 0;
    int multiprocessors = 0;  // of a GPU
    double clock_hz = 0.0;    // of its multiprocessors, at most
    std::string options;      // what set_option has chosen: "attention auto, tf32 off, ..."
    std::string fallbacks;    // what was computed by slower means than chosen; empty if nothing was
};

// A copy to the host that can be waited for alone, while ops that were queued after it still run. It can be used
// again and again, and must not outlive its backend.
class Readback {
  public:
    virtual ~Readback() = default;
    virtual void queue(Tensor inp) = 0;
    virtual void wait(void* host) = 0;  // for the last queue(), whose bytes it stores
};

// The time from start() to stop() in the backend's own order of work.
class Stopwatch {
  public:
    virtual ~Stopwatch() = default;
    virtual void start() = 0;
    virtual void stop() = 0;
    virtual double seconds() = 0;  // waits for what stop() stands behind; 0 before it
};

// What a backend keeps of ops that are queued again and again (Backend::repeat); on a GPU, a graph. It must not outlive
// its backend.
class Recording {
  public:
    virtual ~Recording() = default;
};
// What such ops belong to. Those of generation take so little time that the host can hardly queue them as fast.
enum class Phase { generation, training };

// What AdamW updates of one tensor, or of a part of one.
struct AdamWOperands {
    Tensor param, master, m, v, grad;  // as of Backend::adamw
    float weight_decay = 0.0f;
    std::uint32_t seed = 0;  // of stochastic rounding, the same for all parts of a tensor
    std::int64_t first = 0;  // the index of this part's first element in the tensor
};

int process_id();  // tells a forked child from its parent; in backends.cpp, as it is the system's

inline constexpr const char* kForkedFromGpu =
    "CUDA does not work in a process that was forked from one that had used it: start processes by 'spawn' "
    "(multiprocessing.set_start_method), or use the GPU in them alone";

// Only one thread at a time may call it, because ops share scratch memory. The bindings take it for that: `worker` says who has it.
class Backend {
  public:
    virtual ~Backend() = default;
    std::atomic<int> worker{0};  // the process_id() of the thread that uses it, or 0
    const int maker = process_id();

    // ---- memory and order ----
    virtual DeviceInfo info() const = 0;
    virtual void* allocate(std::size_t bytes) = 0;  // zero-filled, 256-byte aligned; throws Error
    virtual void release(void* memory) noexcept = 0;
    virtual void zero(Tensor x) = 0;                           // x = 0
    virtual void copy(Tensor out, Tensor inp) = 0;             // out = inp, converting between f32 and bf16
    virtual void from_host(Tensor out, const void* host) = 0;  // host memory may be reused on return
    virtual void to_host(void* host, Tensor inp) = 0;          // waits
    virtual void synchronize() = 0;                            // waits
    virtual std::unique_ptr<Readback> make_readback(std::size_t bytes);  // of copies up to `bytes`
    virtual std::unique_ptr<Stopwatch> make_stopwatch();                 // by the host's clock
    // True if ops are only queued, so that the host may be ahead of the device.
    virtual bool runs_ahead() const { return false; }

    // True if sums over micro-batches are made as sums over ranks are: of each micro-batch's whole gradient, in order. Then
    // N ranks with one micro-batch each compute, bit for bit, what one process does with N of them.
    virtual bool adds_in_rank_order() const { return false; }

    // Queues what `ops` queues. A backend may keep what that was in `kept`, and if it is asked again with the same
    // `kept` and an equal `key`, queue it without calling `ops`, unless memory was released or an option was set in
    // between. So `ops` queues the same ops with the same tensors and scalars whenever `key` is the same and its
    // memory still lives; it copies nothing from or to the host; and, because it may be called once, twice or not
    // at all, it does nothing else.
    virtual void repeat(std::unique_ptr<Recording>& kept, Phase phase,
                        std::initializer_list<std::int64_t> key, const std::function<void()>& ops) {
        (void)kept, (void)phase, (void)key;
        ops();
    }

    // Call once for memory that holds weights, and again after writing them by any other way than zero, copy,
    // from_host, adamw, adamw_many or muon_update: packed copies of this memory are dropped. Other memory is never kept packed.
    virtual void weights_changed(Tensor weights) { (void)weights; }

    // Bytes that the ops of a training step allocate beside the tensors that they are given.
    virtual std::int64_t workspace_bytes(std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t NH,
                                         DType dtype) {
        (void)B, (void)T, (void)C, (void)NH, (void)dtype;
        return 0;
    }

    // Sets an option of this backend; doc/cuda.md lists those of "cuda". Throws ArgumentError if there is no such
    // option or value.
    virtual void set_option(const std::string& name, const std::string& value);

    // ---- primitive ops ----

    // out[b,t] = wte[inp[b,t]] + wpe[start[b] + t]
    // out (B,T,C)   inp (B,T) i32   wte (Vp,C)   wpe (maxT,C)
    // start (B) i32: the position of each row's first token, for generation. Absent: 0.
    virtual void encoder_forward(Tensor out, Tensor inp, Tensor wte, Tensor wpe, Tensor start) = 0;
    // dwte[inp[b,t]] += dout[b,t];   dwpe[t] += sum_b dout[b,t]
    // In a fixed order: the same bits on every run.
    virtual void encoder_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor inp) = 0;

    // out = (inp - mean) * rstd * weight + bias per row, eps 1e-5
    // out, inp (N,C)   mean, rstd (N)   weight, bias (C)
    virtual void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                                   Tensor bias) = 0;
    // dinp += J^T dout;   dweight, dbias +=
    // dinp_sum += column sums of dinp, as it is stored: the gradient of a bias that was added to inp, without
    // reading dinp again.
    // dinp, dout, inp (N,C)   dweight, dbias, weight (C)   dinp_sum (C) or absent   mean, rstd (N)
    virtual void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dinp_sum, Tensor dout,
                                    Tensor inp, Tensor weight, Tensor mean, Tensor rstd) = 0;

    // out = inp weight^T + bias
    // out (N,OC), of inp's dtype or f32   inp (N,C)   weight (OC,C)   bias (OC) or absent
    virtual void matmul_forward(Tensor out, Tensor inp, Tensor weight, Tensor bias) = 0;
    // dinp = dout weight;   dweight (+)= dout^T inp;   dbias (+)= column sums of dout
    // dinp (N,C)   dweight (OC,C)   dbias (OC): any of the three may be absent.   dout (N,OC)
    // accumulate false: dweight and dbias are overwritten, which saves zeroing and reading them.
    virtual void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                 Tensor weight, bool accumulate) = 0;

    // Causal multi-head attention, softmax(q k^T / sqrt(HS)) v per head. Keeps lse, the log-sum-exp of each
    // row of scaled scores, and nothing else.
    // out (B,T,C)   lse (B,NH,T)   qkv (B,T,3C): a row is [q | k | v], each NH heads of HS
    virtual void attention_forward(Tensor out, Tensor lse, Tensor qkv, std::int64_t NH) = 0;
    // dqkv = J^T dout
    // dqkv, qkv (B,T,3C)   dout, out (B,T,C)   lse (B,NH,T)
    virtual void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                                    std::int64_t NH) = 0;
    // Generation. Stores k, v of T new positions, start[b].., in the caches; then position start[b]+t attends
    // over 0..start[b]+t.
    // out (B,T,C)   kcache, vcache (B,NH,maxT,HS)   qkv (B,T,3C)   start (B) i32
    virtual void attention_decode(Tensor out, Tensor kcache, Tensor vcache, Tensor qkv, Tensor start,
                                  std::int64_t NH) = 0;

    // out = gelu(inp), the tanh form (Hendrycks & Gimpel 2016).   Any shape.
    virtual void gelu_forward(Tensor out, Tensor inp) = 0;
    // dinp = dout * gelu'(inp)   dinp may be dout.
    virtual void gelu_backward(Tensor dinp, Tensor inp, Tensor dout) = 0;

    // out = a + b   Any shape; out may be a or b.
    virtual void residual_forward(Tensor out, Tensor a, Tensor b) = 0;

    // losses = -log softmax(logits[:, :V])[target]
    // losses (N) f32   logits (N,Vp)   targets (N) i32; a negative target is ignored: loss 0, gradient 0.
    virtual void crossentropy_forward(Tensor losses, Tensor logits, Tensor targets, std::int64_t V) = 0;
    // In place: logits = (softmax(logits[:, :V]) - onehot(target)) * dloss, and 0 in the padding V..Vp.
    virtual void crossentropy_softmax_backward(Tensor logits, Tensor targets, float dloss,
                                               std::int64_t V) = 0;

    // out[0] += scale * sum(inp)   out (1) f32   inp f32, any shape.   In a fixed order.
    virtual void sum(Tensor out, Tensor inp, float scale) = 0;
    // out[0] += sum(inp^2)   out (1) f32   inp float, any shape.   In a fixed order.
    virtual void global_norm_squared(Tensor out, Tensor inp) = 0;
    // norm = sqrt(norm_squared);   factor = min(1, max_norm / norm), 1 if max_norm <= 0, NaN if norm is
    // not finite.   norm, factor (1) f32   norm_squared (1) f32, or (kNormDigits) of gradient_norm_squared
    virtual void clip_factor(Tensor norm, Tensor factor, Tensor norm_squared, float max_norm) = 0;

    // g = grad * factor[0];   m = lerp(g, m, beta1);   v = lerp(g^2, v, beta2);
    // param -= lr * ((m / correction1) / (sqrt(v / correction2) + eps) + weight_decay * param)
    // Does nothing if factor[0] is not finite: a NaN gradient must not reach the weights.
    // param, grad float   m, v f32, all of one shape.   master: absent for f32 parameters. For bf16 ones
    // either absent (the new value is rounded stochastically) or i16: the 16 bits below param, which make an
    // f32 weight of it (split_master in core/master.h).
    void adamw(Tensor param, Tensor master, Tensor m, Tensor v, Tensor grad, Tensor factor,
               const AdamWStep& step);
    // adamw for many tensors in as few visits as the backend can; `step` without its weight_decay, seed and first.
    virtual void adamw_many(std::span<const AdamWOperands> operands, Tensor factor,
                            const AdamWStep& step) = 0;

    // Muon (Jordan et al. 2024), in three ops: muon_momentum, newton_schulz, muon_update.
    // g = grad * factor[0];   m = lerp(g, m, momentum);   out = lerp(g, m, momentum) if nesterov, else m
    // Does nothing if factor[0] is not finite, as adamw.
    // out, grad float   m f32, all of one shape.
    virtual void muon_momentum(Tensor out, Tensor m, Tensor grad, Tensor factor, float momentum,
                               bool nesterov) = 0;
    // param -= lr * (scale * direction + weight_decay * param)
    // Does nothing if factor[0] is not finite. direction: of param's dtype.   master, seed, first: as of adamw.
    virtual void muon_update(Tensor param, Tensor master, Tensor direction, Tensor factor,
                             const MuonStep& step) = 0;
    // out = (scale * factor[0]) * inp   Any shape; out may be inp.   factor (1) f32
    virtual void scale(Tensor out, Tensor inp, Tensor factor, float scale) = 0;
    // out = a I + b x + c y   (N,N) each; out may be x or y.
    virtual void shifted_sum(Tensor out, Tensor x, Tensor y, float a, float b, float c) = 0;

    // ---- fused ops ----

    // residual = a + b;   out, mean, rstd = layernorm(residual)   all (N,C), mean and rstd (N)
    virtual void fused_residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd,
                                                  Tensor a, Tensor b, Tensor weight, Tensor bias);
    // pre = inp weight^T + bias;   out = gelu(pre)
    virtual void matmul_gelu_forward(Tensor out, Tensor pre, Tensor inp, Tensor weight, Tensor bias);
    // dinp = (dout weight) * gelu'(pre), where inp = gelu(pre);   dweight, dbias as in matmul_backward.
    // pre absent: matmul_backward.
    virtual void matmul_gelu_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                      Tensor weight, Tensor pre, bool accumulate);
    // Both halves of the classifier in one visit: losses, and dlogits in place of logits.
    virtual void fused_classifier(Tensor losses, Tensor logits, Tensor targets, float dloss, std::int64_t V);

    // out += the sum of the squares of all gradients.   out (kNormDigits) f32, digits as of core/exact_sum.h
    // Squares are taken in f32: those below 2^-126 may count as 0, and if kNormBlock of them add up to 2^128 or
    // more, or if there is a NaN, then out is not finite. On the CPU, the sum over blocks of kNormBlock elements is
    // exact: whatever the threads, and however tensors are cut at multiples of kNormBlock, out is the same to the
    // bit, and so are its digits added over up to 256 ranks.
    virtual void gradient_norm_squared(Tensor out, std::span<const Tensor> gradients);

    // out = U S' V^T of inp = U S V^T, where S' is near 1 for every singular value that is not tiny beside the norm
    // of inp: `steps` times  X = a X + b (X X^T) X + c (X X^T)^2 X,  begun with inp / max(its norm, 1e-7), in the
    // dtype of inp. Coefficients: backend.cpp.
    // out, inp (R,C)   gram, polynomial (k,k), k = min(R,C)   norms (kNormDigits + 2) f32. All but out are scratch memory in
    // the end.
    virtual void newton_schulz(Tensor out, Tensor inp, Tensor gram, Tensor polynomial, Tensor norms,
                               int steps);

    // Generation. Chooses one of the first V tokens for each row, as token_or_fault of core/sampler.h does, whose
    // faults mark the rows that no token can be chosen from. A row with a negative coin is skipped: token 0.
    // tokens (N) i32   logits (N,Vp) f32   coins (N) f32, below 1
    // The default body works on the host, and waits.
    virtual void sample(Tensor tokens, Tensor logits, Tensor coins, std::int64_t V,
                        const SamplerOptions& options);
};

}  // namespace llmc
