#include "cuda/make_cuda.h"

#include "core/check.h"

namespace llmc {

namespace {
[[noreturn]] void absent(const char* flag) {
    throw Error(
        filled("llmc was built without CUDA; build it with: pip install . -C cmake.define.{}=ON", flag));
}
}  // namespace

std::shared_ptr<Backend> make_cuda(int) { absent("USE_CUDA"); }
std::string cuda_status() { return "not built (pip install . -C cmake.define.USE_CUDA=ON)"; }
bool cuda_built() { return false; }
void set_library_directories(std::vector<std::string>) {}
void set_tune_file(std::string) {}
std::string make_nccl_id() { absent("USE_NCCL"); }
std::shared_ptr<Comm> make_nccl(std::shared_ptr<Backend>, int, int, const std::string&, double) {
    absent("USE_NCCL");
}

}  // namespace llmc
