// The activations of a block's columns, in shared memory as fp16.
//
// bf16 has a wider range than fp16, so each token's values are multiplied by a power of two that brings the largest
// among the block's columns to between 2^14 and 2^15; that is exact but for values 2^-29 times smaller than it. The
// sums are multiplied by the inverse, `factors`.
#pragma once

#include "ptx.cuh"

// Columns of one rate that a block reads: units `first .. end` of those that lie at columns `column .. column + columns`
// of x. The last unit may be wider than what there is; it is filled with zeros.
struct Segment {
    int first, end, column, columns;

    __device__ __forceinline__ int units() const { return end - first; }
};

__device__ __forceinline__ float value_of(u16 bits) { return BFLOAT ? bfloat_to_float(bits) : half_to_float(bits); }

__device__ __forceinline__ u16 bits_of(float value) { return BFLOAT ? float_to_bfloat(value) : float_to_half(value); }

// The two values of a word, times a power of two, as fp16.
__device__ __forceinline__ u32 scale_pair(u32 pair, float scale) {
    u32 first = float_to_half(value_of(pair & 0xFFFF) * scale), second = float_to_half(value_of(pair >> 16) * scale);
    return first | second << 16;
}

// The largest magnitude of two bf16 values, as bits.
__device__ __forceinline__ u32 larger_of(u32 pair) { return max(pair & 0x7FFF, pair >> 16 & 0x7FFF); }

// Loads x (batch, in_features) with the last LOADERS warps of the block. `shared_max`: LOADERS * TOKENS words.
//
// The 8 words (pairs of columns) of a tile lie in the order 0 4 1 5 2 6 3 7, so that the two registers of each B operand
// are neighbours.
template <int WARPS_BEFORE, int LOADERS>
__device__ __forceinline__ void load_tokens(
    u16* tokens, int stride, const Segment& low, const Segment& high, const u16* x, int in_features, int batch, int warp,
    float* factors, u32* shared_max) {
    constexpr int SHARERS = LOADERS > TOKENS ? LOADERS / TOKENS : 1;  // warps for a token
    constexpr int AT_ONCE = LOADERS / SHARERS;                        // tokens
    constexpr int FLIGHT = 4;                                         // tiles of a thread in flight
    int lane = lane_index(), part = warp % SHARERS, low_tiles = low.units() * 8, tiles = low_tiles + high.units() * 8;
    for (int token = warp / SHARERS; token < batch; token += AT_ONCE) {
        Words4* to = reinterpret_cast<Words4*>(tokens + token * stride);
        const u16* from = x + static_cast<u64>(token) * in_features;
        u32 largest = 0;
        for (int start = part * 32 + lane; start < tiles; start += FLIGHT * SHARERS * 32) {
            Words4 values[FLIGHT][2] = {};
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                int tile = start + i * SHARERS * 32;
                bool is_low = tile < low_tiles;
                int column = is_low ? low.first * 128 + 16 * tile : high.first * 128 + 16 * (tile - low_tiles);
                if (tile < tiles && column < (is_low ? low.columns : high.columns)) {
                    int start_column = is_low ? low.column : high.column;
                    const Words4* source = reinterpret_cast<const Words4*>(from + start_column + column);
                    values[i][0] = source[0], values[i][1] = source[1];
                }
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                int tile = start + i * SHARERS * 32;
                const Words4 &a = values[i][0], &b = values[i][1];
                if (tile < tiles) {
                    to[2 * tile] = Words4{a.x, b.x, a.y, b.y};
                    to[2 * tile + 1] = Words4{a.z, b.z, a.w, b.w};
                }
                largest = max(largest, max(max(larger_of(a.x), larger_of(a.y)), max(larger_of(a.z), larger_of(a.w))));
                largest = max(largest, max(max(larger_of(b.x), larger_of(b.y)), max(larger_of(b.z), larger_of(b.w))));
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
        for (int token = warp / SHARERS; token < batch; token += AT_ONCE) {
            u32 largest = 0;
            for (int i = 0; i < SHARERS; ++i) largest = max(largest, shared_max[token * SHARERS + i]);
            int shift = min(141 - static_cast<int>(largest >> 7), 126);
            if (part == 0 && lane == 0) factors[token] = bits_to_float((127 - shift) << 23);
            float scale = bits_to_float((127 + shift) << 23);
            Words4* values = reinterpret_cast<Words4*>(tokens + token * stride);
            for (int i = 2 * (part * 32 + lane); i < 2 * tiles; i += 2 * SHARERS * 32) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Words4 v = values[i + half];
                    values[i + half] = Words4{
                        scale_pair(v.x, scale), scale_pair(v.y, scale), scale_pair(v.z, scale), scale_pair(v.w, scale)};
                }
            }
        }
    }
}
