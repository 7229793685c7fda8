// The sum of squares of gradients, without a rounding error: so it is the same bits in whatever order, by whatever
// threads, and on whatever ranks its terms are added. A sum in fixed point, as wide as the exponents of f32 allow
// (Kulisch's accumulator).
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace llmc {

// How a sum of squares travels between ranks: as digits of 16 bits, each an f32, the value being the sum of
// digit[k] * 2^(16 * (k - kUnitDigit)). Digits of up to 256 ranks add in f32 without a rounding error. The value is
// not finite if a digit is not. A backend that promises no bits across ranks uses the unit's digit alone.
constexpr std::int64_t kNormDigits = 40, kUnitDigit = 20;

// The terms are sums over so many elements of a tensor each, counted from its beginning: a rounded sum, but always the
// same one.
constexpr std::int64_t kNormBlock = 1024;

// A sum of numbers that are 0 or more. Of each, what lies below 2^-320 is cut off, which is nothing if it is an f32:
// those are multiples of 2^-149. The sum is not finite if a term, or the sum itself, reaches 2^320. It has room for 2^31
// terms.
class ExactSum {
  public:
    void add(double x) {
        if (!(x >= 0.0 && x < kEnd)) {
            finite_ = false;
            return;
        }
        // x = mantissa * 2^(at - 320)
        const auto bits = std::bit_cast<std::uint64_t>(x);
        const int at = static_cast<int>(bits >> 52 & 0x7ff) - 1075 + kPoint;
        std::uint64_t mantissa = (bits & ((std::uint64_t{1} << 52) - 1)) | std::uint64_t{1} << 52;
        if (at <= -53) return;  // below the last digit: 0, too
        if (at < 0) mantissa >>= -at;
        const int place = at < 0 ? 0 : at, shift = place % 32;
        std::uint64_t* const limb = limbs_.data() + place / 32;
        const std::uint64_t low = (mantissa & kLimb) << shift;
        const std::uint64_t high = ((mantissa >> 32) << shift) + (low >> 32);
        limb[0] += low & kLimb;
        limb[1] += high & kLimb;
        limb[2] += high >> 32;
    }
    void add(const ExactSum& other) {
        for (std::size_t k = 0; k < limbs_.size(); ++k) limbs_[k] += other.limbs_[k];
        finite_ = finite_ && other.finite_;
    }
    // What write() has written, or a sum of that over ranks.
    void add_digits(const float* digits) {
        for (int k = 0; k < kNormDigits; ++k)
            add(std::ldexp(static_cast<double>(digits[k]), 16 * (k - static_cast<int>(kUnitDigit))));
    }

    // The one way to write this sum in digits below 2^16.
    void write(float* digits) {
        carry();
        for (int k = 0; k < kNormDigits; ++k)
            digits[k] =
                static_cast<float>(limbs_[static_cast<std::size_t>(k / 2)] >> (16 * (k % 2)) & 0xffff);
        if (!finite_) digits[kUnitDigit] = std::numeric_limits<float>::quiet_NaN();
    }
    double value() {
        carry();
        if (!finite_) return std::numeric_limits<double>::quiet_NaN();
        double sum = 0.0;
        for (int k = kLimbs - 1; k >= 0; --k)
            sum = sum * 4294967296.0 + static_cast<double>(limbs_[static_cast<std::size_t>(k)]);
        return std::ldexp(sum, -kPoint);
    }

  private:
    static constexpr int kLimbs = kNormDigits / 2, kPoint = 16 * kUnitDigit;  // bits below the point
    static constexpr double kEnd = 0x1p320;
    static constexpr std::uint64_t kLimb = 0xffffffff;
    static_assert(kPoint == 320 && 32 * kLimbs == 640);

    void carry() {
        std::uint64_t over = 0;
        for (std::uint64_t& limb : limbs_) {
            over += limb;
            limb = over & kLimb;
            over >>= 32;
        }
        finite_ = finite_ && !limbs_[kLimbs] && !limbs_[kLimbs + 1];
    }

    // Digits of 32 bits from the lowest on, in 64 bits, so that carries can wait; two more for the carries of the last.
    std::array<std::uint64_t, kLimbs + 2> limbs_{};
    bool finite_ = true;
};

}  // namespace llmc
