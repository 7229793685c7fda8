// Tensor: a pointer, a dtype and a shape. It does not own its memory: an Arena or the caller does. Always
// contiguous and row-major.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <ostream>
#include <span>

#include "core/bf16.h"
#include "core/check.h"

namespace llmc {

enum class DType : std::uint8_t { f32, bf16, i32, i16 };

inline constexpr std::int64_t size_of(DType t) { return t == DType::f32 || t == DType::i32 ? 4 : 2; }
inline constexpr const char* name_of(DType t) {
    switch (t) {
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::i32: return "i32";
    case DType::i16: return "i16";
    }
    return "?";
}
inline constexpr bool is_float(DType t) { return t == DType::f32 || t == DType::bf16; }
inline std::ostream& operator<<(std::ostream& out, DType t) { return out << name_of(t); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const std::uint32_t u = static_cast<std::uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
inline bf16 from_float<bf16>(float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<std::uint16_t>((u >> 16) | 0x40u)};
    return bf16{static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

struct Tensor {
    static constexpr int kMaxRank = 5;

    void* data = nullptr;
    DType dtype = DType::f32;
    int rank = 0;
    std::array<std::int64_t, kMaxRank> shape{};

    Tensor() = default;
    Tensor(void* data, DType dtype, std::initializer_list<std::int64_t> extents)
        : Tensor(data, dtype, std::span(extents.begin(), extents.size())) {}
    Tensor(void* data, DType dtype, std::span<const std::int64_t> extents) : data(data), dtype(dtype) {
        set_shape(extents.data(), static_cast<int>(extents.size()));
    }

    // An absent optional operand (no bias, no input gradient wanted) is a Tensor without data.
    explicit operator bool() const { return data != nullptr; }

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }

    std::int64_t numel() const {
        std::int64_t n = 1;
        for (int i = 0; i < rank; ++i) n *= shape[i];
        return n;
    }
    std::int64_t bytes() const { return numel() * size_of(dtype); }

    // As a matrix: all leading extents together are its rows, the last one is its columns.
    std::int64_t cols() const { return rank == 0 ? 1 : shape[rank - 1]; }
    std::int64_t rows() const {
        std::int64_t n = 1;
        for (int i = 0; i + 1 < rank; ++i) n *= shape[i];
        return n;
    }

    bool is(std::initializer_list<std::int64_t> extents) const {
        if (rank != static_cast<int>(extents.size())) return false;
        int i = 0;
        for (const std::int64_t e : extents)
            if (shape[i++] != e) return false;
        return true;
    }
    bool is_like(const Tensor& other) const {
        if (rank != other.rank) return false;
        for (int i = 0; i < rank; ++i)
            if (shape[i] != other.shape[i]) return false;
        return true;
    }

    // The same memory under another shape of as many elements.
    Tensor view(std::initializer_list<std::int64_t> extents) const {
        Tensor t = *this;
        t.set_shape(extents.begin(), static_cast<int>(extents.size()));
        LLMC_CHECK(t.numel() == numel(), "cannot view {} as {}", *this, t);
        return t;
    }

    // The first elements of the same memory, under another shape.
    Tensor prefix(std::initializer_list<std::int64_t> extents) const {
        Tensor t = *this;
        t.set_shape(extents.begin(), static_cast<int>(extents.size()));
        LLMC_CHECK(t.numel() <= numel(), "{} has no room for {}", *this, t);
        return t;
    }

    // Element i of the leading extent: (L, C, C)[l] is a (C, C).
    Tensor operator[](std::int64_t i) const {
        LLMC_CHECK(rank > 0 && i >= 0 && i < shape[0], "index {} is outside of {}", i, *this);
        Tensor t = *this;
        t.rank = rank - 1;
        for (int d = 0; d + 1 < rank; ++d) t.shape[d] = shape[d + 1];
        t.shape[rank - 1] = 0;
        if (data) t.data = as<std::byte>() + i * t.bytes();
        return t;
    }

    // Elements [begin, end) of the leading extent.
    Tensor slice(std::int64_t begin, std::int64_t end) const {
        LLMC_CHECK(rank > 0 && 0 <= begin && begin <= end && end <= shape[0],
                   "slice [{}, {}) is outside of {}", begin, end, *this);
        Tensor t = *this;
        t.shape[0] = end - begin;
        if (data) t.data = as<std::byte>() + (shape[0] ? bytes() / shape[0] : 0) * begin;
        return t;
    }

    friend std::ostream& operator<<(std::ostream& out, const Tensor& t) {
        out << t.dtype << " (";
        for (int i = 0; i < t.rank; ++i) out << (i ? ", " : "") << t.shape[i];
        return out << ")";
    }

  private:
    void set_shape(const std::int64_t* extents, int count) {
        LLMC_CHECK(count <= kMaxRank, "a tensor has at most {} extents, got {}", kMaxRank, count);
        rank = count;
        shape = {};
        for (int i = 0; i < count; ++i) {
            LLMC_CHECK(extents[i] >= 0, "extent {} of a tensor is negative ({})", i, extents[i]);
            shape[i] = extents[i];
        }
    }
};

}  // namespace llmc
