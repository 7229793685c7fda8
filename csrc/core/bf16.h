// The storage type of bf16: the upper half of an IEEE float32. Kept apart, and free of functions, because the
// kernel files that are compiled once per instruction set may include nothing that the linker could merge.
#pragma once

#include <cstdint>

namespace llmc {
struct bf16 {
    std::uint16_t bits;
};
}  // namespace llmc
