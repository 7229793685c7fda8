// Packed copies of matmul weights, for kernel sets that are faster with them (kernels.h: pack_weight). A copy is
// used until its weight changes. Only memory that was once named to weights_changed() gets copies: nobody says when
// the contents of other memory change.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "core/tensor.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace llmc {

class PackedWeights {
  public:
    void weights_changed(const Tensor& weights);  // Backend::weights_changed
    void drop_copies(const Tensor& memory);       // memory was written, whether it holds weights or not
    void forget(const void* memory, std::size_t bytes) noexcept;  // memory is about to be released

    struct Copy {
        void* data = nullptr;  // null if g.b is not a weight
        bool stale = false;    // the caller must pack the weight into data before it is used
    };
    // The copy of g.b, in `bytes` bytes. Says only once that it is stale.
    Copy find(const Gemm& g, std::int64_t bytes);

  private:
    using Address = std::uintptr_t;
    struct Release {
        void operator()(void* p) const { release_pages(p); }
    };
    struct Entry {
        Address end = 0;  // of the weight in memory
        std::int64_t K = 0, N = 0, ldb = 0;
        std::unique_ptr<void, Release> data;
        bool stale = true;
    };
    void mark_stale(Address begin, Address end);

    std::mutex mutex_;                    // Python may release a tensor while another thread computes
    std::map<Address, Address> weights_;  // begin -> end, of disjoint ranges
    std::map<std::pair<Address, bool>, Entry> copies_;  // by the weight's address and b_kmajor
};

}  // namespace llmc
