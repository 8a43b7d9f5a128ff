// y = x W^T for up to 16 tokens and a packed W: decoded on the fly into the A operand of mma.m16n8k16.
//
// A block takes one of SPLITS chunks of the input dimension (the grid is a multiple of SPLITS) and a range of rows of
// tiles. Its warps form ROW_GROUPS groups, which take ROWS rows of tiles in turn; the warps of a group share the chunk's
// columns. They meet only at the end: a warp leaves the sums of each row of tiles in a slot of shared memory, and these
// are added up in the order of the warps. With several chunks, the block of the last one adds the others' sums in the
// order of the chunks; they pass through `workspace`, whose words are EMPTY before and after every launch, so that a
// sum's arrival needs no flag. That block has the highest index, so those it waits for are running or done. Every sum
// has a fixed order: results repeat.
//
// A quantizer of two rates (WIDTH_HIGH != 0) has two segments of columns; the last HIGH_WARPS warps work on the second.
//
// Macros: FAMILY, WIDTH_LOW, WIDTH_HIGH, STATE_BITS, TABLE_BITS, TABLE_OF_PAIRS, REPLICAS, SIGNED_TABLE (decoders.cuh),
// ROWS, ROW_GROUPS (stream.cuh), SPLITS, WARPS, HIGH_WARPS, RESIDENT (blocks for which a multiprocessor must have registers),
// TOKENS (1, 2, 4, 8 or 16), BFLOAT.
#include "stream.cuh"
#include "tokens.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TOKEN_TILES = (TOKENS + 7) / 8;
constexpr int TOKEN_STRIDE = TOKENS == 1 ? 16 : 20;  // floats; 20 keeps the fragments' stores free of conflicts
constexpr int TILE_SUMS = TOKENS * TOKEN_STRIDE;
constexpr u32 EMPTY = 0xFFFFFFFF;  // a NaN that no sum has
constexpr int MOST_POLLS = 1 << 23;  // seconds: the workspace must have been shared or spoilt

using Low = Choose<WIDTH_LOW>::Decoder;
constexpr int LOW_WARPS = WARPS - HIGH_WARPS;
constexpr int LOW_COLUMNS = LOW_WARPS / ROW_GROUPS, HIGH_COLUMNS = HIGH_WARPS / ROW_GROUPS;  // warps side by side
constexpr int SLOTS = WARPS / ROW_GROUPS;  // of a row of tiles: one for each warp of a group
constexpr int SECOND_WIDTH = WIDTH_HIGH ? WIDTH_HIGH : WIDTH_LOW;
using High = Choose<SECOND_WIDTH>::Decoder;

// Offsets in shared memory; after the factors come the slots of sums, the scales and biases of the block's rows, the tokens.
constexpr int FACTOR_OFFSET = Low::TABLE_BYTES;
constexpr int SUMS_OFFSET = (FACTOR_OFFSET + (WARPS + 1) * TOKENS * 4 + 15) & ~15;

using Sums = float[TOKEN_TILES][2][4];       // two chains, so that a multiplication needn't wait for the one before
using Fragments = Words4[TOKEN_TILES][2];  // of the tokens, for the 4 multiplications of a block

// Those of block BLOCK of a unit; tokens: address of the unit's first column, at this lane's place.
template <int BLOCK>
__device__ __forceinline__ void load_fragments(Fragments& fragments, u32 tokens, int token_stride, int batch) {
    // Lanes of absent tokens keep what they have or read what is there: it meets only sums that nobody reads. Of one
    // condition for both loads the compiler would make a branch, and nothing moves across that.
    bool front = TOKENS >= 8 || lane_index() < 4 * TOKENS, back = TOKENS >= 8 || lane_index() < 4 * batch;
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        u32 from = tokens + 16 * tile * token_stride;
        load_shared_if<BLOCK * 128>(fragments[tile][0], from, front);
        load_shared_if<BLOCK * 128 + 16>(fragments[tile][1], from, back);
    }
}

__device__ __forceinline__ void multiply_block(
    Sums& sums, const u32 (&weights)[BLOCK_PAIRS], const Fragments& fragments) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        const Words4 &front = fragments[tile][0], &back = fragments[tile][1];  // columns 0 .. 7 and 8 .. 15 of a tile
        multiply_add(sums[tile][0], weights, front.x, back.x);
        multiply_add(sums[tile][1], weights + 4, front.y, back.y);
        multiply_add(sums[tile][0], weights + 8, front.z, back.z);
        multiply_add(sums[tile][1], weights + 12, front.w, back.w);
    }
}

__device__ __forceinline__ void store_sums(float* to, const Sums& sums) {
    int row = lane_index() / 4, token = lane_index() % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int t = 8 * tile + token + i % 2;
            if (t < TOKENS) to[t * TOKEN_STRIDE + row + 8 * (i / 2)] = sums[tile][0][i] + sums[tile][1][i];
        }
    }
}

// A warp at work on its share: a step is one unit in each of ROWS rows of tiles, in 2 * ROWS pieces of a block each.
// Lookups run one piece ahead of the multiplications, so neither waits for the other.
template <typename Decoder, int WIDTH>
struct Worker {
    static constexpr int PIECES = 2 * ROWS;

    Stream<WIDTH> stream;
    u32 table_lane;
    u32 first_tokens;  // address of those of the share's first column, at this lane's place
    int token_stride, batch;
    float* slot;       // of the warp, for the first of the step's rows
    int tiles;         // rows of tiles from there on
    int run;           // steps up to the end of the columns
    u32 tokens;
    Sums sums[ROWS];
    Fragments fragments[2];
    u32 weights[2][BLOCK_PAIRS];  // of the last two pieces

    // slots: of the block, the warp's for row 0.
    __device__ __forceinline__ void multiply_share(const Share& share, float* slots) {
        slot = slots + share.group * ROWS * SLOTS * TILE_SUMS;
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
        stream.fetch_after(1, stream.units[0][0]);
        Decoder::finish(stream.units[0][0]);
        Decoder::template decode<0>(stream.units[0][0], table_lane, weights[0]);
        while (!(step<0>() || step<1>())) {}
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS * TOKEN_TILES * 8; ++i) sums[i / 8 / TOKEN_TILES][i / 8 % TOKEN_TILES][i / 4 % 2][i % 4] = 0;
    }

    __device__ __forceinline__ void store_rows() {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            if (row < tiles) store_sums(slot + row * SLOTS * TILE_SUMS, sums[row]);
        }
    }

    __device__ __forceinline__ void next_rows() {
        slot += ROW_GROUPS * ROWS * SLOTS * TILE_SUMS;
        tiles -= ROW_GROUPS * ROWS;
    }

    // Whether the share is done.
    template <int PLACE>
    __device__ __forceinline__ bool step() {
        --run;
        tokens = run == 0 ? first_tokens : tokens + UNIT_COLUMNS * 2;
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
        constexpr int NEXT = PIECE + 1, BLOCK = PIECE / ROWS, ROW = PIECE % ROWS;
        if constexpr (NEXT < PIECES) {
            Unit<WIDTH>& unit = stream.units[PLACE][NEXT % ROWS];
            if constexpr (NEXT < ROWS) Decoder::finish(unit);
            Decoder::template decode<NEXT / ROWS>(unit, table_lane, weights[NEXT % 2]);
        } else {
            Unit<WIDTH>& unit = stream.units[1 - PLACE][0];
            stream.fetch_after(PLACE, unit);
            Decoder::finish(unit);
            Decoder::template decode<0>(unit, table_lane, weights[0]);
        }
        multiply_block(sums[ROW], weights[PIECE % 2], fragments[BLOCK]);
        if constexpr (ROW == ROWS - 1) load_fragments<BLOCK>(fragments[BLOCK], tokens, token_stride, batch);
        if constexpr (NEXT < PIECES) pieces<PLACE, NEXT>();
    }
};

// Where a block's results go, and what they are multiplied with (all but `y` and `workspace` in shared memory).
struct Output {
    u16* y;
    u32* workspace;
    const u16* scales;
    const u16* bias;       // or null
    const float* factors;  // of each token
    int row_tiles, batch;
};

// Chunk `chunk` of a segment's units.
__device__ __forceinline__ Segment segment_of(int units, int chunk, int column, int columns) {
    return Segment{units * chunk / SPLITS, units * (chunk + 1) / SPLITS, column, columns};
}

// What warp `index` of a segment's takes of `tiles` rows.
template <int COLUMNS>
__device__ __forceinline__ Share share_of(int index, const Segment& segment, int tiles) {
    int group = index / COLUMNS, column = index - group * COLUMNS, units = segment.units();
    int first = units * column / COLUMNS, end = units * (column + 1) / COLUMNS;
    return Share{group, tiles, first, end - first};
}

// Adds up the warps' sums and writes what is complete.
__device__ __forceinline__ void finish_rows(const Output& to, const float* slots, int chunk, int first_tile, int tiles) {
    for (int item = threadIdx.x; item < tiles * TOKENS * 16; item += THREADS) {
        int row = item % 16, token = item / 16 % TOKENS, tile = item / (16 * TOKENS);
        if (token >= to.batch) continue;
        const float* from = slots + tile * SLOTS * TILE_SUMS + token * TOKEN_STRIDE + row;
        float sum = 0;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) sum += from[slot * TILE_SUMS];
        sum *= to.factors[token];
        int output_tile = first_tile + tile, row_in_block = tile * 16 + row;
        if constexpr (SPLITS > 1) {
            u32* slot = to.workspace + (static_cast<u64>(output_tile) * TOKENS + token) * 16 + row;
            u64 stride = static_cast<u64>(to.row_tiles) * TOKENS * 16;
            if (chunk < SPLITS - 1) {
                u32 bits = float_to_bits(sum);
                store_global(slot + chunk * stride, bits == EMPTY ? EMPTY >> 1 : bits);
                continue;
            }
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
            sum += others;
        }
        sum *= half_to_float(to.scales[row_in_block]);
        if (to.bias != nullptr) sum += value_of(to.bias[row_in_block]);
        to.y[static_cast<u64>(token) * to.row_tiles * 16 + output_tile * 16 + row] = bits_of(sum);
    }
}

// packed_*: units of each segment, (row_tiles, units, 128 * WIDTH bytes). codebook: fp16, null for int. scales: fp16,
// one for each row; bias (or null) and y in the type of x. x: (batch, columns_low + columns_high). workspace: fp32 words
// for SPLITS > 1, (SPLITS - 1, row_tiles, TOKENS, 16). most_tiles: rows of tiles of a block for which there is shared
// memory.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) multiply(
    const u8* packed_low, const u8* packed_high, const u16* codebook, const u16* scales, const u16* bias, const u16* x,
    u16* y, u32* workspace, int row_tiles, int units_low, int units_high, int columns_low, int columns_high, int batch,
    int most_tiles) {
    DYNAMIC_SHARED(shared);
    check_shared_base(shared);
    allow_next_kernel();

    // One division comes before the first fetch: the first blocks take one row of tiles more than the others.
    u32 chunk_blocks = gridDim.x / SPLITS, chunk = SPLITS == 1 ? 0 : blockIdx.x / chunk_blocks;
    u32 block = blockIdx.x - chunk * chunk_blocks;
    u32 least = static_cast<u32>(row_tiles) / chunk_blocks, longer_blocks = row_tiles - least * chunk_blocks;
    int first_tile = block * least + min(block, longer_blocks), tiles = least + (block < longer_blocks);
    int warp = shuffle(threadIdx.x / 32, 0);  // so that the compiler sees that a warp's lanes agree
    Segment low = segment_of(units_low, chunk, 0, columns_low);
    Segment high = segment_of(units_high, chunk, columns_low, columns_high);

    float* slots = reinterpret_cast<float*>(shared + SUMS_OFFSET);
    float* factors = reinterpret_cast<float*>(shared + FACTOR_OFFSET);
    u16* row_scales = reinterpret_cast<u16*>(slots + most_tiles * SLOTS * TILE_SUMS);
    u16* row_bias = row_scales + most_tiles * 16;
    u16* tokens = row_bias + most_tiles * 16;
    int token_stride = (low.units() + high.units()) * UNIT_COLUMNS + 8;  // 8 more: loads without bank conflicts

    // Half of the warps prepare the table and fetch the scales while the others fetch the tokens.
    auto prepare_block = [&] {
        constexpr int FILLERS = WARPS / 2, LOADERS = WARPS - FILLERS;
        if (warp < FILLERS) {
            [[maybe_unused]] TableFilling<Low, 32 * FILLERS> table;
            if constexpr (Low::ENTRIES > 0) table.ask(codebook);
            for (int i = threadIdx.x; i < tiles * 2; i += 32 * FILLERS) {
                copy_async(row_scales + 8 * i, scales + first_tile * 16 + 8 * i);
                if (bias != nullptr) copy_async(row_bias + 8 * i, bias + first_tile * 16 + 8 * i);
            }
            if constexpr (Low::ENTRIES > 0 && (WITHOUT & WITHOUT_TABLE) == 0) table.store(shared);
        } else if constexpr ((WITHOUT & WITHOUT_TOKENS) == 0) {
            wait_for_previous_kernels();
            TokenFilling<LOADERS> filling{low, high, x, columns_low + columns_high, batch, warp - FILLERS};
            filling.fill(tokens, token_stride, factors, reinterpret_cast<u32*>(factors + TOKENS));
        }
        block_sync();
    };

    // The first weights are asked for before anything else.
    u32 my_tokens = shared_address(tokens + lane_index() / 4 * token_stride + lane_index() % 4 * 16);
    u64 tiles_before = first_tile;
    if (HIGH_WARPS == 0 || warp < LOW_WARPS) {
        Share share = share_of<LOW_COLUMNS>(warp, low, tiles);
        Worker<Low, WIDTH_LOW> work{
            {}, Low::lane_offset(), my_tokens + share.first * UNIT_COLUMNS * 2, token_stride, batch};
        work.stream.begin(packed_low + tiles_before * units_low * Unit<WIDTH_LOW>::BYTES, units_low, low.first, share);
        prepare_block();
        work.multiply_share(share, slots + warp % LOW_COLUMNS * TILE_SUMS);
    } else if constexpr (HIGH_WARPS > 0) {
        Share share = share_of<HIGH_COLUMNS>(warp - LOW_WARPS, high, tiles);
        Worker<High, SECOND_WIDTH> work{
            {}, Low::lane_offset(), my_tokens + (low.units() + share.first) * UNIT_COLUMNS * 2, token_stride, batch};
        work.stream.begin(
            packed_high + tiles_before * units_high * Unit<SECOND_WIDTH>::BYTES, units_high, high.first, share);
        prepare_block();
        work.multiply_share(share, slots + (LOW_COLUMNS + (warp - LOW_WARPS) % HIGH_COLUMNS) * TILE_SUMS);
    }
    copy_wait();
    block_sync();
    if constexpr ((WITHOUT & WITHOUT_ADDING) != 0) return;
    Output to{y, workspace, row_scales, bias == nullptr ? nullptr : row_bias, factors, row_tiles, batch};
    finish_rows(to, slots, chunk, first_tile, tiles);
}
