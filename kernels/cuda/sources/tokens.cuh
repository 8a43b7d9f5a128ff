// The activations of a warp's columns, in shared memory as fp16, or as 8-bit digits for what is multiplied byte by byte.
//
// bf16 has a wider range than fp16, so each token's values are multiplied by a power of two that brings the largest
// among the warp's columns to between 2^14 and 2^15; that is exact but for values 2^-29 times smaller than it. The
// warp's sums are multiplied by the inverse.
#pragma once

#include "activation.cuh"

// Columns of one rate that a block reads: units `first .. end` of those that lie at columns `column .. column + columns`
// of x. The last unit may be wider than what there is; it is filled with zeros.
struct Segment {
    int first, end, column, columns;

    __device__ __forceinline__ int units() const { return end - first; }
};

// The two values of a word, times a power of two, as fp16.
__device__ __forceinline__ u32 scale_pair(u32 pair, float scale) {
    u32 first = float_to_half(value_of(pair & 0xFFFF) * scale), second = float_to_half(value_of(pair >> 16) * scale);
    return first | second << 16;
}

// The largest magnitude of two bf16 values, as bits.
__device__ __forceinline__ u32 larger_of(u32 pair) { return max(pair & 0x7FFF, pair >> 16 & 0x7FFF); }

__device__ __forceinline__ u32 largest_of(const Words4& words) {
    return max(max(larger_of(words.x), larger_of(words.y)), max(larger_of(words.z), larger_of(words.w)));
}

// What a warp brings to shared memory, in pieces of 8 columns.
struct TokenFilling {
    static constexpr int SIDE_BY_SIDE = TOKENS < 4 ? TOKENS : 4;  // tokens, and
    static constexpr int FLIGHT = 4 / SIDE_BY_SIDE;               // pieces of each that a lane has in flight
    static constexpr int STEP = 32 * FLIGHT;                      // pieces

    const u16* x;  // the first token's first column
    int in_features, batch;
    int pieces, real;  // of a token; those that x has: the others are zeros
    u32 to, stride;    // where the first token goes, and from there to the next
    u32 factors;       // where the inverse factors of bf16 go

    __device__ __forceinline__ void fill() const {
        for (int token = 0; token < batch; token += SIDE_BY_SIDE) {
            u32 largest[SIDE_BY_SIDE] = {};
#pragma unroll 1
            for (int piece = lane_index(); piece < pieces; piece += STEP) copy(token, piece, largest);
            if constexpr (BFLOAT) {
#pragma unroll
                for (int i = 0; i < SIDE_BY_SIDE; ++i) {
                    if (token + i < batch) scale(token + i, warp_max(largest[i]));
                }
            }
        }
        warp_sync();
    }

    __device__ __forceinline__ void copy(int token, int piece, u32 (&largest)[SIDE_BY_SIDE]) const {
        Words4 values[SIDE_BY_SIDE][FLIGHT];
        const u16* from = x + static_cast<u64>(token) * in_features + 8 * piece;
        u32 place = to + token * stride + 16 * piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = i / FLIGHT, further = i % FLIGHT * 32;
            Words4& value = values[row][i % FLIGHT];
            value = Words4{};
            if (token + row < batch && piece + further < real) {
                value = *reinterpret_cast<const Words4*>(from + static_cast<u64>(row) * in_features + 8 * further);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = i / FLIGHT, further = i % FLIGHT * 32;
            const Words4& value = values[row][i % FLIGHT];
            if (token + row < batch && piece + further < pieces) store_shared(place + row * stride + 16 * further, value);
            if constexpr (BFLOAT) largest[row] = max(largest[row], largest_of(value));
        }
    }

    // largest: of the token's magnitudes, as bits of a bf16.
    __device__ __forceinline__ void scale(int token, u32 largest) const {
        int shift = min(141 - static_cast<int>(largest >> 7), 126);
        if (lane_index() == 0) store_shared(factors + 4 * token, (127 - shift) << 23);
        float power = bits_to_float((127 + shift) << 23);
        for (int piece = lane_index(); piece < pieces; piece += 32) {
            u32 own = to + token * stride + 16 * piece;
            Words4 v = load_shared_four(own);
            store_shared(
                own, Words4{
                         scale_pair(v.x, power), scale_pair(v.y, power), scale_pair(v.z, power), scale_pair(v.w, power)});
        }
    }
};

// The same for pairs that tensor cores multiply by the bytes of a hash (MadDecoder): a pair of columns (x0, x1) has a word of
// signed bytes, the lowest first, for 3/4 (x1 - x0), x1, 3/4 (x0 + x1), x0. These are taken times a power of two, so that the
// largest of the warp's columns has 13 or 21 bits and more, rounded, and written as two or three DIGITS to the base 256, the
// highest first: `stride` bytes each. The warp's sums are multiplied by `gain` and the inverse of that power.
template <int DIGITS>
struct DigitFilling {
    static constexpr int FLIGHT = 4;  // pieces that a lane has in flight
    // Added to a number below 2^22, it leaves it in the mantissa's low bits, with 128 more for each digit but the highest.
    static constexpr float ROUNDER = 12582912.0f + (DIGITS == 3 ? 0x8080 : 0x80);
    static constexpr int LARGEST_EXPONENT = DIGITS == 3 ? 20 : 13;  // of a column, scaled

    const u16* x;  // as in TokenFilling
    int in_features, batch;
    int pieces, real;
    u32 to, stride;
    u32 factors;
    float gain;

    __device__ __forceinline__ void fill() const {
        for (int token = 0; token < batch; ++token) {
            u32 place = to + token * DIGITS * stride, largest = 0;
#pragma unroll 1
            for (int piece = lane_index(); piece < pieces; piece += 32 * FLIGHT) {
                largest = max(largest, bring(x + static_cast<u64>(token) * in_features, piece, place));
            }
            write(token, place, warp_max(largest));
        }
        warp_sync();
    }

    // Puts pieces of x where their first digits will be; their largest magnitude, as bits.
    __device__ __forceinline__ u32 bring(const u16* from, int piece, u32 place) const {
        Words4 values[FLIGHT] = {};
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < FLIGHT; ++i) {
            if (piece + 32 * i < real) values[i] = *reinterpret_cast<const Words4*>(from + 8 * (piece + 32 * i));
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; ++i) {
            if (piece + 32 * i < pieces) store_shared(place + 16 * (piece + 32 * i), values[i]);
            largest = max(largest, largest_of(values[i]));
        }
        return largest;
    }

    __device__ __forceinline__ void write(int token, u32 place, u32 largest) const {
        // Exponents as fp32 has them; a magnitude that is no number spoils the sums, as it would elsewhere.
        int exponent = static_cast<int>(float_to_bits(value_of(largest)) >> 23);
        int up = min(127 + LARGEST_EXPONENT + 127 - exponent, 253);
        u32 factor = exponent == 255 ? 0x7FC00000 : (254 - up) << 23;
        if (lane_index() == 0) store_shared(factors + 4 * token, float_to_bits(bits_to_float(factor) * gain));
        float scale = bits_to_float(exponent == 255 ? 0 : up << 23);
#pragma unroll 1
        for (int piece = lane_index(); piece < pieces; piece += 32) {
            u32 own = place + 16 * piece;
            Words4 raw = load_shared_four(own);
            const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
            u32 words[DIGITS][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) split(pairs[i], scale, words, i);
#pragma unroll
            for (int i = 0; i < DIGITS; ++i) {
                store_shared(own + i * stride, Words4{words[i][0], words[i][1], words[i][2], words[i][3]});
            }
        }
    }

    // The n-th word of each digit.
    static __device__ __forceinline__ void split(u32 pair, float scale, u32 (&words)[DIGITS][4], int n) {
        constexpr u32 EVERY = 0x01010101;
        float first = value_of(pair & 0xFFFF) * scale, second = value_of(pair >> 16) * scale;
        u32 low = rounded(0.75f * (second - first)), next = rounded(second);
        u32 third = rounded(0.75f * (first + second)), high = rounded(first);
        u32 lower = permute(low, next, 0x5140), upper = permute(third, high, 0x5140);  // bytes 0, 0, 1, 1
        u32 middle = permute(lower, upper, 0x7632);
        words[DIGITS - 1][n] = permute(lower, upper, 0x5410) ^ 0x80 * EVERY;
        if constexpr (DIGITS == 3) {
            u32 top = permute(permute(low, next, 0x0062), permute(third, high, 0x0062), 0x5410);  // 0x40 + digit
            words[1][n] = middle ^ 0x80 * EVERY;
            words[0][n] = (top + 0x40 * EVERY) ^ 0x80 * EVERY;
        } else {
            words[0][n] = middle;
        }
    }

    static __device__ __forceinline__ u32 rounded(float value) { return float_to_bits(value + ROUNDER); }
};
