// What backends.cpp and the bindings know of this folder. In a build without CUDA, no_cuda.cpp defines these functions.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace llmc {
class Backend;
class Comm;
std::shared_ptr<Backend> make_cuda(int device);
// "CUDA 13.0; devices: ...; cuBLASLt found (...); ...", with what is missing and the package that brings it.
std::string cuda_status();
bool cuda_built();
// Directories of NVIDIA's wheels, searched for libraries at their first use.
void set_library_directories(std::vector<std::string> directories);
// Where backends keep the algorithms that tuning chose, unless their option tune_file says otherwise.
// In UTF-8; at first empty: nowhere.
void set_tune_file(std::string file);

// NCCL: rank 0 makes an id, which reaches the other ranks by other means; then every rank makes its Comm. `timeout`:
// after so many seconds of waiting for other ranks, at the start, to launch a collective or in sum(), it throws Error.
std::string make_nccl_id();
std::shared_ptr<Comm> make_nccl(std::shared_ptr<Backend> backend, int rank, int size, const std::string& id,
                                double timeout);
}  // namespace llmc
