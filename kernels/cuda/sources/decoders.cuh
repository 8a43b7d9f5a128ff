// Codes to what tensor cores multiply, one struct for each family of quantizers: pairs of fp16 weights, or, for the trellis
// code MAD, hashes whose bytes are multiplied.
//
// A *unit* is 16 rows x 128 columns of a weight: 8 tiles, or 2 *blocks* of 4 tiles. Lane 4 * g + t of a warp owns, in
// each block, the codes of pairs 16 g .. 16 g + 15 of tile t: 16 * WIDTH consecutive bits of that tile's stream, rows g
// and g + 8, all 16 columns. The two blocks' bits follow one another in the lane's WIDTH words, unless these are byte
// planes (ByteDecoder) or half planes (IntegerDecoder). Pair 4 m + j is columns 2m and 2m + 1 of tile t, 8 further where
// j >= 2, of row g, or g + 8 where j is odd.
//
// Words of a unit in memory, for all lanes: WIDTH / 4 pieces of 16 bytes a lane, then 8 bytes a lane if WIDTH & 2, then
// 4 if WIDTH & 1: 128 * WIDTH bytes, every access aligned and without bank conflicts.
//
// Tables, made of the codebook in global memory (TableFilling), lie at the start of shared memory with REPLICAS copies of
// every 4-byte entry side by side. With 32 of them each lane reads its own bank, so a lookup is one wavefront whatever the
// codes; with fewer, lanes that share a copy may collide.
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

// A table on its way to shared memory, by the first THREADS threads of a block: `ask` loads what it is made of, `store`
// writes every entry's copies. Decoder::entry gives the two words that repeat through an entry's ENTRY_BYTES; entries are
// STRIDE bytes apart.
template <typename Decoder, int THREADS>
struct TableFilling {
    static constexpr int STORE_BYTES = Decoder::ENTRY_BYTES < 16 ? 4 : 16;
    static constexpr int STORES = Decoder::ENTRY_BYTES / STORE_BYTES;  // of an entry
    static constexpr int ENTRIES = Decoder::ENTRIES > 0 ? Decoder::ENTRIES : 1;
    static constexpr int SPARE_THREADS = ENTRIES < THREADS ? 1 << LOG2<THREADS / ENTRIES> : 1;
    static constexpr int HELPERS = SPARE_THREADS < STORES ? SPARE_THREADS : STORES;  // threads of an entry
    static constexpr int AT_ONCE = THREADS / HELPERS;  // entries
    static constexpr int TURNS = (ENTRIES + AT_ONCE - 1) / AT_ONCE;

    Words2 values[TURNS];

    __device__ __forceinline__ void ask(const u16* codebook) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            int code = threadIdx.x % AT_ONCE + turn * AT_ONCE;
            if (code < Decoder::ENTRIES) values[turn] = Decoder::entry(codebook, code);
        }
    }

    __device__ __forceinline__ void store() const {
        constexpr int SHARE = STORES / HELPERS;
        int first = threadIdx.x / AT_ONCE * SHARE;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            int code = threadIdx.x % AT_ONCE + turn * AT_ONCE;
            if (code >= Decoder::ENTRIES || first >= STORES) continue;
            u32 one = values[turn].x, two = values[turn].y;
#pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                // Neighbouring threads begin at different copies, in different banks.
                u32 to = code * Decoder::STRIDE + (first + (i + threadIdx.x) % SHARE) * STORE_BYTES;
                if constexpr (STORE_BYTES == 16) {
                    store_shared(to, Words4{one, two, one, two});
                } else {
                    store_shared(to, one);
                }
            }
        }
    }
};

// The table of a block of THREADS threads, for kernels that have nothing to do meanwhile.
template <typename Decoder, int THREADS>
__device__ __forceinline__ void make_table(const u16* codebook) {
    if constexpr (Decoder::ENTRIES > 0) {
        TableFilling<Decoder, THREADS> filling;
        filling.ask(codebook);
        filling.store();
    }
    block_sync();
}

// int: the levels are the integers minus half of the largest code. No table: a word holds the codes of pairs in *half planes*
// (layout.py), the two codes of a pair at the same bits of its halves. One instruction brings both into the fractions of two
// fp16 numbers, 1024 + code * 2^p, one more makes the levels; both are exact for 1 <= p <= 10 - BITS.
template <int WIDTH>
struct IntegerDecoder : HalfDecoder {
    static constexpr int BITS = WIDTH / 2;
    static constexpr int ENTRIES = 0, STRIDE = 0, ENTRY_BYTES = 16, TABLE_BYTES = 0;
    static constexpr int STEP = BITS <= 5 ? BITS : 8;        // bits from one code of a half to the next
    static constexpr int IN_WORD = 16 / STEP;                // pairs of a word
    static constexpr int SPARE = 16 - IN_WORD * BITS;        // bits of a half that none of them takes
    static constexpr u32 BOTH = 0x00010001;

    // The exponents of `levels`, in a register: an instruction takes one constant, and that is the mask.
    static __device__ __forceinline__ u32 lane_offset() { return hidden(0x6400 * BOTH); }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    // Of codes that lie at bit PLACE of the halves.
    template <int PLACE>
    static __device__ __forceinline__ u32 levels(u32 codes, u32 exponents) {
        static_assert(PLACE >= 1 && PLACE + BITS <= 10, "not exact there");
        // fp16: 2^-PLACE, and -(2^(10 - PLACE) + half of the largest code), which lies between 2^(10 - PLACE) and twice that
        constexpr u32 factor = (15 - PLACE) << 10;
        constexpr u32 offset = 0x8000 | (25 - PLACE) << 10 | ((1 << BITS) - 1) << (PLACE - 1);
        u32 numbers = (codes & (((1u << BITS) - 1) << PLACE) * BOTH) | exponents;
        return multiply_add_half2(numbers, factor * BOTH, offset * BOTH);
    }

    // The I-th of a word's pairs; `swapped`: the word with the bytes of each half exchanged.
    template <int I>
    static __device__ __forceinline__ u32 pair_of(u32 word, u32 swapped, u32 exponents) {
        constexpr int START = 1 + I * STEP, SWAPPED = (START + 8) % 16;
        if constexpr (START + BITS <= 10) {
            return levels<START>(word, exponents);
        } else if constexpr (SWAPPED >= 1 && SWAPPED + BITS <= 10) {
            return levels<SWAPPED>(swapped, exponents);
        } else {
            return levels<1>(word >> (START - 1), exponents);
        }
    }

    // The n-th bit of a half that lies in no code.
    static __device__ constexpr int spare_bit(int n) {
        int bit = 0;
        for (;; ++bit) {
            bool taken = false;
            for (int i = 0; i < IN_WORD * BITS; ++i) taken = taken || (1 + i / BITS * STEP + i % BITS) % 16 == bit;
            if (!taken && n-- == 0) return bit;
        }
    }

    // The LEFT-th of the pairs left over, whose bits are the spare ones of the words in turn: from bit BIT on, at bit 1.
    template <int LEFT, int BIT = 0>
    static __device__ __forceinline__ u32 gather(const u32 (&words)[WIDTH]) {
        constexpr int PLANE = LEFT * BITS + BIT, FROM = spare_bit(PLANE % SPARE), TO = BIT + 1;
        u32 word = words[PLANE / SPARE], bits = (FROM < TO ? word << (TO - FROM) : word >> (FROM - TO)) & BOTH << TO;
        if constexpr (TO < BITS) bits |= gather<LEFT, TO>(words);
        return bits;
    }

    template <int BLOCK, int PART, int I = 0>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, u32 exponents, u32 (&weights)[BLOCK_PAIRS]) {
        constexpr int PAIR = BLOCK * BLOCK_PAIRS + I, WORD = PAIR / IN_WORD;
        if constexpr (WORD < WIDTH) {
            u32 word = unit.words[WORD];
            weights[I] = pair_of<PAIR % IN_WORD>(word, permute(word, 0, 0x2301), exponents);
        } else {
            weights[I] = levels<1>(gather<PAIR - WIDTH * IN_WORD>(unit.words), exponents);
        }
        if constexpr (I + 1 < BLOCK_PAIRS) decode<BLOCK, PART, I + 1>(unit, exponents, weights);
    }
};

// The bytes of a lane's words, where the words are *byte planes* (layout.py): the i-th octet holds four codes of BITS
// bits, one in each byte. The first WORDS octets are the low bits of the words' bytes; the others are gathered from the
// bits above.
template <int BITS, int WORDS>
struct BytePlanes {
    static constexpr u32 EVERY_BYTE = 0x01010101;
    static constexpr int SPARE = 8 - BITS;

    static __device__ __forceinline__ u32 octet(const u32 (&words)[WORDS], int i) {
        if (i < WORDS) return SPARE == 0 ? words[i] : words[i] & ((1u << BITS) - 1) * EVERY_BYTE;
        u32 gathered = 0;
#pragma unroll
        for (int bit = 0; bit < BITS; ++bit) {
            int plane = (i - WORDS) * BITS + bit, in_word = SPARE == 0 ? 0 : plane % SPARE;
            if (bit > 0 && in_word > 0) continue;  // came along with the plane before
            int run = min(SPARE - in_word, BITS - bit);
            u32 mask = (((1u << run) - 1) << bit) * EVERY_BYTE;
            gathered |= words[plane / (SPARE == 0 ? 1 : SPARE)] >> (BITS + in_word - bit) & mask;
        }
        return gathered;
    }
};

// vq, and nuq at low rates, up to 8 bits a pair: the table entry of a pair's code, or of two pairs' codes where
// these have 8 bits or less. A code is one byte of an octet, and entries are 256 bytes apart, so one byte permutation
// makes an address. Every lane has its own copy: no bank conflicts.
template <int WIDTH>
struct ByteDecoder : HalfDecoder {
    static constexpr bool DOUBLE = WIDTH <= 4;
    static constexpr int BITS = DOUBLE ? 2 * WIDTH : WIDTH;
    static constexpr int ENTRIES = 1 << BITS, STRIDE = 256, ENTRY_BYTES = DOUBLE ? 256 : 128;
    static constexpr int TABLE_BYTES = ENTRIES * STRIDE;

    static __device__ __forceinline__ u32 pair(const u16* codebook, int code) {
        if constexpr (FAMILY == VQ) return reinterpret_cast<const u32*>(codebook)[code];
        int first = code & ((1 << WIDTH / 2) - 1), second = code >> WIDTH / 2;
        return codebook[first] | static_cast<u32>(codebook[second]) << 16;
    }

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int code) {
        u32 first = pair(codebook, code & ((1 << WIDTH) - 1));
        return Words2{first, DOUBLE ? pair(codebook, code >> WIDTH) : first};
    }

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() * (DOUBLE ? 8 : 4); }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, u32 lane, u32 (&weights)[BLOCK_PAIRS]) {
        constexpr int CODES = DOUBLE ? BLOCK_PAIRS / 2 : BLOCK_PAIRS;
#pragma unroll
        for (int i = 0; i < CODES; ++i) {
            int code = BLOCK * CODES + i;
            u32 octet = BytePlanes<BITS, WIDTH>::octet(unit.words, code / 4);
            u32 offset = permute(octet, lane, 0x5504 | code % 4 << 4);
            if constexpr (DOUBLE) {
                Words2 pair = lookup_two(offset);
                weights[2 * i] = pair.x, weights[2 * i + 1] = pair.y;
            } else {
                weights[i] = lookup(offset);
            }
        }
    }
};

// vq and nuq from 9 bits a pair on: one table entry for each code of a pair.
template <int WIDTH, int COPIES>
struct PairDecoder : HalfDecoder {
    static constexpr int ENTRIES = 1 << WIDTH, STRIDE = COPIES * 4, ENTRY_BYTES = STRIDE;
    static constexpr int TABLE_BYTES = ENTRIES * STRIDE;
    static constexpr int SHIFT = 2 + LOG2<COPIES>;

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int code) {
        u32 both = ByteDecoder<WIDTH>::pair(codebook, code);
        return Words2{both, both};
    }

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() % COPIES * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK, int PART>
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
struct ScalarDecoder : HalfDecoder {
    static constexpr int BITS = WIDTH / 2;
    static constexpr int ENTRIES = 1 << BITS, STRIDE = COPIES * 4, ENTRY_BYTES = STRIDE;
    static constexpr int TABLE_BYTES = ENTRIES * STRIDE;
    static constexpr int SHIFT = 2 + LOG2<COPIES>;

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int code) {
        return Words2{codebook[code], codebook[code]};
    }

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() % COPIES * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK, int PART>
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
// 15 - TABLE_BITS .. 14 of h are the table index, bit 15 flips the sign of the first weight; a SIGNED table holds both signs,
// so that bit 15 just extends the index.
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

    static __device__ __forceinline__ u32 lane_offset() { return lane_index() % COPIES * 4; }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, u32 lane, u32 (&weights)[BLOCK_PAIRS]) {
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

// tcq of the code MAD (kernels/mad.py): a pair's words are its hashes, one or two multiply-adds of the state, whose signed
// bytes lie along four directions of the plane. A part of a block is all its pairs for one hash, half of them for two.
template <int WIDTH, int STATE>
struct MadDecoder : TrellisRuns<WIDTH> {
    using Sum = int;
    static constexpr bool BYTES = true;
    static constexpr bool LOW = WIDTH == WIDTH_LOW;
    static constexpr int HASHES = LOW ? HASHES_LOW : HASHES_HIGH;
    static constexpr int PARTS = HASHES, PAIRS = BLOCK_PAIRS / PARTS;
    static constexpr int ENTRIES = 0, STRIDE = 0, ENTRY_BYTES = 16, TABLE_BYTES = 0;
    static constexpr u32 MASK = (1u << STATE) - 1;
    static constexpr bool BY_BYTES = STATE == 16 && WIDTH % 2 == 0 && WIDTH <= 8;

    // Multiplier and addend of each hash.
    static __device__ constexpr u32 constant(int i) {
        constexpr u32 low[] = {CONSTANTS_LOW}, high[] = {CONSTANTS_HIGH};
        return LOW ? low[i] : high[i];
    }

    static __device__ __forceinline__ float gain() { return bits_to_float(LOW ? GAIN_LOW : GAIN_HIGH); }

    static __device__ __forceinline__ u32 lane_offset() { return 0; }

    // 16 bits from bit `position` on, and the same again in the upper half: bytes of shifted words, which neighbours share.
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
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, u32, u32 (&words)[BLOCK_PAIRS]) {
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

    static __device__ __forceinline__ int signed_byte(u32 word, int i) {
        return static_cast<int>(word << (24 - 8 * i)) >> 24;
    }

    // Both weights of every pair.
    template <int BLOCK, int PART = 0>
    static __device__ __forceinline__ void values(const Unit<WIDTH>& unit, u32 lane, float (&weights)[2 * BLOCK_PAIRS]) {
        u32 words[BLOCK_PAIRS];
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

template <bool CONDITION, typename First, typename Second>
struct Either {
    using Type = First;
};
template <typename First, typename Second>
struct Either<false, First, Second> {
    using Type = Second;
};

template <int WIDTH>
struct Choose {
#if FAMILY == MAD
    using Decoder = MadDecoder<WIDTH, STATE_BITS>;
#elif FAMILY == TCQ
    using Decoder = TrellisDecoder<WIDTH, STATE_BITS, TABLE_BITS, REPLICAS, SIGNED_TABLE>;
#elif FAMILY == VQ || TABLE_OF_PAIRS
    using Decoder = typename Either<WIDTH <= 8, ByteDecoder<WIDTH>, PairDecoder<WIDTH, REPLICAS>>::Type;
#elif FAMILY == NUQ
    using Decoder = ScalarDecoder<WIDTH, REPLICAS>;
#else
    using Decoder = IntegerDecoder<WIDTH>;
#endif
};

// Both weights of every pair of a block, as numbers.
template <typename Decoder, int BLOCK, int WIDTH>
__device__ __forceinline__ void decode_values(const Unit<WIDTH>& unit, u32 table_lane, float (&values)[2 * BLOCK_PAIRS]) {
    if constexpr (Decoder::BYTES) {
        Decoder::template values<BLOCK>(unit, table_lane, values);
    } else {
        u32 weights[BLOCK_PAIRS];
        Decoder::template decode<BLOCK, 0>(unit, table_lane, weights);
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            values[2 * i] = half_to_float(weights[i] & 0xFFFF);
            values[2 * i + 1] = half_to_float(weights[i] >> 16);
        }
    }
}
