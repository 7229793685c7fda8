// Reduction: the GradientSink of a rank. Gradients are summed over the ranks while backward() goes on: all of them on
// every rank, or (ZeRO-1) on each rank those that it owns.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/gradient_sink.h"
#include "core/arena.h"

namespace llmc {

class Reduction final : public GradientSink {
  public:
    // partition: the optimizer's, by which each rank gets the sums that it needs; null: each gets all. notes: how many
    // numbers travel beside the loss.
    Reduction(std::shared_ptr<Comm> comm, std::shared_ptr<const Partition> partition, std::int64_t notes);

    Backend& backend() const override { return comm_->backend(); }
    void ready(std::span<const Tensor> gradients) override;
    void finish(Tensor loss) override;
    void failed(const std::string& why) override { comm_->give_up(why); }

    // Call before an update's first forward(). Notes ride along with the loss, and so cost no wait of their own: of
    // what each rank says here, notes() is the sum over the ranks once backward() has finished.
    void begin(const std::vector<float>& notes);
    std::vector<float> notes() const;  // waits
    // From begin() to the end of backward(). The time that other ranks take for their gradients is not in it; what
    // forward() waits for their weights is. Waits.
    double own_seconds() const;

  private:
    std::shared_ptr<Comm> comm_;
    std::shared_ptr<const Partition> partition_;
    std::unique_ptr<Stopwatch> stopwatch_;
    Tensor notes_;
    Arena arena_;  // after its slot: its destructor still writes to it
};

}  // namespace llmc
