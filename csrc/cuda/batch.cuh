// Many tensors in one launch: a table of them travels in the kernel's arguments, which may take 4 KB.
#pragma once

#include <bit>

#include "cuda/device.cuh"

namespace llmc {

// Items in the order of the blocks that work on them. A kernel takes it as `const __grid_constant__`, so that it stays
// in constant memory.
template <class Item, int capacity>
struct Batch {
    Item items[capacity];
    unsigned ends[capacity];  // of each item's blocks
    int count = 0;

    unsigned blocks() const { return count ? ends[count - 1] : 0; }

    // The item of this block, and the block's number among those of that item.
    struct Place {
        int item;
        unsigned block;
    };
    __device__ __forceinline__ Place place(unsigned block) const {
        int item = 0;
#pragma unroll
        for (int step = kHalf; step > 0; step /= 2)
            if (item + step < count && ends[item + step - 1] <= block) item += step;
        return {item, item ? block - ends[item - 1] : block};
    }

  private:
    static constexpr int kHalf = std::bit_ceil(static_cast<unsigned>(capacity)) / 2;
};

// Fills batches, and calls launch(batch) for each.
template <class Item, int capacity, class Launch>
class Batches {
  public:
    explicit Batches(Launch launch) : launch_(launch) {}
    void add(const Item& item, unsigned blocks) {
        if (blocks == 0) return;
        batch_.ends[batch_.count] = batch_.blocks() + blocks;
        batch_.items[batch_.count++] = item;
        if (batch_.count == capacity) flush();
    }
    void flush() {
        if (batch_.count) launch_(batch_);
        batch_.count = 0;
    }

  private:
    Batch<Item, capacity> batch_;
    Launch launch_;
};

// The part of a tensor of n elements that a block works on: W elements at a time up to `middle`, and then one at a time.
struct Part {
    i64 begin, middle, end;
};
template <int W>
__device__ __forceinline__ Part part_of(i64 n, unsigned block, i64 elements, bool aligned) {
    const i64 begin = static_cast<i64>(block) * elements, end = begin + elements < n ? begin + elements : n;
    return {begin, aligned ? begin + (end - begin) / W * W : begin, end};
}

}  // namespace llmc
