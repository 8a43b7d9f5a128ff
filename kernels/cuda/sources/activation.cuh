// One number of the activations' format: bf16 where the macro BFLOAT is 1, else fp16.
#pragma once

#include "ptx.cuh"

__device__ __forceinline__ float value_of(u16 bits) { return BFLOAT ? bfloat_to_float(bits) : half_to_float(bits); }

__device__ __forceinline__ u16 bits_of(float value) { return BFLOAT ? float_to_bfloat(value) : float_to_half(value); }
