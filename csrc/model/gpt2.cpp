// The whole of GPT-2, forward and backward, over the ops of a Backend.
//
// A block: x -> x + attproj(attention(qkv(ln1(x)))) -> . + fcproj(gelu(fc(ln2(.)))). The addition to the
// residual stream and the layernorm that follows it are one op, so the layernorm at a block's end is already
// the next block's ln1, or lnf. What comes after lnf, the classifier, is the same in every family: model.cpp.
#include "model/gpt2.h"

#include <algorithm>
#include <bit>
#include <exception>
#include <iterator>
#include <utility>

namespace llmc {

// ---- tables ----

GPT2Tensors::GPT2Tensors(const ParameterTable& table, const std::vector<Tensor>& tensors) {
    const std::pair<const char*, Tensor*> slots[] = {
        {"wte", &wte},         {"wpe", &wpe},         {"ln1w", &ln1w},         {"ln1b", &ln1b},
        {"qkvw", &qkvw},       {"qkvb", &qkvb},       {"attprojw", &attprojw}, {"attprojb", &attprojb},
        {"ln2w", &ln2w},       {"ln2b", &ln2b},       {"fcw", &fcw},           {"fcb", &fcb},
        {"fcprojw", &fcprojw}, {"fcprojb", &fcprojb}, {"lnfw", &lnfw},         {"lnfb", &lnfb}};
    LLMC_CHECK(table.size() == std::size(slots), "the table has {} parameters, the schedule {}", table.size(),
               std::size(slots));
    for (std::size_t i = 0; i < table.size(); ++i) {
        LLMC_CHECK(table[i].name == slots[i].first, "parameter {} is '{}' in the table, '{}' in the schedule",
                   i, table[i].name, slots[i].first);
        *slots[i].second = tensors[i];
    }
}

// Without training, layers share one slot: only the residual stream goes from layer to layer.
void GPT2::declare_activations(Arena& arena, GPT2Activations& a, const GPT2Config& config,
                               const ModelOptions& options, std::int64_t B, std::int64_t T, bool training) {
    const DType dtype = options.dtype;
    const std::int64_t C = config.channels, NH = config.num_heads;
    const std::int64_t L = training ? config.num_layers : 1;
    const std::int64_t L_gelu = options.recompute >= Recompute::gelu ? 1 : L;
    const std::int64_t L_ln = options.recompute >= Recompute::gelu_and_layernorm ? 1 : L;
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
              {std::min(B * T, options.classifier_rows), config.padded_vocab_size});
    arena.add(a.losses, "losses", DType::f32, {B, T});
    if (!training) return;
    arena.add(a.dresidual, "dresidual", dtype, {B, T, C});
    arena.add(a.dbranch, "dbranch", dtype, {B, T, C});
    arena.add(a.dhidden, "dhidden", dtype, {B, T, 4 * C});
}

MemoryPlan GPT2::memory_plan(const GPT2Config& config, const ModelOptions& options, std::int64_t B,
                             std::int64_t T, bool training, std::int64_t optimizer_bytes,
                             bool micro_gradients) {
    config.validate();
    options.validate();
    LLMC_CHECK(B > 0 && T > 0 && B <= (std::int64_t{1} << 30) / T, "B {} times T {} is out of range", B, T);
    LLMC_CHECK(optimizer_bytes >= 0, "optimizer_bytes is {}, expected 0 or more", optimizer_bytes);
    GPT2Activations activations;
    Arena acts("", 256);
    declare_activations(acts, activations, config, options, B, T, training);
    const std::int64_t N = count_parameters(gpt2_parameters(config));
    const std::int64_t copies = training ? 1 + micro_gradients : 0;
    return {N * size_of(options.dtype), copies * N * size_of(options.grad_dtype),
            training ? optimizer_bytes : 0, acts.bytes()};
}

GPT2::GPT2(const GPT2Config& config, std::shared_ptr<Backend> backend, const ModelOptions& options)
    : Model(gpt2_parameters(config), std::move(backend), options), config_(config),
      params_(table(), values()), act_arena_("activations", 256) {}

// ---- forward ----

// The slot of layer l: its own, or the one that all layers share.
static Tensor slot(const Tensor& t, std::int64_t l) { return t[t.shape[0] == 1 ? 0 : l]; }

void GPT2::forward(const std::int32_t* inputs, std::int64_t B, std::int64_t T, bool training) {
    LLMC_CHECK(B > 0 && T > 0, "B is {} and T is {}, expected both positive", B, T);
    LLMC_CHECK(T <= config_.max_seq_len, "T is {}, but the model's max_seq_len is {}", T,
               config_.max_seq_len);
    check_tokens(inputs, B * T, config_.vocab_size);
    activations_done_ = forward_done_ = false;  // an allocation that fails leaves nothing to go back through
    act_arena_.clear();
    declare_activations(act_arena_, acts_, config_, options(), B, T, training);
    act_arena_.allocate(backend());
    B_ = B, T_ = T;
    backend()->from_host(acts_.inputs, inputs);
    if (arrivals()->any())  // which queue_forward() waits for
        queue_forward();
    else
        backend()->repeat(recorded_forward_, Phase::training, {B, T, training}, [&] { queue_forward(); });
    activations_done_ = forward_done_ = training;
}

// From the inputs on the device.
void GPT2::queue_forward() {
    const std::int64_t L = config_.num_layers, NH = config_.num_heads;
    Backend& ops = *backend();
    const GPT2Tensors& p = params_;
    const GPT2Activations& a = acts_;

    arrivals()->wait(0);
    ops.encoder_forward(a.encoded, a.inputs, p.wte, p.wpe, Tensor());
    arrivals()->wait(1);
    // Only the first block's ln1 stands alone: every later layernorm comes with the addition before it.
    ops.layernorm_forward(slot(a.ln1, 0), slot(a.ln1_mean, 0), slot(a.ln1_rstd, 0), a.encoded, p.ln1w[0],
                          p.ln1b[0]);
    for (std::int64_t l = 0; l < L; ++l) {
        const Tensor x = l == 0 ? a.encoded : slot(a.residual3, l - 1);  // the residual stream so far
        // Attention. Of the scores only their log-sum-exp is kept.
        ops.matmul_forward(slot(a.qkv, l), slot(a.ln1, l), p.qkvw[l], p.qkvb[l]);
        ops.attention_forward(slot(a.atty, l), slot(a.lse, l), slot(a.qkv, l), NH);
        // What a half of the block adds to the stream goes through `branch`, which no backward pass needs.
        ops.matmul_forward(a.branch, slot(a.atty, l), p.attprojw[l], p.attprojb[l]);
        ops.fused_residual_layernorm_forward(slot(a.residual2, l), slot(a.ln2, l), slot(a.ln2_mean, l),
                                             slot(a.ln2_rstd, l), x, a.branch, p.ln2w[l], p.ln2b[l]);
        // The MLP. fch, before GELU, is kept for each layer; fch_gelu and the layernorms may share a slot.
        ops.matmul_gelu_forward(slot(a.fch_gelu, l), slot(a.fch, l), slot(a.ln2, l), p.fcw[l], p.fcb[l]);
        ops.matmul_forward(a.branch, slot(a.fch_gelu, l), p.fcprojw[l], p.fcprojb[l]);
        arrivals()->wait(l + 2);
        if (l + 1 < L)
            ops.fused_residual_layernorm_forward(
                slot(a.residual3, l), slot(a.ln1, l + 1), slot(a.ln1_mean, l + 1), slot(a.ln1_rstd, l + 1),
                slot(a.residual2, l), a.branch, p.ln1w[l + 1], p.ln1b[l + 1]);
        else
            ops.fused_residual_layernorm_forward(slot(a.residual3, l), a.lnf, a.lnf_mean, a.lnf_rstd,
                                                 slot(a.residual2, l), a.branch, p.lnfw, p.lnfb);
    }
}

std::vector<std::pair<std::string, Tensor>> GPT2::activations() const {
    if (!activations_done_)
        throw Error(
            "there are no activations: forward(inputs) computes them; evaluate() and logits() keep none");
    const GPT2Activations& a = acts_;
    std::vector<std::pair<std::string, Tensor>> list = {{"encoded", a.encoded},   {"ln1", a.ln1},
                                                        {"ln1_mean", a.ln1_mean}, {"ln1_rstd", a.ln1_rstd},
                                                        {"qkv", a.qkv},           {"atty", a.atty},
                                                        {"lse", a.lse},           {"residual2", a.residual2},
                                                        {"ln2", a.ln2},           {"ln2_mean", a.ln2_mean},
                                                        {"ln2_rstd", a.ln2_rstd}, {"fch", a.fch},
                                                        {"fch_gelu", a.fch_gelu}, {"residual3", a.residual3},
                                                        {"lnf", a.lnf},           {"lnf_mean", a.lnf_mean},
                                                        {"lnf_rstd", a.lnf_rstd}};
    // What backward computes again has one slot, which all layers share.
    const Recompute level = options().recompute;
    std::erase_if(list, [level](const auto& item) {
        return (level >= Recompute::gelu && item.first == "fch_gelu") ||
               (level >= Recompute::gelu_and_layernorm && (item.first == "ln1" || item.first == "ln2"));
    });
    return list;
}

// ---- backward ----

void GPT2::backward(const std::int32_t* targets, float scale, GradientSink* sink) {
    LLMC_CHECK(forward_done_, "backward() without a forward() before it");
    LLMC_CHECK(!sink || &sink->backend() == backend().get(),
               "the gradient sink is of another backend than the model");
    check_tokens(targets, B_ * T_, config_.vocab_size, kAnyNegative);
    forward_done_ = false;
    gradients();  // are there from now on
    // Until end_backward() the gradients are incomplete.
    const Adding adding = !begin_adding()              ? Adding::none
                          : adds_whole_micro_batches() ? Adding::whole
                                                       : Adding::each;
    if (adding == Adding::whole) micro_gradients();
    backend()->from_host(acts_.targets, targets);
    if (sink) {  // which sends gradients in between
        try {
            queue_backward(scale, adding, sink);
            sink->finish(mean_loss());
        } catch (const std::exception& e) {
            sink->failed(e.what());
            throw;
        }
    } else {
        backend()->repeat(recorded_backward_[static_cast<int>(adding)], Phase::training,
                          {B_, T_, std::bit_cast<std::int32_t>(scale)},
                          [&] { queue_backward(scale, adding, nullptr); });
    }
    end_backward();
}

// From the targets on the device.
void GPT2::queue_backward(float scale, Adding adding, GradientSink* sink) {
    const std::int64_t L = config_.num_layers, C = config_.channels, NH = config_.num_heads;
    Backend& ops = *backend();
    const GPT2Tensors& p = params_;
    const bool whole = adding == Adding::whole, add = adding == Adding::each;
    const GPT2Tensors g(table(), whole ? micro_gradients() : gradients());
    const GPT2Activations& a = acts_;
    // Parameters' gradients add up over micro-steps. The first after zero_grad(), and those whose gradients are added
    // as a whole, need not read what is there: matmuls overwrite (`add` false), and the gradients that other ops only
    // ever add to are zeroed here.
    if (!add)
        for (const Tensor& t : {g.wpe, g.ln1w, g.ln1b, g.ln2w, g.ln2b, g.lnfw, g.lnfb, g.attprojb, g.fcprojb})
            ops.zero(t);

    // Activations' gradients live in three buffers, which all layers share:
    //   dresidual (C)   of the residual stream. It flows down past every block unchanged, and the backward of
    //                   each layernorm adds what comes through the branch behind it.
    //   dbranch (C)     of a layernorm's output, or of attention's. Overwritten by each matmul's backward.
    //   dhidden (4C)    of the MLP's hidden layer.
    // dqkv (3C) reuses dhidden (4C), free after fc's backward.
    // A layernorm's backward also sums dresidual's columns: the bias gradient of the linear layer below, whose
    // output was added to the stream there. So matmuls that take dresidual as dout need not.
    const Tensor dqkv = a.dhidden.prefix({B_, T_, 3 * C});

    // The classifier, by chunks of rows. Its input gradient dlnf goes into dbranch, which no layer needs yet.
    classifier_backward(a.dbranch, g.wte, scale, add);

    // The final layernorm adds to dresidual, so that begins as zero.
    ops.zero(a.dresidual);
    ops.layernorm_backward(a.dresidual, g.lnfw, g.lnfb, g.fcprojb[L - 1], a.dbranch, slot(a.residual3, L - 1),
                           p.lnfw, a.lnf_mean, a.lnf_rstd);
    for (std::int64_t l = L - 1; l >= 0; --l) {
        const Tensor x = l == 0 ? a.encoded : slot(a.residual3, l - 1);  // the block's input
        const Tensor ln1 = slot(a.ln1, l), ln2 = slot(a.ln2, l), fch_gelu = slot(a.fch_gelu, l);

        // fcproj and GELU. At level 1 all layers share the slot of fch_gelu, which holds another layer's.
        if (options().recompute >= Recompute::gelu) ops.gelu_forward(fch_gelu, a.fch[l]);
        // dresidual is also the gradient of what the MLP added to the stream. dhidden is overwritten with the
        // gradient before GELU.
        ops.matmul_gelu_backward(a.dhidden, g.fcprojw[l], Tensor(), a.dresidual, fch_gelu, p.fcprojw[l],
                                 a.fch[l], add);

        // fc. At level 2 the layernorms' outputs share slots as well; their mean and rstd were kept, and are
        // written again with the same values.
        if (options().recompute >= Recompute::gelu_and_layernorm)
            ops.layernorm_forward(ln2, a.ln2_mean[l], a.ln2_rstd[l], a.residual2[l], p.ln2w[l], p.ln2b[l]);
        ops.matmul_backward(a.dbranch, g.fcw[l], g.fcb[l], a.dhidden, ln2, p.fcw[l], add);  // dbranch = dln2
        // From here on dresidual is the gradient of residual2: the stream's, and what came through the MLP.
        ops.layernorm_backward(a.dresidual, g.ln2w[l], g.ln2b[l], g.attprojb[l], a.dbranch, a.residual2[l],
                               p.ln2w[l], a.ln2_mean[l], a.ln2_rstd[l]);

        // attproj, attention and qkv. dbranch is datty first, then dln1; in between dqkv takes dhidden's
        // place.
        ops.matmul_backward(a.dbranch, g.attprojw[l], Tensor(), a.dresidual, a.atty[l], p.attprojw[l], add);
        ops.attention_backward(dqkv, a.dbranch, a.qkv[l], a.atty[l], a.lse[l], NH);
        if (options().recompute >= Recompute::gelu_and_layernorm)
            ops.layernorm_forward(ln1, a.ln1_mean[l], a.ln1_rstd[l], x, p.ln1w[l], p.ln1b[l]);
        ops.matmul_backward(a.dbranch, g.qkvw[l], g.qkvb[l], dqkv, ln1, p.qkvw[l], add);
        // And from here on dresidual is the gradient of the block's input, for the block below.
        ops.layernorm_backward(a.dresidual, g.ln1w[l], g.ln1b[l], l > 0 ? g.fcprojb[l - 1] : Tensor(),
                               a.dbranch, x, p.ln1w[l], a.ln1_mean[l], a.ln1_rstd[l]);
        complete(1 + l, whole, sink);
    }

    // The embeddings come last. wte is the classifier's matrix too, so its gradient is complete only now.
    ops.encoder_backward(g.wte, g.wpe, a.dresidual, a.inputs);
    complete(0, whole, sink);
}

}  // namespace llmc
