// The activations of a block's columns, in shared memory as fp16.
//
// bf16 has a wider range than fp16, so each token's values are multiplied by a power of two that brings the largest
// among the block's columns to between 2^14 and 2^15; that is exact but for values 2^-29 times smaller than it. The
// sums are multiplied by the inverse, `factors`.
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

// Brings x (batch, in_features) to shared memory with the last LOADERS warps of the block, in pieces of 8 columns.
template <int LOADERS>
struct TokenFilling {
    static constexpr int SHARERS = LOADERS > TOKENS ? LOADERS / TOKENS : 1;  // warps for a token
    static constexpr int AT_ONCE = LOADERS / SHARERS;                        // tokens
    static constexpr int FLIGHT = 4;                                         // pieces of a thread in flight
    static constexpr int STEP = SHARERS * 32;                                // pieces from one to the next

    Segment low, high;
    const u16* x;
    int in_features, batch, warp;

    __device__ __forceinline__ int pieces() const { return (low.units() + high.units()) * 16; }
    __device__ __forceinline__ int first_piece() const { return warp % SHARERS * 32 + lane_index(); }
    __device__ __forceinline__ int first_token() const { return warp / SHARERS; }

    __device__ __forceinline__ void load(Words4 (&values)[FLIGHT], int token, int start) const {
        int low_pieces = low.units() * 16;
#pragma unroll
        for (int i = 0; i < FLIGHT; ++i) {
            int piece = start + i * STEP;
            bool is_low = piece < low_pieces;
            int column = is_low ? low.first * 128 + 8 * piece : high.first * 128 + 8 * (piece - low_pieces);
            values[i] = Words4{};
            if (piece < pieces() && column < (is_low ? low.columns : high.columns)) {
                const u16* row = x + static_cast<u64>(token) * in_features;
                values[i] = *reinterpret_cast<const Words4*>(row + (is_low ? low.column : high.column) + column);
            }
        }
    }

    // `shared_max`: LOADERS * TOKENS words.
    __device__ __forceinline__ void fill(u16* tokens, int stride, float* factors, u32* shared_max) const {
        int lane = lane_index(), part = warp % SHARERS;
        for (int token = first_token(); token < batch; token += AT_ONCE) {
            Words4* to = reinterpret_cast<Words4*>(tokens + token * stride);
            u32 largest = 0;
            for (int start = first_piece(); start < pieces(); start += FLIGHT * STEP) {
                Words4 values[FLIGHT];
                load(values, token, start);
#pragma unroll
                for (int i = 0; i < FLIGHT; ++i) {
                    int piece = start + i * STEP;
                    const Words4& v = values[i];
                    if (piece < pieces()) to[piece] = v;
                    largest = max(largest, max(max(larger_of(v.x), larger_of(v.y)), max(larger_of(v.z), larger_of(v.w))));
                }
            }
            if constexpr (BFLOAT) {
                largest = warp_max(largest);
                if (lane == 0) shared_max[token * SHARERS + part] = largest;
            } else if (part == 0 && lane == 0) {
                factors[token] = 1.0f;
            }
        }
        if constexpr (BFLOAT) {
            barrier_sync<1, 32 * LOADERS>();
            scale(tokens, stride, factors, shared_max);
        }
    }

    __device__ __forceinline__ void scale(u16* tokens, int stride, float* factors, const u32* shared_max) const {
        int lane = lane_index(), part = warp % SHARERS;
        for (int token = first_token(); token < batch; token += AT_ONCE) {
            u32 largest = 0;
            for (int i = 0; i < SHARERS; ++i) largest = max(largest, shared_max[token * SHARERS + i]);
            int shift = min(141 - static_cast<int>(largest >> 7), 126);
            if (part == 0 && lane == 0) factors[token] = bits_to_float((127 - shift) << 23);
            float power = bits_to_float((127 + shift) << 23);
            Words4* own = reinterpret_cast<Words4*>(tokens + token * stride);
            for (int piece = first_piece(); piece < pieces(); piece += STEP) {
                Words4 v = own[piece];
                own[piece] = Words4{
                    scale_pair(v.x, power), scale_pair(v.y, power), scale_pair(v.z, power), scale_pair(v.w, power)};
            }
        }
    }
};
