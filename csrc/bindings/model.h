// What the bindings of models, caches and optimizers share: a model that Python owns, and token ids as Python has them.
#pragma once

#include <atomic>
#include <memory>

#include "bindings/bindings.h"
#include "model/model.h"

namespace llmc {

// A model and the NumPy views of its parameters and gradients that Python holds. Python may write through a
// view, and nothing tells us when it does. So while a view is alive, packed copies of weights are dropped before
// each use of the model, and once more after the last view is gone; and zero_grad() writes zeros at once. Nor does
// anything tell when Python reads a view, or a Tensor of parameters: so while one is alive, updates wait for the weights
// that other ranks send.
struct BoundModel {
    struct Views {
        std::atomic<std::int64_t> alive{0};
        std::atomic<std::int64_t> tensors{0};  // of parameters
        std::atomic<bool> used{false};  // one was made since weights_may_have_changed() was last called
    };
    // Keeps what a view or a Tensor refers to, which is counted.
    struct Keep {
        Keep(const BoundModel& owner, std::atomic<std::int64_t>& of)
            : model(owner.model), views(owner.views), count(of) {
            ++count;
        }
        ~Keep() { --count; }
        std::shared_ptr<Model> model;
        std::shared_ptr<Views> views;
        std::atomic<std::int64_t>& count;  // in views
    };
    std::shared_ptr<Model> model;
    std::shared_ptr<Views> views = std::make_shared<Views>();

    Backend& backend() const { return *model->backend(); }
    py::array view(const Tensor& t) const {
        LLMC_CHECK(backend().info().name == "cpu",
                   "parameters on {} cannot be viewed as NumPy arrays: use parameter_tensors()",
                   backend().info().name);
        views->used = true;
        const py::capsule base(new Keep(*this, views->alive), [](void* p) { delete static_cast<Keep*>(p); });
        return host_view(t, base);
    }
    OwnedTensor parameter_tensor(const Tensor& t) const {
        OwnedTensor counted{model->backend(), t, std::make_shared<Keep>(*this, views->tensors)};
        wait_all_here();
        return counted;
    }
    bool looked_at() const { return views->alive > 0 || views->tensors > 0; }
    // Called before each use of the weights but forward(), which waits for them unit by unit.
    void weights_may_have_changed() const {
        model->arrivals()->wait();
        weights_may_have_changed_in_views();
    }
    // For a caller that is not Busy: waits for the weights that other ranks have updated. What refers to them is counted
    // before, or another thread's update might come in between.
    void wait_all_here() const {
        const Busy busy(backend());
        model->arrivals()->wait();
    }
    void weights_may_have_changed_in_views() const {
        if (views->alive > 0 || views->used.exchange(false)) model->weights_changed();
    }
};

// Token ids: integers in anything that NumPy reads, such as lists or a tensor of PyTorch's. Nothing is rounded or cut off in
// passing: pybind11's own conversion would make a token of 1.5.
struct Tokens {
    py::array_t<std::int32_t, py::array::c_style> ids;
};
// Throws TypeError for text, ArgumentError for whatever else is no array of integers of 32 bits.
Tokens tokens_of(py::handle given);

}  // namespace llmc

template <>
struct pybind11::detail::type_caster<llmc::Tokens> {
    PYBIND11_TYPE_CASTER(llmc::Tokens, const_name("typing.Annotated[numpy.typing.ArrayLike, numpy.int32]"));
    bool load(handle given, bool) {
        value = llmc::tokens_of(given);
        return true;
    }
};
