// What core/backend.cpp and the bindings know of this folder. Absence is a file: without CUDA, no_cuda.cpp is
// compiled instead.
#pragma once

#include <memory>
#include <string>

namespace llmc {
class Backend;
std::shared_ptr<Backend> make_cuda(int device);
// "CUDA 13.0, cuDNN, NCCL; devices: ..." or the reason why there is none.
std::string cuda_status();
bool cuda_built();
}  // namespace llmc
