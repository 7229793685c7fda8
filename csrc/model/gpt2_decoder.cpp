// GPT-2's schedule of generation: the forward pass of gpt2.cpp for new positions only, whose attention reads the
// keys and values of those before. Layers share their activations.
#include "model/gpt2.h"

namespace llmc {

namespace {

class GPT2Decoder final : public Decoder {
  public:
    GPT2Decoder(const GPT2& model, std::int64_t B, std::int64_t max_len)
        : model_(model), arena_("the cache of keys and values", 256),
          work_("the activations of generation", 256) {
        const GPT2Config& c = model.config();
        const std::int64_t HS = c.channels / c.num_heads;
        arena_.add(kcache_, "kcache", model.dtype(), {c.num_layers, B, c.num_heads, max_len, HS});
        arena_.add(vcache_, "vcache", model.dtype(), {c.num_layers, B, c.num_heads, max_len, HS});
        arena_.allocate(model.backend());
    }
    std::int64_t bytes() const override { return arena_.bytes(); }
    Tensor decode(std::int64_t b, const Tensor& tokens, const Tensor& start) override;

  private:
    const GPT2& model_;
    Tensor kcache_, vcache_;  // (L, B, NH, max_len, HS)
    Tensor x_, ln_, mean_, rstd_, qkv_, branch_, residual_, fch_, fch_gelu_;
    Arena arena_, work_;  // after their slots: their destructors still write to them
};

Tensor GPT2Decoder::decode(std::int64_t b, const Tensor& tokens, const Tensor& start) {
    const GPT2Config& config = model_.config();
    const DType dtype = model_.dtype();
    const std::int64_t count = tokens.shape[0], T = tokens.shape[1];
    const std::int64_t L = config.num_layers, NH = config.num_heads, C = config.channels;
    work_.clear();
    work_.add(x_, "x", dtype, {count, T, C});
    work_.add(ln_, "ln", dtype, {count, T, C});
    work_.add(mean_, "mean", DType::f32, {count, T});
    work_.add(rstd_, "rstd", DType::f32, {count, T});
    work_.add(qkv_, "qkv", dtype, {count, T, 3 * C});
    work_.add(branch_, "branch", dtype, {count, T, C});
    work_.add(residual_, "residual", dtype, {count, T, C});
    work_.add(fch_, "fch", dtype, {count, T, 4 * C});
    work_.add(fch_gelu_, "fch_gelu", dtype, {count, T, 4 * C});
    work_.allocate(model_.backend());

    Backend& ops = *model_.backend();
    const GPT2Tensors& p = model_.params();
    ops.encoder_forward(x_, tokens, p.wte, p.wpe, start);
    ops.layernorm_forward(ln_, mean_, rstd_, x_, p.ln1w[0], p.ln1b[0]);
    for (std::int64_t l = 0; l < L; ++l) {
        ops.matmul_forward(qkv_, ln_, p.qkvw[l], p.qkvb[l]);
        ops.attention_decode(ln_, kcache_[l].slice(b, b + count), vcache_[l].slice(b, b + count), qkv_, start,
                             NH);
        ops.matmul_forward(branch_, ln_, p.attprojw[l], p.attprojb[l]);
        ops.fused_residual_layernorm_forward(residual_, ln_, mean_, rstd_, x_, branch_, p.ln2w[l], p.ln2b[l]);
        ops.matmul_gelu_forward(fch_gelu_, fch_, ln_, p.fcw[l], p.fcb[l]);
        ops.matmul_forward(branch_, fch_gelu_, p.fcprojw[l], p.fcprojb[l]);
        const Tensor w = l + 1 < L ? p.ln1w[l + 1] : p.lnfw, bias = l + 1 < L ? p.ln1b[l + 1] : p.lnfb;
        ops.fused_residual_layernorm_forward(x_, ln_, mean_, rstd_, residual_, branch_, w, bias);
    }
    return ln_;
}

}  // namespace

std::unique_ptr<Decoder> GPT2::make_decoder(std::int64_t B, std::int64_t max_len) const {
    return std::make_unique<GPT2Decoder>(*this, B, max_len);
}

}  // namespace llmc
