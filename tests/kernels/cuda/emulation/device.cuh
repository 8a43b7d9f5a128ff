// Stands in for sources/device.cuh: the same names for a host compiler. A block's threads are fibers that run until they
// meet at a barrier or a warp exchange; see emulator.h.
#pragma once
#include "emulator.h"

#include <cmath>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FORMAT_FP16 0
#define FORMAT_BF16 1
#define FORMAT_FP32 2

template <int FORMAT>
struct Bytes {
    static constexpr int value = FORMAT == FORMAT_FP32 ? 4 : 2;
};

struct alignas(8) Words2 {
    u32 x, y;
};

struct alignas(16) Words4 {
    u32 x, y, z, w;
};

template <class To, class From>
inline To same_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "a cast between sizes");
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float bits_to_float(u32 bits) { return same_bits<float>(bits); }
inline u32 float_to_bits(float value) { return same_bits<u32>(value); }
inline float fp16_to_float(u16 bits) { return (float)same_bits<_Float16>(bits); }
inline u16 float_to_fp16(float value) { return same_bits<u16>((_Float16)value); }
inline float bf16_to_float(u16 bits) { return same_bits<float>((u32)bits << 16); }
inline u16 float_to_bf16(float value) {
    u32 bits = float_to_bits(value);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }
inline float reciprocal_root(float value) { return 1.0f / std::sqrt(value); }
inline float exchange(float value, int lane_mask) { return emulator::shuffle(value, lane_mask); }
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
