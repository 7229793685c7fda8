// Comm: the ranks that train one model together. Every rank issues the same collectives in the same order.
//
// A collective starts after the work that the backend has queued so far, runs beside what is queued later,
// and is finished, as far as the backend's later work is concerned, at the next wait(). On a GPU nothing here
// blocks the host but sum() and barrier().
#pragma once

#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/tensor.h"

namespace llmc {

class Comm {
  public:
    virtual ~Comm() = default;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    virtual Backend& backend() const = 0;  // whose tensors travel

    virtual void all_reduce(const std::vector<Tensor>& xs) = 0;  // each x = sum over ranks of x
    virtual void reduce_scatter(Tensor shard,
                                Tensor full) = 0;            // shard = sum over ranks of full's rank-th piece
    virtual void all_gather(Tensor full, Tensor shard) = 0;  // full's r-th piece = rank r's shard
    virtual void broadcast(Tensor x, int root) = 0;
    virtual void wait() = 0;

    virtual void sum(std::vector<double>& x) = 0;  // host values, in a fixed order; waits
    virtual void barrier() = 0;                    // waits
};

// One rank per backend, each to be used by a thread of its own; backends on the CPU only. Collectives run at
// once, and sum in the order of ranks: the same bits on every rank and in every run. Where ranks disagree, all
// of them get the same ArgumentError and may go on; a rank that is destroyed ends the others' calls with an
// Error.
std::vector<std::shared_ptr<Comm>> make_thread_comms(const std::vector<std::shared_ptr<Backend>>& backends);

}  // namespace llmc
