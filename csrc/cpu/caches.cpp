#include "cpu/caches.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>

#include "core/check.h"

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <bit>
#endif

namespace llmc {

namespace {

// "512K", "32M" or "49152"; 0 if it is anything else.
std::int64_t bytes_of(const std::string& text) {
    std::size_t end = text.find_first_not_of("0123456789");
    if (end == std::string::npos) end = text.size();
    if (end == 0 || end > 11) return 0;
    const std::string unit = text.substr(end);
    const int shift = unit.empty()                 ? 0
                      : unit == "K" || unit == "k" ? 10
                      : unit == "M" || unit == "m" ? 20
                                                   : -1;
    return shift < 0 ? 0 : std::atoll(text.c_str()) << shift;
}

Cache& level(Caches& caches, int number) {
    return number == 1 ? caches.l1 : number == 2 ? caches.l2 : caches.l3;
}

// Where CPUs differ (performance and efficiency cores), the smallest share counts: blocks for an eighth of L2 cost 2 % at
// most (Zen 5), and what blocks cost that do not fit depends on what lies behind L2. Sizes that no cache has, as some
// virtual machines tell them, count as not told.
void keep_smaller(Cache& kept, Cache found) {
    constexpr std::int64_t kLeast = 4 << 10, kMost = 1 << 30;
    if (found.bytes < kLeast || found.bytes > kMost || found.shared_by <= 0) return;
    if (kept.bytes == 0 || found.bytes / found.shared_by < kept.bytes / kept.shared_by) kept = found;
}

#if defined(__linux__)
Caches native_caches() {
    std::vector<int> allowed;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
    Caches found = caches_in("/sys/devices/system/cpu", allowed);
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (found.l2.bytes == 0) {  // no /sys: the C library asks the CPU, which does not tell who shares
        keep_smaller(found.l1, {sysconf(_SC_LEVEL1_DCACHE_SIZE), 1});
        keep_smaller(found.l2, {sysconf(_SC_LEVEL2_CACHE_SIZE), 1});
    }
#endif
    return found;
}
#elif defined(__APPLE__)
std::int64_t sysctl_value(const std::string& name) {
    std::int64_t value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(name.c_str(), &value, &size, nullptr, 0) == 0 ? value : 0;
}

Caches native_caches() {
    Caches found;
    // Level 0 are the performance cores. Threads run on the others too.
    for (std::int64_t i = 0; i < sysctl_value("hw.nperflevels"); ++i) {
        const std::string core = "hw.perflevel" + std::to_string(i) + ".";
        keep_smaller(found.l1, {sysctl_value(core + "l1dcachesize"), 1});
        keep_smaller(found.l2, {sysctl_value(core + "l2cachesize"), sysctl_value(core + "cpusperl2")});
    }
    // Before macOS 12, and Intel's L3.
    if (found.l1.bytes == 0) keep_smaller(found.l1, {sysctl_value("hw.l1dcachesize"), 1});
    if (found.l2.bytes == 0) keep_smaller(found.l2, {sysctl_value("hw.l2cachesize"), 1});
    keep_smaller(found.l3, {sysctl_value("hw.l3cachesize"), sysctl_value("hw.activecpu")});
    return found;
}
#elif defined(_WIN32)
Caches native_caches() {
    Caches found;
    DWORD size = 0;
    GetLogicalProcessorInformationEx(RelationCache, nullptr, &size);
    std::vector<char> buffer(size);
    auto* const first = reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data());
    if (size == 0 || !GetLogicalProcessorInformationEx(RelationCache, first, &size)) return found;
    DWORD_PTR allowed = 0, exist = 0;  // 0 if threads run in several groups of processors: then all are
    if (!GetProcessAffinityMask(GetCurrentProcess(), &allowed, &exist) || allowed == 0) allowed = ~allowed;
    for (DWORD at = 0; at < size;) {
        const auto& entry =
            *reinterpret_cast<const SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data() + at);
        const CACHE_RELATIONSHIP& cache = entry.Cache;
        const auto sharers = std::popcount(static_cast<std::uint64_t>(cache.GroupMask.Mask & allowed));
        if ((cache.Type == CacheData || cache.Type == CacheUnified) && cache.Level >= 1 && cache.Level <= 3)
            keep_smaller(level(found, cache.Level), {cache.CacheSize, sharers});
        at += entry.Size;
    }
    return found;
}
#else
Caches native_caches() { return {}; }
#endif

}  // namespace

Caches caches_in(const std::string& directory, const std::vector<int>& allowed) {
    Caches found;
    constexpr std::size_t kLookedAt = 64;  // CPUs of several kinds are in small machines
    for (std::size_t i = 0; i < std::min(allowed.size(), kLookedAt); ++i)
        for (int index = 0;; ++index) {
            const std::string cache = directory + "/cpu" + std::to_string(allowed[i]) + "/cache/index" +
                                      std::to_string(index) + "/";
            const auto word = [&](const char* name) {
                std::string text;
                std::ifstream(cache + name) >> text;
                return text;
            };
            const std::string number = word("level");
            if (number.empty()) break;
            if (number != "1" && number != "2" && number != "3") continue;
            if (const std::string type = word("type"); type != "Data" && type != "Unified") continue;
            std::int64_t sharers = 0;  // from a list such as "0-3,8"
            std::ifstream list(cache + "shared_cpu_list");
            for (int begin; list >> begin;) {
                int end = begin;
                if (list.peek() == '-') list.ignore() >> end;
                sharers += std::count_if(allowed.begin(), allowed.end(),
                                         [=](int cpu) { return begin <= cpu && cpu <= end; });
                if (list.peek() == ',') list.ignore();
            }
            keep_smaller(level(found, number[0] - '0'),
                         {bytes_of(word("size")), std::max<std::int64_t>(1, sharers)});
        }
    return found;
}

Caches caches() {
    if (const char* wanted = std::getenv("LLMC_CACHES"); wanted && *wanted) {
        std::array<std::int64_t, 3> sizes{};
        std::string rest = std::string(wanted) + ",";
        std::size_t count = 0;
        for (std::size_t comma; (comma = rest.find(',')) != std::string::npos;
             rest.erase(0, comma + 1), ++count)
            if (count < 3) sizes[count] = bytes_of(rest.substr(0, comma));
        LLMC_CHECK(count == 3 && std::find(sizes.begin(), sizes.end(), 0) == sizes.end(),
                   "LLMC_CACHES={}: expected the sizes of L1, L2 and L3, as in 32K,512K,16M", wanted);
        return {{sizes[0], 1}, {sizes[1], 1}, {sizes[2], 1}};
    }
    static const Caches native = native_caches();
    return native;
}

std::int64_t l2_share(const Caches& c) {
    return c.l2.bytes == 0 ? std::int64_t{256} << 10 : c.l2.bytes / c.l2.shared_by;
}
std::int64_t l3_share(const Caches& c) { return std::max(l2_share(c), c.l3.bytes / c.l3.shared_by); }

}  // namespace llmc
