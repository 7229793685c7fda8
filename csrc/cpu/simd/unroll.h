// LLMC_UNROLL before a loop with constant bounds: its arrays are then registers.
#pragma once

#if defined(__clang__)
#define LLMC_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LLMC_UNROLL _Pragma("GCC unroll 16")
#else
#define LLMC_UNROLL
#endif
