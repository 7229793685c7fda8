// Ops that are queued again and again, as CUDA graphs: the device then begins one op after another without the
// host.
//
// They are queued plainly for the first time, when memory is allocated and plans of matmuls are made, which cannot be
// recorded; recorded when they come again; and launched from then on. A recording holds addresses and is good only
// for the epoch that it was made in: whatever releases memory or sets an option begins another.
#include <algorithm>
#include <exception>
#include <utility>
#include <vector>

#include "cuda/cuda_backend.h"

namespace llmc {

class CudaBackend::Graph final : public Recording {
  public:
    Graph(int device, std::int64_t epoch, std::initializer_list<std::int64_t> key)
        : device(device), epoch(epoch), key(key) {}
    ~Graph() override {
        if (!exec) return;
        cudaSetDevice(device);
        cudaGraphExecDestroy(exec);  // the device finishes what it has begun
    }

    const int device;
    const std::int64_t epoch;
    const std::vector<std::int64_t> key;
    cudaGraphExec_t exec = nullptr;
    bool refused = false;  // they cannot be recorded
};

void CudaBackend::repeat(std::unique_ptr<Recording>& kept, Phase phase,
                         std::initializer_list<std::int64_t> key, const std::function<void()>& ops) {
    const bool wanted = options_.graphs == CudaOptions::Switch::automatic
                            ? phase == Phase::generation
                            : options_.graphs == CudaOptions::Switch::on;
    if (!wanted || recording()) return ops();  // what is repeated within a recording is a part of it
    Graph* const graph = static_cast<Graph*>(kept.get());
    if (!graph || graph->epoch != epoch() ||
        !std::equal(key.begin(), key.end(), graph->key.begin(), graph->key.end())) {
        kept.reset();
        ops();
        kept = std::make_unique<Graph>(device_, epoch(), key);
        return;
    }
    if (!graph->exec && !graph->refused) record(*graph, ops);
    if (!graph->exec) return ops();
    const cudaError_t error = cudaGraphLaunch(graph->exec, stream());
    if (error != cudaSuccess) kept.reset();
    CUDA_CHECK(error);
}

// Queues nothing. If what the device or a library said stands against a recording, that is remembered and `exec` stays
// null; a mistake of the caller's is thrown on.
void CudaBackend::record(Graph& graph, const std::function<void()>& ops) {
    const cudaStream_t s = stream();
    std::string refusal;
    std::exception_ptr mistake;
    CUDA_CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    recorder_ = std::this_thread::get_id();
    try {
        ops();
    } catch (const ArgumentError&) {
        mistake = std::current_exception();
    } catch (const Error& e) {
        refusal = e.what();
    } catch (...) {
        mistake = std::current_exception();
    }
    recorder_ = std::thread::id();
    cudaGraph_t captured = nullptr;
    cudaError_t error = cudaStreamEndCapture(s, &captured);
    stream();  // what is queued next does not follow what was recorded: it must not overlap with it
    if (!released_.empty() && refusal.empty()) refusal = "memory is released among them";
    for (void* memory : std::exchange(released_, {})) cudaFree(memory);
    // If another thread released memory meanwhile, it is tried again another time.
    if (error == cudaSuccess && refusal.empty() && !mistake && graph.epoch == epoch())
        error = cudaGraphInstantiate(&graph.exec, captured, 0);
    if (captured) cudaGraphDestroy(captured);
    if (error != cudaSuccess) {
        cudaGetLastError();  // the error is dealt with: the next launch must not find it
        if (refusal.empty()) refusal = cudaGetErrorString(error);
    }
    if (mistake) std::rethrow_exception(mistake);
    graph.refused = !refusal.empty();
    if (graph.exec) ++recorded_;
    if (graph.refused && unrecorded_++ == 0) first_unrecorded_ = refusal;
}

bool is_recorded(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
}

void CudaBackend::refuse_in_recording(const char* what) const {
    if (recording()) throw Error(filled("cuda: {} cannot be recorded", what));
}

}  // namespace llmc
