#include "cuda/dynamic_library.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <filesystem>
#include <mutex>

#include "core/check.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace llmc {

// The major version that the build's toolkit has comes first.
#if CUDART_VERSION >= 13000
#define LLMC_EITHER(cuda13, cuda12) cuda13, cuda12
#define LLMC_PACKAGE(cuda13, cuda12) cuda13
#else
#define LLMC_EITHER(cuda13, cuda12) cuda12, cuda13
#define LLMC_PACKAGE(cuda13, cuda12) cuda12
#endif

#if defined(_WIN32)
const LibraryNames kCublasLt{"cuBLASLt",
                             {LLMC_EITHER("cublasLt64_13.dll", "cublasLt64_12.dll")},
                             "LLMC_CUBLASLT_LIB",
                             LLMC_PACKAGE("nvidia-cublas", "nvidia-cublas-cu12")};
const LibraryNames kCudnn{
    "cuDNN", {"cudnn64_9.dll"}, "LLMC_CUDNN_LIB", LLMC_PACKAGE("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")};
const LibraryNames kNccl{"NCCL", {"nccl.dll"}, "LLMC_NCCL_LIB", "(there is no package for Windows)"};
#else
const LibraryNames kCublasLt{"cuBLASLt",
                             {LLMC_EITHER("libcublasLt.so.13", "libcublasLt.so.12")},
                             "LLMC_CUBLASLT_LIB",
                             LLMC_PACKAGE("nvidia-cublas", "nvidia-cublas-cu12")};
const LibraryNames kCudnn{
    "cuDNN", {"libcudnn.so.9"}, "LLMC_CUDNN_LIB", LLMC_PACKAGE("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")};
#if defined(LLMC_CUDA_EMULATION)  // NVIDIA's own knows nothing of the emulated device
const LibraryNames kNccl{"NCCL's stand-in",
                         {LLMC_NCCL_STAND_IN},
                         "LLMC_NCCL_LIB",
                         "(there is none: build the target nccl_stand_in)"};
#else
const LibraryNames kNccl{
    "NCCL", {"libnccl.so.2"}, "LLMC_NCCL_LIB", LLMC_PACKAGE("nvidia-nccl-cu13", "nvidia-nccl-cu12")};
#endif
#endif

namespace {

std::mutex directories_mutex;
std::vector<std::string>& directories() {
    static std::vector<std::string> list;
    return list;
}

#if defined(_WIN32)
// Paths come from Python, in UTF-8.
std::filesystem::path native(const std::string& file) {
    return std::filesystem::path(std::u8string(file.begin(), file.end())).make_preferred();
}
void* already_loaded(const std::string& file) { return GetModuleHandleW(native(file).c_str()); }
void* open(const std::string& file) {
    // From a directory, the DLL's own neighbours are searched too.
    const std::filesystem::path path = native(file);
    return LoadLibraryExW(path.c_str(), nullptr, path.has_parent_path() ? LOAD_WITH_ALTERED_SEARCH_PATH : 0);
}
void* find_symbol(void* handle, const char* name) {
    return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle), name));
}
#else
void* already_loaded(const std::string& file) { return dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD); }
// RTLD_GLOBAL: cuDNN opens its parts and cuBLASLt by name, and finds what is loaded.
void* open(const std::string& file) { return dlopen(file.c_str(), RTLD_LAZY | RTLD_GLOBAL); }
void* find_symbol(void* handle, const char* name) { return dlsym(handle, name); }
#endif

struct Opened {
    void* handle = nullptr;
    std::string path;
};
Opened open_first(const LibraryNames& names) {
    const char* const chosen = std::getenv(names.variable);
    if (chosen && *chosen) return {open(chosen), chosen};
    for (const char* file : names.files)
        if (void* const handle = already_loaded(file)) return {handle, file};
    const std::lock_guard<std::mutex> lock(directories_mutex);
    for (const char* file : names.files) {
        for (const std::string& directory : directories())
            if (void* const handle = open(directory + "/" + file)) return {handle, directory + "/" + file};
        if (void* const handle = open(file)) return {handle, file};
    }
    return {};
}

std::string missing(const LibraryNames& names) {
    return filled("{} ({}) was not found: pip install {}, or name the file in {}", names.title,
                  names.files.front(), names.package, names.variable);
}

}  // namespace

void set_library_directories(std::vector<std::string> list) {
    const std::lock_guard<std::mutex> lock(directories_mutex);
    directories() = std::move(list);
}

DynamicLibrary::DynamicLibrary(const LibraryNames& names) : title_(names.title) {
    Opened opened = open_first(names);
    if (!opened.handle) throw Error(missing(names));
    handle_ = opened.handle;
    path_ = std::move(opened.path);
}

void* DynamicLibrary::symbol(const char* name) const {
    void* const p = find_symbol(handle_, name);
    if (!p) throw Error(filled("{} has no function {}: {} is too old", path_, name, title_));
    return p;
}

std::string library_status(const LibraryNames& names) {
    const Opened opened = open_first(names);
    return opened.handle ? filled("{} found ({})", names.title, opened.path) : missing(names);
}

}  // namespace llmc
