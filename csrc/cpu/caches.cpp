#include "cpu/caches.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <vector>

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

// Where CPUs differ (performance and efficiency cores), the smallest share counts: a block that is too small costs a few
// percent, one that does not fit costs as much as the cache gains.
void keep_smaller(Cache& kept, Cache found) {
    if (found.bytes <= 0 || found.shared_by <= 0) return;
    if (kept.bytes == 0 || found.bytes / found.shared_by < kept.bytes / kept.shared_by) kept = found;
}

#if defined(__linux__)
bool may_run_on(int cpu) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 && cpu < CPU_SETSIZE && CPU_ISSET(cpu, &set);
}

Caches native_caches() {
    Caches found;
    int first = 0, last = CPU_SETSIZE - 1;  // hybrid CPUs number one kind of core after the other
    while (first < last && !may_run_on(first)) ++first;
    while (last > first && !may_run_on(last)) --last;
    for (const int cpu : {first, last}) {
        Caches of_cpu = caches_in("/sys/devices/system/cpu", cpu, may_run_on);
        for (int i = 1; i <= 3; ++i) keep_smaller(level(found, i), level(of_cpu, i));
    }
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (found.l2.bytes == 0) {  // no /sys: the C library asks the CPU, which does not tell who shares
        keep_smaller(found.l1, {sysconf(_SC_LEVEL1_DCACHE_SIZE), 1});
        keep_smaller(found.l2, {sysconf(_SC_LEVEL2_CACHE_SIZE), 1});
    }
#endif
    return found;
}
#elif defined(__APPLE__)
std::int64_t sysctl_value(const char* name) {
    std::int64_t value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}

Caches native_caches() {
    // perflevel0 are the performance cores, on which threads that compute run.
    Caches found;
    keep_smaller(found.l1, {sysctl_value("hw.perflevel0.l1dcachesize"), 1});
    keep_smaller(found.l2,
                 {sysctl_value("hw.perflevel0.l2cachesize"), sysctl_value("hw.perflevel0.cpusperl2")});
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
    for (DWORD at = 0; at < size;) {
        const auto& entry =
            *reinterpret_cast<const SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data() + at);
        const CACHE_RELATIONSHIP& cache = entry.Cache;
        const auto sharers = std::popcount(static_cast<std::uint64_t>(cache.GroupMask.Mask));
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

Caches caches_in(const std::string& directory, int cpu, const std::function<bool(int)>& allowed) {
    Caches found;
    for (int index = 0; index < 8; ++index) {
        const std::string cache =
            directory + "/cpu" + std::to_string(cpu) + "/cache/index" + std::to_string(index) + "/";
        const auto word = [&](const char* name) {
            std::string text;
            std::ifstream(cache + name) >> text;
            return text;
        };
        const std::string number = word("level"), type = word("type");
        if (number.size() != 1 || number < "1" || number > "3" || (type != "Data" && type != "Unified"))
            continue;
        std::int64_t sharers = 0;  // from a list such as "0-3,8"
        std::ifstream list(cache + "shared_cpu_list");
        for (int begin; list >> begin;) {
            int end = begin;
            if (list.peek() == '-') list.ignore() >> end;
            for (int i = begin; i <= std::min(end, begin + 4095); ++i) sharers += allowed(i);
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
