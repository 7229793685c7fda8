// Comm over NCCL. Collectives run in a stream of their own: each begins when the backend's queued work is done
// and runs beside what is queued later; wait() makes the backend's stream wait for all of them. The host waits
// in sum() and barrier() alone.
//
// NCCL fixes its own order of summation: the same bits on every rank, and from run to run on one machine, but
// not from one machine to another.
#include "cuda/nccl_comm.h"

#include <nccl.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "comm/comm.h"
#include "cuda/cuda_backend.h"
#include "cuda/dynamic_library.h"

namespace llmc {

namespace {

struct Library {
    DynamicLibrary file{kNccl};
#define LLMC_FUNCTION(name) decltype(nccl##name)* name = file.function<decltype(nccl##name)>("nccl" #name)
    LLMC_FUNCTION(GetVersion);
    LLMC_FUNCTION(GetUniqueId);
    LLMC_FUNCTION(GetErrorString);
    LLMC_FUNCTION(CommInitRank);
    LLMC_FUNCTION(CommDestroy);
    LLMC_FUNCTION(AllReduce);
    LLMC_FUNCTION(ReduceScatter);
    LLMC_FUNCTION(AllGather);
    LLMC_FUNCTION(Broadcast);
    LLMC_FUNCTION(GroupStart);
    LLMC_FUNCTION(GroupEnd);
    LLMC_FUNCTION(CommAbort);
    LLMC_FUNCTION(CommGetAsyncError);
#undef LLMC_FUNCTION

    void check(ncclResult_t result, const char* call) const {
        if (result != ncclSuccess) throw Error(filled("nccl: {} ({})", GetErrorString(result), call));
    }
};
#define NCCL_CHECK(library, call) (library).check((library).call, #call)

ncclDataType_t data_type(const Tensor& t) {
    switch (t.dtype) {
    case DType::f32: return ncclFloat32;
    case DType::bf16: return ncclBfloat16;
    case DType::i32: return ncclInt32;
    case DType::i16: break;
    }
    throw ArgumentError(filled("nccl: cannot send {}", t));
}
std::size_t numel(const Tensor& t) { return static_cast<std::size_t>(t.numel()); }

class NcclComm final : public Comm {
  public:
    NcclComm(std::shared_ptr<Backend> backend, int rank, int size, const std::string& id)
        : backend_(std::dynamic_pointer_cast<CudaBackend>(std::move(backend))), rank_(rank), size_(size) {
        LLMC_CHECK(backend_ != nullptr, "NCCL needs a CUDA backend");
        LLMC_CHECK(size > 0 && rank >= 0 && rank < size, "rank {} of {}", rank, size);
        ncclUniqueId unique;
        LLMC_CHECK(id.size() == sizeof unique, "an NCCL id has {} bytes, got {}", sizeof unique, id.size());
        std::memcpy(&unique, id.data(), sizeof unique);
        backend_->stream();  // makes the device current
        try {
            int lowest = 0, highest = 0;  // the fewer blocks of collectives go before those of backward
            CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
            CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest));
            for (cudaEvent_t* event : {&begin_, &end_})
                CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
            NCCL_CHECK(lib_, CommInitRank(&comm_, size_, unique, rank_));
        } catch (...) {
            close();
            throw;
        }
    }
    ~NcclComm() override { close(); }

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    Backend& backend() const override { return *backend_; }

    void all_reduce(const std::vector<Tensor>& xs) override {
        for (const Tensor& x : xs)
            data_type(x);  // an error between GroupStart and GroupEnd would leave it open
        begin();
        checked(lib_.GroupStart(), "GroupStart");  // one launch for all
        ncclResult_t result = ncclSuccess;
        for (const Tensor& x : xs)
            if (result == ncclSuccess)
                result = lib_.AllReduce(x.data, x.data, numel(x), data_type(x), ncclSum, comm_, stream_);
        const ncclResult_t end = lib_.GroupEnd();  // whatever came before: a group must not stay open
        checked(result, "AllReduce");
        checked(end, "GroupEnd");
    }
    void reduce_scatter(Tensor shard, Tensor full) override {
        check_pieces("reduce_scatter", full, shard);
        begin();
        checked(
            lib_.ReduceScatter(full.data, shard.data, numel(shard), data_type(full), ncclSum, comm_, stream_),
            "ReduceScatter");
    }
    void all_gather(Tensor full, Tensor shard) override {
        check_pieces("all_gather", full, shard);
        begin();
        checked(lib_.AllGather(shard.data, full.data, numel(shard), data_type(full), comm_, stream_),
                "AllGather");
    }
    void broadcast(Tensor x, int root) override {
        LLMC_CHECK(root >= 0 && root < size_, "broadcast: root is {} of {} ranks", root, size_);
        begin();
        checked(lib_.Broadcast(x.data, x.data, numel(x), data_type(x), root, comm_, stream_), "Broadcast");
    }
    void wait() override {
        const cudaStream_t main = backend_->stream();
        CUDA_CHECK(cudaEventRecord(end_, stream_));
        CUDA_CHECK(cudaStreamWaitEvent(main, end_, 0));
    }

    // Every rank receives all values and adds them in the order of ranks, so NCCL's order has no say.
    void sum(std::vector<double>& x) override {
        if (x.empty()) return;
        const std::size_t bytes = x.size() * sizeof(double), all = bytes * static_cast<std::size_t>(size_);
        require_comm();
        backend_->stream();
        reserve_scalars(all);
        char* const rank_values = static_cast<char*>(scalars_) + bytes * static_cast<std::size_t>(rank_);
        double* const values = static_cast<double*>(host_scalars_);
        std::memcpy(values, x.data(), bytes);
        CUDA_CHECK(cudaMemcpyAsync(rank_values, values, bytes, cudaMemcpyHostToDevice, stream_));
        checked(lib_.AllGather(rank_values, scalars_, x.size(), ncclFloat64, comm_, stream_), "AllGather");
        CUDA_CHECK(cudaMemcpyAsync(values, scalars_, all, cudaMemcpyDeviceToHost, stream_));
        finish();
        for (std::size_t i = 0; i < x.size(); ++i) {
            x[i] = 0.0;
            for (std::size_t r = 0; r < static_cast<std::size_t>(size_); ++r)
                x[i] += values[r * x.size() + i];
        }
    }
    void barrier() override {
        std::vector<double> one{1.0};
        sum(one);
    }

  private:
    static constexpr auto kPatience = std::chrono::seconds(60);

    // After an error the ranks no longer agree on what comes next: the communicator is given up, which ends
    // what runs in its stream.
    void checked(ncclResult_t result, const char* call) {
        if (result != ncclSuccess) abandon();
        lib_.check(result, call);
    }
    void abandon() {
        if (comm_) lib_.CommAbort(comm_);
        comm_ = nullptr;
    }
    void require_comm() const {
        if (!comm_) throw Error("nccl: the communicator was given up after an error");
    }
    // The host waits for the stream, and hears of a rank that NCCL has lost instead of waiting for it.
    void finish() {
        for (;;) {
            const cudaError_t state = cudaStreamQuery(stream_);
            if (state == cudaSuccess) return;
            if (state != cudaErrorNotReady) CUDA_CHECK(state);
            ncclResult_t result = ncclSuccess;
            checked(lib_.CommGetAsyncError(comm_, &result), "CommGetAsyncError");
            if (result != ncclInProgress) checked(result, "of another rank or the network");
            std::this_thread::yield();
        }
    }
    // What is under way is waited for, but not for ever: if this rank ends by an error, the others' parts of it
    // may never come.
    void close() noexcept {
        cudaSetDevice(backend_->device());
        if (comm_) {
            const auto end = std::chrono::steady_clock::now() + kPatience;
            cudaError_t state;
            ncclResult_t result = ncclSuccess;
            while ((state = cudaStreamQuery(stream_)) == cudaErrorNotReady &&
                   lib_.CommGetAsyncError(comm_, &result) == ncclSuccess &&
                   (result == ncclSuccess || result == ncclInProgress) &&
                   std::chrono::steady_clock::now() < end)
                std::this_thread::sleep_for(std::chrono::microseconds(100));
            if (state == cudaSuccess)
                lib_.CommDestroy(comm_);
            else
                lib_.CommAbort(comm_);
            comm_ = nullptr;
        }
        if (scalars_) backend_->release(scalars_);
        if (host_scalars_) cudaFreeHost(host_scalars_);
        for (cudaEvent_t event : {begin_, end_})
            if (event) cudaEventDestroy(event);
        if (stream_) cudaStreamDestroy(stream_);
    }
    void begin() {
        backend_->refuse_in_recording("a collective");
        require_comm();
        const cudaStream_t main = backend_->stream();
        CUDA_CHECK(cudaEventRecord(begin_, main));
        CUDA_CHECK(cudaStreamWaitEvent(stream_, begin_, 0));
    }
    void check_pieces(const char* op, const Tensor& full, const Tensor& shard) const {
        LLMC_CHECK(full.dtype == shard.dtype && full.numel() == size_ * shard.numel(),
                   "{}: full is {} and shard is {} for {} ranks", op, full, shard, size_);
    }
    void reserve_scalars(std::size_t bytes) {
        if (bytes <= scalar_bytes_) return;
        if (scalars_) backend_->release(scalars_);
        if (host_scalars_) cudaFreeHost(host_scalars_);
        scalars_ = host_scalars_ = nullptr, scalar_bytes_ = 0;
        scalars_ = backend_->allocate(bytes);
        // Pinned: a copy into other memory would hold the host inside of cudaMemcpyAsync, where finish() does not
        // look after the other ranks.
        CUDA_CHECK(cudaMallocHost(&host_scalars_, bytes));
        backend_->synchronize();  // it is zeroed in the backend's stream
        scalar_bytes_ = bytes;
    }

    Library lib_;
    std::shared_ptr<CudaBackend> backend_;
    int rank_, size_;
    ncclComm_t comm_ = nullptr;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
    void *scalars_ = nullptr, *host_scalars_ = nullptr;
    std::size_t scalar_bytes_ = 0;
};

}  // namespace

std::string make_nccl_id() {
    const Library lib;
    ncclUniqueId unique;
    NCCL_CHECK(lib, GetUniqueId(&unique));
    return std::string(reinterpret_cast<const char*>(&unique), sizeof unique);
}

std::shared_ptr<Comm> make_nccl(std::shared_ptr<Backend> backend, int rank, int size, const std::string& id) {
    return std::make_shared<NcclComm>(std::move(backend), rank, size, id);
}

std::string nccl_status() { return library_status(kNccl); }

}  // namespace llmc
