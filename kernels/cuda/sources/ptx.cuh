// Own integer types and the PTX instructions that the kernels use, one function each.
//
// Nothing here includes a CUDA header, so NVRTC compiles it on a machine without them. Shared memory is addressed by
// bytes from the beginning of dynamic shared memory. Instructions newer than sm_80 say so.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Parts that a kernel leaves out, with wrong results, to see what they cost (experiments/bench_kernels.py).
#ifndef WITHOUT
#define WITHOUT 0
#endif
#define WITHOUT_LOOKUPS 1
#define WITHOUT_TABLE 2
#define WITHOUT_TOKENS 4
#define WITHOUT_WEIGHTS 8
#define WITHOUT_ADDING 16

// Four words that move as one 16-byte access, two as one of 8 bytes.
struct __align__(16) Words4 { u32 x, y, z, w; };
struct __align__(8) Words2 { u32 x, y; };

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }

// Ends the kernel with an error, which the host sees at its next synchronisation.
__device__ __forceinline__ void stop_kernel() { __trap(); }

// Where dynamic shared memory begins when a kernel has no other: known, so that it costs no addition at every lookup.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr u32 SHARED_BASE = 1024;
#else
constexpr u32 SHARED_BASE = 0;
#endif

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

// Stops the kernel, with an error at the next synchronisation, should an architecture lay shared memory out otherwise.
__device__ __forceinline__ void check_shared_base(const void* dynamic_shared) {
    if (static_cast<u32>(__cvta_generic_to_shared(dynamic_shared)) != SHARED_BASE) stop_kernel();
}

// The word `offset` bytes into dynamic shared memory.
__device__ __forceinline__ u32 lookup(u32 offset) {
    if constexpr ((WITHOUT & WITHOUT_LOOKUPS) != 0) return offset;
    u32 word;
    asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(word) : "r"(offset), "n"(SHARED_BASE));
    return word;
}

// The two words `offset` bytes into dynamic shared memory.
__device__ __forceinline__ Words2 lookup_two(u32 offset) {
    if constexpr ((WITHOUT & WITHOUT_LOOKUPS) != 0) return Words2{offset, offset};
    Words2 words;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2 + %3];"
                 : "=r"(words.x), "=r"(words.y)
                 : "r"(offset), "n"(SHARED_BASE));
    return words;
}

// The words `offset` + BYTES bytes into dynamic shared memory, where `active`; elsewhere anything.
template <int BYTES>
__device__ __forceinline__ void load_shared_if(Words4& words, u32 offset, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %6]; }"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "r"(offset), "r"(static_cast<u32>(active)), "n"(SHARED_BASE + BYTES));
}

__device__ __forceinline__ Words4 load_shared_four(u32 offset) {
    Words4 words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(offset), "n"(SHARED_BASE)
                 : "memory");
    return words;
}

__device__ __forceinline__ Words2 load_shared_two(u32 offset) {
    Words2 words;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2 + %3];"
                 : "=r"(words.x), "=r"(words.y)
                 : "r"(offset), "n"(SHARED_BASE)
                 : "memory");
    return words;
}

__device__ __forceinline__ u32 load_shared_word(u32 offset) {
    u32 word;
    asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(word) : "r"(offset), "n"(SHARED_BASE) : "memory");
    return word;
}

__device__ __forceinline__ u16 load_shared_half(u32 offset) {
    u16 half;
    asm volatile("ld.shared.b16 %0, [%1 + %2];" : "=h"(half) : "r"(offset), "n"(SHARED_BASE) : "memory");
    return half;
}

__device__ __forceinline__ void store_shared(u32 offset, const Words4& words) {
    asm volatile("st.shared.v4.b32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(offset), "n"(SHARED_BASE), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 offset, const Words2& words) {
    asm volatile("st.shared.v2.b32 [%0 + %1], {%2, %3};" ::"r"(offset), "n"(SHARED_BASE), "r"(words.x), "r"(words.y)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 offset, u32 word) {
    asm volatile("st.shared.b32 [%0 + %1], %2;" ::"r"(offset), "n"(SHARED_BASE), "r"(word) : "memory");
}

// Lines of the second-level cache that the next ones may take the place of: what is read once must not drive out
// codebooks, machine code and keys, which the next kernels want.
__device__ __forceinline__ u64 first_to_evict() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Words of global memory that are read once, where `active`; elsewhere the old contents stay.
__device__ __forceinline__ void load_once_if(Words4& words, const void* pointer, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %5, 0; "
        "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %6; }"
        : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
        : "l"(pointer), "r"(static_cast<u32>(active)), "l"(first_to_evict()));
}

__device__ __forceinline__ void load_once_if(Words2& words, const void* pointer, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; "
        "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {%0, %1}, [%2], %4; }"
        : "+r"(words.x), "+r"(words.y)
        : "l"(pointer), "r"(static_cast<u32>(active)), "l"(first_to_evict()));
}

__device__ __forceinline__ void load_once_if(u32& word, const void* pointer, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %3; }"
        : "+r"(word)
        : "l"(pointer), "r"(static_cast<u32>(active)), "l"(first_to_evict()));
}

// The low 32 bits of high:low >> shift, 0 <= shift < 32.
__device__ __forceinline__ u32 funnel_shift(u32 low, u32 high, u32 shift) {
    return __funnelshift_r(low, high, shift);
}

// A number whose value the compiler does not know: grids here have one row.
__device__ __forceinline__ u32 hidden(u32 value) { return value + (gridDim.y - 1); }

// Bytes of second:first chosen by four selector digits, the least significant first.
__device__ __forceinline__ u32 permute(u32 first, u32 second, u32 selector) {
    return __byte_perm(first, second, selector);
}

// The same for a selector that is no constant: its digits must be below 8, which `permute` would see to once more; what
// lies above the four may be anything.
__device__ __forceinline__ u32 pick_bytes(u32 first, u32 second, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(first), "r"(second), "r"(selector));
    return result;
}

__device__ __forceinline__ u32 shuffle(u32 value, int source_lane) {
    return __shfl_sync(0xffffffffu, value, source_lane);
}

__device__ __forceinline__ u32 warp_max(u32 value) { return __reduce_max_sync(0xffffffffu, value); }

__device__ __forceinline__ void block_sync() { __syncthreads(); }

// A warp's lanes see what the others have stored.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

__device__ __forceinline__ void pause() { __nanosleep(20); }

// a * b + c for both halves of fp16 pairs, rounded once.
__device__ __forceinline__ u32 multiply_add_half2(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float bfloat_to_float(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

__device__ __forceinline__ u16 float_to_bfloat(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float bits_to_float(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ u32 float_to_bits(float value) { return __float_as_uint(value); }

// sum (16x8 fp32) += weights (16x16 fp16: a, b, c, d) * tokens (16x8 fp16), fragments as in PTX's mma.m16n8k16.
__device__ __forceinline__ void multiply_add(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a), "r"(b), "r"(c), "r"(d), "r"(low), "r"(high));
}

// The same of bf16.
__device__ __forceinline__ void multiply_add_bfloat(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a), "r"(b), "r"(c), "r"(d), "r"(low), "r"(high));
}

// The transpose of an 8x8 matrix of 16 bits, of which lane 4 g + t has columns 2 t and 2 t + 1 of row g.
__device__ __forceinline__ u32 transpose(u32 pair) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// sum (16x8 int32) += codes (16x32 int8: a, b, c, d) * digits (32x8 int8), fragments as in PTX's mma.m16n8k32.
__device__ __forceinline__ void multiply_add(int (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a), "r"(b), "r"(c), "r"(d), "r"(low), "r"(high));
}

// Global memory that another block writes or reads during this kernel: never cached in a multiprocessor.
__device__ __forceinline__ u32 load_global(const u32* pointer) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

__device__ __forceinline__ void store_global(u32* pointer, u32 value) {
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// Adds one to a counter that blocks share and gives what it was. What the block has stored before its last `block_sync`
// can be seen by a block that reads the counter later, after a `block_sync` of its own.
__device__ __forceinline__ u32 count_up(u32* counter) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// 2 to a power, to 2 units in the last place; 0 for what lies far below.
__device__ __forceinline__ float exp2_fast(float power) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(power));
    return value;
}

// 16 bytes from global memory to `offset` bytes into dynamic shared memory, asynchronously; both aligned to 16.
__device__ __forceinline__ void copy_async(u32 offset, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0 + %1], [%2], 16;"
                 ::"r"(offset), "n"(SHARED_BASE), "l"(from)
                 : "memory");
}

// The same for BYTES (4, 8 or 16), where `active`, with the hint of `load_once_if`; elsewhere nothing is written. Of an
// offset that is partly the same for all lanes NVRTC 13.0 makes an illegal instruction here: it must not see that
// (Stream::begin).
template <int BYTES>
__device__ __forceinline__ void copy_async_if(u32 offset, const void* from, bool active) {
    u32 wanted = active;
    if constexpr (BYTES == 16) {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %3, 0; "
            "@p cp.async.cg.shared.global.L2::cache_hint [%0 + %1], [%2], 16, %4; }"
            ::"r"(offset), "n"(SHARED_BASE), "l"(from), "r"(wanted), "l"(first_to_evict())
            : "memory");
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, %3, 0; "
            "@p cp.async.ca.shared.global.L2::cache_hint [%0 + %1], [%2], %4, %5; }"
            ::"r"(offset), "n"(SHARED_BASE), "l"(from), "r"(wanted), "n"(BYTES), "l"(first_to_evict())
            : "memory");
    }
}

// Copies fall into groups; waits until all but this thread's last COUNT groups have arrived.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int COUNT>
__device__ __forceinline__ void wait_for_copy_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// Waits for all of this thread's copies.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Waits until the kernels before this one have ended and their writes can be seen.
__device__ __forceinline__ void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel start as soon as every block has said so.
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// A barrier of all threads of a cluster of blocks, in two halves: what a thread has stored in any block's shared memory
// before it arrives can be seen by those that have waited. Threads of a warp come together.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Stores where block `rank` of the cluster has what is `place` here, in static shared memory. That block must have
// started and must not have ended: both sides of such stores are barriers of the cluster.
__device__ __forceinline__ void store_in_cluster(float* place, u32 rank, float value) {
    u32 here = static_cast<u32>(__cvta_generic_to_shared(place)), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

#else

__device__ __forceinline__ void wait_for_previous_kernels() {}
__device__ __forceinline__ void allow_next_kernel() {}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void store_in_cluster(float*, u32, float) { stop_kernel(); }

#endif
