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
struct TokenPieces {
    static constexpr int SIDE_BY_SIDE = TOKENS < 4 ? TOKENS : 4;  // tokens, and
    static constexpr int FLIGHT = 4 / SIDE_BY_SIDE;               // pieces of each that a lane has in flight
    static constexpr int STEP = 32 * FLIGHT;                      // pieces

    using Values = Words4[SIDE_BY_SIDE][FLIGHT];

    const u16* x;  // the first token's first column
    int in_features, batch;
    int pieces, real;  // of a token; those that x has: the others are zeros

    __device__ __forceinline__ void ask(Values& values, int token, int piece) const {
        const u16* from = x + static_cast<u64>(token) * in_features + 8 * piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = i / FLIGHT, further = i % FLIGHT * 32;
            Words4& value = values[row][i % FLIGHT];
            value = Words4{};
            if (token + row < batch && piece + further < real) {
                value = *reinterpret_cast<const Words4*>(from + static_cast<u64>(row) * in_features + 8 * further);
            }
        }
    }

    // Brings SIDE_BY_SIDE tokens: the first one's to `place`, the next one's `stride` bytes further. `largest`: of each token's
    // magnitudes, as bits. `meanwhile` is called once, when the first of x has been asked for.
    template <typename Meanwhile>
    __device__ __forceinline__ void bring(
        int token, u32 place, u32 stride, u32 (&largest)[SIDE_BY_SIDE], Meanwhile meanwhile) const {
#pragma unroll 1
        for (int piece = lane_index(); piece - lane_index() < pieces; piece += STEP) {
            Values values;
            ask(values, token, piece);
            if (token == 0 && piece < 32) meanwhile();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = i / FLIGHT, further = i % FLIGHT * 32;
                const Words4& value = values[row][i % FLIGHT];
                if (token + row < batch && piece + further < pieces) {
                    store_shared(place + row * stride + 16 * (piece + further), value);
                }
                largest[row] = max(largest[row], largest_of(value));
            }
        }
    }
};

// The tokens as fp16.
struct TokenFilling : TokenPieces {
    u32 to, stride;  // where the first token goes, and from there to the next
    u32 factors;     // where the inverse factors of bf16 go

    template <typename Meanwhile>
    __device__ __forceinline__ void fill(Meanwhile meanwhile) const {
        for (int token = 0; token < batch; token += SIDE_BY_SIDE) {
            u32 largest[SIDE_BY_SIDE] = {};
            bring(token, to + token * stride, stride, largest, meanwhile);
            if constexpr (BFLOAT) {
#pragma unroll
                for (int i = 0; i < SIDE_BY_SIDE; ++i) {
                    if (token + i < batch) scale(token + i, warp_max(largest[i]));
                }
            }
        }
        warp_sync();
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

constexpr int DIGITS = 2;

// The same for pairs that tensor cores multiply by the bytes of a hash (MadDecoder): a pair of columns (x0, x1) has a word of
// signed bytes, the lowest first, for 3/4 (x1 - x0), x1, 3/4 (x0 + x1), x0. These are taken times a power of two, which brings
// the largest x of the warp's columns to between 32 and 64, and written as two digits to the base BASE, the higher first,
// `stride` bytes each. So x keeps 14 bits below the largest, where fp16 has 11 of its own. The warp's sums, in units of the
// higher digit, are multiplied by `gain` and the inverse of that power.
struct DigitFilling : TokenPieces {
    static constexpr int BASE = 254;  // half of it is the largest lower digit
    static constexpr int LARGEST_EXPONENT = 5;
    static constexpr u32 BOTH = 0x00010001;

    u32 to, stride;  // as in TokenFilling
    u32 factors;
    float gain;

    // Loops stay loops: the machine code that a block's start runs through is short.
    template <typename Meanwhile>
    __device__ __forceinline__ void fill(Meanwhile meanwhile) const {
        for (int token = 0; token < batch; token += SIDE_BY_SIDE) {
            u32 largest[SIDE_BY_SIDE] = {};
            // to where the first digits will be
            bring(token, to + token * DIGITS * stride, DIGITS * stride, largest, meanwhile);
#pragma unroll 1
            for (int i = 0; i < SIDE_BY_SIDE && token + i < batch; ++i) {
                u32 own = largest[0];
#pragma unroll
                for (int other = 1; other < SIDE_BY_SIDE; ++other) own = i == other ? largest[other] : own;
                write(token + i, scale_of(token + i, warp_max(own)));
            }
        }
        warp_sync();
    }

    // What a token's values are multiplied by, of their largest magnitude (bits of its format): bits of a float for bf16, else
    // two factors in fp16, as one may be too large for it.
    __device__ __forceinline__ u32 scale_of(int token, u32 largest) const {
        int exponent = static_cast<int>(float_to_bits(value_of(largest)) >> 23);  // biased by 127
        int up = min(127 + LARGEST_EXPONENT - exponent, BFLOAT ? 126 : 30);
        // A magnitude that is no number spoils the sums, as it would elsewhere.
        float inverse = bits_to_float(exponent == 255 ? 0x7FC00000 : (127 - up) << 23);
        if (lane_index() == 0) store_shared(factors + 4 * token, float_to_bits(inverse * gain));
        if (BFLOAT) return (127 + max(up, -126)) << 23;
        int one = min(up, 15);
        return (15 + one) << 10 | (15 + up - one) << 26;
    }

    __device__ __forceinline__ void write(int token, u32 scale) const {
#pragma unroll 1
        for (int piece = lane_index(); piece < pieces; piece += 32) {
            u32 own = to + token * DIGITS * stride + 16 * piece;
            Words4 raw = load_shared_four(own);
            const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
            u32 words[DIGITS][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) split(scaled(pairs[i], scale), words, i);
#pragma unroll
            for (int i = 0; i < DIGITS; ++i) {
                store_shared(own + i * stride, Words4{words[i][0], words[i][1], words[i][2], words[i][3]});
            }
        }
    }

    static __device__ __forceinline__ u32 scaled(u32 pair, u32 scale) {
        if constexpr (BFLOAT) return scale_pair(pair, bits_to_float(scale));
        return multiply_add_half2(
            multiply_add_half2(pair, permute(scale, scale, 0x1010), 0), permute(scale, scale, 0x3232), 0);
    }

    // The n-th word of each digit.
    static __device__ __forceinline__ void split(u32 pair, u32 (&words)[DIGITS][4], int n) {
        constexpr u32 SIGNS = 0xBC003C00;  // (1, -1)
        u32 straight[DIGITS], crossed[DIGITS];
        digits_of(pair, 0x3C00 * BOTH, straight);
        // x0 + x1 and x0 - x1; the sign of the second is turned by its factor
        digits_of(multiply_add_half2(permute(pair, pair, 0x3232), SIGNS, permute(pair, pair, 0x1010)), 0xBA003A00, crossed);
#pragma unroll
        for (int i = 0; i < DIGITS; ++i) words[i][n] = permute(straight[i], crossed[i], 0x0426);
    }

    // Digits of both halves times `factor`, each in the low byte of its half.
    static __device__ __forceinline__ void digits_of(u32 number, u32 factor, u32 (&digits)[DIGITS]) {
        constexpr u32 ROUNDER = 0x6600 * BOTH;                        // 1536: sums with it are integers
        constexpr u32 MINUS = 0xBC00 * BOTH, UPWARDS = 0x5BF0 * BOTH;  // -1, BASE
        digits[0] = multiply_add_half2(number, factor, ROUNDER);
        u32 rest = multiply_add_half2(number, factor, multiply_add_half2(digits[0], MINUS, ROUNDER));
        digits[1] = multiply_add_half2(rest, UPWARDS, ROUNDER);
    }
};
