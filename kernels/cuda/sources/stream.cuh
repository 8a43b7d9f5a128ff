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

    u8* ring;
    u64* barriers;
    int unit_bytes, row_bytes;  // of a unit, and of a whole row of tiles in memory
    int units;                  // that the warp reads of each row
    int slot = 0;
    u32 parity = 0;
    // What to fetch next: from where, stages left of the row, rows left.
    const u8* source;
    int stages_left, rows_left;

    // Starts fetching units `first .. end` of `rows` rows of tiles, the first of which begins at `packed`.
    __device__ __forceinline__ void begin(const u8* packed, int first, int end, int rows) {
        units = end - first;
        source = packed + first * unit_bytes;
        stages_left = stages_of_row();
        rows_left = units > 0 ? rows : 0;
#if BULK
        if (lane_index() == 0) {
#pragma unroll
            for (int i = 0; i < STAGES; ++i) barrier_init(barriers + i);
            barrier_init_done();
        }
        warp_sync();
#endif
#pragma unroll 1
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

    __device__ __forceinline__ int stages_of_row() const { return (units + STAGE_UNITS - 1) / STAGE_UNITS; }

    __device__ __forceinline__ void fetch(int to) {
        if (rows_left > 0) {
            int full = STAGE_UNITS * unit_bytes;
            int bytes = stages_left > 1 ? full : (units - (stages_of_row() - 1) * STAGE_UNITS) * unit_bytes;
            u8* stage = ring + to * STAGE_BYTES;
#if BULK
            if (lane_index() == 0) {
                barrier_expect(barriers + to, min(ROW_TILES, rows_left) * bytes);
#pragma unroll
                for (int row = 0; row < ROW_TILES; ++row) {
                    if (row < rows_left) copy_bulk(stage + row * ROW_BYTES, source + row * row_bytes, bytes, barriers + to);
                }
            }
#else
#pragma unroll
            for (int row = 0; row < ROW_TILES; ++row) {
#pragma unroll
                for (int piece = 0; piece < ROW_BYTES; piece += 512) {
                    int offset = piece + 16 * lane_index();
                    if (row < rows_left && offset < bytes) {
                        copy_async<16>(stage + row * ROW_BYTES + offset, source + row * row_bytes + offset);
                    }
                }
            }
#endif
            source += full;
            if (--stages_left == 0) {
                stages_left = stages_of_row();
                rows_left -= ROW_TILES;
                source += ROW_TILES * row_bytes - stages_left * full;
            }
        }
#if !BULK
        copy_commit();
#endif
    }
};
