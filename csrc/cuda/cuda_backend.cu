// Memory and order of the CUDA backend, its options, and its account of the device.
#include "cuda/cuda_backend.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "core/dims.h"
#include "cuda/device.cuh"
#include "cuda/wgmma.h"

namespace llmc {

namespace {

template <class Out, class In>
struct Convert {
    Out* out;
    const In* inp;
    template <int W>
    __device__ void at(i64 i) const {
        store(out + i, load<W>(inp + i));
    }
};

// The values of the options, in the order of their enums.
constexpr const char* kAttentions[] = {"auto", "cudnn", "wgmma", "flash", "simple"};
constexpr const char* kSwitches[] = {"off", "on", "auto"};
constexpr const char* kOffOn[] = {"off", "on"};
constexpr const char* kBiasGradients[] = {"sum", "product"};

class PinnedReadback final : public Readback {
  public:
    PinnedReadback(CudaBackend& backend, std::size_t bytes) : backend_(backend), bytes_(bytes) {
        backend_.stream();  // its device
        CUDA_CHECK(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming));
        const cudaError_t error = cudaMallocHost(&memory_, std::max<std::size_t>(bytes, 1));
        if (error != cudaSuccess) cudaEventDestroy(done_);
        CUDA_CHECK(error);
    }
    ~PinnedReadback() override {
        cudaSetDevice(backend_.device());
        cudaEventSynchronize(done_);  // the device may still write
        cudaEventDestroy(done_);
        cudaFreeHost(memory_);
    }
    void queue(Tensor inp) override {
        size_ = static_cast<std::size_t>(inp.bytes());
        LLMC_CHECK(size_ <= bytes_, "{} bytes for a Readback of {}", size_, bytes_);
        backend_.refuse_in_recording("a copy to the host");
        const cudaStream_t s = backend_.stream();
        CUDA_CHECK(cudaMemcpyAsync(memory_, inp.data, size_, cudaMemcpyDeviceToHost, s));
        CUDA_CHECK(cudaEventRecord(done_, s));
    }
    void wait(void* host) override {
        backend_.stream();
        CUDA_CHECK(cudaEventSynchronize(done_));
        std::memcpy(host, memory_, size_);
    }

  private:
    CudaBackend& backend_;
    std::size_t bytes_, size_ = 0;
    cudaEvent_t done_ = nullptr;
    void* memory_ = nullptr;
};

class EventStopwatch final : public Stopwatch {
  public:
    explicit EventStopwatch(CudaBackend& backend) : backend_(backend) {
        backend_.stream();  // its device
        CUDA_CHECK(cudaEventCreateWithFlags(&begin_, cudaEventDefault));
        const cudaError_t error = cudaEventCreateWithFlags(&end_, cudaEventDefault);
        if (error != cudaSuccess) cudaEventDestroy(begin_);
        CUDA_CHECK(error);
    }
    ~EventStopwatch() override {
        cudaSetDevice(backend_.device());
        cudaEventDestroy(begin_);
        cudaEventDestroy(end_);
    }
    void start() override {
        record(begin_);
        stopped_ = false;
    }
    void stop() override {
        record(end_);
        stopped_ = true;
    }
    double seconds() override {
        if (!stopped_) return 0.0;
        backend_.refuse_in_recording("a wait");
        backend_.stream();
        float milliseconds = 0.0f;
        CUDA_CHECK(cudaEventSynchronize(end_));
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
        return 1e-3 * milliseconds;
    }

  private:
    void record(cudaEvent_t event) {
        backend_.refuse_in_recording("a stopwatch");
        CUDA_CHECK(cudaEventRecord(event, backend_.stream()));
    }
    CudaBackend& backend_;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
    bool stopped_ = false;
};

// As nvidia-smi writes it.
std::string uuid_text(const cudaUUID_t& uuid) {
    std::string text = "GPU-";
    for (int i = 0; i < 16; ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        const unsigned byte = static_cast<unsigned char>(uuid.bytes[i]);
        for (const unsigned digit : {byte >> 4, byte & 15}) text += "0123456789abcdef"[digit];
    }
    return text;
}

double megabytes(std::size_t bytes) { return static_cast<double>(bytes >> 20); }

#if defined(LLMC_CUDA_EMULATION)
bool kernels_wait() { return true; }
#else
__global__ void overlapping_kernel() { overlap_kernels(); }
// Whether overlap_kernels() waits in the code that this device runs. It does from sm_90 on, but a build without code for
// the device may have PTX of an older one, which the driver compiles.
bool kernels_wait() {
    cudaFuncAttributes attributes{};
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, overlapping_kernel));
    return attributes.ptxVersion >= 90;
}
#endif

}  // namespace

void throw_cuda_error(cudaError_t error, const char* call) {
    throw Error(filled("cuda: {} ({})", cudaGetErrorString(error), call));
}

CudaBackend::CudaBackend(int device, std::string tune_file) : device_(device) {
    options_.tune_file = std::move(tune_file);
    CUDA_CHECK(cudaSetDevice(device_));
    cudaDeviceProp p{};
    CUDA_CHECK(cudaGetDeviceProperties(&p, device_));
    if (p.major < 8)
        throw Error(filled("cuda:{} is a {} of compute capability {}.{}: llmc's kernels need 8.0 (Ampere) or "
                           "newer",
                           device_, p.name, p.major, p.minor));
    // Below sm_90 cuBLASLt does not really fuse GELU, and is slower than matmul and GELU apart.
    fuse_gelu_by_default_ = p.major >= 9;
    has_wgmma_ = wgmma_runs_on(device_);
    kernels_overlap_ = p.major >= 9 && kernels_wait();
    for (const char* name :
         {"attention", "tf32", "deterministic", "fused_gelu", "tune", "bias_gradient", "graphs", "overlap"}) {
        std::string variable = "LLMC_CUDA_" + std::string(name);
        std::transform(variable.begin(), variable.end(), variable.begin(),
                       [](char c) { return static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c); });
        const char* const value = std::getenv(variable.c_str());
        if (value && *value) set_option(name, value);
    }
    CUDA_CHECK(cudaStreamCreateWithFlags(&lanes_[0].stream, cudaStreamNonBlocking));
}

CudaBackend::~CudaBackend() {
    // Errors are ignored: nobody could handle them here.
    cudaSetDevice(device_);
    for (Lane& lane : lanes_) {
        if (lane.stream) cudaStreamSynchronize(lane.stream);
        lane.engine.reset();
    }
    cudnn_.reset();
    for (const Staging& s : staging_) {
        if (s.read) cudaEventDestroy(s.read);
        if (s.memory) cudaFreeHost(s.memory);
    }
    if (return_) cudaFreeHost(return_);
    for (const Lane& lane : lanes_) {
        if (lane.scratch) cudaFree(lane.scratch);
        if (lane.counters) cudaFree(lane.counters);
        if (lane.reached) cudaEventDestroy(lane.reached);
        if (lane.stream) cudaStreamDestroy(lane.stream);
    }
}

cudaStream_t CudaBackend::stream() {
    CUDA_CHECK(cudaSetDevice(device_));
    chain_ = false;
    return lane().stream;
}

CudaBackend::Fork::Fork(CudaBackend& backend, bool wanted) : backend_(backend), open_(wanted) {
    if (!wanted) return;
    auto& [first, second] = backend_.lanes_;
    const cudaStream_t s = backend_.stream();  // its device
    if (!second.stream) {
        backend_.refuse_in_recording("a new stream");
        for (Lane& lane : backend_.lanes_)
            CUDA_CHECK(cudaEventCreateWithFlags(&lane.reached, cudaEventDisableTiming));
        CUDA_CHECK(cudaStreamCreateWithFlags(&second.stream, cudaStreamNonBlocking));
    }
    CUDA_CHECK(cudaEventRecord(first.reached, s));
    CUDA_CHECK(cudaStreamWaitEvent(second.stream, first.reached, 0));
}

// Each stream() ends a chain of kernels that overlap: none goes on in the other lane.
void CudaBackend::Fork::other() {
    if (!open_) return;
    backend_.lane_ = 1;
    backend_.stream();
}

void CudaBackend::Fork::join() {
    if (!open_) return;
    open_ = false;
    backend_.lane_ = 0;
    backend_.stream();
    const auto& [first, second] = backend_.lanes_;
    CUDA_CHECK(cudaEventRecord(second.reached, second.stream));
    CUDA_CHECK(cudaStreamWaitEvent(first.stream, second.reached, 0));
}

CudaBackend::Fork::~Fork() {
    try {
        join();
    } catch (const Error&) {  // the exception that came before says more
    }
}

LaunchStream CudaBackend::overlapping_stream(std::initializer_list<Tensor> writes) {
    constexpr std::size_t kLongest = 256;  // of the list, if nothing else ends the chain
    const bool chained = chain_ && chain_writes_.size() < kLongest;
    const cudaStream_t s = stream();
    if (!chained) chain_writes_.clear();
    for (const Tensor& x : writes) {
        const std::pair<const char*, const char*> range(x.as<char>(), x.as<char>() + x.bytes());
        if (x && std::find(chain_writes_.begin(), chain_writes_.end(), range) == chain_writes_.end())
            chain_writes_.push_back(range);
    }
    chain_ = true;
    return {s, chained && kernels_overlap_};
}

bool CudaBackend::at_rest(const Tensor& x) const {
    const char *const begin = x.as<char>(), *const end = begin + x.bytes();
    return chain_ && std::none_of(chain_writes_.begin(), chain_writes_.end(),
                                  [&](const auto& w) { return w.first < end && begin < w.second; });
}

void CudaBackend::set_option(const std::string& name, const std::string& value) {
    const auto choose = [&](const auto& values) {
        int i = 0;
        for (const char* v : values) {
            if (value == v) return i;
            ++i;
        }
        std::string known;
        for (const char* v : values) known += (known.empty() ? "" : ", ") + std::string(v);
        throw ArgumentError(filled("option {} is '{}', expected one of: {}", name, value, known));
    };
    if (name == "attention") {
        const auto attention = static_cast<CudaOptions::Attention>(choose(kAttentions));
        if (attention == CudaOptions::Attention::cudnn && !cudnn_)  // throws now if it cannot be used
            cudnn_ = make_cudnn_attention(device_);
        if (attention == CudaOptions::Attention::wgmma && !has_wgmma_)
            throw Error(filled("attention=wgmma needs a Hopper GPU (compute capability 9.0) and a build with "
                               "code for it; cuda:{} is {}",
                               device_, info().isa));
        options_.attention = attention;
    } else if (name == "tf32") {
        options_.tf32 = choose(kOffOn) == 1;
        for (Lane& lane : lanes_) lane.engine.reset();
    } else if (name == "deterministic") {
        options_.deterministic = choose(kOffOn) == 1;
    } else if (name == "fused_gelu") {
        options_.fused_gelu = static_cast<CudaOptions::Switch>(choose(kSwitches));
    } else if (name == "tune") {
        options_.tune = choose(kOffOn) == 1;
        for (Lane& lane : lanes_) lane.engine.reset();
    } else if (name == "tune_file") {
        options_.tune_file = value;
        for (Lane& lane : lanes_) lane.engine.reset();
    } else if (name == "bias_gradient") {
        options_.bias_in_matmul = choose(kBiasGradients) == 1;
    } else if (name == "overlap") {
        options_.overlap = choose(kOffOn) == 1;
    } else if (name == "graphs") {
        options_.graphs = static_cast<CudaOptions::Switch>(choose(kSwitches));
    } else {
        Backend::set_option(name, value);
    }
    ++epoch_;
}

DeviceInfo CudaBackend::info() const {
    cudaDeviceProp p{};
    CUDA_CHECK(cudaSetDevice(device_));
    CUDA_CHECK(cudaGetDeviceProperties(&p, device_));
    std::size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    DeviceInfo info;
    info.name = filled("cuda:{}", device_);
    info.description = p.name;
    info.uuid = uuid_text(p.uuid);
    info.isa = filled("sm_{}{}", p.major, p.minor);
    info.total_bytes = static_cast<std::int64_t>(total);
    info.free_bytes = static_cast<std::int64_t>(free);
    info.multiprocessors = p.multiProcessorCount;
    int kilohertz = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device_));
    info.clock_hz = 1e3 * kilohertz;
    // Once attention has run, "auto" also says whether cuDNN is among its choices.
    const bool tried =
        options_.attention == CudaOptions::Attention::automatic && (cudnn_ || !cudnn_absence_.empty());
    info.options = filled(
        "attention {}{}, tf32 {}, deterministic {}, fused_gelu {}, tune {}{}, bias_gradient {}, graphs {}{}, "
        "overlap {}",
        kAttentions[static_cast<int>(options_.attention)],
        tried ? cudnn_ ? " (with cuDNN)" : " (without cuDNN)" : "", kOffOn[options_.tf32],
        kOffOn[options_.deterministic], kSwitches[static_cast<int>(options_.fused_gelu)],
        kOffOn[options_.tune],
        options_.tune && !options_.tune_file.empty() ? filled(" (kept in {})", options_.tune_file) : "",
        kBiasGradients[options_.bias_in_matmul], kSwitches[static_cast<int>(options_.graphs)],
        recorded_ > 0 ? filled(" ({} recorded)", recorded_) : "", kOffOn[options_.overlap]);
    const auto fallback = [&](const std::string& text) {
        if (!text.empty()) info.fallbacks += (info.fallbacks.empty() ? "" : "; ") + text;
    };
    if (plain_matmuls_ > 0)
        fallback(filled("cuBLASLt had no algorithm for {} matmuls, the largest {}", plain_matmuls_,
                        largest_plain_));
    if (cudnn_) fallback(cudnn_->refusals());
    if (unrecorded_ > 0)
        fallback(filled("{} recordings of ops failed, the first: {}", unrecorded_, first_unrecorded_));
    return info;
}

// ---- memory ----

void* CudaBackend::allocate(std::size_t bytes) {
    refuse_in_recording("an allocation");
    const cudaStream_t s = stream();
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, std::max<std::size_t>(bytes, 1));
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();  // the error is dealt with: the next launch must not find it
        std::size_t free = 0, total = 0;
        CUDA_CHECK(cudaMemGetInfo(&free, &total));
        throw Error(filled("cuda:{}: out of memory (allocating {} MB with {} of {} MB free)", device_,
                           megabytes(bytes), megabytes(free), megabytes(total)));
    }
    CUDA_CHECK(error);
    if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, s));
    return memory;
}

void CudaBackend::release(void* memory) noexcept {
    if (!memory) return;
    ++epoch_;
    if (recording()) return released_.push_back(memory);  // to be freed when that has ended
    cudaSetDevice(device_);
    cudaFree(memory);  // waits for the work that uses it
}

std::int64_t CudaBackend::workspace_bytes(std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t NH,
                                          DType dtype) {
    // The code of cuBLASLt and cuDNN, which the driver loads at first use: an allowance, not a measurement.
    constexpr std::int64_t kLibraries = std::int64_t{256} << 20;
    // Of all ops encoder_backward needs the most scratch memory (encoder.cu): four lists, two rows for every 32
    // positions, and the sort's; unless there are so many heads that attention's delta is larger.
    const std::int64_t N = B * T, scratch = std::max(N * (4 * 4 + 8 + C / 4), 4 * N * NH) + (1 << 20);
    const AttentionDims d{B, T, C, NH, C / NH};
    const bool by_cudnn = cudnn(d, Tensor(nullptr, dtype, {B, T, 3 * C})) != nullptr;
    // Weights' gradients beside the input's have a workspace of their own, and the sums of dbias.
    const std::int64_t second = options_.overlap ? MatmulEngine::kWorkspaceBytes + N * C / 16 + (1 << 20) : 0;
    return kLibraries + static_cast<std::int64_t>(MatmulEngine::kWorkspaceBytes) + scratch + second +
           (by_cudnn ? cudnn_->workspace_bytes(d, options_.deterministic) : 0);
}

void* CudaBackend::scratch(std::int64_t bytes) {
    Lane& l = lane();
    if (bytes > l.scratch_bytes) {
        release(l.scratch);
        l.scratch = nullptr, l.scratch_bytes = 0;
        l.scratch = allocate(static_cast<std::size_t>(bytes));
        l.scratch_bytes = bytes;
    }
    return l.scratch;
}

unsigned* CudaBackend::counters() {
    void*& memory = lane().counters;
    if (!memory) memory = allocate(kCounters * sizeof(unsigned));  // which fills it with zeros
    return static_cast<unsigned*>(memory);
}

void CudaBackend::zero(Tensor x) {
    zero_dims(x);
    if (x.bytes() > 0) CUDA_CHECK(cudaMemsetAsync(x.data, 0, static_cast<std::size_t>(x.bytes()), stream()));
}

void CudaBackend::copy(Tensor out, Tensor inp) {
    copy_dims(out, inp);
    const std::int64_t n = out.numel();
    if (n == 0) return;
    if (out.dtype == inp.dtype)
        CUDA_CHECK(cudaMemcpyAsync(out.data, inp.data, static_cast<std::size_t>(out.bytes()),
                                   cudaMemcpyDeviceToDevice, stream()));
    else if (out.dtype == DType::f32)
        launch_elementwise<bf16>(stream(), n, Convert<float, bf16>{out.as<float>(), inp.as<bf16>()}, out.data,
                                 inp.data);
    else
        launch_elementwise<bf16>(stream(), n, Convert<bf16, float>{out.as<bf16>(), inp.as<float>()}, out.data,
                                 inp.data);
}

void CudaBackend::from_host(Tensor out, const void* host) {
    refuse_in_recording("a copy from the host");
    host_copy_dims("from_host", out);
    const cudaStream_t s = stream();
    const std::size_t bytes = static_cast<std::size_t>(out.bytes());
    for (std::size_t done = 0; done < bytes;) {
        Staging& staging = staging_[next_staging_];
        next_staging_ = (next_staging_ + 1) % kStagings;
        if (!staging.memory) {
            CUDA_CHECK(cudaMallocHost(&staging.memory, kStagingBytes));
            CUDA_CHECK(cudaEventCreateWithFlags(&staging.read, cudaEventDisableTiming));
        }
        CUDA_CHECK(cudaEventSynchronize(staging.read));
        const std::size_t count = std::min(kStagingBytes, bytes - done);
        std::memcpy(staging.memory, static_cast<const char*>(host) + done, count);
        CUDA_CHECK(cudaMemcpyAsync(out.as<char>() + done, staging.memory, count, cudaMemcpyHostToDevice, s));
        CUDA_CHECK(cudaEventRecord(staging.read, s));
        done += count;
    }
}

void CudaBackend::to_host(void* host, Tensor inp) {
    refuse_in_recording("a copy to the host");
    host_copy_dims("to_host", inp);
    const cudaStream_t s = stream();
    const std::size_t bytes = static_cast<std::size_t>(inp.bytes());
    const bool pinned = bytes <= kReturnBytes;  // else the driver copies in parts of its own
    if (pinned && bytes > return_bytes_) {
        const std::size_t size = std::bit_ceil(std::max<std::size_t>(bytes, 4096));
        if (return_) CUDA_CHECK(cudaFreeHost(return_));
        return_ = nullptr, return_bytes_ = 0;
        CUDA_CHECK(cudaMallocHost(&return_, size));
        return_bytes_ = size;
    }
    if (bytes > 0)
        CUDA_CHECK(cudaMemcpyAsync(pinned ? return_ : host, inp.data, bytes, cudaMemcpyDeviceToHost, s));
    CUDA_CHECK(cudaStreamSynchronize(s));
    if (pinned && bytes > 0) std::memcpy(host, return_, bytes);
}

std::unique_ptr<Readback> CudaBackend::make_readback(std::size_t bytes) {
    return std::make_unique<PinnedReadback>(*this, bytes);
}

std::unique_ptr<Stopwatch> CudaBackend::make_stopwatch() { return std::make_unique<EventStopwatch>(*this); }

void CudaBackend::synchronize() {
    refuse_in_recording("a wait");
    CUDA_CHECK(cudaStreamSynchronize(stream()));
}

}  // namespace llmc
