// Codes to what tensor cores multiply (Operand), one struct for each family of quantizers.
//
// Macros: FAMILY, WIDTH_LOW; LEVEL_BITS, where it is not 0 all numbers of the codebook are multiples of 2^-LEVEL_BITS,
// and AS_BYTES, whether such weights are multiplied as bytes; TABLE_OF_PAIRS and REPLICAS for tables; STATE_BITS,
// TABLE_BITS, SIGNED_TABLE for trellis codes, HASHES_LOW, GAIN_LOW, CONSTANTS_LOW and the same of _HIGH for MAD.
#pragma once

#include "tables.cuh"
#include "trellis.cuh"

// int: the levels are the integers minus half of the largest code. No table: a word holds the codes of pairs in *half
// planes* (layout.py), the two codes of a pair at the same bits of its halves. One instruction brings both into the
// fractions of two fp16 numbers, 1024 + code * 2^p, one more makes the levels; both are exact for 1 <= p <= 10 - BITS.
template <int WIDTH>
struct IntegerDecoder : HalfDecoder {
    static constexpr int BITS = WIDTH / 2;
    static constexpr int STEP = BITS <= 5 ? BITS : 8;        // bits from one code of a half to the next
    static constexpr int IN_WORD = 16 / STEP;                // pairs of a word
    static constexpr int SPARE = 16 - IN_WORD * BITS;        // bits of a half that none of them takes
    static constexpr u32 BOTH = 0x00010001;

    // The exponents of `levels`, in a register: an instruction takes one constant, and that is the mask.
    static __device__ __forceinline__ Lane lane(Asked) { return hidden(0x6400 * BOTH); }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    // Of codes that lie at bit PLACE of the halves.
    template <int PLACE>
    static __device__ __forceinline__ u32 levels(u32 codes, u32 exponents) {
        static_assert(PLACE >= 1 && PLACE + BITS <= 10, "not exact there");
        // fp16: 2^-PLACE, and -(2^(10 - PLACE) + half of the largest code), between 2^(10 - PLACE) and twice that
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

    // The LEFT-th of the pairs left over, whose bits are the spare ones of the words in turn: from BIT on, at bit 1.
    template <int LEFT, int BIT = 0>
    static __device__ __forceinline__ u32 gather(const u32 (&words)[WIDTH]) {
        constexpr int PLANE = LEFT * BITS + BIT, FROM = spare_bit(PLANE % SPARE), TO = BIT + 1;
        u32 word = words[PLANE / SPARE], bits = (FROM < TO ? word << (TO - FROM) : word >> (FROM - TO)) & BOTH << TO;
        if constexpr (TO < BITS) bits |= gather<LEFT, TO>(words);
        return bits;
    }

    template <int BLOCK, int PART, int I = 0>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, Lane exponents, Words& weights) {
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

    // Where the table entry of a lane's code is, with entries 256 bytes apart and the lane's copy from byte `lane` on:
    // one byte permutation makes the address.
    static __device__ __forceinline__ u32 place(const u32 (&words)[WORDS], int code, u32 lane) {
        return permute(octet(words, code / 4), lane, 0x5504 | code % 4 << 4);
    }
};

// A pair of a codebook's weights, in fp16, by its code of WIDTH bits.
template <int WIDTH>
__device__ __forceinline__ u32 codebook_pair(const u16* codebook, int code) {
    if constexpr (FAMILY == VQ) return reinterpret_cast<const u32*>(codebook)[code];
    int first = code & ((1 << WIDTH / 2) - 1), second = code >> WIDTH / 2;
    return codebook[first] | static_cast<u32>(codebook[second]) << 16;
}

// vq from 5 to 8 bits a pair and nuq of 8: the table entry of a pair's code, which is one byte of an octet. Every lane
// has its own copy: no bank conflicts.
template <int WIDTH>
struct ByteDecoder : HalfDecoder {
    static constexpr int ENTRIES = 1 << WIDTH, STRIDE = 256, ENTRY_BYTES = 128;
    static constexpr int TABLE_BYTES = ENTRIES * STRIDE;

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int code) {
        u32 pair = codebook_pair<WIDTH>(codebook, code);
        return Words2{pair, pair};
    }

    static __device__ __forceinline__ Lane lane(Asked) { return lane_index() * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, Lane lane, Words& weights) {
#pragma unroll
        for (int i = 0; i < BLOCK_PAIRS; ++i) {
            weights[i] = lookup(BytePlanes<WIDTH, WIDTH>::place(unit.words, BLOCK * BLOCK_PAIRS + i, lane));
        }
    }
};

// vq of 3 and 4 bits a pair: the same with the codes of a quad as one byte, and the quad's bytes as an entry.
template <int WIDTH>
struct QuadTable {
    static constexpr int BITS = 2 * WIDTH;
    static constexpr int ENTRIES = 1 << BITS, STRIDE = 256;
    static constexpr int TABLE_BYTES = ENTRIES * STRIDE;

    // Both pairs of a quad, in fp16.
    static __device__ __forceinline__ Words2 pairs(const u16* codebook, int code) {
        int first = code & ((1 << WIDTH) - 1), last = code >> WIDTH;
        return Words2{codebook_pair<WIDTH>(codebook, first), codebook_pair<WIDTH>(codebook, last)};
    }

    // Where the entry of a block's quad is, for a lane whose copy begins at byte `lane`.
    template <int BLOCK>
    static __device__ __forceinline__ u32 place(const Unit<WIDTH>& unit, int quad, u32 lane) {
        return BytePlanes<BITS, WIDTH>::place(unit.words, BLOCK * BLOCK_QUADS + quad, lane);
    }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}
};

template <int WIDTH>
struct QuadTableDecoder : QuadDecoder, QuadTable<WIDTH> {
    using Table = QuadTable<WIDTH>;
    using Table::ENTRIES, Table::STRIDE, Table::TABLE_BYTES;
    static constexpr int ENTRY_BYTES = 128;

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int code) {
        Words2 pairs = Table::pairs(codebook, code);
        u32 quad = bytes_of(pairs.x, pairs.y);
        return Words2{quad, quad};
    }

    static __device__ __forceinline__ Lane lane(Asked) { return lane_index() * 4; }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, Lane lane, Words& quads) {
#pragma unroll
        for (int i = 0; i < BLOCK_QUADS; ++i) quads[i] = lookup(Table::template place<BLOCK>(unit, i, lane));
    }
};

// The same as fp16, for more tokens than digits pay for.
template <int WIDTH>
struct QuadTableHalfDecoder : HalfDecoder, QuadTable<WIDTH> {
    using Table = QuadTable<WIDTH>;
    using Table::ENTRIES, Table::STRIDE, Table::TABLE_BYTES;
    static constexpr int ENTRY_BYTES = 256;

    static __device__ __forceinline__ Words2 entry(const u16* codebook, int code) {
        return Table::pairs(codebook, code);
    }

    static __device__ __forceinline__ Lane lane(Asked) { return lane_index() * 8; }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, Lane lane, Words& weights) {
#pragma unroll
        for (int i = 0; i < BLOCK_QUADS; ++i) {
            Words2 pairs = lookup_two(Table::template place<BLOCK>(unit, i, lane));
            weights[pair_of_quad(i, 0)] = pairs.x, weights[pair_of_quad(i, 1)] = pairs.y;
        }
    }
};

// nuq of 2 and 3 bits: no table, a lane has all levels as the bytes of registers. Codes are the low bits of nibbles
// (layout.py), and four nibbles are what a byte permutation wants to choose a quad's levels.
template <int WIDTH>
struct Nibbles {
    static constexpr int BITS = WIDTH / 2;
    static constexpr u32 EVERY_NIBBLE = 0x11111111;
    static_assert(BITS == 2 || BITS == 3, "two codes of a nibble, or one and a bit of another");

    using Asked = Words4;  // the codebook

    static __device__ __forceinline__ Asked ask(const u16* codebook) {
        if constexpr (BITS == 3) return *reinterpret_cast<const Words4*>(codebook);
        Words2 levels = *reinterpret_cast<const Words2*>(codebook);
        return Words4{levels.x, levels.y, levels.x, levels.y};
    }

    // The codes of a block's quads, in the four low nibbles of each.
    template <int BLOCK>
    static __device__ __forceinline__ void codes(const Unit<WIDTH>& unit, u32 (&quads)[BLOCK_QUADS]) {
        const u32* own = unit.words + BLOCK * BITS;
        u32 pairs[BLOCK_QUADS / 2] = {};  // of quads
        if constexpr (BITS == 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = own[i / 2] >> i % 2 * 2 & 3 * EVERY_NIBBLE;
        } else {
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                pairs[i] = own[i] & 7 * EVERY_NIBBLE;
                pairs[3] |= own[i] >> (3 - i) & EVERY_NIBBLE << i;
            }
        }
#pragma unroll
        for (int i = 0; i < BLOCK_QUADS; ++i) quads[i] = i % 2 == 0 ? pairs[i / 2] : pairs[i / 2] >> 16;
    }

    // The bytes of four codes; of 2 bits these are all in `first`.
    static __device__ __forceinline__ u32 pick(u32 first, u32 last, u32 codes) {
        return pick_bytes(first, BITS == 3 ? last : 0, codes);
    }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}
};

template <int WIDTH>
struct NibbleDecoder : QuadDecoder, Nibbles<WIDTH> {
    using typename Nibbles<WIDTH>::Asked;
    using Nibbles<WIDTH>::ask;
    using Lane = Words2;  // as bytes

    static __device__ __forceinline__ Lane lane(const Asked& codebook) {
        return Words2{bytes_of(codebook.x, codebook.y), bytes_of(codebook.z, codebook.w)};
    }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, const Lane& levels, Words& quads) {
        Nibbles<WIDTH>::template codes<BLOCK>(unit, quads);
#pragma unroll
        for (int i = 0; i < BLOCK_QUADS; ++i) quads[i] = Nibbles<WIDTH>::pick(levels.x, levels.y, quads[i]);
    }
};

// The same as fp16, for more tokens than digits pay for: the lower bytes of levels and the higher are picked apart.
template <int WIDTH>
struct NibbleHalfDecoder : HalfDecoder, Nibbles<WIDTH> {
    using typename Nibbles<WIDTH>::Asked;
    using Nibbles<WIDTH>::ask;
    using Lane = Words4;  // its lower bytes, then its higher ones

    static __device__ __forceinline__ Lane lane(const Asked& codebook) {
        return Words4{
            permute(codebook.x, codebook.y, 0x6420), permute(codebook.z, codebook.w, 0x6420),
            permute(codebook.x, codebook.y, 0x7531), permute(codebook.z, codebook.w, 0x7531)};
    }

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(const Unit<WIDTH>& unit, const Lane& levels, Words& weights) {
        u32 quads[BLOCK_QUADS];
        Nibbles<WIDTH>::template codes<BLOCK>(unit, quads);
#pragma unroll
        for (int i = 0; i < BLOCK_QUADS; ++i) {
            u32 low = Nibbles<WIDTH>::pick(levels.x, levels.y, quads[i]);
            u32 high = Nibbles<WIDTH>::pick(levels.z, levels.w, quads[i]);
            weights[pair_of_quad(i, 0)] = permute(low, high, 0x5140);
            weights[pair_of_quad(i, 1)] = permute(low, high, 0x7362);
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
        u32 both = codebook_pair<WIDTH>(codebook, code);
        return Words2{both, both};
    }

    static __device__ __forceinline__ Lane lane(Asked) { return lane_index() % COPIES * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, Lane lane, Words& weights) {
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

    static __device__ __forceinline__ Lane lane(Asked) { return lane_index() % COPIES * 4; }

    static __device__ __forceinline__ void finish(Unit<WIDTH>&) {}

    template <int BLOCK, int PART>
    static __device__ __forceinline__ void decode(
        const Unit<WIDTH>& unit, Lane lane, Words& weights) {
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
#elif FAMILY == NUQ && LEVEL_BITS
    using Decoder = typename Either<AS_BYTES, NibbleDecoder<WIDTH>, NibbleHalfDecoder<WIDTH>>::Type;
#elif FAMILY == VQ && LEVEL_BITS
    using Decoder = typename Either<AS_BYTES, QuadTableDecoder<WIDTH>, QuadTableHalfDecoder<WIDTH>>::Type;
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
__device__ __forceinline__ void decode_values(
    const Unit<WIDTH>& unit, const typename Decoder::Lane& lane, float (&values)[2 * BLOCK_PAIRS]) {
    if constexpr (Decoder::OPERAND == Operand::DIRECTIONS) {
        Decoder::template values<BLOCK>(unit, lane, values);
    } else {
        typename Decoder::Words words;
        Decoder::template decode<BLOCK, 0>(unit, lane, words);
        Decoder::values_of(words, values);
    }
}
