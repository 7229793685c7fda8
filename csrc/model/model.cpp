// What is the same in every family. Logits exist only by chunks of rows: in training these go through the
// softmax, its gradient and both matmuls of the classifier's backward before the next chunk is computed.
#include "model/model.h"

#include <algorithm>

namespace llmc {

Model::Model(ParameterTable table, std::shared_ptr<Backend> backend, const ModelOptions& options)
    : backend_(std::move(backend)), options_(options), table_(std::move(table)), values_(table_.size()),
      gradients_(table_.size()), micro_gradients_(table_.size()), param_arena_("parameters", 1),
      grad_arena_("parameter gradients", 1), micro_arena_("the gradients of a micro-batch", 1),
      scalar_arena_("scalars", 256) {
    options_.validate();
    for (std::size_t i = 0; i < table_.size(); ++i) {
        param_arena_.add(values_[i], table_[i].name, options_.dtype, table_[i].shape);
        grad_arena_.add(gradients_[i], table_[i].name, options_.grad_dtype, table_[i].shape);
        micro_arena_.add(micro_gradients_[i], table_[i].name, options_.grad_dtype, table_[i].shape);
    }
    param_arena_.allocate(backend_);
    scalar_arena_.add(mean_loss_, "mean_loss", DType::f32, {1});
    scalar_arena_.allocate(backend_);
}

// ---- the classifier ----

void check_tokens(const std::int32_t* tokens, std::int64_t n, std::int64_t vocab_size, std::int64_t lowest) {
    for (std::int64_t i = 0; i < n; ++i)
        LLMC_CHECK(tokens[i] >= lowest && tokens[i] < vocab_size,
                   "token {} at position {} is outside of the vocabulary of {}", tokens[i], i, vocab_size);
}

float Model::evaluate(const std::int32_t* inputs, const std::int32_t* targets, std::int64_t B, std::int64_t T,
                      float* losses) {
    forward(inputs, B, T, false);
    check_tokens(targets, B * T, vocab_size(), kAnyNegative);
    const Classifier c = classifier();
    const std::int64_t N = B * T, C = c.lnf.cols(), rows = c.logits.rows();
    const Tensor lnf = c.lnf.view({N, C}), all_losses = c.losses.view({N}), all_targets = c.targets.view({N});
    backend()->from_host(c.targets, targets);
    for (std::int64_t begin = 0; begin < N; begin += rows) {
        const std::int64_t end = std::min(N, begin + rows);
        const Tensor logits = c.logits.slice(0, end - begin);
        backend()->matmul_forward(logits, lnf.slice(begin, end), c.weight, Tensor());
        backend()->crossentropy_forward(all_losses.slice(begin, end), logits, all_targets.slice(begin, end),
                                        vocab_size());
    }
    std::vector<float> host(static_cast<std::size_t>(N));
    backend()->to_host(host.data(), all_losses);
    if (losses) std::copy(host.begin(), host.end(), losses);
    double sum = 0.0;
    for (const float x : host) sum += x;
    return static_cast<float>(sum / static_cast<double>(N));
}

void Model::logits(const std::int32_t* inputs, std::int64_t B, std::int64_t T, float* out) {
    forward(inputs, B, T, false);
    const Classifier c = classifier();
    const std::int64_t N = B * T, V = vocab_size(), Vp = c.logits.cols(), rows = c.logits.rows();
    const Tensor lnf = c.lnf.view({N, c.lnf.cols()});
    std::vector<float> host(static_cast<std::size_t>(rows * Vp));
    std::vector<bf16> rounded(dtype() == DType::bf16 ? host.size() : 0);
    for (std::int64_t begin = 0; begin < N; begin += rows) {
        const std::int64_t count = std::min(N - begin, rows);
        const Tensor chunk = c.logits.slice(0, count);
        backend()->matmul_forward(chunk, lnf.slice(begin, begin + count), c.weight, Tensor());
        if (dtype() == DType::bf16) {
            backend()->to_host(rounded.data(), chunk);
            std::transform(rounded.begin(), rounded.end(), host.begin(), [](bf16 x) { return to_float(x); });
        } else {
            backend()->to_host(host.data(), chunk);
        }
        for (std::int64_t r = 0; r < count; ++r) std::copy_n(host.data() + r * Vp, V, out + (begin + r) * V);
    }
}

void Model::classifier_backward(const Tensor& dlnf, const Tensor& dweight, float scale, bool add) {
    const Classifier c = classifier();
    const std::int64_t N = c.targets.numel(), C = c.lnf.cols(), rows = c.logits.rows();
    const float dloss = scale / static_cast<float>(N);
    const Tensor lnf = c.lnf.view({N, C}), all_dlnf = dlnf.view({N, C});
    const Tensor losses = c.losses.view({N}), all_targets = c.targets.view({N});
    Backend& ops = *backend();
    // Backward computes the logits for the first time: forward stopped before them. In each chunk
    // fused_classifier turns the logits into their gradient, in place.
    for (std::int64_t begin = 0; begin < N; begin += rows) {
        const std::int64_t end = std::min(N, begin + rows);
        const Tensor logits = c.logits.slice(0, end - begin);
        ops.matmul_forward(logits, lnf.slice(begin, end), c.weight, Tensor());
        ops.fused_classifier(losses.slice(begin, end), logits, all_targets.slice(begin, end), dloss,
                             vocab_size());
        // The matrix's gradient adds up over the chunks, so only the first of them may overwrite it.
        ops.matmul_backward(all_dlnf.slice(begin, end), dweight, Tensor(), logits, lnf.slice(begin, end),
                            c.weight, add || begin > 0);
    }
    ops.sum(mean_loss(), losses, dloss);
}

// ---- parameters and gradients ----

void Model::init_weights(std::uint32_t seed) {
    arrivals_->wait();
    init_parameters(*backend_, table_, values_, seed);
    weights_changed();
}

bool Model::begin_adding() {
    LLMC_CHECK(grads_complete_, "the last backward() failed half-way: call zero_grad() before going on");
    grads_complete_ = false;
    return !std::exchange(grads_fresh_, false);
}

void Model::zero_grad() {
    grads_fresh_ = grads_complete_ = true;
    has_loss_ = false;
    backend_->zero(mean_loss_);
}

float Model::loss() const {
    if (!grads_complete_) throw Error("there is no loss: the last backward() failed half-way");
    if (!has_loss_)
        throw Error("there is no loss: backward(targets) computes it, and none came after zero_grad(); "
                    "evaluate(inputs, targets) returns one without gradients");
    float loss;
    backend_->to_host(&loss, mean_loss_);
    return loss;
}

std::vector<Parameter> Model::parameters() {
    gradients();
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < table_.size(); ++i)
        list.push_back({table_[i].name, values_[i], gradients_[i], table_[i].decay,
                        table_[i].per_layer ? table_[i].shape[0] : 1, first_unit(i), table_[i].matrices});
    return list;
}

std::vector<std::pair<std::string, Tensor>> Model::parameter_tensors() const {
    std::vector<std::pair<std::string, Tensor>> list;
    for (std::size_t i = 0; i < table_.size(); ++i) list.emplace_back(table_[i].name, values_[i]);
    return list;
}

const std::vector<Tensor>& Model::gradients() {
    if (!grad_arena_.allocated()) grad_arena_.allocate(backend_);
    return gradients_;
}

bool Model::adds_whole_micro_batches() const {
    return backend_->adds_in_rank_order() && grad_dtype() == DType::f32;
}

const std::vector<Tensor>& Model::micro_gradients() {
    if (!micro_arena_.allocated()) micro_arena_.allocate(backend_);
    return micro_gradients_;
}

void Model::complete(std::int64_t unit, bool micro, GradientSink* sink) {
    if (!micro && !sink) return;
    const std::vector<Tensor> sums = of_unit(gradients(), unit);
    if (micro) {
        const std::vector<Tensor> added = of_unit(micro_gradients(), unit);
        for (std::size_t i = 0; i < sums.size(); ++i) backend_->residual_forward(sums[i], sums[i], added[i]);
    }
    if (sink) sink->ready(sums);
}

// What stands before the layers in the table is of unit 0; layer l is of unit 1 + l; the rest belongs to the last layer.
std::int64_t Model::first_unit(std::size_t i) const {
    if (table_[i].per_layer) return 1;
    std::int64_t unit = 0;
    for (std::size_t k = 0; k < i; ++k)
        if (table_[k].per_layer) unit = table_[k].shape[0];
    return unit;
}

std::vector<Tensor> Model::of_unit(const std::vector<Tensor>& tensors, std::int64_t unit) const {
    std::vector<Tensor> list;
    for (std::size_t i = 0; i < table_.size(); ++i) {
        const std::int64_t layer = unit - first_unit(i);
        if (table_[i].per_layer && layer >= 0 && layer < table_[i].shape[0])
            list.push_back(tensors[i][layer]);
        else if (!table_[i].per_layer && layer == 0)
            list.push_back(tensors[i]);
    }
    return list;
}

void Model::materialize_gradients() {
    gradients();
    if (!begin_adding()) backend_->zero(grad_arena_.whole(grad_dtype()));
    end_adding();
}

}  // namespace llmc
