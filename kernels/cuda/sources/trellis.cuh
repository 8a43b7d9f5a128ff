// Decoders of `tcq` and `half_tcq`, for the trellis codes HYB and MAD.
#pragma once

#include "units.cuh"

// Trellis codes: the state of a pair is STATE_BITS bits of the circular stream, from the first bit of its code on.
template <int WIDTH>
struct TrellisRuns {
    static constexpr bool ODD = (WIDTH & 1) != 0;
    static constexpr int FULL = WIDTH / 2;  // whole words of a run

    // The first 16 bits of a lane's runs: what follows the runs of lane - 4.
    static __device__ __forceinline__ u32 starts(const Unit<WIDTH>& unit) {
        return permute(unit.words[0], unit.words[WIDTH / 2], ODD ? 0x7610 : 0x5410);
    }

    // The run of lane + 4 continues a lane's run: the streams are circles.
    static __device__ __forceinline__ void finish(Unit<WIDTH>& unit) {
        unit.next = shuffle(starts(unit), (lane_index() + 4) & 31);
    }
};

// The run of a lane in a block, which begins at bit START, and 16 bits of what follows it.
template <int WIDTH, int BLOCK>
struct Run {
    static constexpr bool ODD = TrellisRuns<WIDTH>::ODD;
    static constexpr int FULL = TrellisRuns<WIDTH>::FULL;
    static constexpr int FIRST = BLOCK == 0 ? 0 : FULL;       // the word where the run begins,
    static constexpr int START = BLOCK == 1 && ODD ? 16 : 0;  // at this bit
    static constexpr int WORDS = FULL + (ODD && BLOCK == 1);

    u32 words[WORDS + 1];

    explicit __device__ __forceinline__ Run(const Unit<WIDTH>& unit) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = unit.words[FIRST + i];
        if constexpr (BLOCK == 1) {
            words[WORDS] = unit.next >> 16;
        } else if constexpr (ODD) {
            words[WORDS] = permute(unit.words[FULL], unit.next, 0x5410);
        } else {
            words[WORDS] = unit.next;
        }
    }
};

// tcq of the code HYB: the hash h = s * (s + 1) needs only the low 16 bits of the state s to be right. Bits
// 15 - TABLE_BITS .. 14 of h are the table index, bit 15 flips the sign of the first weight; a SIGNED table holds both
// signs, so that bit 15 just extends the index.
template <int WIDTH, int STATE, int INDEX, int COPIES, bool SIGNED>
struct TrellisDecoder : HalfDecoder, TrellisRuns<WIDTH> {
    static constexpr int ENTRIES = 1 << (INDEX + SIGNED), STRIDE = COPIES * 4, ENTRY_BYTES = STRIDE;
    static constexpr int TABLE_BYTES = ENTRIES * STRIDE;
    static constexpr int INDEX_BIT = 15 - INDEX;
    static constexpr int SHIFT = 2 + LOG2<COPIES>;

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int index) {
        u32 point = reinterpret_cast<const u32*>(codebook)[index & ((1 << INDEX) - 1)] ^ (index >> INDEX) << 15;
        return Words2{point, point};
    }

    static __device__ __forceinline__ Lane lane(Asked) { return lane_index() % COPIES * 4; }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, Lane lane, Words& weights) {
        Run<WIDTH, BLOCK> run(unit);
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            u32 state = window(run.words, run.START + WIDTH * i, STATE);
            if constexpr (STATE < 16) state &= (1u << STATE) - 1;
            u32 hash = state * state + state;
            u32 scaled = SHIFT >= INDEX_BIT ? hash << (SHIFT - INDEX_BIT) : hash >> (INDEX_BIT - SHIFT);
            u32 offset = (scaled & (ENTRIES - 1u) << SHIFT) | lane;
            u32 point = lookup(offset);
            weights[i] = SIGNED ? point : point ^ (hash & 0x8000);
        }
    }
};

#if FAMILY == MAD
#ifndef HASHES_HIGH
#define HASHES_HIGH HASHES_LOW
#define GAIN_HIGH GAIN_LOW
#define CONSTANTS_HIGH CONSTANTS_LOW
#endif

// tcq of the code MAD (kernels/mad.py): a pair's words are its hashes, one or two multiply-adds of the state, whose
// signed bytes lie along four directions of the plane. A part of a block is all its pairs for one hash, half of them
// for two.
template <int WIDTH, int STATE>
struct MadDecoder : AnyDecoder, TrellisRuns<WIDTH> {
    using Sum = int;
    using Words = u32[BLOCK_PAIRS];
    static constexpr Operand OPERAND = Operand::DIRECTIONS;
    static constexpr bool LOW = WIDTH == WIDTH_LOW;
    static constexpr int HASHES = LOW ? HASHES_LOW : HASHES_HIGH;
    static constexpr int PARTS = HASHES, PAIRS = BLOCK_PAIRS / PARTS;
    static constexpr u32 MASK = (1u << STATE) - 1;
    static constexpr bool BY_BYTES = STATE == 16 && WIDTH % 2 == 0 && WIDTH <= 8;

    // Multiplier and addend of each hash.
    static __device__ constexpr u32 constant(int i) {
        constexpr u32 low[] = {CONSTANTS_LOW}, high[] = {CONSTANTS_HIGH};
        return LOW ? low[i] : high[i];
    }

    static __device__ __forceinline__ float gain() { return bits_to_float(LOW ? GAIN_LOW : GAIN_HIGH); }

    static __device__ __forceinline__ Lane lane(Asked) { return 0; }

    // 16 bits from bit `position` on, and the same again in the upper half: bytes of shifted words, which neighbours
    // share.
    template <int N>
    static __device__ __forceinline__ u32 doubled(const u32 (&words)[N], int position) {
        int word = position >> 5, byte = position >> 3 & 3, shift = position & 7;
        u32 low = shifted(words, word, shift);
        if (byte < 3) return permute(low, low, 0x1010 + 0x1111 * byte);
        return permute(low, shifted(words, word + 1, shift), 0x4343);
    }

    template <int N>
    static __device__ __forceinline__ u32 shifted(const u32 (&words)[N], int word, int shift) {
        if (shift == 0) return words[word];
        return word + 1 == N ? words[word] >> shift : funnel_shift(words[word], words[word + 1], shift);
    }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, Lane, Words& words) {
        Run<WIDTH, BLOCK> run(unit);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            int position = run.START + WIDTH * (PART * PAIRS + i);
            u32 state = BY_BYTES ? doubled(run.words, position) : window(run.words, position, STATE) & MASK;
#pragma unroll
            for (int hash = 0; hash < HASHES; ++hash) {
                // 0xFFFF0001 undoes the multiplication by 0x10001 that the doubling is.
                u32 multiplier = constant(2 * hash) * (BY_BYTES ? 0xFFFF0001 : 1);
                words[hash * PAIRS + i] = state * multiplier + constant(2 * hash + 1);
            }
        }
    }

    // Both weights of every pair.
    template <int BLOCK, int PART = 0>
    static __device__ __forceinline__ void values(
        const Unit<WIDTH>& unit, Lane lane, float (&weights)[2 * BLOCK_PAIRS]) {
        Words words;
        decode<BLOCK, PART>(unit, lane, words);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            int first = 0, second = 0;  // in quarters
#pragma unroll
            for (int hash = 0; hash < HASHES; ++hash) {
                u32 word = words[hash * PAIRS + i];
                int low = signed_byte(word, 0), third = signed_byte(word, 2);
                first += 4 * signed_byte(word, 3) + 3 * (third - low);
                second += 4 * signed_byte(word, 1) + 3 * (third + low);
            }
            weights[2 * (PART * PAIRS + i)] = static_cast<float>(first) * (0.25f * gain());
            weights[2 * (PART * PAIRS + i) + 1] = static_cast<float>(second) * (0.25f * gain());
        }
        if constexpr (PART + 1 < PARTS) values<BLOCK, PART + 1>(unit, lane, weights);
    }
};
#endif
