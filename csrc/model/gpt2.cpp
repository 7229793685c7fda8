// The whole of GPT-2, forward and backward, over the ops of a Backend.
//
// A block: x -> x + attproj(attention(qkv(ln1(x)))) -> . + fcproj(gelu(fc(ln2(.)))). The addition to the
// residual stream and the layernorm that follows it are one op, so the layernorm at a block's end is already
// the next block's ln1, or lnf. Logits exist only by chunks of rows, which go through the softmax, its
// gradient and both products of the classifier before the next.
#include "model/gpt2.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace llmc {

// ---- configuration ----

void GPT2Config::validate() const {
    LLMC_CHECK(max_seq_len > 0 && vocab_size > 0 && num_layers > 0 && num_heads > 0 && channels > 0,
               "max_seq_len {}, vocab_size {}, num_layers {}, num_heads {} and channels {} must be positive",
               max_seq_len, vocab_size, num_layers, num_heads, channels);
    LLMC_CHECK(channels % num_heads == 0, "channels {} is not divisible by num_heads {}", channels,
               num_heads);
    LLMC_CHECK(padded_vocab_size >= vocab_size, "padded_vocab_size {} is smaller than vocab_size {}",
               padded_vocab_size, vocab_size);
    // Far beyond any model, and far below overflow of a byte count.
    LLMC_CHECK(max_seq_len <= 1 << 24 && padded_vocab_size <= 1 << 28 && num_layers <= 1 << 12 &&
                   channels <= 1 << 20,
               "max_seq_len {}, padded_vocab_size {}, num_layers {} and channels {} are out of range",
               max_seq_len, padded_vocab_size, num_layers, channels);
    LLMC_CHECK(num_layers * channels <= (std::int64_t{1} << 42) / channels,
               "{} layers of {} channels are out of range", num_layers, channels);
}

GPT2Config gpt2_config_from_descriptor(const std::string& descriptor) {
    struct Row {
        const char* name;
        std::int64_t L, C, NH;
    };
    // GPT-2 by depth (d6, d60 to d84 are llm.c's own), GPT-3 by channels (Brown et al. 2020, table 2.1).
    static const Row kGpt2[] = {{"6", 6, 384, 6},     {"12", 12, 768, 12},  {"24", 24, 1024, 16},
                                {"36", 36, 1280, 20}, {"48", 48, 1600, 25}, {"60", 60, 1920, 30},
                                {"72", 72, 2880, 30}, {"84", 84, 3456, 36}};
    static const Row kGpt3[] = {{"384", 6, 384, 6},     {"768", 12, 768, 12},    {"1024", 24, 1024, 16},
                                {"1536", 24, 1536, 16}, {"2048", 24, 2048, 16},  {"2560", 32, 2560, 32},
                                {"4096", 32, 4096, 32}, {"12288", 96, 12288, 96}};
    const auto find = [&](const auto& rows, const std::string& name, std::int64_t max_seq_len) {
        std::string known;
        for (const Row& row : rows) {
            if (row.name == name) return GPT2Config{max_seq_len, 50257, row.L, row.NH, row.C, 50304};
            known += (known.empty() ? "" : ", ") + std::string(row.name);
        }
        throw ArgumentError(
            filled("unknown model descriptor '{}': '{}' is not one of {}", descriptor, name, known));
    };
    if (descriptor == "gpt3:c5140")
        throw ArgumentError("model descriptor 'gpt3:c5140' (GPT-3 13B) cannot be built: 5140 channels are "
                            "not divisible by its 128 per head; "
                            "give num_layers, num_heads and channels instead");
    if (descriptor.rfind("gpt2:d", 0) == 0) return find(kGpt2, descriptor.substr(6), 1024);
    if (descriptor.rfind("gpt3:c", 0) == 0) return find(kGpt3, descriptor.substr(6), 2048);
    if (descriptor.rfind('d', 0) == 0) return find(kGpt2, descriptor.substr(1), 1024);
    throw ArgumentError(
        filled("unknown model descriptor '{}': expected d12 or gpt2:d12 (depth), or gpt3:c768 (channels)",
               descriptor));
}

// ---- tables ----

void GPT2::declare_parameters(Arena& arena, GPT2Tensors& t, const GPT2Config& config, DType dtype) {
    const std::int64_t L = config.num_layers, C = config.channels, Vp = config.padded_vocab_size;
    arena.add(t.wte, "wte", dtype, {Vp, C});
    arena.add(t.wpe, "wpe", dtype, {config.max_seq_len, C});
    arena.add(t.ln1w, "ln1w", dtype, {L, C});
    arena.add(t.ln1b, "ln1b", dtype, {L, C});
    arena.add(t.qkvw, "qkvw", dtype, {L, 3 * C, C});
    arena.add(t.qkvb, "qkvb", dtype, {L, 3 * C});
    arena.add(t.attprojw, "attprojw", dtype, {L, C, C});
    arena.add(t.attprojb, "attprojb", dtype, {L, C});
    arena.add(t.ln2w, "ln2w", dtype, {L, C});
    arena.add(t.ln2b, "ln2b", dtype, {L, C});
    arena.add(t.fcw, "fcw", dtype, {L, 4 * C, C});
    arena.add(t.fcb, "fcb", dtype, {L, 4 * C});
    arena.add(t.fcprojw, "fcprojw", dtype, {L, C, 4 * C});
    arena.add(t.fcprojb, "fcprojb", dtype, {L, C});
    arena.add(t.lnfw, "lnfw", dtype, {C});
    arena.add(t.lnfb, "lnfb", dtype, {C});
}

// Weight decay is for matrices and embeddings, as in llm.c's train_gpt2.cu and nanoGPT.
static bool decays(const std::string& name) {
    for (const char* matrix : {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"})
        if (name == matrix) return true;
    return false;
}

// Without training, layers share one slot: only the residual stream goes from layer to layer.
void GPT2::declare_activations(Arena& arena, GPT2Activations& a, const GPT2Config& config, DType dtype,
                               std::int64_t B, std::int64_t T, Recompute recompute,
                               std::int64_t classifier_rows, bool training) {
    const std::int64_t C = config.channels, NH = config.num_heads;
    const std::int64_t L = training ? config.num_layers : 1;
    const std::int64_t L_gelu = recompute >= Recompute::gelu ? 1 : L;
    const std::int64_t L_ln = recompute >= Recompute::gelu_and_layernorm ? 1 : L;
    arena.add(a.inputs, "inputs", DType::i32, {B, T});
    arena.add(a.targets, "targets", DType::i32, {B, T});
    arena.add(a.encoded, "encoded", dtype, {B, T, C});
    arena.add(a.ln1, "ln1", dtype, {L_ln, B, T, C});
    arena.add(a.ln1_mean, "ln1_mean", DType::f32, {L, B, T});
    arena.add(a.ln1_rstd, "ln1_rstd", DType::f32, {L, B, T});
    arena.add(a.qkv, "qkv", dtype, {L, B, T, 3 * C});
    arena.add(a.atty, "atty", dtype, {L, B, T, C});
    arena.add(a.lse, "lse", DType::f32, {L, B, NH, T});
    arena.add(a.residual2, "residual2", dtype, {L, B, T, C});
    arena.add(a.ln2, "ln2", dtype, {L_ln, B, T, C});
    arena.add(a.ln2_mean, "ln2_mean", DType::f32, {L, B, T});
    arena.add(a.ln2_rstd, "ln2_rstd", DType::f32, {L, B, T});
    arena.add(a.fch, "fch", dtype, {L, B, T, 4 * C});
    arena.add(a.fch_gelu, "fch_gelu", dtype, {L_gelu, B, T, 4 * C});
    arena.add(a.residual3, "residual3", dtype, {L, B, T, C});
    arena.add(a.lnf, "lnf", dtype, {B, T, C});
    arena.add(a.lnf_mean, "lnf_mean", DType::f32, {B, T});
    arena.add(a.lnf_rstd, "lnf_rstd", DType::f32, {B, T});
    arena.add(a.branch, "branch", dtype, {B, T, C});
    arena.add(a.logits, "logits", dtype,
              {std::min(B * T, std::max<std::int64_t>(1, classifier_rows)), config.padded_vocab_size});
    arena.add(a.losses, "losses", DType::f32, {B, T});
    if (!training) return;
    arena.add(a.dresidual, "dresidual", dtype, {B, T, C});
    arena.add(a.dbranch, "dbranch", dtype, {B, T, C});
    arena.add(a.dhidden, "dhidden", dtype, {B, T, 4 * C});
}

MemoryPlan GPT2::memory_plan(const GPT2Config& config, DType dtype, DType grad_dtype, std::int64_t B,
                             std::int64_t T, Recompute recompute, std::int64_t classifier_rows, bool training,
                             bool master_weights) {
    config.validate();
    LLMC_CHECK(B > 0 && T > 0 && B <= (std::int64_t{1} << 30) / T, "B {} times T {} is out of range", B, T);
    GPT2Tensors tensors;
    GPT2Activations activations;
    Arena parameters("", 1), gradients("", 1), acts("", 256);
    declare_parameters(parameters, tensors, config, dtype);
    declare_parameters(gradients, tensors, config, grad_dtype);
    declare_activations(acts, activations, config, dtype, B, T, recompute, classifier_rows, training);
    const std::int64_t N = parameters.bytes() / size_of(dtype);
    const std::int64_t state = 8 + (dtype == DType::bf16 && master_weights ? 2 : 0);
    return {parameters.bytes(), training ? gradients.bytes() : 0, training ? state * N : 0, acts.bytes()};
}

GPT2::GPT2(std::shared_ptr<Backend> backend, const GPT2Config& config, DType dtype, DType grad_dtype)
    : backend_(std::move(backend)), config_(config), dtype_(dtype), grad_dtype_(grad_dtype),
      param_arena_("parameters", 1), grad_arena_("parameter gradients", 1), act_arena_("activations", 256),
      scalar_arena_("scalars", 256) {
    config_.validate();
    LLMC_CHECK(is_float(dtype) && is_float(grad_dtype),
               "dtype is {} and grad_dtype is {}, expected f32 or bf16", dtype, grad_dtype);
    LLMC_CHECK(dtype == DType::bf16 || grad_dtype == DType::f32,
               "grad_dtype is {}, but an f32 model has f32 gradients", grad_dtype);
    declare_parameters(param_arena_, params_, config_, dtype_);
    declare_parameters(grad_arena_, grads_, config_, grad_dtype_);
    param_arena_.allocate(backend_);
    scalar_arena_.add(mean_loss_, "mean_loss", DType::f32, {1});
    scalar_arena_.allocate(backend_);
}

std::vector<Parameter> GPT2::parameters() {
    require_gradients();
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < param_arena_.size(); ++i)
        list.push_back({param_arena_.name(i), param_arena_.tensor(i), grad_arena_.tensor(i),
                        decays(param_arena_.name(i))});
    return list;
}

std::vector<std::pair<std::string, Tensor>> GPT2::parameter_tensors() const {
    std::vector<std::pair<std::string, Tensor>> list;
    for (std::size_t i = 0; i < param_arena_.size(); ++i)
        list.emplace_back(param_arena_.name(i), param_arena_.tensor(i));
    return list;
}

void GPT2::init_weights(std::uint32_t seed) {
    const std::int64_t L = config_.num_layers, C = config_.channels, V = config_.vocab_size;
    const float std_ = 0.02f;
    const float residual_std = std_ * (1.0f / std::sqrt(2.0f * static_cast<float>(L)));
    Mt19937 rng(seed);
    std::vector<float> drawn;
    std::vector<bf16> rounded;
    const auto put = [&](Tensor t) {
        if (dtype_ == DType::f32) return backend_->from_host(t, drawn.data());
        rounded.resize(drawn.size());
        std::transform(drawn.begin(), drawn.end(), rounded.begin(),
                       [](float x) { return from_float<bf16>(x); });
        backend_->from_host(t, rounded.data());
    };
    const auto normal = [&](Tensor t, float std) {
        drawn.resize(static_cast<std::size_t>(t.numel()));
        rng.normal_(drawn.data(), t.numel(), 0.0f, std);
        put(t);
    };
    backend_->zero(all_parameters());
    normal(params_.wte.slice(0, V), std_);
    normal(params_.wpe, std_);
    for (std::int64_t l = 0; l < L; ++l) {
        normal(params_.qkvw[l], std_);
        normal(params_.attprojw[l], residual_std);
        normal(params_.fcw[l], std_);
        normal(params_.fcprojw[l], residual_std);
    }
    drawn.assign(static_cast<std::size_t>(L * C), 1.0f);
    put(params_.ln1w);
    put(params_.ln2w);
    drawn.resize(static_cast<std::size_t>(C));
    put(params_.lnfw);
    weights_changed();
}

// ---- forward ----

void GPT2::check_tokens(const std::int32_t* tokens, std::int64_t n, std::int64_t least) const {
    for (std::int64_t i = 0; i < n; ++i)
        LLMC_CHECK(tokens[i] >= least && tokens[i] < config_.vocab_size,
                   "token {} at position {} is outside of the vocabulary of {}", tokens[i], i,
                   config_.vocab_size);
}

// The slot of layer l: its own, or the one that all layers share.
static Tensor slot(const Tensor& t, std::int64_t l) { return t[t.shape[0] == 1 ? 0 : l]; }

void GPT2::forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T, bool training) {
    LLMC_CHECK(B > 0 && T > 0, "B is {} and T is {}, expected both positive", B, T);
    LLMC_CHECK(T <= config_.max_seq_len, "T is {}, but the model's max_seq_len is {}", T,
               config_.max_seq_len);
    check_tokens(inputs, B * T, 0);
    forward_done_ = false;  // an allocation that fails leaves nothing to go back through
    act_arena_.clear();
    declare_activations(act_arena_, acts_, config_, dtype_, B, T, recompute, classifier_rows, training);
    act_arena_.allocate(backend_);
    B_ = B, T_ = T, training_ = training, laid_out_ = recompute;
    const std::int64_t L = config_.num_layers, NH = config_.num_heads;
    Backend& ops = *backend_;
    const GPT2Tensors& p = params_;
    const GPT2Activations& a = acts_;

    ops.from_host(a.inputs, inputs);
    ops.encoder_forward(a.encoded, a.inputs, p.wte, p.wpe, Tensor());
    ops.layernorm_forward(slot(a.ln1, 0), slot(a.ln1_mean, 0), slot(a.ln1_rstd, 0), a.encoded, p.ln1w[0],
                          p.ln1b[0]);
    for (std::int64_t l = 0; l < L; ++l) {
        const Tensor x = l == 0 ? a.encoded : slot(a.residual3, l - 1);
        ops.matmul_forward(slot(a.qkv, l), slot(a.ln1, l), p.qkvw[l], p.qkvb[l]);
        ops.attention_forward(slot(a.atty, l), slot(a.lse, l), slot(a.qkv, l), NH);
        ops.matmul_forward(a.branch, slot(a.atty, l), p.attprojw[l], p.attprojb[l]);
        ops.fused_residual_layernorm_forward(slot(a.residual2, l), slot(a.ln2, l), slot(a.ln2_mean, l),
                                             slot(a.ln2_rstd, l), x, a.branch, p.ln2w[l], p.ln2b[l]);
        ops.matmul_gelu_forward(slot(a.fch_gelu, l), slot(a.fch, l), slot(a.ln2, l), p.fcw[l], p.fcb[l]);
        ops.matmul_forward(a.branch, slot(a.fch_gelu, l), p.fcprojw[l], p.fcprojb[l]);
        if (l + 1 < L)
            ops.fused_residual_layernorm_forward(
                slot(a.residual3, l), slot(a.ln1, l + 1), slot(a.ln1_mean, l + 1), slot(a.ln1_rstd, l + 1),
                slot(a.residual2, l), a.branch, p.ln1w[l + 1], p.ln1b[l + 1]);
        else
            ops.fused_residual_layernorm_forward(slot(a.residual3, l), a.lnf, a.lnf_mean, a.lnf_rstd,
                                                 slot(a.residual2, l), a.branch, p.lnfw, p.lnfb);
    }
    forward_done_ = true;
}

float GPT2::evaluate(const std::int32_t* inputs, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                     float* losses) {
    forward(inputs, B, T, false);
    forward_done_ = false;
    check_tokens(targets, B * T, std::int64_t{-1} << 31);
    const std::int64_t N = B * T, C = config_.channels, rows = acts_.logits.rows();
    const Tensor lnf = acts_.lnf.view({N, C}), all_losses = acts_.losses.view({N}),
                 all_targets = acts_.targets.view({N});
    backend_->from_host(acts_.targets, targets);
    for (std::int64_t begin = 0; begin < N; begin += rows) {
        const std::int64_t end = std::min(N, begin + rows);
        const Tensor logits = acts_.logits.slice(0, end - begin);
        backend_->matmul_forward(logits, lnf.slice(begin, end), params_.wte, Tensor());
        backend_->crossentropy_forward(all_losses.slice(begin, end), logits, all_targets.slice(begin, end),
                                       config_.vocab_size);
    }
    std::vector<float> host(static_cast<std::size_t>(N));
    backend_->to_host(host.data(), all_losses);
    if (losses) std::copy(host.begin(), host.end(), losses);
    double sum = 0.0;
    for (const float x : host) sum += x;
    return static_cast<float>(sum / static_cast<double>(N));
}

void GPT2::logits(const std::int32_t* inputs, std::int64_t B, std::int64_t T, float* out) {
    forward(inputs, B, T, false);
    forward_done_ = false;
    const std::int64_t N = B * T, V = config_.vocab_size, Vp = config_.padded_vocab_size,
                       rows = acts_.logits.rows();
    const Tensor lnf = acts_.lnf.view({N, config_.channels});
    std::vector<float> host(static_cast<std::size_t>(rows * Vp));
    std::vector<bf16> rounded(dtype_ == DType::bf16 ? host.size() : 0);
    for (std::int64_t begin = 0; begin < N; begin += rows) {
        const std::int64_t count = std::min(N - begin, rows);
        const Tensor chunk = acts_.logits.slice(0, count);
        backend_->matmul_forward(chunk, lnf.slice(begin, begin + count), params_.wte, Tensor());
        if (dtype_ == DType::bf16) {
            backend_->to_host(rounded.data(), chunk);
            std::transform(rounded.begin(), rounded.end(), host.begin(), [](bf16 x) { return to_float(x); });
        } else {
            backend_->to_host(host.data(), chunk);
        }
        for (std::int64_t r = 0; r < count; ++r) std::copy_n(host.data() + r * Vp, V, out + (begin + r) * V);
    }
}

// ---- backward ----

void GPT2::require_gradients() {
    if (!grad_arena_.allocated()) grad_arena_.allocate(backend_);
}

void GPT2::zero_grad() {
    grads_fresh_ = true;
    backend_->zero(mean_loss_);
}

void GPT2::materialize_gradients() {
    require_gradients();
    if (grads_fresh_) backend_->zero(grad_arena_.whole(grad_dtype_));
    grads_fresh_ = false;
}

float GPT2::loss() const {
    float loss;
    backend_->to_host(&loss, mean_loss_);
    return loss;
}

void GPT2::backward(const std::int32_t* targets, float scale, Comm* comm) {
    LLMC_CHECK(forward_done_ && training_, "backward() without a forward() before it");
    check_tokens(targets, B_ * T_, std::int64_t{-1} << 31);
    forward_done_ = false;
    require_gradients();
    const std::int64_t N = B_ * T_, L = config_.num_layers, C = config_.channels, NH = config_.num_heads;
    Backend& ops = *backend_;
    const GPT2Tensors &p = params_, &g = grads_;
    const GPT2Activations& a = acts_;
    const bool add = !grads_fresh_;
    if (!add)  // the products below overwrite their gradients; these few are only ever added to
        for (const Tensor& t : {g.wpe, g.ln1w, g.ln1b, g.ln2w, g.ln2b, g.lnfw, g.lnfb}) ops.zero(t);
    grads_fresh_ = false;
    const auto reduce = [comm](std::initializer_list<Tensor> complete) {
        if (comm) comm->all_reduce(complete);
    };

    // The classifier, by chunks of rows: dlnf goes into dbranch.
    const float dloss = scale / static_cast<float>(N);
    const std::int64_t rows = a.logits.rows();
    const Tensor lnf = a.lnf.view({N, C}), dlnf = a.dbranch.view({N, C});
    const Tensor losses = a.losses.view({N}), all_targets = a.targets.view({N});
    ops.from_host(a.targets, targets);
    for (std::int64_t begin = 0; begin < N; begin += rows) {
        const std::int64_t end = std::min(N, begin + rows);
        const Tensor logits = a.logits.slice(0, end - begin);
        ops.matmul_forward(logits, lnf.slice(begin, end), p.wte, Tensor());
        ops.fused_classifier(losses.slice(begin, end), logits, all_targets.slice(begin, end), dloss,
                             config_.vocab_size);
        ops.matmul_backward(dlnf.slice(begin, end), g.wte, Tensor(), logits, lnf.slice(begin, end), p.wte,
                            add || begin > 0);
    }
    ops.sum(mean_loss_, losses, dloss);

    ops.zero(a.dresidual);
    ops.layernorm_backward(a.dresidual, g.lnfw, g.lnfb, a.dbranch, slot(a.residual3, L - 1), p.lnfw,
                           a.lnf_mean, a.lnf_rstd);
    reduce({g.lnfw, g.lnfb});
    const Tensor dqkv = Tensor(a.dhidden.data, dtype_, {B_, T_, 3 * C});
    for (std::int64_t l = L - 1; l >= 0; --l) {
        const Tensor x = l == 0 ? a.encoded : slot(a.residual3, l - 1);
        const Tensor ln1 = slot(a.ln1, l), ln2 = slot(a.ln2, l), fch_gelu = slot(a.fch_gelu, l);
        if (laid_out_ >= Recompute::gelu) ops.gelu_forward(fch_gelu, a.fch[l]);
        ops.matmul_gelu_backward(a.dhidden, g.fcprojw[l], g.fcprojb[l], a.dresidual, fch_gelu, p.fcprojw[l],
                                 a.fch[l], add);
        if (laid_out_ >= Recompute::gelu_and_layernorm)
            ops.layernorm_forward(ln2, a.ln2_mean[l], a.ln2_rstd[l], a.residual2[l], p.ln2w[l], p.ln2b[l]);
        ops.matmul_backward(a.dbranch, g.fcw[l], g.fcb[l], a.dhidden, ln2, p.fcw[l], add);
        ops.layernorm_backward(a.dresidual, g.ln2w[l], g.ln2b[l], a.dbranch, a.residual2[l], p.ln2w[l],
                               a.ln2_mean[l], a.ln2_rstd[l]);
        ops.matmul_backward(a.dbranch, g.attprojw[l], g.attprojb[l], a.dresidual, a.atty[l], p.attprojw[l],
                            add);
        ops.attention_backward(dqkv, a.dbranch, a.qkv[l], a.atty[l], a.lse[l], NH);
        if (laid_out_ >= Recompute::gelu_and_layernorm)
            ops.layernorm_forward(ln1, a.ln1_mean[l], a.ln1_rstd[l], x, p.ln1w[l], p.ln1b[l]);
        ops.matmul_backward(a.dbranch, g.qkvw[l], g.qkvb[l], dqkv, ln1, p.qkvw[l], add);
        ops.layernorm_backward(a.dresidual, g.ln1w[l], g.ln1b[l], a.dbranch, x, p.ln1w[l], a.ln1_mean[l],
                               a.ln1_rstd[l]);
        reduce({g.fcprojw[l], g.fcprojb[l], g.fcw[l], g.fcb[l], g.ln2w[l], g.ln2b[l], g.attprojw[l],
                g.attprojb[l], g.qkvw[l], g.qkvb[l], g.ln1w[l], g.ln1b[l]});
    }
    ops.encoder_backward(g.wte, g.wpe, a.dresidual, a.inputs);
    reduce({g.wte, g.wpe, mean_loss_});
    if (comm) comm->wait();
}

// ---- generation ----

KVCache::KVCache(const GPT2& model, std::int64_t B, std::int64_t max_len)
    : backend_(model.backend()), B_(B), max_len_(max_len), arena_("the cache of keys and values", 256),
      work_("the activations of generation", 256) {
    const GPT2Config& c = model.config();
    LLMC_CHECK(B > 0 && B <= 1 << 24, "B is {}, expected 1 to {}", B, 1 << 24);
    LLMC_CHECK(max_len > 0 && max_len <= c.max_seq_len, "max_len is {}, but the model's max_seq_len is {}",
               max_len, c.max_seq_len);
    lengths_.assign(static_cast<std::size_t>(B), 0);
    const std::int64_t HS = c.channels / c.num_heads;
    arena_.add(kcache_, "kcache", model.dtype(), {c.num_layers, B, c.num_heads, max_len, HS});
    arena_.add(vcache_, "vcache", model.dtype(), {c.num_layers, B, c.num_heads, max_len, HS});
    arena_.allocate(backend_);
}

// T new tokens for each of the sequences [b, b + count); logits of the last token of each, on the device. T > 1
// only with count 1.
void GPT2::run_cached(KVCache& k, std::int64_t b, std::int64_t count, const std::int32_t* tokens,
                      std::int64_t T, const float* coins) {
    if (tokens) check_tokens(tokens, count * T, 0);
    for (std::int64_t i = b; i < b + count; ++i)
        LLMC_CHECK(k.length(i) + T <= k.max_len(),
                   "sequence {} has {} positions and gets {}, but the cache holds {}", i, k.length(i), T,
                   k.max_len());
    const std::int64_t L = config_.num_layers, NH = config_.num_heads, C = config_.channels;
    k.work_.clear();
    k.work_.add(k.tokens_, "tokens", DType::i32, {count, T});
    k.work_.add(k.numbers_, "numbers", DType::i32, {2, count});
    k.work_.add(k.x_, "x", dtype_, {count, T, C});
    k.work_.add(k.ln_, "ln", dtype_, {count, T, C});
    k.work_.add(k.mean_, "mean", DType::f32, {count, T});
    k.work_.add(k.rstd_, "rstd", DType::f32, {count, T});
    k.work_.add(k.qkv_, "qkv", dtype_, {count, T, 3 * C});
    k.work_.add(k.branch_, "branch", dtype_, {count, T, C});
    k.work_.add(k.residual_, "residual", dtype_, {count, T, C});
    k.work_.add(k.fch_, "fch", dtype_, {count, T, 4 * C});
    k.work_.add(k.fch_gelu_, "fch_gelu", dtype_, {count, T, 4 * C});
    k.work_.add(k.logits_, "logits", DType::f32, {count, config_.padded_vocab_size});
    k.work_.allocate(backend_);
    k.start_ = k.numbers_[0];
    k.coins_ = Tensor(k.numbers_[1].data, DType::f32, {count});
    k.host_numbers_.assign(static_cast<std::size_t>(2 * count), 0);
    std::copy_n(k.lengths_.data() + b, count, k.host_numbers_.data());
    if (coins)
        std::memcpy(k.host_numbers_.data() + count, coins, static_cast<std::size_t>(count) * sizeof(float));

    Backend& ops = *backend_;
    const GPT2Tensors& p = params_;
    k.chosen_ = false;
    if (tokens) ops.from_host(k.tokens_, tokens);  // else they lie there
    ops.from_host(k.numbers_, k.host_numbers_.data());
    ops.encoder_forward(k.x_, k.tokens_, p.wte, p.wpe, k.start_);
    ops.layernorm_forward(k.ln_, k.mean_, k.rstd_, k.x_, p.ln1w[0], p.ln1b[0]);
    for (std::int64_t l = 0; l < L; ++l) {
        ops.matmul_forward(k.qkv_, k.ln_, p.qkvw[l], p.qkvb[l]);
        ops.attention_decode(k.ln_, k.kcache_[l].slice(b, b + count), k.vcache_[l].slice(b, b + count),
                             k.qkv_, k.start_, NH);
        ops.matmul_forward(k.branch_, k.ln_, p.attprojw[l], p.attprojb[l]);
        ops.fused_residual_layernorm_forward(k.residual_, k.ln_, k.mean_, k.rstd_, k.x_, k.branch_, p.ln2w[l],
                                             p.ln2b[l]);
        ops.matmul_gelu_forward(k.fch_gelu_, k.fch_, k.ln_, p.fcw[l], p.fcb[l]);
        ops.matmul_forward(k.branch_, k.fch_gelu_, p.fcprojw[l], p.fcprojb[l]);
        const Tensor w = l + 1 < L ? p.ln1w[l + 1] : p.lnfw, bias = l + 1 < L ? p.ln1b[l + 1] : p.lnfb;
        ops.fused_residual_layernorm_forward(k.x_, k.ln_, k.mean_, k.rstd_, k.residual_, k.branch_, w, bias);
    }
    const Tensor last =
        k.ln_.view({count * T, C}).slice((T - 1) * count, count * T);  // T == 1, or one sequence
    ops.matmul_forward(k.logits_, last, p.wte, Tensor());
    for (std::int64_t i = b; i < b + count; ++i)
        k.lengths_[static_cast<std::size_t>(i)] += static_cast<std::int32_t>(T);
}

void GPT2::cached_logits(KVCache& k, float* out) {
    const std::int64_t V = config_.vocab_size, Vp = config_.padded_vocab_size;
    k.host_logits_.resize(static_cast<std::size_t>(k.logits_.numel()));
    backend_->to_host(k.host_logits_.data(), k.logits_);
    for (std::int64_t i = 0; i < k.logits_.rows(); ++i)
        std::copy_n(k.host_logits_.data() + i * Vp, V, out + i * V);
}

void GPT2::prefill(KVCache& cache, std::int64_t b, const std::int32_t* tokens, std::int64_t count,
                   float* logits) {
    LLMC_CHECK(b >= 0 && b < cache.B(), "sequence {} of {}", b, cache.B());
    LLMC_CHECK(count > 0, "no tokens to put into the cache");
    run_cached(cache, b, 1, tokens, count);
    cached_logits(cache, logits);
}

void GPT2::decode(KVCache& cache, const std::int32_t* tokens, float* logits) {
    run_cached(cache, 0, cache.B(), tokens, 1);
    cached_logits(cache, logits);
}

void GPT2::queue_tokens(KVCache& k, const std::int32_t* tokens, const float* coins,
                        const SamplerOptions& options) {
    check_sampler(config_.vocab_size, options);
    LLMC_CHECK(tokens || k.chosen_, "no tokens to go on from: the cache was used for something else");
    LLMC_CHECK(k.queued_ - k.read_ < 2, "two steps are queued already: read_tokens() comes first");
    run_cached(k, 0, k.B(), tokens, 1, coins);
    const Tensor chosen = k.tokens_.view({k.B()});
    backend_->sample(chosen, k.logits_, k.coins_, config_.vocab_size, options);
    std::unique_ptr<Readback>& readback = k.readbacks_[k.queued_ % 2];
    if (!readback) readback = backend_->make_readback(static_cast<std::size_t>(chosen.bytes()));
    readback->queue(chosen);
    k.chosen_ = true;
    ++k.queued_;
}

void GPT2::read_tokens(KVCache& k, std::int32_t* out) {
    LLMC_CHECK(k.queued_ > k.read_, "no step is queued");
    k.readbacks_[k.read_ % 2]->wait(out);
    ++k.read_;
}

}  // namespace llmc
