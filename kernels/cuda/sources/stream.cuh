// A warp's stream of packed units from global to shared memory, several stages ahead of the decoding.
//
// Every warp has a ring of its own, so warps never wait for one another. A stage holds up to STAGE_UNITS neighbouring
// units of up to ROW_TILES rows of tiles. With BULK the copy engine fills it (sm_90 and newer), otherwise cp.async.
#pragma once

#include "ptx.cuh"

template <int MAX_UNIT_BYTES>
struct Stream {
    static constexpr int ROW_BYTES = MAX_UNIT_BYTES * STAGE_UNITS;
    static constexpr int STAGE_BYTES = ROW_BYTES * ROW_TILES;

    const u8* source;  // row of tiles 0 and unit 0 of what the warp may read
    int unit_bytes, row_bytes;
    int first, end, tiles;  // the warp reads units `first .. end` of rows of tiles `0 .. tiles`
    u8* ring;
    u64* barriers;
    int slot = 0;
    u32 parity = 0;
    int next_tile = 0, next_unit = 0;  // what to fetch next

    // Starts fetching.
    __device__ __forceinline__ void begin() {
        if (first >= end) tiles = 0;
        next_unit = first;
#if BULK
        if (lane_index() == 0) {
#pragma unroll
            for (int i = 0; i < STAGES; ++i) barrier_init(barriers + i);
            barrier_init_done();
        }
        warp_sync();
#endif
#pragma unroll
        for (int i = 0; i < STAGES; ++i) fetch(i);
    }

    // Where unit `unit` of row `row` of the current stage lies.
    __device__ __forceinline__ const u8* at(int row, int unit) const {
        return ring + slot * STAGE_BYTES + row * ROW_BYTES + unit * unit_bytes;
    }

    // Until the current stage has arrived.
    __device__ __forceinline__ void wait() {
#if BULK
        barrier_wait(barriers + slot, parity);
#else
        copy_wait<STAGES - 1>();
        warp_sync();
#endif
    }

    // The current stage has been read: refill it and go on to the next.
    __device__ __forceinline__ void release() {
        warp_sync();
        fetch(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }

    __device__ __forceinline__ void fetch(int to) {
        if (next_tile < tiles) {
            int bytes = min(STAGE_UNITS, end - next_unit) * unit_bytes, rows = min(ROW_TILES, tiles - next_tile);
            const u8* from = source + (static_cast<u64>(next_tile) * row_bytes + next_unit * unit_bytes);
            u8* stage = ring + to * STAGE_BYTES;
#if BULK
            if (lane_index() == 0) {
                barrier_expect(barriers + to, rows * bytes);
#pragma unroll
                for (int row = 0; row < ROW_TILES; ++row) {
                    if (row < rows) copy_bulk(stage + row * ROW_BYTES, from, bytes, barriers + to);
                    from += row_bytes;
                }
            }
#else
#pragma unroll
            for (int row = 0; row < ROW_TILES; ++row) {
#pragma unroll
                for (int piece = 0; piece < ROW_BYTES; piece += 512) {
                    int offset = piece + 16 * lane_index();
                    if (row < rows && offset < bytes) copy_async<16>(stage + row * ROW_BYTES + offset, from + offset);
                }
                from += row_bytes;
            }
#endif
            next_unit += STAGE_UNITS;
            if (next_unit >= end) next_unit = first, next_tile += ROW_TILES;
        }
#if !BULK
        copy_commit();
#endif
    }
};
