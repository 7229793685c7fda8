#include "model/model.h"

namespace llmc {

Model::Model(ParameterTable table, std::shared_ptr<Backend> backend, const ModelOptions& options)
    : backend_(std::move(backend)), options_(options), table_(std::move(table)), values_(table_.size()),
      gradients_(table_.size()), param_arena_("parameters", 1), grad_arena_("parameter gradients", 1),
      scalar_arena_("scalars", 256) {
    options_.validate();
    for (std::size_t i = 0; i < table_.size(); ++i) {
        param_arena_.add(values_[i], table_[i].name, options_.dtype, table_[i].shape);
        grad_arena_.add(gradients_[i], table_[i].name, options_.grad_dtype, table_[i].shape);
    }
    param_arena_.allocate(backend_);
    scalar_arena_.add(mean_loss_, "mean_loss", DType::f32, {1});
    scalar_arena_.allocate(backend_);
}

void Model::init_weights(std::uint32_t seed) {
    init_parameters(*backend_, table_, values_, seed);
    weights_changed();
}

void Model::zero_grad() {
    grads_fresh_ = true;
    backend_->zero(mean_loss_);
}

float Model::loss() const {
    float loss;
    backend_->to_host(&loss, mean_loss_);
    return loss;
}

std::vector<Parameter> Model::parameters() {
    gradients();
    std::vector<Parameter> list;
    for (std::size_t i = 0; i < table_.size(); ++i)
        list.push_back({table_[i].name, values_[i], gradients_[i], table_[i].decay});
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

std::vector<Tensor> Model::layer_gradients(std::int64_t l) {
    std::vector<Tensor> list;
    for (std::size_t i = 0; i < table_.size(); ++i)
        if (table_[i].per_layer) list.push_back(gradients()[i][l]);
    return list;
}

void Model::materialize_gradients() {
    gradients();
    if (!begin_adding()) backend_->zero(grad_arena_.whole(grad_dtype()));
}

}  // namespace llmc
