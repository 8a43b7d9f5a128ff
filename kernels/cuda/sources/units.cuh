// Codes as a warp reads them: the other side of kernels/cuda/layout.py.
//
// A *unit* is 16 rows x 128 columns of a weight: 8 tiles, or 2 *blocks* of 4 tiles. Lane 4 * g + t of a warp owns, in
// each block, the codes of pairs 16 g .. 16 g + 15 of tile t: 16 * WIDTH consecutive bits of that tile's stream, rows g
// and g + 8, all 16 columns. The two blocks' bits follow one another in the lane's WIDTH words, unless these are byte
// planes (ByteDecoder) or half planes (IntegerDecoder). Pair 4 m + j is columns 2m and 2m + 1 of tile t, 8 further where
// j >= 2, of row g, or g + 8 where j is odd.
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

constexpr int BLOCK_PAIRS = 16;
constexpr int UNIT_COLUMNS = 128;

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
    static constexpr int TO_TWO = LANE_BYTES - 8, TO_ONE = LANE_BYTES - 4;  // from a lane's first piece back to these, a lane

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

    // The same to shared memory, asynchronously: a unit's bytes lie from `to` on as they lie in global memory.
    static __device__ __forceinline__ void copy(u32 to, const u8* place, bool active) {
        int lane = lane_index();
        u32 own = to + LANE_BYTES * lane;
#pragma unroll
        for (int piece = 0; piece < WIDTH / 4; ++piece) copy_async_if<16>(own + 512 * piece, place + 512 * piece, active);
        if constexpr ((WIDTH & 2) != 0) copy_async_if<8>(own - TO_TWO * lane + TWOS, place - TO_TWO * lane + TWOS, active);
        if constexpr ((WIDTH & 1) != 0) copy_async_if<4>(own - TO_ONE * lane + ONES, place - TO_ONE * lane + ONES, active);
    }

    // A lane's words of a unit that lies from `from` on.
    __device__ __forceinline__ void read(u32 from) {
        int lane = lane_index();
#pragma unroll
        for (int piece = 0; piece < WIDTH / 4; ++piece) {
            Words4 four = load_shared_four(from + 512 * piece + 16 * lane);
            u32* to = words + 4 * piece;
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
        if constexpr ((WIDTH & 2) != 0) {
            Words2 two = load_shared_two(from + TWOS + 8 * lane);
            words[WIDTH / 4 * 4] = two.x, words[WIDTH / 4 * 4 + 1] = two.y;
        }
        if constexpr ((WIDTH & 1) != 0) words[WIDTH - 1] = load_shared_word(from + ONES + 4 * lane);
    }
};

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

// What is common to decoders of fp16 weights: `decode<BLOCK, PART>` gives BLOCK_PAIRS words of a block, which PARTS calls give
// whole; sums of products are multiplied by `gain`.
struct HalfDecoder {
    using Sum = float;
    static constexpr bool BYTES = false;  // whether the words are multiplied byte by byte
    static constexpr int PARTS = 1;

    static __device__ __forceinline__ float gain() { return 1; }
};
