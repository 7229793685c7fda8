// Packed copies of matmul weights, for kernel sets that want them (kernels.h: pack_weight). A copy lasts until
// its weight changes, of which the backend hears through changed() and from its own ops that write parameters.
// Memory that changed() never named is no parameter and has no copies: its contents may change without a word.
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
    void changed(const Tensor& parameters);  // they have new values
    void written(const Tensor& memory);      // it has new values, and may hold parameters or not
    void forget(const void* memory, std::size_t bytes) noexcept;  // it goes back to the system

    struct Copy {
        void* data = nullptr;  // null where the product's B is not a parameter
        bool stale = false;    // to be packed by who asked
    };
    Copy find(const Gemm& g, std::int64_t bytes);

  private:
    using Address = std::uintptr_t;
    struct Release {
        void operator()(void* p) const { release_pages(p); }
    };
    struct Entry {
        Address end = 0;  // of the weight
        std::int64_t K = 0, N = 0, ldb = 0;
        std::unique_ptr<void, Release> data;
        bool stale = true;
    };
    void mark_stale(Address begin, Address end);

    std::mutex mutex_;                       // Python may release a tensor while another thread computes
    std::map<Address, Address> parameters_;  // disjoint ranges
    std::map<std::pair<Address, bool>, Entry> copies_;  // by the weight's address and b_kmajor
};

}  // namespace llmc
