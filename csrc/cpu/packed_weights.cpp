#include "cpu/packed_weights.h"

#include <algorithm>
#include <iterator>

namespace llmc {

static std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

void PackedWeights::mark_stale(Address begin, Address end) {
    for (auto& [key, entry] : copies_)
        if (key.first < end && begin < entry.end) entry.stale = true;
}

void PackedWeights::weights_changed(const Tensor& weights) {
    Address begin = address(weights.data), end = begin + static_cast<Address>(weights.bytes());
    const std::lock_guard lock(mutex_);
    mark_stale(begin, end);
    // Ranges that overlap or touch this one become one with it.
    auto range = weights_.lower_bound(begin);
    if (range != weights_.begin() && std::prev(range)->second >= begin) --range;
    while (range != weights_.end() && range->first <= end) {
        begin = std::min(begin, range->first);
        end = std::max(end, range->second);
        range = weights_.erase(range);
    }
    weights_[begin] = end;
}

void PackedWeights::drop_copies(const Tensor& memory) {
    const Address begin = address(memory.data);
    const std::lock_guard lock(mutex_);
    mark_stale(begin, begin + static_cast<Address>(memory.bytes()));
}

void PackedWeights::forget(const void* memory, std::size_t bytes) noexcept {
    const Address begin = address(memory), end = begin + bytes;
    const std::lock_guard lock(mutex_);
    weights_.erase(weights_.lower_bound(begin), weights_.lower_bound(end));
    copies_.erase(copies_.lower_bound({begin, false}), copies_.lower_bound({end, false}));
}

PackedWeights::Copy PackedWeights::find(const Gemm& g, std::int64_t bytes) {
    const std::int64_t rows = g.b_kmajor ? g.K : g.N, columns = g.b_kmajor ? g.N : g.K;
    const Address begin = address(g.b),
                  end = begin + static_cast<Address>(((rows - 1) * g.ldb + columns) * 2);
    const std::lock_guard lock(mutex_);
    const auto range = weights_.upper_bound(begin);
    if (range == weights_.begin() || std::prev(range)->second < end) return {};
    Entry& entry = copies_[{begin, g.b_kmajor}];
    if (!entry.data || entry.K != g.K || entry.N != g.N || entry.ldb != g.ldb) {
        entry.data.reset(allocate_pages(static_cast<std::size_t>(bytes)));
        entry.end = end, entry.K = g.K, entry.N = g.N, entry.ldb = g.ldb;
        entry.stale = true;
    }
    return {entry.data.get(), std::exchange(entry.stale, false)};
}

}  // namespace llmc
