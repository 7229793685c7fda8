#include "cuda/make_cuda.h"

#include "core/check.h"

namespace llmc {

std::shared_ptr<Backend> make_cuda(int) {
    throw Error("llmc was built without CUDA; build it with: pip install . -C cmake.define.USE_CUDA=ON");
}

std::string cuda_status() { return "not built (pip install . -C cmake.define.USE_CUDA=ON)"; }
bool cuda_built() { return false; }

}  // namespace llmc
