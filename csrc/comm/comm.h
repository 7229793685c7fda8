// Comm: the ranks that train one model together. Every rank issues the same collectives in the same order, with
// tensors of the same shapes and dtypes.
//
// A collective starts after the work that the backend has queued so far, and runs beside what is queued later. It
// returns a ticket; wait(ticket) makes the backend's later work see what it did. On a GPU a collective holds the host
// until it is launched, and only sum() and barrier() until it is done; on a CPU wait() does too. Until then its tensors
// must live, and must not be touched.
//
// CPUs add in the order of ranks, in f32, and round once: the same bits on every rank, in every run, by every
// transport. GPUs leave the order to NCCL: the same bits on every rank.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/partition.h"
#include "core/backend.h"
#include "core/tensor.h"

namespace llmc {

class Comm {
  public:
    using Ticket = std::int64_t;  // the number of a collective; those before it are finished whenever it is

    virtual ~Comm() = default;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    virtual const std::shared_ptr<Backend>& backend_owner() const = 0;
    Backend& backend() const { return *backend_owner(); }  // whose tensors travel

    // Each x = sum over ranks of x.
    virtual Ticket all_reduce(const std::vector<Tensor>& xs) = 0;
    // In each x, this rank's piece = sum over ranks of that piece. The other pieces are left undefined.
    virtual Ticket reduce_scatter(const std::vector<Divided>& xs) = 0;
    // Each x = the pieces of it that the ranks own, each from its owner.
    virtual Ticket all_gather(const std::vector<Divided>& xs) = 0;
    // Each x = that of rank `root`.
    virtual Ticket broadcast(const std::vector<Tensor>& xs, int root) = 0;
    virtual void wait(Ticket ticket) = 0;
    void wait() { wait(last_); }  // for all so far

    // Host values: x = sum over ranks of x, in the order of ranks; waits.
    virtual void sum(std::vector<double>& x) = 0;
    virtual void barrier() = 0;  // waits for every rank

    // This rank cannot go on: nothing touches the tensors of what was under way any more, and every later call throws. If
    // collectives run at once, there is nothing to let go of.
    virtual void give_up(const std::string& why) { static_cast<void>(why); }

    // For a thread that watches over this rank. It may call them at any time, whatever the others do with this Comm and its
    // backend, and waits for none of them. Collectives that block the host tell their delays themselves.
    virtual void check() {}  // throws Error if a rank is known to be lost
    struct Pending {
        double seconds = 0.0;  // 0: there is none
        std::string op;
    };
    virtual Pending pending() { return {}; }  // the collective that has begun and not ended, and for how long

  protected:
    // Throws ArgumentError.
    void check_owners(const char* op, const std::vector<Divided>& xs) const {
        for (const Divided& x : xs)
            LLMC_CHECK(x.owner == kEachRank || (x.owner >= 0 && x.owner < size()),
                       "{}: the owner of {} is {} of {} ranks", op, x.tensor, x.owner, size());
    }

    Ticket last_ = 0;  // of the last collective that was issued
};

// One rank per backend, each to be used by a thread of its own; backends on the CPU only. Collectives run at once.
// If ranks disagree, all of them get the same ArgumentError and may go on; a rank that is destroyed ends the
// others' calls with an Error.
std::vector<std::shared_ptr<Comm>> make_thread_comms(const std::vector<std::shared_ptr<Backend>>& backends);

}  // namespace llmc
