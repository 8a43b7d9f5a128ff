// The activations of a warp's columns, in shared memory as fp16, or as 8-bit digits for what is multiplied byte by
// byte.
//
// bf16 has a wider range than fp16, so each token's values are multiplied by a power of two that brings the largest
// among the warp's columns to between 2^14 and 2^15; that is exact but for values 2^-29 times smaller than it. The
// warp's sums are multiplied by the inverse.
#pragma once

#include "activation.cuh"
#include "units.cuh"

// Columns of one rate that a block reads: units `first .. end` of those that lie at columns `column .. column +
// columns` of x. The last unit may be wider than what there is; it is filled with zeros.
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
    static constexpr int SIDE_BY_SIDE = TOKENS < 8 ? TOKENS : 8;      // tokens, and
    static constexpr int FLIGHT = TOKENS == 1 ? 4 : 2;                // pieces of each that a lane has in flight
    static constexpr int STEP = 32 * FLIGHT, PIECES = SIDE_BY_SIDE * FLIGHT;

    using Values = Words4[SIDE_BY_SIDE][FLIGHT];

    const u16* x;  // the first token's first column
    int in_features, batch;
    int pieces, real;  // of a token; those that x has: the others are zeros

    __device__ __forceinline__ void ask(Values& values, int token, int piece) const {
        const u16* from = x + static_cast<u64>(token) * in_features + 8 * piece;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            int row = i / FLIGHT, further = i % FLIGHT * 32;
            Words4& value = values[row][i % FLIGHT];
            value = Words4{};
            if (token + row < batch && piece + further < real) {
                value = *reinterpret_cast<const Words4*>(from + static_cast<u64>(row) * in_features + 8 * further);
            }
        }
    }

    // Brings SIDE_BY_SIDE tokens, from the `token`-th on: `put(row, piece, words)` for each piece of the row-th of
    // them. `largest`: of each token's magnitudes, as bits. `meanwhile` is called once, when the first of x has been
    // asked for.
    template <typename Put, typename Meanwhile>
    __device__ __forceinline__ void bring(
        int token, u32 (&largest)[SIDE_BY_SIDE], Put put, Meanwhile meanwhile) const {
#pragma unroll 1
        for (int piece = lane_index(); piece - lane_index() < pieces; piece += STEP) {
            Values values;
            ask(values, token, piece);
            if (token == 0 && piece < 32) meanwhile();
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                int row = i / FLIGHT, further = i % FLIGHT * 32;
                const Words4& value = values[row][i % FLIGHT];
                if (token + row < batch && piece + further < pieces) put(row, piece + further, value);
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
            auto put = [&](int row, int piece, const Words4& words) {
                store_shared(to + (token + row) * stride + 16 * piece, words);
            };
            bring(token, largest, put, meanwhile);
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
            u32 x = scale_pair(v.x, power), y = scale_pair(v.y, power);
            store_shared(own, Words4{x, y, scale_pair(v.z, power), scale_pair(v.w, power)});
        }
    }
};

constexpr int DIGITS = 2, DIGIT_BASE = 254;  // half of the base is the largest lower digit

// The tokens as two digits to the base DIGIT_BASE, for what tensor cores multiply byte by byte. x is taken times a
// power of two, which brings the largest of the warp's columns to between 32 and 64; the digits are signed bytes, the
// higher ones first and the lower ones `stride` bytes further. So x keeps 14 bits below the largest, where fp16 has 11
// of its own. The warp's sums, in units of the higher digit, are multiplied by `gain` and the inverse of that power.
//
// With quads a column's digit is a byte. With the bytes of a hash (MadDecoder) a pair of columns (x0, x1) has a word of
// digits, the lowest byte first, of 3/4 (x1 - x0), x1, 3/4 (x0 + x1), x0.
template <Operand OPERAND>
struct DigitFilling : TokenPieces {
    static constexpr int LARGEST_EXPONENT = 5;
    static constexpr int WORDS = OPERAND == Operand::QUADS ? 2 : 4;  // that each digit of a piece takes
    static constexpr int TOGETHER = TOKENS < 4 ? TOKENS : 4;  // tokens that are written at a time
    static constexpr u32 BOTH = 0x00010001;

    using Digits = u32[DIGITS][WORDS];

    u32 to, stride;  // where the first token's first digits go, and from digits to digits
    u32 factors;     // where the inverse factors go
    float gain;

    // Loops stay loops: the machine code that a block's start runs through is short.
    template <typename Meanwhile>
    __device__ __forceinline__ void fill(Meanwhile meanwhile) const {
        for (int token = 0; token < batch; token += SIDE_BY_SIDE) {
            u32 largest[SIDE_BY_SIDE] = {}, own = 0;
            auto put = [&](int row, int piece, const Words4& words) { stage(place_of(token + row, piece), words); };
            bring(token, largest, put, meanwhile);
#pragma unroll
            for (int i = 0; i < SIDE_BY_SIDE; ++i) {
                u32 of_warp = warp_max(largest[i]);
                own = i == 0 || lane_index() == i ? of_warp : own;
            }
            u32 scale = scale_of(token + lane_index(), own);  // of one token in each lane
#pragma unroll 1
            for (int i = 0; i < SIDE_BY_SIDE && token + i < batch; i += TOGETHER) write(token + i, i, scale);
        }
        warp_sync();
    }

    __device__ __forceinline__ u32 place_of(int token, int piece) const {
        return to + token * DIGITS * stride + 4 * WORDS * piece;
    }

    // A piece of x waits where its own digits will be.
    __device__ __forceinline__ void stage(u32 place, const Words4& words) const {
        if constexpr (OPERAND == Operand::QUADS) {
            store_shared(place, Words2{words.x, words.y});
            store_shared(place + stride, Words2{words.z, words.w});
        } else {
            store_shared(place, words);
        }
    }

    __device__ __forceinline__ Words4 staged(u32 place) const {
        if constexpr (OPERAND != Operand::QUADS) return load_shared_four(place);
        Words2 first = load_shared_two(place), last = load_shared_two(place + stride);
        return Words4{first.x, first.y, last.x, last.y};
    }

    // What a token's values are multiplied by, of their largest magnitude (bits of its format): bits of a float for
    // bf16, else two factors in fp16, as one may be too large for it.
    __device__ __forceinline__ u32 scale_of(int token, u32 largest) const {
        int exponent = static_cast<int>(float_to_bits(value_of(largest)) >> 23);  // biased by 127
        int up = min(127 + LARGEST_EXPONENT - exponent, BFLOAT ? 126 : 30);
        // A magnitude that is no number spoils the sums, as it would elsewhere.
        float inverse = bits_to_float(exponent == 255 ? 0x7FC00000 : (127 - up) << 23);
        if (lane_index() < SIDE_BY_SIDE) store_shared(factors + 4 * token, float_to_bits(inverse * gain));
        if (BFLOAT) return (127 + max(up, -126)) << 23;
        int one = min(up, 15);
        return (15 + one) << 10 | (15 + up - one) << 26;
    }

    // TOGETHER tokens; the first one's scale is that of lane `lane`. There is room for absent ones, of which anything
    // is made.
    __device__ __forceinline__ void write(int token, int lane, u32 lane_scale) const {
        u32 scale[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) scale[i] = shuffle(lane_scale, lane + i);
#pragma unroll 1
        for (int piece = lane_index(); piece < pieces; piece += 32) {
            Digits digits[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) split(staged(place_of(token + i, piece)), scale[i], digits[i]);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) store(place_of(token + i, piece), digits[i]);
        }
    }

    __device__ __forceinline__ void store(u32 place, const Digits& digits) const {
#pragma unroll
        for (int i = 0; i < DIGITS; ++i) {
            const u32* words = digits[i];
            if constexpr (OPERAND == Operand::QUADS) {
                store_shared(place + i * stride, Words2{words[0], words[1]});
            } else {
                store_shared(place + i * stride, Words4{words[0], words[1], words[2], words[3]});
            }
        }
    }

    // The digits of a piece.
    static __device__ __forceinline__ void split(const Words4& raw, u32 scale, Digits& digits) {
        const u32 pairs[4] = {scaled(raw.x, scale), scaled(raw.y, scale), scaled(raw.z, scale), scaled(raw.w, scale)};
        if constexpr (OPERAND == Operand::QUADS) {
            split_columns(pairs, digits);
        } else {
            split_directions(pairs, digits);
        }
    }

    static __device__ __forceinline__ u32 scaled(u32 pair, u32 scale) {
        if constexpr (BFLOAT) return scale_pair(pair, bits_to_float(scale));
        return multiply_add_half2(
            multiply_add_half2(pair, permute(scale, scale, 0x1010), 0), permute(scale, scale, 0x3232), 0);
    }

    static __device__ __forceinline__ void split_columns(const u32 (&pairs)[4], Digits& digits) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            u32 first[DIGITS], second[DIGITS];
            digits_of(pairs[2 * n], 0x3C00 * BOTH, first);
            digits_of(pairs[2 * n + 1], 0x3C00 * BOTH, second);
#pragma unroll
            for (int i = 0; i < DIGITS; ++i) digits[i][n] = permute(first[i], second[i], 0x6420);
        }
    }

    static __device__ __forceinline__ void split_directions(const u32 (&pairs)[4], Digits& digits) {
        constexpr u32 SIGNS = 0xBC003C00;  // (1, -1)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            u32 pair = pairs[n], straight[DIGITS], crossed[DIGITS];
            digits_of(pair, 0x3C00 * BOTH, straight);
            // x0 + x1 and x0 - x1; the sign of the second is turned by its factor
            u32 sums = multiply_add_half2(permute(pair, pair, 0x3232), SIGNS, permute(pair, pair, 0x1010));
            digits_of(sums, 0xBA003A00, crossed);
#pragma unroll
            for (int i = 0; i < DIGITS; ++i) digits[i][n] = permute(straight[i], crossed[i], 0x0426);
        }
    }

    // Digits of both halves times `factor`, each in the low byte of its half.
    static __device__ __forceinline__ void digits_of(u32 number, u32 factor, u32 (&digits)[DIGITS]) {
        constexpr u32 ROUNDER = 0x6600 * BOTH;                        // 1536: sums with it are integers
        constexpr u32 MINUS = 0xBC00 * BOTH, UPWARDS = 0x5BF0 * BOTH;  // -1, DIGIT_BASE
        digits[0] = multiply_add_half2(number, factor, ROUNDER);
        u32 rest = multiply_add_half2(number, factor, multiply_add_half2(digits[0], MINUS, ROUNDER));
        digits[1] = multiply_add_half2(rest, UPWARDS, ROUNDER);
    }
};
