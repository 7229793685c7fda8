// Which kernel set runs here: the best that the CPU, the system and this build have, or the one that LLMC_ISA
// names.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace llmc {

struct IsaChoice {
    const Kernels* kernels;
    std::vector<std::string> usable;  // every set that would run here, worst first
    std::vector<std::string> built;   // every set in this build
};

// Throws ArgumentError if LLMC_ISA names a set that is unknown, not built, or not supported by this CPU.
IsaChoice choose_isa();

// The CPU's name, as its maker wrote it. Linux and Windows on ARM do not tell it.
std::string cpu_name();

}  // namespace llmc
