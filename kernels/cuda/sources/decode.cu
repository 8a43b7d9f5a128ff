// y = x W^T for up to 16 tokens and a packed W: decoded on the fly into the A operand of mma.m16n8k16.
//
// A block takes one of SPLITS chunks of the input dimension (the grid is a multiple of SPLITS) and a range of rows of
// tiles. Its warps share the chunk's units: each walks down the block's rows in columns of its own and waits for no
// other, except to add up. Their sums meet in shared memory every ROUND_TILES rows of tiles, in the order of the warps.
// With several chunks, the block of the last one adds the others' sums in the order of the chunks; they pass through
// `workspace`, whose words are EMPTY before and after every launch, so that a sum's arrival needs no flag. That block
// has the highest index, so those it waits for are running or done. Every sum has a fixed order: results repeat.
//
// A quantizer of two rates (WIDTH_HIGH != 0) has two segments of columns: half of the warps work on each.
//
// Macros: FAMILY, WIDTH_LOW, WIDTH_HIGH, STATE_BITS, TABLE_BITS, TABLE_OF_PAIRS, REPLICAS, SIGNED_TABLE (decoders.cuh),
// BULK, STAGES, STAGE_UNITS, ROW_TILES (stream.cuh), WARPS, RESIDENT (blocks for which a multiprocessor must
// have registers), TOKENS (1, 2, 4, 8 or 16), BFLOAT, SPLITS, ROUND_TILES (a multiple of ROW_TILES), SUM_BUFFERS (1, 2).
#include "decoders.cuh"
#include "stream.cuh"
#include "tokens.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TOKEN_TILES = (TOKENS + 7) / 8;
constexpr int TOKEN_STRIDE = TOKENS == 1 ? 16 : 20;  // floats; 20 keeps the fragments' stores free of conflicts
constexpr int TILE_SUMS = TOKENS * TOKEN_STRIDE;
constexpr u32 EMPTY = 0xFFFFFFFF;  // a NaN that no sum has
constexpr int MOST_POLLS = 1 << 23;  // seconds: the workspace must have been shared or spoilt

using Low = Choose<WIDTH_LOW>::Decoder;
constexpr int LOW_WARPS = WIDTH_HIGH ? WARPS / 2 : WARPS;
constexpr int WIDEST = WIDTH_HIGH > WIDTH_LOW ? WIDTH_HIGH : WIDTH_LOW;
constexpr int SECOND_WIDTH = WIDTH_HIGH ? WIDTH_HIGH : WIDTH_LOW;
constexpr int RING_BYTES = STAGES * STAGE_UNITS * ROW_TILES * Unit<WIDEST>::BYTES;
using Ring = Stream<Unit<WIDEST>::BYTES>;

// Offsets in shared memory; after them come the scales and biases of the block's rows, then the tokens.
constexpr int RING_OFFSET = Low::TABLE_BYTES;
constexpr int SUMS_OFFSET = RING_OFFSET + WARPS * RING_BYTES;
constexpr int ROUND_SUMS = WARPS * ROUND_TILES * TILE_SUMS;
constexpr int BARRIER_OFFSET = SUMS_OFFSET + SUM_BUFFERS * ROUND_SUMS * 4;
constexpr int FACTOR_OFFSET = BARRIER_OFFSET + WARPS * STAGES * 8;
constexpr int CODEBOOK_OFFSET = (FACTOR_OFFSET + (WARPS + 1) * TOKENS * 4 + 15) & ~15;
constexpr int ROWS_OFFSET = CODEBOOK_OFFSET + ((Low::CODEBOOK_BYTES + 15) & ~15);

using Sums = float[ROW_TILES][TOKEN_TILES][4];

// One unit of up to ROW_TILES rows: 2 blocks of 4 multiplications each.
template <typename Decoder, int WIDTH, int BLOCK>
__device__ __forceinline__ void multiply_block(
    Sums& sums, const Unit<WIDTH> (&units)[ROW_TILES], int rows, u32 table_lane,
    Words4 (&held)[TOKEN_TILES][2], const u16* tokens, int token_stride, int batch) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        // Lanes of absent tokens keep what they have: it meets only sums that nobody reads.
        bool active = lane_index() < 4 * (batch - 8 * tile);
        const u16* from = tokens + 8 * tile * token_stride + BLOCK * 64;
        load_shared_if(held[tile][0], from, active);
        load_shared_if(held[tile][1], from + 8, active);
    }
#pragma unroll
    for (int row = 0; row < ROW_TILES; ++row) {
        if (row > 0 && row >= rows) continue;
        u32 weights[BLOCK_PAIRS];
        Decoder::template decode<BLOCK>(units[row], table_lane, weights);
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            const Words4 &front = held[tile][0], &back = held[tile][1];
            multiply_add(sums[row][tile], weights, front.x, front.y);
            multiply_add(sums[row][tile], weights + 4, front.z, front.w);
            multiply_add(sums[row][tile], weights + 8, back.x, back.y);
            multiply_add(sums[row][tile], weights + 12, back.z, back.w);
        }
    }
}

// The warp's units of up to ROW_TILES rows of tiles.
template <typename Decoder, int WIDTH>
__device__ __forceinline__ void multiply_rows(
    Sums& sums, Ring& stream, int rows, u32 table_lane,
    Words4 (&held)[TOKEN_TILES][2], const u16* tokens, int token_stride, int batch) {
    for (int left = stream.units; left > 0; left -= STAGE_UNITS) {
        int count = min(STAGE_UNITS, left);
        stream.wait();
        for (int i = 0; i < count; ++i) {
            Unit<WIDTH> units[ROW_TILES];
#pragma unroll
            for (int row = 0; row < ROW_TILES; ++row) {
                units[row].load(stream.at(row, i));
                Decoder::finish(units[row]);
            }
            multiply_block<Decoder, WIDTH, 0>(
                sums, units, rows, table_lane, held, tokens, token_stride, batch);
            multiply_block<Decoder, WIDTH, 1>(
                sums, units, rows, table_lane, held, tokens, token_stride, batch);
            tokens += UNIT_COLUMNS;
        }
        stream.release();
    }
}

__device__ __forceinline__ void store_sums(float* to, const Sums& sums) {
    int row = lane_index() / 4, token = lane_index() % 4 * 2;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int t = 8 * tile + token + i % 2;
                if (t < TOKENS) to[r * TILE_SUMS + t * TOKEN_STRIDE + row + 8 * (i / 2)] = sums[r][tile][i];
            }
        }
    }
}

// Where a block's results go, and what they are multiplied with (all but `y` and `workspace` in shared memory).
struct Output {
    u16* y;
    u32* workspace;
    const u16* scales;
    const u16* bias;       // or null
    const float* factors;  // of each token
    int row_tiles, batch;
};

// Adds up a round of the warps' sums, rows of tiles `start .. start + tiles` of the block, and writes what is complete.
__device__ __forceinline__ void finish_round(
    const Output& to, const float* sums, int chunk, int first_tile, int start, int tiles) {
    for (int item = threadIdx.x; item < tiles * TOKENS * 16; item += THREADS) {
        int row = item % 16, token = item / 16 % TOKENS, tile = item / (16 * TOKENS);
        if (token >= to.batch) continue;
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            sum += sums[(warp * ROUND_TILES + tile) * TILE_SUMS + token * TOKEN_STRIDE + row];
        }
        sum *= to.factors[token];
        int output_tile = first_tile + start + tile, row_in_block = (start + tile) * 16 + row;
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
// one for each row; bias and y in the type of x. x: (batch, columns_low + columns_high). workspace: fp32 words for
// SPLITS > 1, (SPLITS - 1, row_tiles, TOKENS, 16). row_capacity: rows of a block for which there is shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) multiply(
    const u8* packed_low, const u8* packed_high, const u16* codebook, const u16* scales, const u16* bias, const u16* x,
    u16* y, u32* workspace, int row_tiles, int units_low, int units_high, int columns_low, int columns_high, int batch,
    int row_capacity) {
    extern __shared__ __align__(128) u8 shared[];
    check_shared_base(shared);
    allow_next_kernel();

    int chunk_blocks = gridDim.x / SPLITS, chunk = blockIdx.x / chunk_blocks, block = blockIdx.x % chunk_blocks;
    int first_tile = row_tiles * block / chunk_blocks;
    int tiles = row_tiles * (block + 1) / chunk_blocks - first_tile;

    // Half of the warps prepare the table and fetch the scales while the others fetch the tokens.
    constexpr int FILLERS = WARPS / 2;
    int warp = shuffle(threadIdx.x / 32, 0);  // so that the compiler sees that a warp's lanes agree
    Segment low{units_low * chunk / SPLITS, units_low * (chunk + 1) / SPLITS, 0, columns_low};
    Segment high{units_high * chunk / SPLITS, units_high * (chunk + 1) / SPLITS, columns_low, columns_high};
    bool is_low = WIDTH_HIGH == 0 || warp < LOW_WARPS;
    int share = is_low ? warp : warp - LOW_WARPS, shares = is_low ? LOW_WARPS : WARPS - LOW_WARPS;
    Segment mine = is_low ? low : high;

    Ring stream;
    stream.unit_bytes = is_low ? Unit<WIDTH_LOW>::BYTES : Unit<SECOND_WIDTH>::BYTES;
    stream.row_bytes = (is_low ? units_low : units_high) * stream.unit_bytes;
    stream.ring = shared + RING_OFFSET + warp * RING_BYTES;
    stream.barriers = reinterpret_cast<u64*>(shared + BARRIER_OFFSET) + warp * STAGES;
    int first_unit = mine.units() * share / shares, end_unit = mine.units() * (share + 1) / shares;  // of the chunk
    u16* codebook_copy = reinterpret_cast<u16*>(shared + CODEBOOK_OFFSET);
    u16* row_scales = reinterpret_cast<u16*>(shared + ROWS_OFFSET);
    u16* row_bias = row_scales + row_capacity;
    if (warp < FILLERS) {
        fetch_async<32 * FILLERS>(codebook_copy, codebook, Low::CODEBOOK_BYTES);
        fetch_async<32 * FILLERS>(row_scales, scales + first_tile * 16, tiles * 32);
        if (bias != nullptr) fetch_async<32 * FILLERS>(row_bias, bias + first_tile * 16, tiles * 32);
        copy_commit();
    }
    const u8* packed = (is_low ? packed_low : packed_high) + static_cast<u64>(first_tile) * stream.row_bytes;
    stream.begin(packed, mine.first + first_unit, mine.first + end_unit, tiles);

    float* all_sums = reinterpret_cast<float*>(shared + SUMS_OFFSET);
    float* factors = reinterpret_cast<float*>(shared + FACTOR_OFFSET);
    u16* tokens = row_bias + row_capacity;
    int token_stride = (low.units() + high.units()) * UNIT_COLUMNS + 8;  // 8 more: loads without bank conflicts

    if (warp < FILLERS) {
        copy_wait<BULK ? 0 : STAGES>();
        barrier_sync<2, 32 * FILLERS>();
        Low::fill<32 * FILLERS>(shared, codebook_copy);
    } else {
        wait_for_previous_kernels();
        load_tokens<FILLERS, WARPS - FILLERS>(
            tokens, token_stride, low, high, x, columns_low + columns_high, batch, warp - FILLERS, factors,
            reinterpret_cast<u32*>(factors + TOKENS));
    }
    block_sync();

    Output to{y, workspace, row_scales, bias == nullptr ? nullptr : row_bias, factors, row_tiles, batch};
    Words4 held[TOKEN_TILES][2] = {};
    u32 table_lane = Low::lane_offset();
    const u16* my_tokens = tokens + lane_index() / 4 * token_stride + lane_index() % 4 * 16 +
                           (first_unit + (is_low ? 0 : low.units())) * UNIT_COLUMNS;
    int round_start = 0;
    float* round_sums = all_sums;
    for (int tile = 0; tile < tiles; tile += ROW_TILES) {
        Sums sums = {};
        int rows = min(ROW_TILES, tiles - tile);
        if (is_low) {
            multiply_rows<Low, WIDTH_LOW>(
                sums, stream, rows, table_lane, held, my_tokens, token_stride, batch);
        } else if constexpr (WIDTH_HIGH != 0) {
            multiply_rows<Choose<SECOND_WIDTH>::Decoder, SECOND_WIDTH>(
                sums, stream, rows, table_lane, held, my_tokens, token_stride, batch);
        }
        store_sums(round_sums + (warp * ROUND_TILES + tile - round_start) * TILE_SUMS, sums);
        if (tile + ROW_TILES - round_start == ROUND_TILES || tile + ROW_TILES >= tiles) {
            block_sync();
            finish_round(to, round_sums, chunk, first_tile, round_start, tile + rows - round_start);
            round_start = tile + ROW_TILES;
            // The next round's sums must not meet those that are being read: another buffer, or another barrier.
            if constexpr (SUM_BUFFERS == 2) {
                round_sums = round_sums == all_sums ? all_sums + ROUND_SUMS : all_sums;
            } else {
                block_sync();
            }
        }
    }
}
