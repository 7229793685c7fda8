// AllReduce: every rank gets the sums of all gradients (distributed data parallel).
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "comm/comm.h"
#include "comm/gradient_sink.h"

namespace llmc {

class AllReduce final : public GradientSink {
  public:
    explicit AllReduce(std::shared_ptr<Comm> comm) : comm_(std::move(comm)) {
        LLMC_CHECK(comm_ != nullptr, "AllReduce: no Comm");
    }
    const Backend& backend() const override { return comm_->backend(); }
    void ready(std::span<const Tensor> gradients) override {
        comm_->all_reduce(std::vector<Tensor>(gradients.begin(), gradients.end()));
    }
    void finish(Tensor loss) override {
        comm_->all_reduce({loss});
        comm_->wait();
    }

  private:
    std::shared_ptr<Comm> comm_;
};

}  // namespace llmc
