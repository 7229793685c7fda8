// Arena: a table of named tensors that share one allocation. Rows are declared first, which costs nothing and
// tells the size; then allocate() places them. If rows are declared anew after
// clear(), the memory is used again, provided that it is large enough.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"

namespace llmc {

class Arena {
  public:
    // `what` names the arena in errors; `align` is the alignment of each tensor in bytes, 1 to pack them as
    // in a file.
    Arena(std::string what, std::int64_t align) : what_(std::move(what)), align_(align) {}
    ~Arena() { release(); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Declares a tensor; `slot` receives its address in allocate(), and has its shape at once.
    void add(Tensor& slot, std::string name, DType dtype, std::initializer_list<std::int64_t> shape) {
        add(slot, std::move(name), dtype, std::span(shape.begin(), shape.size()));
    }
    void add(Tensor& slot, std::string name, DType dtype, std::span<const std::int64_t> shape) {
        slot = Tensor(nullptr, dtype, shape);
        offset_ = (offset_ + align_ - 1) / align_ * align_;
        rows_.push_back({std::move(name), &slot, offset_});
        offset_ += slot.bytes();
    }

    std::int64_t bytes() const { return offset_; }

    void allocate(const std::shared_ptr<Backend>& backend) {
        if (offset_ > capacity_) {
            release();
            try {
                memory_ = {backend->allocate(static_cast<std::size_t>(offset_)),
                           [backend](void* p) { backend->release(p); }};
            } catch (const Error& e) {
                throw Error(filled("{} for {}", e.what(), what_));
            }
            capacity_ = offset_;
        }
        for (Row& row : rows_) row.slot->data = static_cast<char*>(memory_.get()) + row.offset;
    }

    // Forgets the rows, keeps the memory.
    void clear() {
        rows_.clear();
        offset_ = 0;
    }

    // Whoever else holds memory() keeps it.
    void release() noexcept {
        for (Row& row : rows_) row.slot->data = nullptr;
        memory_ = nullptr;
        capacity_ = 0;
    }

    bool allocated() const { return memory_ != nullptr; }
    std::size_t size() const { return rows_.size(); }
    const std::string& name(std::size_t i) const { return rows_[i].name; }
    Tensor tensor(std::size_t i) const { return *rows_[i].slot; }

    // All tensors as one, in the order of declaration. Only for an arena with align 1 and a single dtype.
    Tensor whole(DType dtype) const { return Tensor(memory_.get(), dtype, {offset_ / size_of(dtype)}); }
    // What all tensors lie in, for those who must not lose it when more is allocated.
    const std::shared_ptr<void>& memory() const { return memory_; }

  private:
    struct Row {
        std::string name;
        Tensor* slot;
        std::int64_t offset;
    };
    std::string what_;
    std::int64_t align_;
    std::vector<Row> rows_;
    std::int64_t offset_ = 0;
    std::shared_ptr<void> memory_;  // which holds the backend that releases it
    std::int64_t capacity_ = 0;
};

}  // namespace llmc
