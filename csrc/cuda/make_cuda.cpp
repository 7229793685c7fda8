// Whether there is a GPU to make a backend of, and what `llmc info` says of it.
#include "cuda/make_cuda.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "cuda/cuda_backend.h"
#include "cuda/dynamic_library.h"
#include "cuda/nccl_comm.h"
#include "cuda/tuned_algorithms.h"

namespace llmc {

namespace {

std::mutex tune_file_mutex;
std::string default_tune_file;

std::string tune_file() {
    const std::lock_guard<std::mutex> lock(tune_file_mutex);
    if (!default_tune_file.empty()) return default_tune_file;
    const char* const chosen = std::getenv("LLMC_CUDA_TUNE_FILE");  // for programs without Python
    return chosen ? chosen : "";
}

std::string version_text(int version) { return filled("{}.{}", version / 1000, version % 1000 / 10); }

// Why there are no devices; empty if there are some.
std::string absence(int* count) {
    *count = 0;
    // The process that has found GPUs. One forked from it finds none, which must not look as if there were none.
    static std::atomic<int> user{0};
    if (user != 0 && user != process_id()) throw std::runtime_error(kForkedFromGpu);
    const cudaError_t error = cudaGetDeviceCount(count);
    if (error == cudaSuccess && *count > 0) {
        user = process_id();
        return "";
    }
    cudaGetLastError();
    if (error == cudaSuccess || error == cudaErrorNoDevice) return "no NVIDIA GPU was found";
    if (error == cudaErrorInsufficientDriver) {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        if (driver == 0) return "no NVIDIA driver was found";
        return filled("the NVIDIA driver is for CUDA {}, but this build needs {}", version_text(driver),
                      version_text(runtime));
    }
    return cudaGetErrorString(error);
}

}  // namespace

std::shared_ptr<Backend> make_cuda(int device) {
    int count = 0;
    const std::string reason = absence(&count);
    if (!reason.empty()) throw Error(filled("cuda:{}: {}; device 'cpu' needs none", device, reason));
    if (device >= count)
        throw Error(filled("cuda:{}: there are {} GPUs, the first is cuda:0", device, count));
    return std::make_shared<CudaBackend>(device, tune_file());
}

std::string cuda_status() {
    int runtime = 0, count = 0;
    cudaRuntimeGetVersion(&runtime);
    std::string status = filled("CUDA {}; ", version_text(runtime));
    const std::string reason = absence(&count);
    status += reason.empty() ? "devices:" : reason;
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp p{};
        if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
        status += filled(" cuda:{} {} (sm_{}{}, {} MB)", i, p.name, p.major, p.minor, p.totalGlobalMem >> 20);
    }
    status += "; " + library_status(kCublasLt) + "; " + cudnn_status() + "; " + nccl_status();
    const std::string file = tune_file();
    const std::int64_t tuned = TunedAlgorithms::count(std::u8string(file.begin(), file.end()));
    if (tuned > 0) status += filled("; tuned algorithms of {} matmuls ({})", tuned, file);
    return status;
}

bool cuda_built() { return true; }

void set_tune_file(std::string file) {
    const std::lock_guard<std::mutex> lock(tune_file_mutex);
    default_tune_file = std::move(file);
}

}  // namespace llmc
