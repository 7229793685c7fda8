// HostComm: the Comm of CPUs whose bytes somebody else moves (MPI, through Python). Collectives become jobs in a queue,
// and each job a few exchanges of bytes. One thread, the transport, takes them from Exchanges, moves the bytes, and says
// so. Copies into and out of the staging memory, and the sum in the order of ranks, run on that thread, beside what the
// computing thread does.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/partition.h"

namespace llmc {

// Bytes that can be used again without being filled first.
class Staging {
  public:
    std::byte* data() const { return memory_.get(); }
    std::int64_t size() const { return size_; }
    void resize(std::int64_t size);  // what it holds is lost
    void leak() { static_cast<void>(memory_.release()); }

  private:
    std::unique_ptr<std::byte[]> memory_;
    std::int64_t size_ = 0, capacity_ = -1;
};

// What the transport does next. Parts lie in a buffer in the order of ranks, without gaps, and their sizes are in bytes.
struct Exchange {
    enum class Kind {
        barrier,     // only the heads
        all_to_all,  // part r of `send` to rank r; into part r of `receive` what rank r sends. None to oneself.
        all_gather,  // this rank's part of `receive` to all ranks, where it is that part too
        broadcast,   // all of `receive`, from rank `root` to the others
    };
    Kind kind = Kind::barrier;
    std::string what;  // the collective, in words
    Staging send, receive;
    std::vector<std::int64_t> send_counts, receive_counts;
    int root = 0;
    // A job's first exchange also gathers the heads, as many bytes of each rank, by which check() sees whether all
    // ranks are in the same collective. They travel first: buffers of other sizes may end an MPI by a signal.
    bool has_heads = false;
    Staging head, heads;
};

// The transport's side. It may outlive its HostComm. Methods without a word on threads are the transport's.
class Exchanges {
  public:
    // Memory of an exchange that began and was never done is not freed: its bytes may still arrive.
    ~Exchanges();
    // Waits for an exchange. nullptr: it has ended.
    const Exchange* next();
    // Throws Error if the heads, which have arrived, tell that ranks disagree.
    void check() const;
    // The exchange is complete. What it refers to is valid no longer.
    void done();
    // Any thread: the exchange is impossible, and so is everything after it.
    void fail(const std::string& message);
    // Any thread: it failed, or its HostComm is gone. An exchange that is under way need not be waited for.
    bool ended() const;
    // Any thread: whether all that was asked for is done.
    bool idle() const;
    // Any thread: whether somebody waits, so that its core is free for the transport.
    bool awaited() const { return awaited_ > 0; }
    // Any thread: bytes that this rank has had to send to the other ranks so far.
    std::int64_t bytes_sent() const { return bytes_sent_; }

  private:
    friend class HostComm;
    enum class Op { all_reduce, reduce_scatter, all_gather, broadcast, sum, barrier };
    struct Job {
        Op op;
        std::vector<Divided> xs;
        std::vector<double>* values;
        int root;
        std::string what;
        std::uint64_t fingerprint;
    };

    Exchanges(int rank, int size);
    std::int64_t add(Op op, std::vector<Divided> xs, int root, std::vector<double>* values);
    void wait(std::int64_t ticket);
    // Whoever is told of a failure may release the tensors: so the transport has let go of them before.
    void throw_if_failed(std::unique_lock<std::mutex>& lock);
    void close();
    void let_go();  // waits until the transport touches no tensor

    // A step of the first job, with the mutex free. False: it was impossible, and so is everything after it.
    bool touch(std::unique_lock<std::mutex>& lock, void (Exchanges::*step)(const Job&));
    void set_failed(const std::string& message);  // with the mutex held
    void prepare(const Job& job);
    void finish(const Job& job);
    bool is_last_step(const Job& job) const;

    // A list of tensors in chunks: `ranks` ranks have a piece of each, and a rank's pieces, laid end to end, are cut at
    // multiples of chunk_.
    std::int64_t pieces_bytes(const Job& job, int rank, int ranks) const;
    std::int64_t chunks(const Job& job) const;
    std::vector<std::int64_t> chunk_bytes(const Job& job, int ranks) const;
    template <class Visit>
    void visit_chunk(const Job& job, int rank, int ranks, Visit&& visit) const;
    bool gathers(const Job& job) const;
    void copy_chunk(const Job& job, int rank, int ranks, std::byte* staging, bool out) const;
    void sum_chunk(const Job& job);

    const int rank_, size_;
    const std::int64_t chunk_;
    Exchange exchange_;
    std::int64_t step_ = 0;  // of the first job: which of its exchanges

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Job> jobs_;
    std::int64_t added_ = 0, done_ = 0;  // jobs
    bool moving_ = false;                // the transport has an exchange
    bool touching_ = false;              // ... or reads or writes tensors
    bool closed_ = false, failed_ = false;
    std::string error_;
    std::atomic<int> awaited_ = 0;
    std::atomic<std::int64_t> bytes_sent_ = 0;
};

class HostComm : public Comm {
  public:
    // Until a transport serves exchanges(), collectives wait.
    HostComm(std::shared_ptr<Backend> backend, int rank, int size);
    ~HostComm() override;  // forgets what is not done yet

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    const std::shared_ptr<Backend>& backend_owner() const override { return backend_; }
    const std::shared_ptr<Exchanges>& exchanges() const { return exchanges_; }

    Ticket all_reduce(const std::vector<Tensor>& xs) override;
    Ticket reduce_scatter(const std::vector<Divided>& xs) override;
    Ticket all_gather(const std::vector<Divided>& xs) override;
    Ticket broadcast(const std::vector<Tensor>& xs, int root) override;
    using Comm::wait;
    // Throws Error, like every later call, once a collective has failed.
    void wait(Ticket ticket) override;
    void sum(std::vector<double>& x) override;
    void barrier() override;
    void give_up(const std::string& why) override;

  private:
    std::shared_ptr<Backend> backend_;
    int rank_, size_;
    std::shared_ptr<Exchanges> exchanges_;
};

}  // namespace llmc
