// The master weight of a bf16 parameter costs 2 bytes, not 4: the f32 weight is split into the bf16 parameter,
// which is its upper half rounded to nearest (ties away from zero), and the signed 16-bit difference of the
// bit patterns. join_master gives back every bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bf16.h"

namespace llmc {

inline float join_master(bf16 param, std::int16_t master) {
    const std::uint32_t u =
        (static_cast<std::uint32_t>(param.bits) << 16) + static_cast<std::uint32_t>(master);
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}
inline void split_master(float weight, bf16& param, std::int16_t& master) {
    std::uint32_t u;
    std::memcpy(&u, &weight, sizeof u);
    param.bits = static_cast<std::uint16_t>((u + 0x8000u) >> 16);
    master = static_cast<std::int16_t>(
        static_cast<std::uint16_t>(u - (static_cast<std::uint32_t>(param.bits) << 16)));
}

}  // namespace llmc
