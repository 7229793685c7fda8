// Comm over NCCL, which is opened at first use (nccl_comm.cpp, or no_nccl.cpp in a build without).
#pragma once

#include <string>

#include "cuda/make_cuda.h"

namespace llmc {
// "NCCL 2.28 (path)", or what is missing.
std::string nccl_status();
}  // namespace llmc
