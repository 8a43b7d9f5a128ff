// Stands in for sources/ptx.cuh: those of its names that emulated kernels use, for a host compiler.
#pragma once
#include "emulator.h"

#include <cmath>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Words4 {
    u32 x, y, z, w;
};

struct alignas(8) Words2 {
    u32 x, y;
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
inline float half_to_float(u16 bits) { return (float)same_bits<_Float16>(bits); }
inline u16 float_to_half(float value) { return same_bits<u16>((_Float16)value); }
inline float bfloat_to_float(u16 bits) { return same_bits<float>((u32)bits << 16); }
inline u16 float_to_bfloat(float value) {
    u32 bits = float_to_bits(value);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

inline void wait_for_previous_kernels() {}
inline void allow_next_kernel() {}
