#include "comm/comm.h"
#include "cuda/nccl_comm.h"

namespace llmc {

namespace {
[[noreturn]] void absent() {
    throw Error("llmc was built without NCCL; build it with: pip install . -C cmake.define.USE_NCCL=ON");
}
}  // namespace

std::string make_nccl_id() { absent(); }
std::shared_ptr<Comm> make_nccl(std::shared_ptr<Backend>, int, int, const std::string&, double) { absent(); }
std::string nccl_status() { return "NCCL not built (pip install . -C cmake.define.USE_NCCL=ON)"; }

}  // namespace llmc
