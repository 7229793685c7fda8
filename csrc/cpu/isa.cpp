#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

namespace llmc {

namespace {

struct Cpu {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false, amd = false, neon = false,
         neon_bf16 = false;
};

#if defined(__x86_64__) || defined(_M_X64)
struct Regs {
    std::uint32_t a, b, c, d;
};
Regs cpuid(std::uint32_t leaf, std::uint32_t sub) {
    Regs r{};
#if defined(_MSC_VER) && !defined(__clang__)
    int x[4];
    __cpuidex(x, static_cast<int>(leaf), static_cast<int>(sub));
    std::memcpy(&r, x, sizeof r);
#else
    __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
#endif
    return r;
}

// Which register files the system saves (XCR0). Needs OSXSAVE.
std::uint64_t xcr0() {
#if defined(_MSC_VER) && !defined(__clang__)
    return _xgetbv(0);
#else
    std::uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (static_cast<std::uint64_t>(hi) << 32) | lo;
#endif
}

// The tile registers are given only to a process that asks: on Linux by arch_prctl(ARCH_REQ_XCOMP_PERM,
// XFEATURE_XTILEDATA), on Windows by a function that Windows 11 and Server 2022 have.
bool tiles_granted() {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#elif defined(_WIN32)
    using Enable = BOOL(WINAPI*)(DWORD64);
    const auto enable = reinterpret_cast<Enable>(
        GetProcAddress(GetModuleHandleW(L"kernel32.dll"), "EnableProcessOptionalXStateFeatures"));
    return enable && enable(DWORD64{1} << 18);
#else
    return false;
#endif
}

Cpu detect() {
    Cpu cpu;
    const Regs vendor = cpuid(0, 0), f1 = cpuid(1, 0);
    cpu.amd = vendor.b == 0x68747541;  // "Auth"enticAMD
    if (vendor.a < 7 || !(f1.c >> 27 & 1)) return cpu;
    const std::uint64_t saved = xcr0();
    const Regs f7 = cpuid(7, 0), f71 = f7.a >= 1 ? cpuid(7, 1) : Regs{};
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
    cpu.avx2 = ymm && (f7.b >> 5 & 1) && (f1.c >> 12 & 1) && (f7.b >> 8 & 1);  // AVX2, FMA, BMI2
    cpu.avx512 =
        cpu.avx2 && zmm && (f7.b >> 16 & 1) && (f7.b >> 17 & 1) && (f7.b >> 30 & 1) && (f7.b >> 31 & 1);
    cpu.avx512_bf16 = cpu.avx512 && (f71.a >> 5 & 1);
    cpu.amx = cpu.avx512_bf16 && tiles && (f7.d >> 22 & 1) && (f7.d >> 24 & 1) &&
              tiles_granted();  // AMX-BF16, AMX-TILE
    return cpu;
}

std::string brand() {
    std::string text;
    for (std::uint32_t leaf = 0x80000002; leaf <= 0x80000004 && cpuid(0x80000000, 0).a >= leaf; ++leaf) {
        const Regs r = cpuid(leaf, 0);
        text.append(reinterpret_cast<const char*>(&r), sizeof r);
    }
    return text;
}
#elif defined(__aarch64__) || defined(_M_ARM64)
Cpu detect() {
    Cpu cpu;
    cpu.neon = true;
#if defined(__linux__)
    cpu.neon_bf16 = getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16
#elif defined(__APPLE__)
    int value = 0;
    std::size_t size = sizeof value;
    cpu.neon_bf16 = sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value;
#endif
    return cpu;
}

std::string brand() {
    char text[64] = "";
#if defined(__APPLE__)
    std::size_t size = sizeof text;
    if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) != 0) return "";
#endif
    return text;
}
#else
Cpu detect() { return {}; }
std::string brand() { return ""; }
#endif

}  // namespace

std::string cpu_name() {
    const std::string text = brand().c_str();  // up to its end: it is padded with zeros
    const std::size_t begin = text.find_first_not_of(' ');
    if (begin == std::string::npos) return "a CPU without a name";
    return text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

IsaChoice choose_isa() {
    const Cpu cpu = detect();
    struct Row {
        const char* name;
        const Kernels* kernels;
        bool supported;
        bool emulated = false;  // slow: used only when asked for
    };
    // Worst first. On Intel the bf16 dot product runs at half the rate of f32 (measured on Sapphire Rapids),
    // so that set is behind plain AVX-512 there.
    const Row avx512_bf16{"avx512_bf16", kernels_avx512_bf16(), cpu.avx512_bf16};
    const Row avx512{"avx512", kernels_avx512(), cpu.avx512};
#if defined(LLMC_AMX_EMULATION)
    const Row amx{"amx", kernels_amx(), cpu.avx512, true};
#else
    const Row amx{"amx", kernels_amx(), cpu.amx};
#endif
#if defined(LLMC_ACCELERATE_EMULATION)
    const Row accelerate{"accelerate", kernels_accelerate(), cpu.avx2 || cpu.neon, true};
#else
    const Row accelerate{"accelerate", kernels_accelerate(), cpu.neon};
#endif
    const Row rows[] = {{"baseline", kernels_baseline(), true},
                        {"avx2", kernels_avx2(), cpu.avx2},
                        cpu.amd ? avx512 : avx512_bf16,
                        cpu.amd ? avx512_bf16 : avx512,
                        amx,
                        {"neon", kernels_neon(), cpu.neon},
                        {"neon_bf16", kernels_neon_bf16(), cpu.neon_bf16},
                        accelerate};
    IsaChoice choice{nullptr, {}, {}};
    const char* wanted = std::getenv("LLMC_ISA");
    if (wanted && !*wanted) wanted = nullptr;
    bool known = false;
    for (const Row& row : rows) {
        known = known || (wanted && row.name == std::string(wanted));
        if (!row.kernels) continue;
        choice.built.push_back(row.name);
        if (!row.supported) continue;
        choice.usable.push_back(row.name);
        if (wanted ? row.name == std::string(wanted) : !row.emulated) choice.kernels = row.kernels;
    }
    if (!choice.kernels) {
        std::string list;
        for (const std::string& name : choice.usable) list += (list.empty() ? "" : ", ") + name;
        throw ArgumentError(
            filled("LLMC_ISA={}: {}; usable here: {}", wanted,
                   known ? "not supported by this CPU, system or build" : "unknown instruction set", list));
    }
    return choice;
}

}  // namespace llmc
