// y = x W^T for up to 16 tokens and a packed W: decoded on the fly into the A operand of a tensor-core multiplication,
// of fp16 weights, or of bytes with the tokens as 8-bit digits (Operand).
//
// A block takes one of SPLITS chunks of the input dimension (the grid is a multiple of SPLITS) and a range of rows of
// tiles. Its warps form ROW_GROUPS groups, which take ROWS rows of tiles in turn; the warps of a group share the
// chunk's columns. A warp brings the tokens of its own columns, those of group 0 do for all groups. Warps meet once for
// the table and at the end: a warp leaves the sums of each row of tiles in a slot of shared memory, and these are added
// up in the order of the warps. With several chunks, the block of the last one adds the others' sums in the order of
// the chunks; they pass through `workspace`, whose words are EMPTY before and after every launch, so that a sum's
// arrival needs no flag. That block has the highest index, so those it waits for are running or done. Every sum has a
// fixed order: results repeat.
//
// A quantizer of two rates (WIDTH_HIGH != 0) has two segments of columns; the last HIGH_WARPS warps work on the second.
//
// Macros: those of decoders.cuh and WIDTH_HIGH; ROWS, ROW_GROUPS, STEPS_AT_START, RING (stream.cuh), SPLITS, WARPS,
// HIGH_WARPS, RESIDENT (blocks for which a multiprocessor must have registers), TOKENS (1, 2, 4, 8 or 16), BFLOAT.
#include "stream.cuh"
#include "tokens.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TOKEN_STRIDE = TOKENS == 1 ? 16 : 20;  // floats; 20 keeps the fragments' stores free of conflicts
constexpr int TILE_SUMS = TOKENS * TOKEN_STRIDE;
constexpr u32 EMPTY = 0xFFFFFFFF;  // a NaN that no sum has
constexpr int MOST_POLLS = 1 << 23;  // seconds: the workspace must have been shared or spoilt

using Low = Choose<WIDTH_LOW>::Decoder;
constexpr bool BYTES = Low::OPERAND != Operand::HALVES;
constexpr int COLUMNS = BYTES ? DIGITS : 1;  // that a token takes of a multiplication
constexpr int COLUMN_BYTES = Low::OPERAND == Operand::QUADS ? 1 : 2;  // of a token, or of each of its digits
constexpr int TOKEN_UNIT = UNIT_COLUMNS * COLUMN_BYTES, TOKEN_BLOCK = TOKEN_UNIT / 2, TOKEN_LANE = TOKEN_BLOCK / 4;
constexpr int TOKEN_FILLING = TOKEN_LANE == 16 ? 64 : 16;  // bytes after each, which keep loads free of bank conflicts
constexpr int TOKEN_TILES = (TOKENS * COLUMNS + 7) / 8;
constexpr int LOW_WARPS = WARPS - HIGH_WARPS;
constexpr int LOW_COLUMNS = LOW_WARPS / ROW_GROUPS, HIGH_COLUMNS = HIGH_WARPS / ROW_GROUPS;  // warps side by side
constexpr int SLOTS = WARPS / ROW_GROUPS;  // of a row of tiles: one for each warp of a group
constexpr int SECOND_WIDTH = WIDTH_HIGH ? WIDTH_HIGH : WIDTH_LOW;
using High = Choose<SECOND_WIDTH>::Decoder;

// Offsets in shared memory, in bytes as everywhere here; after table, rings and factors come the slots of sums, the
// scales and biases of the block's rows, the tokens.
constexpr int RING_OFFSET = Low::TABLE_BYTES;
constexpr int RING_BYTES = RING * ROWS * 128 * (WIDTH_LOW > WIDTH_HIGH ? WIDTH_LOW : WIDTH_HIGH);  // of a warp
constexpr int FACTOR_OFFSET = RING_OFFSET + WARPS * RING_BYTES;
constexpr int SUMS_OFFSET = (FACTOR_OFFSET + WARPS * TOKENS * 4 + 15) & ~15;
constexpr int ROW_SUMS = SLOTS * TILE_SUMS * 4;  // bytes of the slots of a row of tiles
constexpr int ROW_BYTES = 2 * 16;                // of the scales, or the biases, of a row of tiles

using Sums = Low::Sum[TOKEN_TILES][2][4];  // two chains, so that a multiplication needn't wait for the one before
using Fragments = Words4[TOKEN_TILES][TOKEN_LANE / 16];  // of the tokens, for the multiplications of a block

// Those of block BLOCK of a unit; tokens: of the unit's first column, at this lane's place.
template <int BLOCK>
__device__ __forceinline__ void load_fragments(Fragments& fragments, u32 tokens, u32 token_stride, int batch) {
    // Lanes of absent tokens get anything: it meets only sums that nobody reads. Of one condition for both loads the
    // compiler would make a branch, and nothing moves across that.
    constexpr bool FULL = TOKENS * COLUMNS >= 8;
    bool front = FULL || lane_index() < 4 * TOKENS * COLUMNS, back = FULL || lane_index() < 4 * batch * COLUMNS;
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        u32 from = tokens + 8 * tile * token_stride;
        load_shared_if<BLOCK * TOKEN_BLOCK>(fragments[tile][0], from, front);
        if constexpr (TOKEN_LANE > 16) load_shared_if<BLOCK * TOKEN_BLOCK + 16>(fragments[tile][1], from, back);
    }
}

// Of part PART of a block, with words of BLOCK_PAIRS / PARTS pairs for each hash.
template <int PARTS, int PART>
__device__ __forceinline__ void multiply_part(Sums& sums, const u32 (&words)[BLOCK_PAIRS], const Fragments& fragments) {
    static_assert(PARTS == 1 || PARTS == 2, "a half at least");
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        // A multiplication's 16 columns are 8 neighbouring ones, so that the tokens' registers are neighbours too.
        const Words4 &front = fragments[tile][0], &back = fragments[tile][1];  // columns 0 .. 7 and 8 .. 15 of a tile
        const u32* w = words;
        if constexpr (PARTS == 1) {
            multiply_add(sums[tile][0], w[0], w[1], w[4], w[5], front.x, front.y);
            multiply_add(sums[tile][1], w[8], w[9], w[12], w[13], front.z, front.w);
            multiply_add(sums[tile][0], w[2], w[3], w[6], w[7], back.x, back.y);
            multiply_add(sums[tile][1], w[10], w[11], w[14], w[15], back.z, back.w);
        } else {
            u32 front_low = PART == 0 ? front.x : front.z, front_high = PART == 0 ? front.y : front.w;
            u32 back_low = PART == 0 ? back.x : back.z, back_high = PART == 0 ? back.y : back.w;
            multiply_add(sums[tile][0], w[0], w[1], w[4], w[5], front_low, front_high);
            multiply_add(sums[tile][1], w[2], w[3], w[6], w[7], back_low, back_high);
            multiply_add(sums[tile][0], w[8], w[9], w[12], w[13], front_low, front_high);
            multiply_add(sums[tile][1], w[10], w[11], w[14], w[15], back_low, back_high);
        }
    }
}

// The same for a block's quads.
template <int PARTS, int PART>
__device__ __forceinline__ void multiply_part(Sums& sums, const u32 (&quads)[BLOCK_QUADS], const Fragments& fragments) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        const Words4& columns = fragments[tile][0];
        multiply_add(sums[tile][0], quads[0], quads[1], quads[2], quads[3], columns.x, columns.y);
        multiply_add(sums[tile][1], quads[4], quads[5], quads[6], quads[7], columns.z, columns.w);
    }
}

// Where in a slot a lane's first sum lies: of its first token, in row g.
__device__ __forceinline__ u32 first_sum() {
    return 4 * (lane_index() % 4 * 2 / COLUMNS * TOKEN_STRIDE + lane_index() / 4);
}

// to: of the slot, at this lane's place. factors: of the warp's tokens, for bf16 and for digits.
__device__ __forceinline__ void store_sums(u32 to, const Sums& sums, u32 factors) {
    int token = lane_index() % 4 * 2 / COLUMNS;
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto first = sums[tile][0][2 * half] + sums[tile][1][2 * half];
            auto second = sums[tile][0][2 * half + 1] + sums[tile][1][2 * half + 1];
            if constexpr (BYTES) {
                static_assert(DIGITS == 2, "a lane's two columns are a token's digits");
                int further = 8 * tile / COLUMNS;
                if (token + further >= TOKENS) continue;
                // exact where a token is, as unit vectors are
                float sum = static_cast<float>(first) + static_cast<float>(second) * (1.0f / DIGIT_BASE);
                sum *= bits_to_float(load_shared_word(factors + 4 * (token + further)));
                store_shared(to + 4 * (further * TOKEN_STRIDE + 8 * half), float_to_bits(sum));
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int further = 8 * tile + i;
                    float sum = i == 0 ? first : second;
                    if (token + further >= TOKENS) continue;
                    if (BFLOAT) sum *= bits_to_float(load_shared_word(factors + 4 * (token + further)));
                    store_shared(to + 4 * (further * TOKEN_STRIDE + 8 * half), float_to_bits(sum));
                }
            }
        }
    }
}

// A warp at work on its share: a step is one unit in each of ROWS rows of tiles, in 2 * ROWS pieces of a block each, or
// of part of one. Decoding runs one piece ahead of the multiplications, so neither waits for the other.
template <typename Decoder, int WIDTH>
struct Worker {
    static constexpr int PARTS = Decoder::PARTS, PIECES = 2 * PARTS * ROWS;

    Stream<WIDTH> stream;
    typename Decoder::Asked codebook;
    u32 first_tokens;  // those of the share's first column, at this lane's place
    u32 token_stride;
    u32 factors;       // of the warp's tokens
    int batch;
    u32 slot;          // of the warp, for the first of the step's rows, at this lane's place
    int tiles;         // rows of tiles from there on
    int run;           // steps up to the end of the columns
    u32 tokens;
    typename Decoder::Lane lane;
    Sums sums[ROWS];
    Fragments fragments[2];
    typename Decoder::Words weights[2];  // of the last two pieces

    // column: of the warp among those of its group.
    __device__ __forceinline__ void multiply_share(const Share& share, int column) {
        slot = SUMS_OFFSET + share.group * ROWS * ROW_SUMS + column * TILE_SUMS * 4 + first_sum();
        tiles = share.tiles - share.group * ROWS;
        run = share.units;
        tokens = first_tokens;
        clear();
        if (run == 0) {
            for (; tiles > 0; next_rows()) store_rows();
        }
        if (tiles <= 0) return;
        load_fragments<0>(fragments[0], tokens, token_stride, batch);
        load_fragments<1>(fragments[1], tokens, token_stride, batch);
        lane = Decoder::lane(codebook);
        stream.take_first();
        Decoder::finish(stream.units[0][0]);
        Decoder::template decode<0, 0>(stream.units[0][0], lane, weights[0]);
        if constexpr (RING > 0) {
            while (!step<0>()) {}
        } else {
            while (!(step<0>() || step<1>())) {}
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS * TOKEN_TILES * 8; ++i) {
            sums[i / 8 / TOKEN_TILES][i / 8 % TOKEN_TILES][i / 4 % 2][i % 4] = 0;
        }
    }

    __device__ __forceinline__ void store_rows() {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (row < tiles) store_sums(slot + row * ROW_SUMS, sums[row], factors);
        }
    }

    __device__ __forceinline__ void next_rows() {
        slot += ROW_GROUPS * ROWS * ROW_SUMS;
        tiles -= ROW_GROUPS * ROWS;
    }

    // Whether the share is done.
    template <int PLACE>
    __device__ __forceinline__ bool step() {
        --run;
        tokens = run == 0 ? first_tokens : tokens + TOKEN_UNIT;
        pieces<PLACE, 0>();
        if (run == 0) {
            store_rows();
            next_rows();
            if (tiles <= 0) return true;
            run = stream.columns;
            clear();
        }
        return false;
    }

    // Decodes the piece after PIECE, the last time one of the next step, and multiplies PIECE.
    template <int PLACE, int PIECE>
    __device__ __forceinline__ void pieces() {
        constexpr int NOW = RING > 0 ? 0 : PLACE, THEN = RING > 0 ? 0 : 1 - PLACE;  // where this and the next step are
        constexpr int NEXT = PIECE + 1, ROW = PIECE % ROWS, PART = PIECE / ROWS % PARTS, BLOCK = PIECE / ROWS / PARTS;
        if constexpr (NEXT < PIECES) {
            Unit<WIDTH>& unit = stream.units[NOW][NEXT % ROWS];
            if constexpr (NEXT < ROWS) Decoder::finish(unit);
            Decoder::template decode<NEXT / ROWS / PARTS, NEXT / ROWS % PARTS>(unit, lane, weights[NEXT % 2]);
            if constexpr (RING > 0 && NEXT >= PIECES - ROWS) stream.take(NEXT % ROWS);
        } else {
            Unit<WIDTH>& unit = stream.units[THEN][0];
            if constexpr (RING == 0) stream.fetch_after(PLACE, unit);
            Decoder::finish(unit);
            Decoder::template decode<0, 0>(unit, lane, weights[0]);
        }
        multiply_part<PARTS, PART>(sums[ROW], weights[PIECE % 2], fragments[BLOCK]);
        if constexpr (ROW == ROWS - 1 && PART == PARTS - 1) {
            load_fragments<BLOCK>(fragments[BLOCK], tokens, token_stride, batch);
        }
        if constexpr (NEXT < PIECES) pieces<PLACE, NEXT>();
    }
};

// Where a block's results go, and where in shared memory their factors lie.
struct Output {
    u16* y;
    u32* workspace;
    u32 scales, bias;
    bool has_bias;
    int row_tiles, batch;
};

// Chunk `chunk` of a segment's units.
__device__ __forceinline__ Segment segment_of(int units, int chunk, int column, int columns) {
    return Segment{units * chunk / SPLITS, units * (chunk + 1) / SPLITS, column, columns};
}

// What warp `index` of a segment's takes of `tiles` rows.
template <int COLUMNS>
__device__ __forceinline__ Share share_of(u32 index, const Segment& segment, int tiles) {
    u32 group = index / COLUMNS, column = index - group * COLUMNS, units = segment.units();
    u32 first = units * column / COLUMNS, end = units * (column + 1) / COLUMNS;
    return Share{static_cast<int>(group), tiles, static_cast<int>(first), static_cast<int>(end - first)};
}

// The sum of the other chunks' sums, which arrive in `workspace`: `slot` is that of the first.
__device__ __forceinline__ float receive_sums(u32* slot, u64 stride) {
    float others = 0;
    for (int other = 0; other < SPLITS - 1; ++other) {
        u32 bits = load_global(slot + other * stride);
        for (int polls = 0; bits == EMPTY; ++polls) {
            if (polls == MOST_POLLS) stop_kernel();
            pause();
            bits = load_global(slot + other * stride);
        }
        store_global(slot + other * stride, EMPTY);
        others += bits_to_float(bits);
    }
    return others;
}

// What comes before the first step, in a block.
struct Start {
    const u16 *x, *scales, *bias;  // those of the block's rows
    int in_features, batch, tiles;
    u32 token_stride, row_scales, row_bias;  // in shared memory
    TableFilling<Low, THREADS> table;

    // to, factors: where a warp's tokens go, and the inverses of what they are multiplied by.
    template <typename Stream>
    __device__ __forceinline__ void prepare(
        const Share& share, const Segment& segment, u32 to, u32 factors, float gain, Stream& stream) {
        if constexpr (Low::ENTRIES > 0 && (WITHOUT & WITHOUT_TABLE) == 0) table.store();
        if (Low::ENTRIES > 0 && ROW_GROUPS == 1) block_sync();
        auto ask_ahead = [&] { stream.ask_ahead(); };
        if ((WITHOUT & WITHOUT_TOKENS) == 0 && share.group == 0) {  // groups share tokens
            wait_for_previous_kernels();
            int first = (segment.first + share.first) * UNIT_COLUMNS;
            const u16* from = x + segment.column + first;
            TokenPieces own{from, in_features, batch, share.units * 16, (segment.columns - first) / 8};
            if constexpr (BYTES) {
                DigitFilling<Low::OPERAND>{own, to, token_stride, factors, gain}.fill(ask_ahead);
            } else {
                TokenFilling{own, to, token_stride, factors}.fill(ask_ahead);
            }
        } else {
            ask_ahead();
        }
        if (ROW_GROUPS > 1) block_sync();
#pragma unroll 1
        for (int i = threadIdx.x; i < tiles * 2; i += THREADS) {
            copy_async(row_scales + 16 * i, scales + 8 * i);
            if (bias != nullptr) copy_async(row_bias + 16 * i, bias + 8 * i);
        }
    }
};

// Adds up the warps' sums and writes what is complete.
__device__ __forceinline__ void finish_rows(const Output& to, int chunk, int first_tile, int tiles) {
#pragma unroll 1
    for (u32 item = threadIdx.x; item < tiles * TOKENS * 16; item += THREADS) {
        u32 row = item % 16, token = item / 16 % TOKENS, tile = item / (16 * TOKENS);
        if (token >= to.batch) continue;
        u32 from = SUMS_OFFSET + tile * ROW_SUMS + 4 * (token * TOKEN_STRIDE + row);
        float sum = 0;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) sum += bits_to_float(load_shared_word(from + slot * TILE_SUMS * 4));
        u32 output_row = (first_tile + tile) * 16 + row, row_in_block = tile * 16 + row;
        if constexpr (SPLITS > 1) {
            u32* slot = to.workspace + (static_cast<u64>(first_tile + tile) * TOKENS + token) * 16 + row;
            u64 stride = static_cast<u64>(to.row_tiles) * TOKENS * 16;
            if (chunk < SPLITS - 1) {
                u32 bits = float_to_bits(sum);
                store_global(slot + chunk * stride, bits == EMPTY ? EMPTY >> 1 : bits);
                continue;
            }
            sum += receive_sums(slot, stride);
        }
        sum *= half_to_float(load_shared_half(to.scales + 2 * row_in_block));
        if (to.has_bias) sum += value_of(load_shared_half(to.bias + 2 * row_in_block));
        to.y[static_cast<u64>(token) * to.row_tiles * 16 + output_row] = bits_of(sum);
    }
}

// packed_*: units of each segment, (row_tiles, units, 128 * WIDTH bytes). codebook: fp16, null for int. scales: fp16,
// one for each row; bias (or null) and y in the type of x. x: (batch, columns_low + columns_high). workspace: fp32
// words for SPLITS > 1, (SPLITS - 1, row_tiles, TOKENS, 16). Each chunk has `chunk_blocks` blocks of `least_tiles` rows
// of tiles, the first `longer_blocks` of one more; there is shared memory for `most_tiles`.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) multiply(
    const u8* packed_low, const u8* packed_high, const u16* codebook, const u16* scales, const u16* bias, const u16* x,
    u16* y, u32* workspace, int row_tiles, int units_low, int units_high, int columns_low, int columns_high, int batch,
    int chunk_blocks, int least_tiles, int longer_blocks, int most_tiles) {
    DYNAMIC_SHARED(shared);
    allow_next_kernel();

    int warp = shuffle(threadIdx.x / 32, 0);  // so that the compiler sees that a warp's lanes agree
    int chunk = SPLITS == 1 ? 0 : blockIdx.x / static_cast<u32>(chunk_blocks);
    int block = blockIdx.x - chunk * chunk_blocks;
    int first_tile = block * least_tiles + min(block, longer_blocks), tiles = least_tiles + (block < longer_blocks);
    Segment low = segment_of(units_low, chunk, 0, columns_low);
    Segment high = segment_of(units_high, chunk, columns_low, columns_high);

    u32 row_scales = SUMS_OFFSET + most_tiles * ROW_SUMS, row_bias = row_scales + most_tiles * ROW_BYTES;
    u32 tokens = row_bias + most_tiles * ROW_BYTES;
    u32 token_stride = (low.units() + high.units()) * TOKEN_UNIT + TOKEN_FILLING;

    // The codebook is asked for first, as the first lookup waits for all of the table, and weights before tokens, which
    // a kernel ahead may still be writing.
    const u16 *own_scales = scales + first_tile * 16, *own_bias = bias == nullptr ? nullptr : bias + first_tile * 16;
    int in_features = columns_low + columns_high;
    Start start{x, own_scales, own_bias, in_features, batch, tiles, token_stride, row_scales, row_bias, {}};
    if constexpr (Low::ENTRIES > 0) start.table.ask(codebook);

    u32 lane_place = lane_index() / 4 * token_stride + lane_index() % 4 * TOKEN_LANE;
    u64 tiles_before = first_tile;
    u32 ring = RING_OFFSET + threadIdx.x / 32 * RING_BYTES;  // not by `warp`, whose lanes agree: see Stream::begin
    if (HIGH_WARPS == 0 || warp < LOW_WARPS) {
        Share share = share_of<LOW_COLUMNS>(warp, low, tiles);
        int column = warp % LOW_COLUMNS;
        u32 own = tokens + share.first * TOKEN_UNIT, factors = FACTOR_OFFSET + column * TOKENS * 4;
        Worker<Low, WIDTH_LOW> work{{}, Low::ask(codebook), own + lane_place, token_stride, factors, batch};
        const u8* packed = packed_low + tiles_before * units_low * Unit<WIDTH_LOW>::BYTES;
        work.stream.begin(packed, units_low, low.first, share, ring);
        start.prepare(share, low, own, factors, Low::gain(), work.stream);
        work.multiply_share(share, column);
    } else if constexpr (HIGH_WARPS > 0) {
        Share share = share_of<HIGH_COLUMNS>(warp - LOW_WARPS, high, tiles);
        int column = LOW_COLUMNS + (warp - LOW_WARPS) % HIGH_COLUMNS;
        u32 own = tokens + (low.units() + share.first) * TOKEN_UNIT, factors = FACTOR_OFFSET + column * TOKENS * 4;
        Worker<High, SECOND_WIDTH> work{{}, High::ask(codebook), own + lane_place, token_stride, factors, batch};
        const u8* packed = packed_high + tiles_before * units_high * Unit<SECOND_WIDTH>::BYTES;
        work.stream.begin(packed, units_high, high.first, share, ring);
        start.prepare(share, high, own, factors, High::gain(), work.stream);
        work.multiply_share(share, column);
    }
    copy_wait();
    block_sync();
    check_shared_base(shared);  // late, where it costs nothing: a wrong base ends in an error all the same
    if constexpr ((WITHOUT & WITHOUT_ADDING) != 0) return;
    Output output{y, workspace, row_scales, row_bias, bias != nullptr, row_tiles, batch};
    finish_rows(output, chunk, first_tile, tiles);
}
