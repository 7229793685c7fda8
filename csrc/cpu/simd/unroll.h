// LLMC_UNROLL before a loop with constant bounds: its arrays are then registers.
#pragma once

#if defined(__clang__)
#define LLMC_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LLMC_UNROLL _Pragma("GCC unroll 16")
#else
#define LLMC_UNROLL
#endif

// LLMC_NOINLINE before a function: its registers are not shared with what its caller keeps.
#if defined(_MSC_VER) && !defined(__clang__)
#define LLMC_NOINLINE __declspec(noinline)
#else
#define LLMC_NOINLINE __attribute__((noinline))
#endif
