// Comm over NCCL. Collectives run in a stream of their own: each begins when the backend's queued work is done
// and runs beside what is queued later; wait() makes the backend's stream wait for all of them. The host waits
// in sum() and barrier() alone.
//
// NCCL fixes its own order of summation: the same bits on every rank, and from run to run on one machine, but
// not from one machine to another.
#include "cuda/nccl_comm.h"

#include <nccl.h>

#include <cstring>
#include <thread>

#include "core/comm.h"
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
        NCCL_CHECK(lib_, CommInitRank(&comm_, size_, unique, rank_));
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
        for (cudaEvent_t* event : {&begin_, &end_})
            CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    ~NcclComm() override {
        if (stream_) cudaStreamSynchronize(stream_);
        if (comm_) lib_.CommDestroy(comm_);
        if (scalars_) backend_->release(scalars_);
        for (cudaEvent_t event : {begin_, end_})
            if (event) cudaEventDestroy(event);
        if (stream_) cudaStreamDestroy(stream_);
    }

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    Backend& backend() const override { return *backend_; }

    void all_reduce(const std::vector<Tensor>& xs) override {
        for (const Tensor& x : xs)
            data_type(x);  // an error between GroupStart and GroupEnd would leave it open
        begin();
        NCCL_CHECK(lib_, GroupStart());  // one launch for all
        ncclResult_t result = ncclSuccess;
        for (const Tensor& x : xs)
            if (result == ncclSuccess)
                result = lib_.AllReduce(x.data, x.data, numel(x), data_type(x), ncclSum, comm_, stream_);
        const ncclResult_t end = lib_.GroupEnd();  // whatever came before: a group must not stay open
        lib_.check(result, "AllReduce");
        lib_.check(end, "GroupEnd");
    }
    void reduce_scatter(Tensor shard, Tensor full) override {
        check_pieces("reduce_scatter", full, shard);
        begin();
        NCCL_CHECK(lib_, ReduceScatter(full.data, shard.data, numel(shard), data_type(full), ncclSum, comm_,
                                       stream_));
    }
    void all_gather(Tensor full, Tensor shard) override {
        check_pieces("all_gather", full, shard);
        begin();
        NCCL_CHECK(lib_, AllGather(shard.data, full.data, numel(shard), data_type(full), comm_, stream_));
    }
    void broadcast(Tensor x, int root) override {
        LLMC_CHECK(root >= 0 && root < size_, "broadcast: root is {} of {} ranks", root, size_);
        begin();
        NCCL_CHECK(lib_, Broadcast(x.data, x.data, numel(x), data_type(x), root, comm_, stream_));
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
        reserve_scalars(all);
        char* const mine = static_cast<char*>(scalars_) + bytes * static_cast<std::size_t>(rank_);
        backend_->stream();
        CUDA_CHECK(cudaMemcpyAsync(mine, x.data(), bytes, cudaMemcpyHostToDevice, stream_));
        NCCL_CHECK(lib_, AllGather(mine, scalars_, x.size(), ncclFloat64, comm_, stream_));
        std::vector<double> values(x.size() * static_cast<std::size_t>(size_));
        CUDA_CHECK(cudaMemcpyAsync(values.data(), scalars_, all, cudaMemcpyDeviceToHost, stream_));
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
    // The host waits for the stream, and hears of a rank that NCCL has lost instead of waiting for it.
    void finish() {
        for (;;) {
            const cudaError_t state = cudaStreamQuery(stream_);
            if (state == cudaSuccess) return;
            if (state != cudaErrorNotReady) CUDA_CHECK(state);
            ncclResult_t result = ncclSuccess;
            NCCL_CHECK(lib_, CommGetAsyncError(comm_, &result));
            if (result != ncclSuccess && result != ncclInProgress) {
                lib_.CommAbort(comm_);
                comm_ = nullptr;
                lib_.check(result, "of another rank or the network");
            }
            std::this_thread::yield();
        }
    }
    void begin() {
        if (!comm_) throw Error("nccl: the communicator was given up after an error");
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
        scalars_ = nullptr, scalar_bytes_ = 0;
        scalars_ = backend_->allocate(bytes);
        backend_->synchronize();  // it is zeroed in the backend's stream
        scalar_bytes_ = bytes;
    }

    Library lib_;
    std::shared_ptr<CudaBackend> backend_;
    int rank_, size_;
    ncclComm_t comm_ = nullptr;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
    void* scalars_ = nullptr;
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
