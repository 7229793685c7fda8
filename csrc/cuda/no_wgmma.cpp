#include "cuda/wgmma.h"

namespace llmc {

bool wgmma_runs_on(int) { return false; }
bool wgmma_supports(const AttentionDims&, const Tensor&, const Tensor&) { return false; }
void wgmma_forward(Tensor, Tensor, Tensor, const AttentionDims&, cudaStream_t) {
    throw Error("llmc was built without wgmma");
}
void wgmma_backward(Tensor, Tensor, Tensor, Tensor, const float*, const AttentionDims&, cudaStream_t) {
    throw Error("llmc was built without wgmma");
}

}  // namespace llmc
