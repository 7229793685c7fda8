// Comm over NCCL. Collectives run in a stream of their own, a list of tensors as one group: each begins when the backend's
// queued work is done and runs beside what is queued later; wait() makes the backend's stream wait for it. Nothing is copied
// or padded. The host waits in sum() and barrier() alone, and until NCCL has launched a group: a thread of its own does, and
// connects to other ranks if it is the first.
//
// NCCL fixes its own order of summation: the same bits on every rank, and from run to run on one machine, but
// not from one machine to another.
#include "cuda/nccl_comm.h"

#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

#include "comm/comm.h"
#include "cuda/cuda_backend.h"
#include "cuda/dynamic_library.h"

namespace llmc {

namespace {

struct Library {
    DynamicLibrary file{kNccl};
#define LLMC_FUNCTION(name) decltype(nccl##name)* name = file.function<decltype(nccl##name)>("nccl" #name)
    LLMC_FUNCTION(GetUniqueId);
    LLMC_FUNCTION(GetErrorString);
    LLMC_FUNCTION(GetLastError);
    LLMC_FUNCTION(CommInitRankConfig);
    LLMC_FUNCTION(CommGetAsyncError);
    LLMC_FUNCTION(CommFinalize);
    LLMC_FUNCTION(CommDestroy);
    LLMC_FUNCTION(CommAbort);
    LLMC_FUNCTION(AllReduce);
    LLMC_FUNCTION(Reduce);
    LLMC_FUNCTION(ReduceScatter);
    LLMC_FUNCTION(AllGather);
    LLMC_FUNCTION(Broadcast);
    LLMC_FUNCTION(GroupStart);
    LLMC_FUNCTION(GroupEnd);
#undef LLMC_FUNCTION
};

ncclDataType_t data_type(const Tensor& t) { return t.dtype == DType::f32 ? ncclFloat32 : ncclBfloat16; }
std::size_t count_of(const Tensor& t) { return static_cast<std::size_t>(t.numel()); }
std::size_t bytes_of(const Tensor& t) { return static_cast<std::size_t>(t.bytes()); }

// The first failure among the calls of a group. A call that is still in progress is none.
class Calls {
  public:
    void operator()(ncclResult_t result) {
        if (first_ == ncclSuccess && result != ncclInProgress) first_ = result;
    }
    ncclResult_t result() const { return first_; }

  private:
    ncclResult_t first_ = ncclSuccess;
};

class NcclComm final : public Comm {
    using Clock = std::chrono::steady_clock;
    using Seconds = std::chrono::duration<double>;

  public:
    NcclComm(std::shared_ptr<Backend> backend, int rank, int size, const std::string& id, double timeout)
        : backend_(std::dynamic_pointer_cast<CudaBackend>(std::move(backend))), rank_(rank), size_(size),
          timeout_(timeout) {
        LLMC_CHECK(backend_ != nullptr, "NCCL needs a CUDA backend");
        LLMC_CHECK(size > 0 && rank >= 0 && rank < size, "rank {} of {}", rank, size);
        LLMC_CHECK(timeout > 0.0 && timeout <= 1e6, "the timeout is {} s", timeout);
        ncclUniqueId unique;
        LLMC_CHECK(id.size() == sizeof unique, "an NCCL id has {} bytes, got {}", sizeof unique, id.size());
        std::memcpy(&unique, id.data(), sizeof unique);
        backend_->stream();  // makes the device current
        try {
            int lowest = 0, highest = 0;  // the fewer blocks of collectives go before those of backward
            CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
            CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest));
            for (Slot& slot : slots_)
                for (cudaEvent_t* event : {&slot.begun, &slot.done})
                    CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
            ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
            config.blocking = 0;  // no call waits for another rank, nor aborting for any
            checked(lib_.CommInitRankConfig(&comm_, size_, unique, rank_, &config), "CommInitRankConfig");
            wait_until("the start", timeout_, [&] { return settled(); });
        } catch (...) {
            close();
            throw;
        }
    }
    ~NcclComm() override { close(); }

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    const std::shared_ptr<Backend>& backend_owner() const override { return owner_; }

    Ticket all_reduce(const std::vector<Tensor>& xs) override {
        check_floats("all_reduce", {xs.begin(), xs.end()});
        return collective("all_reduce", [&](Calls& calls) {
            for (const Tensor& x : xs)
                calls(lib_.AllReduce(x.data, x.data, count_of(x), data_type(x), ncclSum, comm_, stream_));
        });
    }
    // To a tensor's one owner; or as many elements to every rank, and what is left over to the last one.
    Ticket reduce_scatter(const std::vector<Divided>& xs) override {
        check_owners("reduce_scatter", xs);
        check_floats("reduce_scatter", xs);
        return collective("reduce_scatter", [&](Calls& calls) {
            for (const auto& [x, owner] : xs) {
                const ncclDataType_t type = data_type(x);
                if (owner != kEachRank) {
                    calls(lib_.Reduce(x.data, x.data, count_of(x), type, ncclSum, owner, comm_, stream_));
                    continue;
                }
                const Parts p = parts(x);
                if (p.each > 0)
                    calls(lib_.ReduceScatter(x.data, p.own, p.each, type, ncclSum, comm_, stream_));
                if (p.rest > 0)
                    calls(lib_.Reduce(p.left, p.left, p.rest, type, ncclSum, size_ - 1, comm_, stream_));
            }
        });
    }
    // What is not added travels as bytes: NCCL has no 16-bit integers.
    Ticket all_gather(const std::vector<Divided>& xs) override {
        check_owners("all_gather", xs);
        return collective("all_gather", [&](Calls& calls) {
            for (const auto& [x, owner] : xs) {
                if (owner != kEachRank) {
                    calls(lib_.Broadcast(x.data, x.data, bytes_of(x), ncclInt8, owner, comm_, stream_));
                    continue;
                }
                const Parts p = parts(x);
                const std::size_t item = static_cast<std::size_t>(size_of(x.dtype));
                if (p.each > 0) calls(lib_.AllGather(p.own, x.data, p.each * item, ncclInt8, comm_, stream_));
                if (p.rest > 0)
                    calls(lib_.Broadcast(p.left, p.left, p.rest * item, ncclInt8, size_ - 1, comm_, stream_));
            }
        });
    }
    Ticket broadcast(const std::vector<Tensor>& xs, int root) override {
        LLMC_CHECK(root >= 0 && root < size_, "broadcast: root is {} of {} ranks", root, size_);
        return collective("broadcast", [&](Calls& calls) {
            for (const Tensor& x : xs)
                calls(lib_.Broadcast(x.data, x.data, bytes_of(x), ncclInt8, root, comm_, stream_));
        });
    }
    using Comm::wait;
    void wait(Ticket ticket) override {
        LLMC_CHECK(ticket >= 0 && ticket <= last_, "ticket {} of {} collectives", ticket, last_);
        backend_->refuse_in_recording("a wait for a collective");
        {
            const std::lock_guard lock(mutex_);
            if (!failure_.empty()) throw Error(failure_);
        }
        if (ticket <= waited_) return;
        CUDA_CHECK(cudaStreamWaitEvent(backend_->stream(), slot(ticket).done, 0));
        waited_ = ticket;
    }

    // Every rank receives all values and adds them in the order of ranks, so NCCL's order has no say.
    void sum(std::vector<double>& x) override {
        if (x.empty()) return;
        const std::size_t bytes = x.size() * sizeof(double), all = bytes * static_cast<std::size_t>(size_);
        backend_->refuse_in_recording("a sum over ranks");
        backend_->stream();
        reserve_scalars(all);
        char* const rank_values = static_cast<char*>(scalars_) + bytes * static_cast<std::size_t>(rank_);
        double* const values = static_cast<double*>(host_scalars_);
        std::memcpy(values, x.data(), bytes);
        CUDA_CHECK(cudaMemcpyAsync(rank_values, values, bytes, cudaMemcpyHostToDevice, stream_));
        launch("sum", [&](Calls& calls) {
            calls(lib_.AllGather(rank_values, scalars_, x.size(), ncclFloat64, comm_, stream_));
        });
        CUDA_CHECK(cudaMemcpyAsync(values, scalars_, all, cudaMemcpyDeviceToHost, stream_));
        wait_until("sum", timeout_, [&] { return stream_is_idle(); });
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = 0.0;
            for (std::size_t r = 0; r < static_cast<std::size_t>(size_); ++r)
                x[i] += values[r * x.size() + i];
        }
    }
    void give_up(const std::string& why) override {
        try {
            or_give_up([&] {
                const std::lock_guard lock(mutex_);
                fail(why);
            });
        } catch (const Error&) {  // which the caller has already
        }
    }
    void barrier() override {
        std::vector<double> one{1.0};
        sum(one);
    }

    // If this rank is in one of NCCL's functions just now, another call will tell.
    void check() override {
        const std::unique_lock lock(mutex_, std::try_to_lock);
        if (lock) ask();
    }
    Pending pending() override {
        const std::unique_lock lock(mutex_, std::try_to_lock);
        if (!lock || !failure_.empty()) return {};
        cudaSetDevice(backend_->device());  // or this thread would make a context on another one
        const auto has_passed = [](cudaEvent_t event) {
            const bool passed = cudaEventQuery(event) == cudaSuccess;
            if (!passed) cudaGetLastError();
            return passed;
        };
        while (finished_ < last_ && has_passed(slot(finished_ + 1).done)) ++finished_;
        const Ticket next = finished_ + 1;
        if (finished_ == last_ || !has_passed(slot(next).begun)) return {};
        if (next != seen_) seen_ = next, seen_at_ = Clock::now();
        return {Seconds(Clock::now() - seen_at_).count(), slot(next).op};
    }

  private:
    static constexpr Seconds kPatience{60.0};

    struct Parts {
        std::size_t each, rest;  // elements for every rank, and for the last one beside
        char *own, *left;        // where this rank's part begins, and the rest
    };
    Parts parts(const Tensor& x) const {
        const std::int64_t item = size_of(x.dtype);
        const std::int64_t each = piece_of(x.numel(), 0, size_).size();  // the first rank's; of one rank: all
        const std::int64_t all = each * size_;
        return {static_cast<std::size_t>(each), static_cast<std::size_t>(x.numel() - all),
                x.as<char>() + each * rank_ * item, x.as<char>() + all * item};
    }
    static void check_floats(const char* op, const std::vector<Divided>& xs) {
        for (const Divided& x : xs)
            LLMC_CHECK(is_float(x.tensor.dtype), "{}: {} is not of floats", op, x.tensor);
    }

    // Tickets take turns at these. If one's events have been recorded again, they stand for more than that ticket.
    static constexpr std::size_t kSlots = 256;
    struct Slot {
        cudaEvent_t begun = nullptr, done = nullptr;
        const char* op = "";
    };
    Slot& slot(Ticket ticket) { return slots_[static_cast<std::size_t>(ticket) % kSlots]; }

    template <class Body>
    Ticket collective(const char* op, Body&& body) {
        backend_->refuse_in_recording("a collective");
        Slot& own = slot(last_ + 1);
        CUDA_CHECK(cudaEventRecord(own.begun, backend_->stream()));
        CUDA_CHECK(cudaStreamWaitEvent(stream_, own.begun, 0));
        launch(op, body);
        CUDA_CHECK(cudaEventRecord(own.done, stream_));
        const std::lock_guard lock(mutex_);
        own.op = op;
        return ++last_;
    }
    // One launch for all that `body` calls.
    template <class Body>
    void launch(const char* op, Body&& body) {
        or_give_up([&] {
            const std::lock_guard lock(mutex_);
            ask();
            Calls calls;
            calls(lib_.GroupStart());
            if (calls.result() == ncclSuccess) {
                body(calls);
                calls(lib_.GroupEnd());  // whatever came before: a group must not stay open
            }
            checked(calls.result(), op);
        });
        wait_until(op, timeout_, [&] { return settled(); });
    }

    // ---- errors: mutex_ is held by whoever calls NCCL, but for no longer than the call takes ----

    // After an error the ranks no longer agree on what comes next: every later call throws it again. Kernels that wait for
    // a lost rank are ended, or whoever frees memory would wait for them; aborting may take its time, and is done with the
    // mutex free.
    template <class Body>
    void or_give_up(Body&& body) {
        try {
            body();
        } catch (const Error&) {
            ncclComm_t lost = nullptr;
            {
                const std::lock_guard lock(mutex_);
                if (!failure_.empty()) std::swap(lost, comm_);
            }
            if (lost) lib_.CommAbort(lost);
            throw;
        }
    }
    [[noreturn]] void fail(std::string text) {
        failure_ = std::move(text);
        throw Error(failure_);
    }
    void checked(ncclResult_t result, const char* call) {
        if (result == ncclSuccess || result == ncclInProgress) return;
        const char* const details = lib_.GetLastError(comm_);
        fail(filled("nccl: {} ({}){}{}", lib_.GetErrorString(result), call, details && *details ? ": " : "",
                    details ? details : ""));
    }
    // Whether NCCL has finished what it was last called for; its kernels may still run. Throws what it says of any rank.
    bool ask() {
        if (!failure_.empty()) throw Error(failure_);
        ncclResult_t state = ncclSuccess;
        checked(lib_.CommGetAsyncError(comm_, &state), "CommGetAsyncError");
        checked(state, "seen by CommGetAsyncError");
        return state == ncclSuccess;
    }
    bool settled() {
        const std::lock_guard lock(mutex_);
        return ask();
    }
    bool stream_is_idle() {
        const cudaError_t state = cudaStreamQuery(stream_);
        if (state == cudaErrorNotReady)
            return cudaGetLastError(), false;  // no error for the next launch to find
        CUDA_CHECK(state);
        return true;
    }
    // The host waits, and hears of a rank that NCCL has lost instead of waiting for it.
    template <class Done>
    void wait_until(const char* what, Seconds limit, Done&& is_done) {
        const Clock::time_point begin = Clock::now();
        or_give_up([&] {
            while (!is_done()) {
                settled();
                const Seconds waited = Clock::now() - begin;
                if (waited > limit) {
                    const std::lock_guard lock(mutex_);
                    fail(filled("nccl: rank {} of {} has waited {} s for the others ({})", rank_, size_,
                                limit.count(), what));
                }
                if (waited < std::chrono::milliseconds(1))
                    std::this_thread::yield();
                else
                    std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        });
    }
    // What is under way is waited for, but not for ever: if this rank ends by an error, the others' parts of it
    // may never come.
    void finish() noexcept {
        bool whole = false;
        try {
            const Seconds limit = std::min(timeout_, kPatience);
            wait_until("the end", limit, [&] { return settled() && stream_is_idle(); });
            {
                const std::lock_guard lock(mutex_);
                checked(lib_.CommFinalize(comm_), "CommFinalize");
            }
            wait_until("CommFinalize", limit, [&] { return settled(); });
            whole = true;
        } catch (const Error&) {  // nobody could handle it here
        }
        if (comm_) whole ? lib_.CommDestroy(comm_) : lib_.CommAbort(comm_);
    }
    void close() noexcept {
        cudaSetDevice(backend_->device());
        if (comm_) finish();
        if (scalars_) backend_->release(scalars_);
        if (host_scalars_) cudaFreeHost(host_scalars_);
        for (const Slot& slot : slots_)
            for (cudaEvent_t event : {slot.begun, slot.done})
                if (event) cudaEventDestroy(event);
        if (stream_) cudaStreamDestroy(stream_);
    }
    void reserve_scalars(std::size_t bytes) {
        if (bytes <= scalar_bytes_) return;
        if (scalars_) backend_->release(scalars_);
        if (host_scalars_) cudaFreeHost(host_scalars_);
        scalars_ = host_scalars_ = nullptr, scalar_bytes_ = 0;
        scalars_ = backend_->allocate(bytes);
        // Pinned: a copy into other memory would hold the host inside of cudaMemcpyAsync, where it does not look
        // after the other ranks.
        CUDA_CHECK(cudaMallocHost(&host_scalars_, bytes));
        backend_->synchronize();  // it is zeroed in the backend's stream
        scalar_bytes_ = bytes;
    }

    Library lib_;
    std::shared_ptr<CudaBackend> backend_;
    std::shared_ptr<Backend> owner_ = backend_;
    int rank_, size_;
    Seconds timeout_;
    std::mutex mutex_;
    std::string failure_;
    ncclComm_t comm_ = nullptr;
    cudaStream_t stream_ = nullptr;
    Slot slots_[kSlots];
    Ticket waited_ = 0;  // the newest ticket that the backend's stream has waited for
    // For pending(): the newest ticket that is known to have ended, and since when which one is known to go on.
    Ticket finished_ = 0, seen_ = 0;
    Clock::time_point seen_at_;
    void *scalars_ = nullptr, *host_scalars_ = nullptr;
    std::size_t scalar_bytes_ = 0;
};

}  // namespace

std::string make_nccl_id() {
    const Library lib;
    ncclUniqueId unique;
    const ncclResult_t result = lib.GetUniqueId(&unique);
    if (result != ncclSuccess) throw Error(filled("nccl: {} (GetUniqueId)", lib.GetErrorString(result)));
    return std::string(reinterpret_cast<const char*>(&unique), sizeof unique);
}

std::shared_ptr<Comm> make_nccl(std::shared_ptr<Backend> backend, int rank, int size, const std::string& id,
                                double timeout) {
    return std::make_shared<NcclComm>(std::move(backend), rank, size, id, timeout);
}

std::string nccl_status() { return library_status(kNccl); }

}  // namespace llmc
