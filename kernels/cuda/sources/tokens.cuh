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

__device__ __forceinline__ u32 largest_of(const Words4& words) {
    return max(max(larger_of(words.x), larger_of(words.y)), max(larger_of(words.z), larger_of(words.w)));
}

// Brings x (batch, in_features) to shared memory with the last LOADERS warps of the block, tiles of 16 columns in the order
// in which a multiplication's B operand has them in its registers: pairs 0, 4, 1, 5, 2, 6, 3, 7.
// `tokens`, `factors`, `shared_max` (LOADERS * TOKENS words; bf16 only): where to, bytes into dynamic shared memory.
template <int LOADERS>
struct TokenFilling {
    static constexpr int SHARERS = LOADERS > TOKENS ? LOADERS / TOKENS : 1;  // warps for a token
    static constexpr int AT_ONCE = LOADERS / SHARERS;                        // tokens
    static constexpr int FLIGHT = 2;                                         // tiles of a thread in flight
    static constexpr int STEP = SHARERS * 32;                                // tiles from one to the next

    Segment low, high;
    const u16* x;
    int in_features, batch, warp;

    __device__ __forceinline__ int first_tile() const { return warp % SHARERS * 32 + lane_index(); }
    __device__ __forceinline__ int first_token() const { return warp / SHARERS; }

    __device__ __forceinline__ void fill(u32 tokens, u32 stride, u32 factors, u32 shared_max) const {
        int part = warp % SHARERS;
        for (int token = first_token(); token < batch; token += AT_ONCE) {
            const u16* from = x + static_cast<u64>(token) * in_features;
            u32 to = tokens + token * stride;
            u32 largest = copy(from, to, low);
            if constexpr (WIDTH_HIGH != 0) largest = max(largest, copy(from, to + low.units() * UNIT_COLUMNS * 2, high));
            if constexpr (BFLOAT) {
                largest = warp_max(largest);
                if (lane_index() == 0) store_shared(shared_max + 4 * (token * SHARERS + part), largest);
            }
        }
        if constexpr (BFLOAT) {
            barrier_sync<1, 32 * LOADERS>();
            scale(tokens, stride, factors, shared_max);
        }
    }

    // This thread's share of one token's columns of a segment; the largest magnitude among them, as bits of a bf16.
    __device__ __forceinline__ u32 copy(const u16* row, u32 to, const Segment& segment) const {
        int first = first_tile(), left = segment.units() * 8 - first;
        int real = segment.columns / 16 - segment.first * 8 - first;  // tiles of columns; those behind are zeros
        const Words4* from = reinterpret_cast<const Words4*>(row + segment.column + segment.first * UNIT_COLUMNS) + 2 * first;
        to += 32 * first;
        u32 largest = 0;
#pragma unroll 1
        for (; left > 0; left -= FLIGHT * STEP, real -= FLIGHT * STEP) {
            Words4 values[FLIGHT][2];
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                values[i][0] = values[i][1] = Words4{};
                if (i * STEP < min(left, real)) values[i][0] = from[2 * i * STEP], values[i][1] = from[2 * i * STEP + 1];
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                const Words4 &front = values[i][0], &back = values[i][1];
                if (i * STEP < left) {
                    store_shared(to + 32 * i * STEP, Words4{front.x, back.x, front.y, back.y});
                    store_shared(to + 32 * i * STEP + 16, Words4{front.z, back.z, front.w, back.w});
                }
                if constexpr (BFLOAT) largest = max(largest, max(largest_of(front), largest_of(back)));
            }
            from += 2 * FLIGHT * STEP;
            to += 32 * FLIGHT * STEP;
        }
        return largest;
    }

    __device__ __forceinline__ void scale(u32 tokens, u32 stride, u32 factors, u32 shared_max) const {
        int part = warp % SHARERS, pieces = (low.units() + high.units()) * 16;
        for (int token = first_token(); token < batch; token += AT_ONCE) {
            u32 largest = 0;
            for (int i = 0; i < SHARERS; ++i) {
                largest = max(largest, load_shared_word(shared_max + 4 * (token * SHARERS + i)));
            }
            int shift = min(141 - static_cast<int>(largest >> 7), 126);
            if (part == 0 && lane_index() == 0) store_shared(factors + 4 * token, (127 - shift) << 23);
            float power = bits_to_float((127 + shift) << 23);
            for (int piece = first_tile(); piece < pieces; piece += STEP) {
                u32 own = tokens + token * stride + 16 * piece;
                Words4 v = load_shared_four(own);
                store_shared(
                    own,
                    Words4{
                        scale_pair(v.x, power), scale_pair(v.y, power), scale_pair(v.z, power), scale_pair(v.w, power)});
            }
        }
    }
};
