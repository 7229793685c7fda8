// What the bindings of models, caches and optimizers share: a model that Python owns.
#pragma once

#include <atomic>
#include <memory>

#include "bindings/bindings.h"
#include "model/gpt2.h"

namespace llmc {

// A model and the NumPy views of it that Python holds. Whoever holds a view may write through it, so packed
// copies of weights are not trusted while one lives, nor once after, and zeroed gradients are really zeroed.
struct BoundModel {
    struct Views {
        std::atomic<std::int64_t> alive{0};
        std::atomic<bool> used{false};  // since weights_changed() was last called
    };
    std::shared_ptr<GPT2> gpt2;
    std::shared_ptr<Views> views = std::make_shared<Views>();

    Backend& backend() const { return *gpt2->backend(); }
    py::array view(const Tensor& t) const {
        LLMC_CHECK(backend().info().name == "cpu",
                   "parameters on {} cannot be viewed as NumPy arrays: use get() and set()",
                   backend().info().name);
        struct Keep {
            std::shared_ptr<GPT2> gpt2;
            std::shared_ptr<Views> views;
            ~Keep() { --views->alive; }
        };
        ++views->alive;
        views->used = true;
        const py::capsule base(new Keep{gpt2, views}, [](void* p) { delete static_cast<Keep*>(p); });
        return host_view(t, base);
    }
    // A view may have been written through: if there has been one since the last call, packed copies are dropped.
    void weights_changed() const {
        if (views->alive > 0 || views->used.exchange(false)) gpt2->weights_changed();
    }
};

}  // namespace llmc
