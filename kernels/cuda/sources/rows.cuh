// Neighbouring numbers of a row: fp16, bf16 or fp32 in memory, float32 in registers.
#pragma once
#include "ptx.cuh"

constexpr int FP16 = 0, BF16 = 1, FP32 = 2;
constexpr int LANES = 32;

__device__ constexpr int bytes_of(int format) { return format == FP32 ? 4 : 2; }

__device__ __forceinline__ float exchange(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// COUNT neighbouring numbers as they lie in memory, moved in the widest pieces.
template <int FORMAT, int COUNT>
struct Raw {
    static constexpr int BYTES = bytes_of(FORMAT) * COUNT;
    static constexpr int WORDS = (BYTES + 3) / 4;
    u32 word[WORDS];

    __device__ __forceinline__ void load(const void* base, long long index) {
        const u8* address = (const u8*)base + index * bytes_of(FORMAT);
        if constexpr (BYTES >= 16) {
#pragma unroll
            for (int n = 0; n < WORDS / 4; ++n) {
                Words4 four = ((const Words4*)address)[n];
                word[4 * n] = four.x, word[4 * n + 1] = four.y, word[4 * n + 2] = four.z, word[4 * n + 3] = four.w;
            }
        } else if constexpr (BYTES == 8) {
            Words2 two = *(const Words2*)address;
            word[0] = two.x, word[1] = two.y;
        } else if constexpr (BYTES == 4) {
            word[0] = *(const u32*)address;
        } else {
            word[0] = *(const u16*)address;
        }
    }

    __device__ __forceinline__ float value(int n) const {
        if constexpr (FORMAT == FP32) {
            return bits_to_float(word[n]);
        } else {
            u16 half = (u16)(word[n / 2] >> 16 * (n % 2));
            return FORMAT == FP16 ? half_to_float(half) : bfloat_to_float(half);
        }
    }

    __device__ __forceinline__ void set(const float* values) {
#pragma unroll
        for (int n = 0; n < WORDS; ++n) {
            if constexpr (FORMAT == FP32) {
                word[n] = float_to_bits(values[n]);
            } else {
                word[n] = FORMAT == FP16 ? float_to_half(values[2 * n]) : float_to_bfloat(values[2 * n]);
                if constexpr (COUNT > 1) {
                    float odd = values[2 * n + 1];
                    word[n] |= (u32)(FORMAT == FP16 ? float_to_half(odd) : float_to_bfloat(odd)) << 16;
                }
            }
        }
    }

    __device__ __forceinline__ void store(void* base, long long index) const {
        u8* address = (u8*)base + index * bytes_of(FORMAT);
        if constexpr (BYTES >= 16) {
#pragma unroll
            for (int n = 0; n < WORDS / 4; ++n) {
                ((Words4*)address)[n] = Words4{word[4 * n], word[4 * n + 1], word[4 * n + 2], word[4 * n + 3]};
            }
        } else if constexpr (BYTES == 8) {
            *(Words2*)address = Words2{word[0], word[1]};
        } else if constexpr (BYTES == 4) {
            *(u32*)address = word[0];
        } else {
            *(u16*)address = (u16)word[0];
        }
    }
};
