// What the bindings of models, caches and optimizers share: a model that Python owns.
#pragma once

#include <atomic>
#include <memory>

#include "bindings/bindings.h"
#include "model/model.h"

namespace llmc {

// A model and the NumPy views of its parameters and gradients that Python holds. Python may write through a
// view, and nothing tells us when it does. So while a view is alive, packed copies of weights are dropped before
// each use of the model, and once more after the last view is gone; and zero_grad() writes zeros at once.
struct BoundModel {
    struct Views {
        std::atomic<std::int64_t> alive{0};
        std::atomic<bool> used{false};  // one was made since weights_may_have_changed() was last called
    };
    std::shared_ptr<Model> model;
    std::shared_ptr<Views> views = std::make_shared<Views>();

    Backend& backend() const { return *model->backend(); }
    py::array view(const Tensor& t) const {
        LLMC_CHECK(backend().info().name == "cpu",
                   "parameters on {} cannot be viewed as NumPy arrays: use parameter_tensors()",
                   backend().info().name);
        struct Keep {
            std::shared_ptr<Model> model;
            std::shared_ptr<Views> views;
            ~Keep() { --views->alive; }
        };
        ++views->alive;
        views->used = true;
        const py::capsule base(new Keep{model, views}, [](void* p) { delete static_cast<Keep*>(p); });
        return host_view(t, base);
    }
    // Called before each use of the weights but forward(), which waits for them unit by unit.
    void weights_may_have_changed() const {
        model->arrivals()->wait();
        weights_may_have_changed_in_views();
    }
    // For a caller that is not Busy: waits for the weights that other ranks have updated.
    void wait_all_here() const {
        const Busy busy(backend());
        model->arrivals()->wait();
    }
    void weights_may_have_changed_in_views() const {
        if (views->alive > 0 || views->used.exchange(false)) model->weights_changed();
    }
};

using Tokens = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

}  // namespace llmc
