// GradientSink: what a model tells about its gradients while backward() still runs. The model does not know
// what happens to them: they may be summed over ranks, or each rank may keep the sum of its part only.
#pragma once

#include <span>
#include <string>

#include "core/backend.h"

namespace llmc {

class GradientSink {
  public:
    virtual ~GradientSink() = default;
    virtual Backend& backend() const = 0;  // whose gradients it takes

    // These gradients are complete: backward() writes them no more, and they may be sent while it computes
    // those of the layers below. Every gradient is named once, in the same order at every call of backward().
    virtual void ready(std::span<const Tensor> gradients) = 0;
    // Every gradient was named. `loss` (1) f32 is this rank's share of the mean loss, to be summed over the
    // ranks. On return later work of the backend sees the reduced values.
    virtual void finish(Tensor loss) = 0;
    // backward() ends by an error, and does not finish. On return nobody uses the gradients that were named.
    virtual void failed(const std::string& why) = 0;
};

}  // namespace llmc
