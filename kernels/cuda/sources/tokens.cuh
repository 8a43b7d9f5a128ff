// The activations of a warp's columns, in shared memory as fp16.
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
