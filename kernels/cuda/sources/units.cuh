// Codes as a warp reads them: the other side of kernels/cuda/layout.py.
//
// A *unit* is 16 rows x 128 columns of a weight: 8 tiles, or 2 *blocks* of 4 tiles. Lane 4 * g + t of a warp owns, in
// each block, the codes of pairs 16 g .. 16 g + 15 of tile t: 16 * WIDTH consecutive bits of that tile's stream, rows g
// and g + 8, all 16 columns. The two blocks' bits follow one another in the lane's WIDTH words, unless these are byte
// planes (BytePlanes), half planes (IntegerDecoder) or nibbles (Nibbles). Pair 4 m + j is columns 2m and 2m + 1 of
// tile t, 8 further where j >= 2, of row g, or g + 8 where j is odd. Weights that are multiplied as bytes go by
// *quads*, four neighbouring columns of a row: quad 2 c + r is columns 4c .. 4c + 3 of row g + 8 r.
//
// Words of a unit in memory, for all lanes: WIDTH / 4 pieces of 16 bytes a lane, then 8 bytes a lane if WIDTH & 2, then
// 4 if WIDTH & 1: 128 * WIDTH bytes, every access aligned and without bank conflicts.
#pragma once

#include "ptx.cuh"

#define INT 0
#define NUQ 1
#define VQ 2
#define TCQ 3
#define MAD 4

constexpr int BLOCK_PAIRS = 16, BLOCK_QUADS = BLOCK_PAIRS / 2;
constexpr int UNIT_COLUMNS = 128;

// The pair that is the first two columns of a quad, or where `last` is 1 the last two.
__device__ __forceinline__ constexpr int pair_of_quad(int quad, int last) {
    return 4 * (quad / 2 % 2 * 2 + last) + 2 * (quad / 4) + quad % 2;
}

template <int VALUE>
constexpr int LOG2 = 1 + LOG2<VALUE / 2>;
template <>
constexpr int LOG2<1> = 0;
template <>
constexpr int LOG2<0> = 0;

template <int WIDTH>
struct Unit {
    static constexpr int BYTES = 128 * WIDTH;
    u32 words[WIDTH] = {};
    u32 next;  // trellis codes: the first 16 bits that follow the lane's run, block 0 in the low half, 1 in the high

    static constexpr int LANE_BYTES = WIDTH >= 4 ? 16 : WIDTH >= 2 ? 8 : 4;  // of a lane's first piece
    static constexpr int TWOS = WIDTH / 4 * 512;                      // where the pieces of 8 bytes begin,
    static constexpr int ONES = TWOS + ((WIDTH & 2) != 0 ? 256 : 0);  // and those of 4
    // From a lane's first piece back to these, a lane.
    static constexpr int TO_TWO = LANE_BYTES - 8, TO_ONE = LANE_BYTES - 4;

    // A lane's words. `place`: of its first piece in global memory; where not `active`, the words stay as they are.
    __device__ __forceinline__ void load(const u8* place, bool active = true, int lane = lane_index()) {
#pragma unroll
        for (int piece = 0; piece < WIDTH / 4; ++piece) {
            u32* to = words + 4 * piece;
            Words4 four{to[0], to[1], to[2], to[3]};
            load_once_if(four, place + 512 * piece, active);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
        if constexpr ((WIDTH & 2) != 0) {
            u32* to = words + WIDTH / 4 * 4;
            Words2 two{to[0], to[1]};
            load_once_if(two, place - TO_TWO * lane + TWOS, active);
            to[0] = two.x, to[1] = two.y;
        }
        if constexpr ((WIDTH & 1) != 0) {
            load_once_if(words[WIDTH - 1], place - TO_ONE * lane + ONES, active);
        }
    }

    // The same to shared memory, asynchronously, where a unit's bytes lie as in global memory. `to`: of a lane's first
    // piece.
    static __device__ __forceinline__ void copy(u32 to, const u8* place, bool active) {
        int lane = lane_index();
#pragma unroll
        for (int piece = 0; piece < WIDTH / 4; ++piece) {
            copy_async_if<16>(to + 512 * piece, place + 512 * piece, active);
        }
        if constexpr ((WIDTH & 2) != 0) {
            copy_async_if<8>(to - TO_TWO * lane + TWOS, place - TO_TWO * lane + TWOS, active);
        }
        if constexpr ((WIDTH & 1) != 0) {
            copy_async_if<4>(to - TO_ONE * lane + ONES, place - TO_ONE * lane + ONES, active);
        }
    }

    // A lane's words from shared memory. `from`: of its first piece.
    __device__ __forceinline__ void read(u32 from) {
        int lane = lane_index();
#pragma unroll
        for (int piece = 0; piece < WIDTH / 4; ++piece) {
            Words4 four = load_shared_four(from + 512 * piece);
            u32* to = words + 4 * piece;
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
        if constexpr ((WIDTH & 2) != 0) {
            Words2 two = load_shared_two(from - TO_TWO * lane + TWOS);
            words[WIDTH / 4 * 4] = two.x, words[WIDTH / 4 * 4 + 1] = two.y;
        }
        if constexpr ((WIDTH & 1) != 0) words[WIDTH - 1] = load_shared_word(from - TO_ONE * lane + ONES);
    }
};

__device__ __forceinline__ int signed_byte(u32 word, int i) { return static_cast<int>(word << (24 - 8 * i)) >> 24; }

// `count` bits of a stream from bit `position` on, in the low bits of the result; the bits above are anything.
// Both are constants after unrolling; a negative position (of the first word only) puts the bits higher.
template <int N>
__device__ __forceinline__ u32 window(const u32 (&words)[N], int position, int count) {
    if (position < 0) return words[0] << -position;
    int word = position >> 5, shift = position & 31;
    if (shift == 0) return words[word];
    if (shift + count <= 32 || word + 1 == N) return words[word] >> shift;
    return funnel_shift(words[word], words[word + 1], shift);
}

// What tensor cores multiply: fp16 weights in pairs, with fp16 activations; or bytes, with activations as digits
// (tokens.cuh): of hashes that are a pair of weights along four directions, or of the weights of a quad.
enum class Operand { HALVES, DIRECTIONS, QUADS };

// What is common to decoders. `decode<BLOCK, PART>` gives the words of a block, which PARTS calls give whole; sums of
// products are multiplied by `gain`. `ask` loads what a lane wants to know of the codebook, `lane` makes of it what it
// decodes with.
struct AnyDecoder {
    static constexpr int PARTS = 1;
    static constexpr int ENTRIES = 0, STRIDE = 0, ENTRY_BYTES = 16, TABLE_BYTES = 0;  // where there is no table

    struct Asked {};
    using Lane = u32;

    static __device__ __forceinline__ Asked ask(const u16*) { return {}; }

    static __device__ __forceinline__ float gain() { return 1; }
};

struct HalfDecoder : AnyDecoder {
    using Sum = float;
    using Words = u32[BLOCK_PAIRS];
    static constexpr Operand OPERAND = Operand::HALVES;

    static __device__ __forceinline__ void values_of(const Words& pairs, float (&weights)[2 * BLOCK_PAIRS]) {
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            weights[2 * i] = half_to_float(pairs[i] & 0xFFFF);
            weights[2 * i + 1] = half_to_float(pairs[i] >> 16);
        }
    }
};

// Of weights that are bytes times 2^-LEVEL_BITS.
struct QuadDecoder : AnyDecoder {
    using Sum = int;
    using Words = u32[BLOCK_QUADS];
    static constexpr Operand OPERAND = Operand::QUADS;

    static __device__ __forceinline__ float gain() { return bits_to_float((127 - LEVEL_BITS) << 23); }

    // Four fp16 weights of a codebook as bytes.
    static __device__ __forceinline__ u32 bytes_of(u32 first_two, u32 last_two) {
        constexpr u32 BOTH = 0x00010001, STEPS = (15 + LEVEL_BITS) << 10;
        constexpr u32 ROUNDER = 0x6600;  // 1536: sums with it are integers
        u32 first = multiply_add_half2(first_two, STEPS * BOTH, ROUNDER * BOTH);
        return permute(first, multiply_add_half2(last_two, STEPS * BOTH, ROUNDER * BOTH), 0x6420);
    }

    // Both weights of every pair of a block, in the order of pairs.
    static __device__ __forceinline__ void values_of(const Words& quads, float (&weights)[2 * BLOCK_PAIRS]) {
#pragma unroll
        for (int i = 0; i < 4 * BLOCK_QUADS; ++i) {
            int pair = pair_of_quad(i / 4, i / 2 % 2);
            weights[2 * pair + i % 2] = static_cast<float>(signed_byte(quads[i / 4], i % 4)) * gain();
        }
    }
};
