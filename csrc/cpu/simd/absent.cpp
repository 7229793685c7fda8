// Kernel sets that this build does not have. CMake compiles this with LLMC_HAVE_<SET> for each that it does.
#include "cpu/kernels.h"

namespace llmc {
#ifndef LLMC_HAVE_AVX2
const Kernels* kernels_avx2() { return nullptr; }
#endif
#ifndef LLMC_HAVE_AVX512
const Kernels* kernels_avx512() { return nullptr; }
#endif
#ifndef LLMC_HAVE_AVX512_BF16
const Kernels* kernels_avx512_bf16() { return nullptr; }
#endif
#ifndef LLMC_HAVE_AMX
const Kernels* kernels_amx() { return nullptr; }
#endif
#ifndef LLMC_HAVE_NEON
const Kernels* kernels_neon() { return nullptr; }
#endif
#ifndef LLMC_HAVE_NEON_BF16
const Kernels* kernels_neon_bf16() { return nullptr; }
#endif
#ifndef LLMC_HAVE_ACCELERATE
const Kernels* kernels_accelerate() { return nullptr; }
#endif
}  // namespace llmc
