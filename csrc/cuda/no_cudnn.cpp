#include "cuda/cudnn_attention.h"

namespace llmc {

std::unique_ptr<CudnnAttention> make_cudnn_attention(int) {
    throw Error("llmc was built without cuDNN; build it with: pip install . -C cmake.define.USE_CUDNN=ON");
}
std::string cudnn_status() { return "cuDNN not built (pip install . -C cmake.define.USE_CUDNN=ON)"; }

}  // namespace llmc
