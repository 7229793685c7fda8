// Shared libraries opened at first use, so that the extension itself needs none of NVIDIA's.
#pragma once

#include <string>
#include <vector>

namespace llmc {

// One library of NVIDIA's: what its file is called, newest first, which variable names one file to use
// instead, and which package brings it.
struct LibraryNames {
    const char* title;               // "cuBLASLt"
    std::vector<const char*> files;  // "libcublasLt.so.13", ...
    const char* variable;            // "LLMC_CUBLASLT_LIB"
    const char* package;             // "nvidia-cublas"
};
extern const LibraryNames kCublasLt, kCudnn, kNccl;

// The folders of pip's wheels, which Python knows (src/llmc/system/cuda_libs.py). Declared in make_cuda.h too, for the
// bindings.
void set_library_directories(std::vector<std::string> directories);

// Stays open until the process ends: NVIDIA's libraries are not made to be unloaded.
class DynamicLibrary {
  public:
    // Looks among the libraries already loaded, then in the directories, then in the system. Throws Error naming the
    // package to install.
    explicit DynamicLibrary(const LibraryNames& names);
    void* symbol(const char* name) const;  // throws Error
    const std::string& path() const { return path_; }

    // function<decltype(cublasLtCreate)>("cublasLtCreate")
    template <class F>
    F* function(const char* name) const {
        return reinterpret_cast<F*>(symbol(name));
    }

  private:
    const char* title_;
    void* handle_ = nullptr;
    std::string path_;
};

// "found (path)", or what is missing.
std::string library_status(const LibraryNames& names);

}  // namespace llmc
