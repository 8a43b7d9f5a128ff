// Codes to fp16 weights, one struct for each family of quantizers.
//
// A *unit* is 16 rows x 128 columns of a weight: 8 tiles, or 2 *blocks* of 4 tiles. Lane 4 * g + t of a warp owns, in
// each block, the codes of pairs 16 g .. 16 g + 15 of tile t: 16 * WIDTH consecutive bits of that tile's stream, rows g
// and g + 8, all 16 columns. The two blocks' bits follow one another in the lane's WIDTH words. Pair 4 m + j (j = 0..3)
// of a block becomes register j of the A operand of the block's m-th mma.m16n8k16, whose k slots 2t, 2t+1, 2t+8, 2t+9
// then stand for columns 2m, 2m+1, 2m+8, 2m+9 of tile t.
//
// Words of a unit in memory, for all lanes: WIDTH / 4 pieces of 16 bytes a lane, then 8 bytes a lane if WIDTH & 2, then
// 4 if WIDTH & 1: 128 * WIDTH bytes, every access aligned and without bank conflicts.
//
// Tables, made of the codebook in global memory by `fill`, lie at the start of shared memory with REPLICAS copies of every
// 4-byte entry side by side. With 32 of them each lane reads its own bank, so a lookup is one wavefront whatever the
// codes; with fewer, lanes that share a copy may collide.
#pragma once

#include "ptx.cuh"

#define INT 0
#define NUQ 1
#define VQ 2
#define TCQ 3

constexpr int BLOCK_PAIRS = 16;
constexpr int UNIT_COLUMNS = 128;

template <int VALUE>
constexpr int LOG2 = 1 + LOG2<VALUE / 2>;
template <>
constexpr int LOG2<1> = 0;

template <int WIDTH>
struct Unit {
    static constexpr int BYTES = 128 * WIDTH;
    u32 words[WIDTH] = {};
    u32 next;  // trellis codes: the first 16 bits that follow the lane's run, block 0 in the low half, 1 in the high

    // From global memory; where not `active`, the words stay as they are.
    __device__ __forceinline__ void load(const u8* bytes, bool active = true) {
        int lane = lane_index();
#pragma unroll
        for (int piece = 0; piece < WIDTH / 4; ++piece) {
            u32* to = words + 4 * piece;
            Words4 four{to[0], to[1], to[2], to[3]};
            load_once_if(four, reinterpret_cast<const Words4*>(bytes) + 32 * piece + lane, active);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        }
        bytes += WIDTH / 4 * 512;
        if constexpr ((WIDTH & 2) != 0) {
            u32* to = words + WIDTH / 4 * 4;
            Words2 two{to[0], to[1]};
            load_once_if(two, reinterpret_cast<const Words2*>(bytes) + lane, active);
            to[0] = two.x, to[1] = two.y;
            bytes += 256;
        }
        if constexpr ((WIDTH & 1) != 0) {
            load_once_if(words[WIDTH - 1], reinterpret_cast<const u32*>(bytes) + lane, active);
        }
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

// One value into all its copies; the first THREADS threads of a block share the entries of a table.
template <int ENTRIES, int COPIES, int THREADS, typename Value>
__device__ __forceinline__ void fill_table(u8* table, Value value) {
    constexpr int STORE_WORDS = COPIES < 4 ? 1 : 4;
#pragma unroll 16
    for (int store = threadIdx.x; store < ENTRIES * COPIES / STORE_WORDS; store += THREADS) {
        u32 entry = value(store * STORE_WORDS / COPIES);
        if constexpr (STORE_WORDS == 4) {
            reinterpret_cast<Words4*>(table)[store] = Words4{entry, entry, entry, entry};
        } else {
            reinterpret_cast<u32*>(table)[store] = entry;
        }
    }
}

// int at higher rates: the levels are the integers minus half of the largest code. No table: 512 + code is assembled in
// the fraction of an fp16 number, where the last bit counts a half, and one subtraction makes the level.
template <int WIDTH>
struct IntegerDecoder {
    static constexpr int BITS = WIDTH / 2;
    static constexpr int TABLE_BYTES = 0;
    static constexpr u32 HALF = (512 * 2 + (1 << BITS) - 1);  // twice what is subtracted
    static constexpr u32 HALF_BITS = 0xE000 | (HALF - 1024);  // -(HALF / 2) in fp16, between 512 and 1024

    template <int THREADS>
    static __device__ __forceinline__ void fill(u8*, const u16*) {}

    static __device__ __forceinline__ u32 lane_offset() { return 0; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, u32, u32 (&weights)[BLOCK_PAIRS]) {
        constexpr u32 mask = (1u << BITS) - 1;
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            int first = WIDTH * (BLOCK * BLOCK_PAIRS + i), second = first + BITS;
            u32 low = window(unit.words, first - 1, BITS + 1), high = window(unit.words, second - 17, BITS + 17);
            u32 both = (high & mask << 17) | 0x60006000;
            weights[i] = add_half2((low & mask << 1) | both, HALF_BITS | HALF_BITS << 16);
        }
    }
};

// vq, and int and nuq at low rates: one table entry for each code of a pair.
template <int WIDTH, int COPIES>
struct PairDecoder {
    static constexpr int ENTRIES = 1 << WIDTH;
    static constexpr int TABLE_BYTES = ENTRIES * COPIES * 4;
    static constexpr int SHIFT = 2 + LOG2<COPIES>;

    template <int THREADS>
    static __device__ __forceinline__ void fill(u8* table, const u16* codebook) {
        fill_table<ENTRIES, COPIES, THREADS>(table, [=](int code) -> u32 {
            if constexpr (FAMILY == VQ) return reinterpret_cast<const u32*>(codebook)[code];
            int first = code & ((1 << WIDTH / 2) - 1), second = code >> WIDTH / 2;
            if constexpr (FAMILY == NUQ) return codebook[first] | static_cast<u32>(codebook[second]) << 16;
            float half = ((1 << WIDTH / 2) - 1) * 0.5f;
            return float_to_half(first - half) | static_cast<u32>(float_to_half(second - half)) << 16;
        });
    }

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() % COPIES * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, u32 lane, u32 (&weights)[BLOCK_PAIRS]) {
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            int position = WIDTH * (BLOCK * BLOCK_PAIRS + i) - SHIFT;
            u32 code = window(unit.words, position, SHIFT + WIDTH);
            u32 offset = (code & (ENTRIES - 1u) << SHIFT) | lane;
            weights[i] = lookup(offset);
        }
    }
};

// nuq from 6 bits on: the table of pairs would not fit, so each weight is looked up.
template <int WIDTH, int COPIES>
struct ScalarDecoder {
    static constexpr int BITS = WIDTH / 2;
    static constexpr int ENTRIES = 1 << BITS;
    static constexpr int TABLE_BYTES = ENTRIES * COPIES * 4;
    static constexpr int SHIFT = 2 + LOG2<COPIES>;

    template <int THREADS>
    static __device__ __forceinline__ void fill(u8* table, const u16* codebook) {
        fill_table<ENTRIES, COPIES, THREADS>(table, [=](int code) -> u32 { return codebook[code]; });
    }

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() % COPIES * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, u32 lane, u32 (&weights)[BLOCK_PAIRS]) {
        u32 level[2];
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int position = WIDTH * (BLOCK * BLOCK_PAIRS + i) + BITS * half - SHIFT;
                u32 code = window(unit.words, position, SHIFT + BITS);
                u32 offset = (code & (ENTRIES - 1u) << SHIFT) | lane;
                level[half] = lookup(offset);
            }
            weights[i] = permute(level[0], level[1], 0x5410);
        }
    }
};

// tcq: the state of a pair is STATE_BITS bits of the circular stream, from the first bit of its code on. The hash
// h = s * (s + 1) needs only the low 16 bits of s to be right. Bits 15 - TABLE_BITS .. 14 of h are the table index,
// bit 15 flips the sign of the first weight; a SIGNED table holds both signs, so that bit 15 just extends the index.
template <int WIDTH, int STATE, int INDEX, int COPIES, bool SIGNED>
struct TrellisDecoder {
    static constexpr int ENTRIES = 1 << (INDEX + SIGNED);
    static constexpr int TABLE_BYTES = ENTRIES * COPIES * 4;
    static constexpr int INDEX_BIT = 15 - INDEX;
    static constexpr int SHIFT = 2 + LOG2<COPIES>;

    template <int THREADS>
    static __device__ __forceinline__ void fill(u8* table, const u16* codebook) {
        const u32* points = reinterpret_cast<const u32*>(codebook);
        fill_table<ENTRIES, COPIES, THREADS>(table, [=](int index) -> u32 {
            return points[index & ((1 << INDEX) - 1)] ^ (index >> INDEX) << 15;
        });
    }

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() % COPIES * 4; }

    // The run of lane + 4 continues a lane's run: the streams are circles.
    static __device__ __forceinline__ void finish(Unit<WIDTH>& unit) {
        constexpr u32 selector = (WIDTH & 1) != 0 ? 0x7610 : 0x5410;
        u32 starts = permute(unit.words[0], unit.words[WIDTH / 2], selector);
        unit.next = shuffle(starts, (lane_index() + 4) & 31);
    }

    template <int BLOCK>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, u32 lane, u32 (&weights)[BLOCK_PAIRS]) {
        constexpr bool ODD = (WIDTH & 1) != 0;
        constexpr int FULL = WIDTH / 2;                    // whole words of a run
        constexpr int FIRST = BLOCK == 0 ? 0 : FULL;       // the word where the run begins,
        constexpr int START = BLOCK == 1 && ODD ? 16 : 0;  // at this bit
        constexpr int WORDS = FULL + (ODD && BLOCK == 1);
        u32 run[WORDS + 1];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) run[i] = unit.words[FIRST + i];
        if constexpr (BLOCK == 1) {
            run[WORDS] = unit.next >> 16;
        } else if constexpr (ODD) {
            run[WORDS] = permute(unit.words[FULL], unit.next, 0x5410);
        } else {
            run[WORDS] = unit.next;
        }
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            u32 state = window(run, START + WIDTH * i, STATE);
            if constexpr (STATE < 16) state &= (1u << STATE) - 1;
            u32 hash = state * state + state;
            u32 scaled = SHIFT >= INDEX_BIT ? hash << (SHIFT - INDEX_BIT) : hash >> (INDEX_BIT - SHIFT);
            u32 offset = (scaled & (ENTRIES - 1u) << SHIFT) | lane;
            u32 point = lookup(offset);
            weights[i] = SIGNED ? point : point ^ (hash & 0x8000);
        }
    }
};

template <int WIDTH>
struct Choose {
#if FAMILY == TCQ
    using Decoder = TrellisDecoder<WIDTH, STATE_BITS, TABLE_BITS, REPLICAS, SIGNED_TABLE>;
#elif FAMILY == VQ || TABLE_OF_PAIRS
    using Decoder = PairDecoder<WIDTH, REPLICAS>;
#elif FAMILY == NUQ
    using Decoder = ScalarDecoder<WIDTH, REPLICAS>;
#else
    using Decoder = IntegerDecoder<WIDTH>;
#endif
};
