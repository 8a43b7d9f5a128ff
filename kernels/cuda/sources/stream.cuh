// A warp's units from global memory to registers, some steps in flight while another is decoded.
//
// A step is one unit in each of ROWS rows of tiles, of the same columns. A warp goes through its columns, then on to
// the next ROWS rows of its group (every ROW_GROUPS-th), and no warp waits for another.
//
// RING = 0: straight to registers. The compiler counts these loads with one scoreboard, so that waiting for one step is
// waiting for all that were asked for since. So the next step is asked for when the one before has come, and not
// earlier; but a warp that has few steps asks for STEPS_AT_START of them at once.
//
// RING > 0: through a ring of so many steps in shared memory, where each lane copies and reads its own words. That many
// steps are in flight, for decoders that leave shared memory the time. Loads come back in the order in which they were
// asked for, so the second step and those after it are asked for behind the tokens, which would wait for them.
#pragma once

#include "decoders.cuh"

// What a warp takes of a block's `tiles` rows of tiles: those of its group, `units` columns of units from `first` on.
struct Share {
    int group, tiles, first, units;
};

template <int WIDTH>
struct Stream {
    static constexpr int BYTES = Unit<WIDTH>::BYTES, STEP_BYTES = ROWS * BYTES;
    static constexpr int PLACES = RING > 0 ? 1 : 2;

    Unit<WIDTH> units[PLACES][ROWS];
    const u8* next;   // what to fetch next in the first of the rows, at this lane's place,
    int bytes_left;   // and what there is from there to the end of the block's rows
    int row_bytes;    // of a row of tiles
    u32 zero;         // hidden
    int columns;      // steps of the warp's columns, in each of the rows,
    int column_left;  // and from `next` to their end
    u32 ring, slot;   // in shared memory, at this lane's place: the ring, and its step that is read next

    // `packed`: the block's first row of tiles, of `stride_units` units; `chunk`: where the block's columns begin
    // there; `own_ring`: the warp's; the compiler mustn't see that its lanes agree (copy_async_if).
    __device__ __forceinline__ void begin(
        const u8* packed, int stride_units, int chunk, const Share& share, u32 own_ring) {
        columns = column_left = share.units;
        row_bytes = stride_units * BYTES;
        int before = share.group * ROWS * row_bytes + (chunk + share.first) * BYTES;
        bytes_left = columns == 0 ? 0 : share.tiles * row_bytes - before;
        next = packed + (before + lane_index() * Unit<WIDTH>::LANE_BYTES);
        if constexpr (RING > 0) {
            ring = slot = own_ring + lane_index() * Unit<WIDTH>::LANE_BYTES;
            ask(ring);
        } else {
            zero = hidden(0);
            fetch(0);
            if constexpr (STEPS_AT_START > 1) fetch(1);
        }
    }

    // RING > 0: asks for the steps that `begin` left.
    __device__ __forceinline__ void ask_ahead() {
#pragma unroll
        for (int step = 1; step < RING; ++step) ask(ring + step * STEP_BYTES);
    }

    // The first step, in units[0].
    __device__ __forceinline__ void take_first() {
        if constexpr (RING > 0) {
#pragma unroll
            for (int row = 0; row < ROWS; ++row) take(row);
        } else if constexpr (STEPS_AT_START == 1) {
            fetch_after(1, units[0][0]);
        }
    }

    // RING > 0: reads a row of the next step, the rows in order; with the last one asks for a further step in its
    // place.
    __device__ __forceinline__ void take(int row) {
        if (row == 0) wait_for_copy_groups<RING == 0 ? 0 : RING - 1>();
        units[0][row].read(slot + row * BYTES);
        if (row < ROWS - 1) return;
        ask(slot);
        slot += STEP_BYTES;
        if (slot == ring + RING * STEP_BYTES) slot = ring;
    }

    // RING = 0: asks for a step once `arrived` has come.
    __device__ __forceinline__ void fetch_after(int place, const Unit<WIDTH>& arrived) {
        next += arrived.words[0] & zero;
        fetch(place);
    }

    __device__ __forceinline__ void fetch(int place) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) units[place][row].load(next + row * row_bytes, has(row));
        advance();
    }

    __device__ __forceinline__ void ask(u32 to) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) Unit<WIDTH>::copy(to + row * BYTES, next + row * row_bytes, has(row));
        end_copy_group();
        advance();
    }

    __device__ __forceinline__ bool has(int row) const {
        return row * row_bytes < bytes_left && (WITHOUT & WITHOUT_WEIGHTS) == 0;
    }

    __device__ __forceinline__ void advance() {
        bool last = --column_left == 0;
        int further = last ? ROW_GROUPS * ROWS * row_bytes - (columns - 1) * BYTES : BYTES;
        next += further;
        bytes_left -= further;
        column_left = last ? columns : column_left;
    }
};
