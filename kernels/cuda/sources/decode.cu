// y = x W^T for up to 16 tokens and a packed W: decoded on the fly into the A operand of mma.m16n8k16.
//
// A block takes one of SPLITS chunks of the input dimension (the grid is a multiple of SPLITS) and a range of rows of
// tiles. Its warps share the units of that range evenly (stream.cuh) and meet only at the end: a warp leaves the sums of
// each row of tiles it touched in a slot of shared memory, and these are added up in the order of the warps. With several
// chunks, the block of the last one adds the others' sums in the order of the chunks; they pass through `workspace`,
// whose words are EMPTY before and after every launch, so that a sum's arrival needs no flag. That block has the highest
// index, so those it waits for are running or done. Every sum has a fixed order: results repeat.
//
// A quantizer of two rates (WIDTH_HIGH != 0) has two segments of columns: half of the warps work on each.
//
// Macros: FAMILY, WIDTH_LOW, WIDTH_HIGH, STATE_BITS, TABLE_BITS, TABLE_OF_PAIRS, REPLICAS, SIGNED_TABLE (decoders.cuh),
// DEPTH, SPLITS (stream.cuh), WARPS, RESIDENT (blocks for which a multiprocessor must have registers), TOKENS (1, 2, 4, 8
// or 16), BFLOAT.
#include "stream.cuh"
#include "tokens.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TOKEN_TILES = (TOKENS + 7) / 8;
constexpr int TOKEN_STRIDE = TOKENS == 1 ? 16 : 20;  // floats; 20 keeps the fragments' stores free of conflicts
constexpr int TILE_SUMS = TOKENS * TOKEN_STRIDE;
constexpr u32 EMPTY = 0xFFFFFFFF;  // a NaN that no sum has
constexpr int MOST_POLLS = 1 << 23;  // seconds: the workspace must have been shared or spoilt

using Low = Choose<WIDTH_LOW>::Decoder;
constexpr int SEGMENTS = WIDTH_HIGH ? 2 : 1;
constexpr int SEGMENT_WARPS = WARPS / SEGMENTS;
constexpr int SECOND_WIDTH = WIDTH_HIGH ? WIDTH_HIGH : WIDTH_LOW;
using High = Choose<SECOND_WIDTH>::Decoder;

// Offsets in shared memory; after them come the slots of sums, the scales and biases of the block's rows, the tokens.
constexpr int FACTOR_OFFSET = Low::TABLE_BYTES;
constexpr int SUMS_OFFSET = (FACTOR_OFFSET + (WARPS + 1) * TOKENS * 4 + 15) & ~15;

using Sums = float[TOKEN_TILES][4];
using Fragments = Words4[TOKEN_TILES][2];  // of the tokens, for the 4 multiplications of a block

// Those of block BLOCK of a unit; tokens: address of the unit's first column, at this lane's place.
template <int BLOCK>
__device__ __forceinline__ void load_fragments(Fragments& fragments, u32 tokens, int token_stride, int batch) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        // Lanes of absent tokens keep what they have: it meets only sums that nobody reads.
        bool active = lane_index() < 4 * (batch - 8 * tile);
        u32 from = tokens + 16 * tile * token_stride;
        load_shared_if<BLOCK * 128>(fragments[tile][0], from, active);
        load_shared_if<BLOCK * 128 + 16>(fragments[tile][1], from, active);
    }
}

__device__ __forceinline__ void multiply_block(
    Sums& sums, const u32 (&weights)[BLOCK_PAIRS], const Fragments& fragments) {
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
        const Words4 &front = fragments[tile][0], &back = fragments[tile][1];
        multiply_add(sums[tile], weights, front.x, front.y);
        multiply_add(sums[tile], weights + 4, front.z, front.w);
        multiply_add(sums[tile], weights + 8, back.x, back.y);
        multiply_add(sums[tile], weights + 12, back.z, back.w);
    }
}

__device__ __forceinline__ void store_sums(float* to, const Sums& front, const Sums& back) {
    int row = lane_index() / 4, token = lane_index() % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < TOKEN_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int t = 8 * tile + token + i % 2;
            if (t < TOKENS) to[t * TOKEN_STRIDE + row + 8 * (i / 2)] = front[tile][i] + back[tile][i];
        }
    }
}

// A warp at work on its share. Lookups run one block of tiles ahead of the multiplications, so neither waits for the
// other.
template <typename Decoder, int WIDTH>
struct Worker {
    Stream<WIDTH> stream;
    u32 table_lane;
    u32 row_tokens;  // address of those of the segment's first column, at this lane's place
    int token_stride, batch;
    float* slot;      // of the row's sums
    int left, run;    // units of the share; of these, up to the end of the row
    u32 tokens;
    Sums sums[2];
    Fragments fragments[2];
    u32 front[BLOCK_PAIRS], back[BLOCK_PAIRS];  // weights of a unit's blocks

    // slots: of the sums, the warp's for row 0 of the block.
    __device__ __forceinline__ void multiply_share(const Share& share, float* slots) {
        left = share.end - share.begin;
        if (left == 0) return;
        int row = share.begin / share.row_units, column = share.begin - row * share.row_units;
        run = min(share.row_units - column, left);
        tokens = row_tokens + column * UNIT_COLUMNS * 2;
        slot = slots + row * TILE_SUMS;
        clear();
        Decoder::finish(stream.units[0]);
        Decoder::template decode<0>(stream.units[0], table_lane, front);
        while (!steps<0>()) {}
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 4; ++i) sums[0][i / 4][i % 4] = sums[1][i / 4][i % 4] = 0;
    }

    // One unit from each place in the stream; whether the share is done.
    template <int PLACE>
    __device__ __forceinline__ bool steps() {
        if constexpr (PLACE < DEPTH) {
            return step<PLACE>() || steps<PLACE + 1>();
        } else {
            return false;
        }
    }

    template <int PLACE>
    __device__ __forceinline__ bool step() {
        Unit<WIDTH>&unit = stream.units[PLACE], &following = stream.units[(PLACE + 1) % DEPTH];
        load_fragments<0>(fragments[0], tokens, token_stride, batch);
        Decoder::template decode<1>(unit, table_lane, back);
        stream.fetch(PLACE);
        multiply_block(sums[0], front, fragments[0]);
        load_fragments<1>(fragments[1], tokens, token_stride, batch);
        Decoder::finish(following);
        Decoder::template decode<0>(following, table_lane, front);
        multiply_block(sums[1], back, fragments[1]);
        tokens += UNIT_COLUMNS * 2;
        --left;
        if (--run == 0) {
            store_sums(slot, sums[0], sums[1]);
            if (left == 0) return true;
            run = min(stream.row_units, left);
            tokens = row_tokens;
            slot += TILE_SUMS;
            clear();
        }
        return false;
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

// What warp `index` of a segment's takes of `tiles` rows: even parts, or one unit each of the first where there are few.
__device__ __forceinline__ Share share_of(int index, int row_units, int tiles) {
    int units = row_units * tiles;
    row_units = max(row_units, 1);  // what an empty chunk is divided by
    if (units < SEGMENT_WARPS) return Share{min(index, units), min(index + 1, units), row_units};
    return Share{units * index / SEGMENT_WARPS, units * (index + 1) / SEGMENT_WARPS, row_units};
}

// The sum of what a segment's warps left of row of tiles `tile`, at `offset` of its sums.
__device__ __forceinline__ float add_slots(const float* slots, int row_units, int tiles, int tile, int offset) {
    int units = row_units * tiles, workers = min(SEGMENT_WARPS, units);
    if (units == 0) return 0;
    // Warp w begins at units * w / workers (share_of): the last that begins at or before a unit holds it.
    int first = ((tile * row_units + 1) * workers - 1) / units, last = ((tile + 1) * row_units * workers - 1) / units;
    float sum = 0;
#pragma unroll 4
    for (int warp = first; warp <= last; ++warp) sum += slots[(tile + warp) * TILE_SUMS + offset];
    return sum;
}

// Adds up the warps' sums and writes what is complete.
__device__ __forceinline__ void finish_rows(
    const Output& to, const float* slots, int low_units, int high_units, int chunk, int first_tile, int tiles) {
    for (int item = threadIdx.x; item < tiles * TOKENS * 16; item += THREADS) {
        int row = item % 16, token = item / 16 % TOKENS, tile = item / (16 * TOKENS);
        if (token >= to.batch) continue;
        int offset = token * TOKEN_STRIDE + row;
        float sum = add_slots(slots, low_units, tiles, tile, offset);
        if constexpr (SEGMENTS == 2) {
            sum += add_slots(slots + (tiles + SEGMENT_WARPS) * TILE_SUMS, high_units, tiles, tile, offset);
        }
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
// one for each row; bias and y in the type of x. x: (batch, columns_low + columns_high). workspace: fp32 words for
// SPLITS > 1, (SPLITS - 1, row_tiles, TOKENS, 16). row_capacity: rows of a block for which there is shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) multiply(
    const u8* packed_low, const u8* packed_high, const u16* codebook, const u16* scales, const u16* bias, const u16* x,
    u16* y, u32* workspace, int row_tiles, int units_low, int units_high, int columns_low, int columns_high, int batch,
    int row_capacity) {
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

    bool is_low = SEGMENTS == 1 || warp < SEGMENT_WARPS;
    int worker = is_low ? warp : warp - SEGMENT_WARPS, row_units = is_low ? low.units() : high.units();
    Share share = share_of(worker, row_units, tiles);

    float* slots = reinterpret_cast<float*>(shared + SUMS_OFFSET);
    float* factors = reinterpret_cast<float*>(shared + FACTOR_OFFSET);
    u16* row_scales = reinterpret_cast<u16*>(slots + (SEGMENTS * row_capacity / 16 + WARPS) * TILE_SUMS);
    u16* row_bias = row_scales + row_capacity;
    u16* tokens = row_bias + row_capacity;
    int token_stride = (low.units() + high.units()) * UNIT_COLUMNS + 8;  // 8 more: loads without bank conflicts

    // Half of the warps prepare the table and fetch the scales while the others fetch the tokens.
    auto prepare_block = [&] {
        constexpr int FILLERS = WARPS / 2;
        if (warp < FILLERS) {
            if constexpr ((WITHOUT & WITHOUT_TABLE) == 0) Low::fill<32 * FILLERS>(shared, codebook);
            for (int i = threadIdx.x; i < tiles * 2; i += 32 * FILLERS) {
                copy_async(row_scales + 8 * i, scales + first_tile * 16 + 8 * i);
                if (bias != nullptr) copy_async(row_bias + 8 * i, bias + first_tile * 16 + 8 * i);
            }
            copy_commit();
        } else if constexpr ((WITHOUT & WITHOUT_TOKENS) == 0) {
            wait_for_previous_kernels();
            load_tokens<FILLERS, WARPS - FILLERS>(
                tokens, token_stride, low, high, x, columns_low + columns_high, batch, warp - FILLERS, factors,
                reinterpret_cast<u32*>(factors + TOKENS));
        }
        block_sync();
    };

    // The first weights are asked for before anything else.
    u32 my_tokens = shared_address(tokens + lane_index() / 4 * token_stride + lane_index() % 4 * 16);
    u64 tiles_before = first_tile;
    if (is_low) {
        Worker<Low, WIDTH_LOW> work{{}, Low::lane_offset(), my_tokens, token_stride, batch};
        const u8* packed = packed_low + tiles_before * units_low * Unit<WIDTH_LOW>::BYTES;
        work.stream.begin(packed, units_low, low.first, share);
        prepare_block();
        work.multiply_share(share, slots + worker * TILE_SUMS);
    } else if constexpr (SEGMENTS == 2) {
        u32 high_tokens = my_tokens + low.units() * UNIT_COLUMNS * 2;
        Worker<High, SECOND_WIDTH> work{{}, Low::lane_offset(), high_tokens, token_stride, batch};
        const u8* packed = packed_high + tiles_before * units_high * Unit<SECOND_WIDTH>::BYTES;
        work.stream.begin(packed, units_high, high.first, share);
        prepare_block();
        work.multiply_share(share, slots + (tiles + SEGMENT_WARPS + worker) * TILE_SUMS);
    }
    copy_wait();
    block_sync();
    if constexpr ((WITHOUT & WITHOUT_ADDING) != 0) return;
    Output to{y, workspace, row_scales, bias == nullptr ? nullptr : row_bias, factors, row_tiles, batch};
    finish_rows(to, slots, low.units(), high.units(), chunk, first_tile, tiles);
}
