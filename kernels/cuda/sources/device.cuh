// What the kernels need of CUDA's own headers, which NVRTC would have to find on the user's machine: fixed-width types,
// number formats, warp exchange, and programmatic dependent launch. Tests replace this file to run kernels on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FORMAT_FP16 0
#define FORMAT_BF16 1
#define FORMAT_FP32 2

// Bytes of one number of a format.
template <int FORMAT>
struct Bytes {
    static constexpr int value = FORMAT == FORMAT_FP32 ? 4 : 2;
};

struct alignas(8) Words2 {
    u32 x, y;
};

struct alignas(16) Words4 {
    u32 x, y, z, w;
};

__device__ __forceinline__ float bits_to_float(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ u32 float_to_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float fp16_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 float_to_fp16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 float_to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// 1 / (1 + exp(-value)), to about 1e-6 of its value.
__device__ __forceinline__ float sigmoid(float value) { return __fdividef(1.0f, 1.0f + __expf(-value)); }

__device__ __forceinline__ float reciprocal_root(float value) { return rsqrtf(value); }

__device__ __forceinline__ float exchange(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Waits until the kernels ahead in the stream have written what they write. Needed, and doing anything, only in a
// kernel launched as `programmatic`; everything it reads or overwrites of theirs must come after.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its preamble, once every block has come here or ended.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
