// Stands in for sources/ptx.cuh, for a host compiler: lanes exchange what shuffles and tensor cores need.
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
inline void cluster_arrive() { emulator::arrive_at_cluster(); }
inline void cluster_wait() { emulator::wait_for_cluster(); }
inline void store_in_cluster(float* place, u32 rank, float value) { *emulator::in_cluster(place, rank) = value; }

// For the kernels with tensor-core multiplications.
#define WITHOUT 0
#define WITHOUT_LOOKUPS 1
#define WITHOUT_TABLE 2
#define WITHOUT_TOKENS 4
#define WITHOUT_WEIGHTS 8
#define WITHOUT_ADDING 16
#define DYNAMIC_SHARED(name) u8* name = dynamic_shared
using std::max;
using std::min;


inline int lane_index() { return threadIdx.x & 31; }
inline void stop_kernel() { std::abort(); }
inline void check_shared_base(const void*) {}
inline u32 lookup(u32 offset) { return *(const u32*)(dynamic_shared + offset); }
inline Words2 lookup_two(u32 offset) { return *(const Words2*)(dynamic_shared + offset); }
inline u32 funnel_shift(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> shift); }
inline u32 hidden(u32 value) { return value; }
inline u32 permute(u32 first, u32 second, u32 selector) {
    u64 both = (u64)second << 32 | first;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline u32 pick_bytes(u32 first, u32 second, u32 selector) {
    if (selector & 0x8888) {
        std::fprintf(stderr, "pick_bytes: the selector %08x would repeat a sign\n", selector);
        std::abort();
    }
    return permute(first, second, selector);
}
inline u32 shuffle(u32 value, int source_lane) {
    return emulator::received(emulator::exchange({value}), source_lane)[0];
}
inline u32 warp_max(u32 value) {
    int slot = emulator::exchange({value});
    for (int lane = 0; lane < 32; ++lane) value = max(value, emulator::received(slot, lane)[0]);
    return value;
}
inline void block_sync() { emulator::barrier(); }
inline void warp_sync() { emulator::exchange({0}); }
inline void pause() {}
inline float half_of(u32 pair, int side) { return half_to_float((u16)(pair >> 16 * side)); }
inline u32 multiply_add_half2(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int side = 0; side < 2; ++side) {
        double exact = (double)half_of(a, side) * half_of(b, side) + half_of(c, side);
        result |= (u32)float_to_half((float)exact) << 16 * side;
    }
    return result;
}

template <class Words>
inline void load_once_if(Words& words, const void* pointer, bool active) {
    if (active) std::memcpy(&words, pointer, sizeof words);
}
template <int BYTES>
inline void load_shared_if(Words4& words, u32 offset, bool active) {
    if (active) std::memcpy(&words, dynamic_shared + offset + BYTES, sizeof words);
}
template <class Value>
inline Value load_shared(u32 offset) {
    Value value;
    std::memcpy(&value, dynamic_shared + offset, sizeof value);
    return value;
}
inline Words4 load_shared_four(u32 offset) { return load_shared<Words4>(offset); }
inline Words2 load_shared_two(u32 offset) { return load_shared<Words2>(offset); }
inline u32 load_shared_word(u32 offset) { return load_shared<u32>(offset); }
inline u16 load_shared_half(u32 offset) { return load_shared<u16>(offset); }
inline void store_shared(u32 offset, const Words4& words) { std::memcpy(dynamic_shared + offset, &words, sizeof words); }
inline void store_shared(u32 offset, const Words2& words) { std::memcpy(dynamic_shared + offset, &words, sizeof words); }
inline void store_shared(u32 offset, u32 word) { std::memcpy(dynamic_shared + offset, &word, sizeof word); }
inline u32 load_global(const u32* pointer) { return *pointer; }
inline void store_global(u32* pointer, u32 value) { *pointer = value; }
inline u32 count_up(u32* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST); }
inline float exp2_fast(float power) { return std::exp2(power); }
// Copies arrive as late as they may: when the lane that asked for them waits.
inline void copy_async(u32 offset, const void* from) { emulator::copies().back().push_back({offset, from, 16}); }
template <int BYTES>
inline void copy_async_if(u32 offset, const void* from, bool active) {
    if (active) emulator::copies().back().push_back({offset, from, BYTES});
}
inline void end_copy_group() { emulator::copies().emplace_back(); }
template <int COUNT>
inline void wait_for_copy_groups() {
    emulator::receive_copies(COUNT);
}
inline void copy_wait() {
    end_copy_group();
    emulator::receive_copies(0);
}

// PTX, "Matrix fragments for mma.m16n8k16" and "m16n8k32": lane 4 g + t holds rows g and g + 8 of the weights and column g of
// the tokens. `dot` multiplies the numbers of two words and adds them to a sum.
template <class Number, class Dot>
inline void multiply_fragments(Number (&sum)[4], std::initializer_list<u32> words, Dot dot) {
    int slot = emulator::exchange(words);
    int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        for (int source = 0; source < 4; ++source) {
            const u32* row = emulator::received(slot, 4 * g + source);
            const u32* column = emulator::received(slot, 4 * (2 * t + i % 2) + source);
            dot(sum[i], row[i / 2], column[4]);
            dot(sum[i], row[2 + i / 2], column[5]);
        }
    }
}

inline void multiply_add(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    multiply_fragments(sum, {a, b, c, d, low, high}, [](float& to, u32 x, u32 y) {
        for (int side = 0; side < 2; ++side) to += half_of(x, side) * half_of(y, side);
    });
}

inline void multiply_add_bfloat(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    multiply_fragments(sum, {a, b, c, d, low, high}, [](float& to, u32 x, u32 y) {
        for (int half = 0; half < 32; half += 16) to += bfloat_to_float((u16)(x >> half)) * bfloat_to_float((u16)(y >> half));
    });
}

inline u32 transpose(u32 pair) {
    int slot = emulator::exchange({pair});
    int g = lane_index() / 4, t = lane_index() % 4;
    u32 low = emulator::received(slot, 4 * (2 * t) + g / 2)[0], high = emulator::received(slot, 4 * (2 * t + 1) + g / 2)[0];
    return (low >> 16 * (g % 2) & 0xFFFF) | (high >> 16 * (g % 2) & 0xFFFF) << 16;
}

inline void multiply_add(int (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    multiply_fragments(sum, {a, b, c, d, low, high}, [](int& to, u32 x, u32 y) {
        for (int byte = 0; byte < 32; byte += 8) to += (signed char)(x >> byte) * (signed char)(y >> byte);
    });
}
