#include "optim/optimizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace llmc {

static bool has_master(DType dtype, bool master_weights) { return dtype == DType::bf16 && master_weights; }

void OptimizerOptions::validate() const {
    LLMC_CHECK(!std::isnan(grad_clip), "grad_clip is {}", grad_clip);
    LLMC_CHECK(seed != 0, "seed is 0, which xorshift cannot leave");
}

// Elements [begin, end) of a tensor, flat.
static Tensor elements(const Tensor& t, Range range) {
    return t.view({t.numel()}).slice(range.begin, range.end);
}

Optimizer::Optimizer(std::shared_ptr<Backend> backend, std::vector<Parameter> parameters,
                     const OptimizerOptions& options, Treatment (*treatment)(const Parameter&),
                     Sharding sharding)
    : backend_(std::move(backend)), parameters_(std::move(parameters)), norm_(backend_, options.grad_clip),
      rng_{options.seed}, sharding_(std::move(sharding)), state_(parameters_.size()),
      arena_("the optimizer's moments and master weights", 256),
      scratch_arena_("a layer of the optimizer's state", 256) {
    const int rank = sharding_.comm ? sharding_.comm->rank() : 0;
    const int size = sharding_.comm ? sharding_.comm->size() : 1;
    if (sharding_.comm) {
        LLMC_CHECK(sharding_.arrivals != nullptr, "an optimizer among ranks needs the model's Arrivals");
        LLMC_CHECK(&sharding_.comm->backend() == backend_.get(),
                   "the Comm is of another backend than the model");
        std::vector<bool> whole;
        for (const Parameter& p : parameters_) whole.push_back(treatment(p).whole);
        partition_ = std::make_shared<Partition>(parameters_, whole, size);
    }
    for (std::size_t i = 0; i < state_.size(); ++i) {
        const Parameter& p = parameters_[i];
        State& s = state_[i];
        s.name = p.name;
        s.layer_numel = p.value.numel() / p.layers;
        std::int64_t kept = 0;
        for (std::int64_t l = 0; l < p.layers; ++l) {
            s.layers.push_back({piece_of(s.layer_numel, rank, size, owner(i, l)), kept});
            kept += s.layers.back().piece.size();
        }
        s.moments.resize(static_cast<std::size_t>(treatment(p).moments));
        for (Tensor& moment : s.moments) arena_.add(moment, "moment", DType::f32, {kept});
        if (has_master(p.value.dtype, options.master_weights))
            arena_.add(s.master, "master", DType::i16, {kept});
    }
    arena_.allocate(backend_);
    // A master of zero bits is the weight that the bf16 parameter stands for: nothing to initialise.
    for (std::size_t i = 0; i < state_.size(); ++i) plan(i);
}

// Adds what is to be measured, updated and sent of a parameter.
void Optimizer::plan(std::size_t i) {
    const Parameter& p = parameters_[i];
    const State& s = state_[i];
    // Elements of the parameter and, `kept` of its state, as a part of the update.
    const auto add_part = [&](std::vector<Part>& parts, Range range, Range kept) {
        Part part{i, range.begin, elements(p.value, range), elements(p.grad, range), Tensor(), {}};
        if (s.master) part.master = elements(s.master, kept);
        for (const Tensor& moment : s.moments) part.moments.push_back(elements(moment, kept));
        parts.push_back(std::move(part));
    };
    for (std::int64_t l = 0; l < p.layers; ++l) {
        const Kept& kept = s.layers[static_cast<std::size_t>(l)];
        const std::int64_t begin = l * s.layer_numel;
        const Range own{begin + kept.piece.begin, begin + kept.piece.end};
        if (own.size() > 0) measured_gradients_.push_back(elements(p.grad, own));
        if (!sharded()) continue;
        Group& group = group_of(p.first_unit + l);
        if (own.size() > 0) add_part(group.parts, own, kept.range());
        group.values.emplace_back(elements(p.value, {begin, begin + s.layer_numel}), owner(i, l));
    }
    if (!sharded()) {
        Group& group = group_of(0);
        add_part(group.parts, {0, p.value.numel()}, {0, p.value.numel()});
        group.values.emplace_back(p.value);
    }
}

// Groups are in the order of their units, which is that in which forward() needs them.
Optimizer::Group& Optimizer::group_of(std::int64_t unit) {
    auto at = groups_.begin();
    while (at != groups_.end() && at->unit < unit) ++at;
    if (at == groups_.end() || at->unit != unit) at = groups_.insert(at, Group{unit, {}, {}});
    return *at;
}

Optimizer::~Optimizer() {
    if (!sharded()) return;
    try {
        sharding_.arrivals->wait();  // weights must not arrive in memory that is gone
    } catch (...) {                  // a rank was lost: nothing arrives any more
    }
}

std::int64_t Optimizer::bytes_per_parameter(DType dtype, bool master_weights, int moments) {
    return moments * size_of(DType::f32) + (has_master(dtype, master_weights) ? size_of(DType::i16) : 0);
}

void Optimizer::measure() {
    norm_.sum_squares(measured_gradients_);
    if (sharded()) sharding_.comm->wait(sharding_.comm->all_reduce({norm_.squared()}));
    norm_.finish();
    measured_ = has_norm_ = true;
}

float Optimizer::norm() const {
    if (!has_norm_) throw Error("no gradients were measured yet, by step() or measure()");
    return norm_.value();
}

void Optimizer::apply(float lr) {
    LLMC_CHECK(measured_, "apply() without a measure() before it");
    measured_ = false;
    begin_update(lr);
    if (sharded()) sharding_.arrivals->wait();
    for (const Group& group : groups_) {
        update_parts(group.parts);
        for (const Divided& value : group.values) backend_->weights_changed(value.tensor);
        if (sharded())
            sharding_.arrivals->expect(group.unit, sharding_.comm, sharding_.comm->all_gather(group.values));
    }
    ++step_count_;
}

Tensor Optimizer::gather(std::size_t parameter, std::size_t kind, std::int64_t layer) {
    const Tensor own = own_state(parameter, kind, layer);
    if (!sharded()) return own;
    const Tensor whole = scratch(own.dtype, state_[parameter].layer_numel);
    backend_->copy(elements(whole, kept(parameter, layer).piece), own);
    sharding_.comm->wait(sharding_.comm->all_gather({{whole, owner(parameter, layer)}}));
    return whole;
}

void Optimizer::scatter(std::size_t parameter, std::size_t kind, std::int64_t layer, const void* values) {
    const Tensor own = own_state(parameter, kind, layer);
    LLMC_CHECK(values || (sharded() && sharding_.comm->rank() != 0), "no values to scatter");
    if (!sharded()) return backend_->from_host(own, values);
    const Tensor whole = scratch(own.dtype, state_[parameter].layer_numel);
    if (sharding_.comm->rank() == 0) backend_->from_host(whole, values);
    sharding_.comm->wait(sharding_.comm->broadcast({whole}, 0));
    backend_->copy(own, elements(whole, kept(parameter, layer).piece));
}

int Optimizer::owner(std::size_t parameter, std::int64_t layer) const {
    return sharded() ? partition_->owner(parameter, layer) : kEachRank;
}

const Optimizer::Kept& Optimizer::kept(std::size_t parameter, std::int64_t layer) const {
    const State& s = state_.at(parameter);
    const auto layers = static_cast<std::int64_t>(s.layers.size());
    LLMC_CHECK(layer >= 0 && layer < layers, "layer {} of {} of {}", layer, layers, s.name);
    return s.layers[static_cast<std::size_t>(layer)];
}

Tensor Optimizer::own_state(std::size_t parameter, std::size_t kind, std::int64_t layer) const {
    const State& s = state_.at(parameter);
    const std::size_t moments = s.moments.size();
    LLMC_CHECK(kind < moments || (kind == moments && s.has_master()), "{} has no state of kind {}", s.name,
               kind);
    return elements(kind < moments ? s.moments[kind] : s.master, kept(parameter, layer).range());
}

Tensor Optimizer::scratch(DType dtype, std::int64_t numel) {
    if (!scratch_arena_.allocated()) {
        std::int64_t largest = 0;
        for (const State& s : state_) largest = std::max(largest, s.layer_numel);
        scratch_arena_.add(scratch_, "layer", DType::f32, {largest});
        scratch_arena_.allocate(backend_);
    }
    return Tensor(scratch_.data, dtype, {numel});
}

void Optimizer::step(float lr) {
    measure();
    apply(lr);
}

void Optimizer::set_step_count(std::int64_t count) {
    LLMC_CHECK(count >= 0 && count < std::int64_t{1} << 53, "step_count is {}, expected 0 to 2^53 - 1",
               count);
    step_count_ = count;
}

void Optimizer::set_rng_state(std::uint64_t state) {
    LLMC_CHECK(state != 0, "rng_state is 0, which xorshift cannot leave");
    rng_.state = state;
}

}  // namespace llmc
