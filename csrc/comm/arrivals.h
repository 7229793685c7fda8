// Arrivals: weights on their way to this rank from those that updated them (ZeRO-1), unit by unit, so that the next
// forward pass begins when the first unit is here. A unit is what forward() needs at a time: 0 the embeddings, 1 + l
// layer l; what follows the layers belongs to the last one.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "comm/comm.h"

namespace llmc {

class Arrivals {
  public:
    bool any() const { return !expected_.empty(); }

    // Units are expected in ascending order.
    void expect(std::int64_t unit, std::shared_ptr<Comm> comm, Comm::Ticket ticket) {
        expected_.push_back({unit, std::move(comm), ticket});
    }
    // Lets the backend's later work see the weights of this unit and those before it.
    void wait(std::int64_t unit) {
        auto end = expected_.begin();
        while (end != expected_.end() && end->unit <= unit) ++end;
        if (end == expected_.begin()) return;
        // If it throws, they never arrive, and stay expected: whoever looks at them next hears it too.
        (end - 1)->comm->wait((end - 1)->ticket);
        expected_.erase(expected_.begin(), end);
    }
    void wait() {
        if (any()) wait(expected_.back().unit);
    }

  private:
    struct Expected {
        std::int64_t unit;
        std::shared_ptr<Comm> comm;
        Comm::Ticket ticket;
    };
    std::vector<Expected> expected_;
};

}  // namespace llmc
