#include "core/random.h"

#include <cmath>
#include <utility>

namespace llmc {

namespace {

constexpr int kMiddle = 397;
constexpr double kPi = 3.14159265358979323846;
constexpr float kTiny = 1e-12f;  // keeps log away from 0

// 16 uniforms become 16 normals: element t and t + 8 are a pair.
void box_muller_16(float* data, float mean, float std) {
    for (int t = 0; t < 8; ++t) {
        const float u1 = 1 - data[t], u2 = data[t + 8];
        const float radius = std::sqrt(-2 * std::log(u1 + kTiny));
        const float theta = static_cast<float>(2.0 * kPi * u2);
        data[t] = radius * std::cos(theta) * std + mean;
        data[t + 8] = radius * std::sin(theta) * std + mean;
    }
}

}  // namespace

Mt19937::Mt19937(std::uint32_t seed) {
    state[0] = seed;
    for (std::uint32_t j = 1; j < kSize; ++j)
        state[j] = 1812433253u * (state[j - 1] ^ (state[j - 1] >> 30)) + j;
}

void Mt19937::refill() {
    left = kSize;
    next = 0;
    for (int j = 0; j < kSize; ++j) {
        const std::uint32_t y = (state[j] & 0x80000000u) | (state[(j + 1) % kSize] & 0x7fffffffu);
        state[j] = state[(j + kMiddle) % kSize] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
    }
}

std::uint32_t Mt19937::randint32() {
    if (--left <= 0) refill();
    std::uint32_t y = state[next++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    y ^= y >> 18;
    return y;
}

std::uint64_t Mt19937::randint64() {
    const std::uint64_t high = randint32();
    return (high << 32) | randint32();
}

float Mt19937::randfloat32() { return static_cast<float>(randint32() & 0xffffffu) * (1.0f / 16777216.0f); }

double Mt19937::randfloat64() {
    return static_cast<double>(randint64() & ((std::uint64_t{1} << 53) - 1)) * (1.0 / 9007199254740992.0);
}

void Mt19937::normal_(float* data, std::int64_t n, float mean, float std) {
    if (n >= 16) {
        for (std::int64_t t = 0; t < n; ++t) data[t] = randfloat32();
        for (std::int64_t t = 0; t + 16 <= n; t += 16) box_muller_16(data + t, mean, std);
        if (n % 16 != 0) {
            float* const last = data + n - 16;
            for (int t = 0; t < 16; ++t) last[t] = randfloat32();
            box_muller_16(last, mean, std);
        }
        return;
    }
    for (std::int64_t t = 0; t < n; t += 2) {
        const float u1 = static_cast<float>(randfloat64()), u2 = static_cast<float>(randfloat64());
        const float radius = std::sqrt(-2 * std::log(1 - u2 + kTiny));
        const float theta = static_cast<float>(2.0 * kPi * u1);
        data[t] = radius * std::cos(theta) * std + mean;
        if (t + 1 < n)
            data[t + 1] = static_cast<float>(static_cast<double>(radius * std::sin(theta)) * std + mean);
    }
}

void random_permutation(std::vector<std::int32_t>& data, Mt19937& rng) {
    for (std::size_t i = data.size(); i-- > 1;) std::swap(data[i], data[rng.randint32() % (i + 1)]);
}

std::uint32_t XorShift::randint32() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<std::uint32_t>((state * 0x2545F4914F6CDD1Dull) >> 32);
}

float XorShift::randfloat32() { return static_cast<float>(randint32() >> 8) / 16777216.0f; }

}  // namespace llmc
