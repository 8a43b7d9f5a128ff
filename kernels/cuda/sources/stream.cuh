// A warp's units from global memory to registers, DEPTH of them ahead of the decoding.
//
// A block's units are numbered row of tiles by row of tiles, in each the `row_units` that belong to the block's chunk; a
// warp takes a run of them, `begin .. end`, however many rows that touches. So its reads follow one another in memory,
// no warp waits for another, and all have as much to do to within one unit.
#pragma once

#include "decoders.cuh"

struct Share {
    int begin, end, row_units;
};

template <int WIDTH>
struct Stream {
    Unit<WIDTH> units[DEPTH];
    const u8* next;  // what to fetch next
    int left;        // units to fetch
    int row_left;    // of these, up to the end of the chunk in this row
    int row_units;
    u32 jump;  // bytes from there to the chunk in the next row

    // `packed`: the block's first row of tiles, of `stride_units` units; `first`: where its chunk begins there.
    __device__ __forceinline__ void begin(const u8* packed, int stride_units, int first, const Share& share) {
        row_units = share.row_units;
        left = share.end - share.begin;
        next = packed + static_cast<u64>(share.begin) * Unit<WIDTH>::BYTES;
        if constexpr (SPLITS > 1) {
            int row = share.begin / row_units;
            row_left = (row + 1) * row_units - share.begin;
            jump = (stride_units - row_units) * Unit<WIDTH>::BYTES;
            next += first * Unit<WIDTH>::BYTES + static_cast<u64>(row) * jump;
        }
#pragma unroll
        for (int slot = 0; slot < DEPTH; ++slot) fetch(slot);
    }

    __device__ __forceinline__ void fetch(int slot) {
        units[slot].load(next, left > 0 && (WITHOUT & WITHOUT_WEIGHTS) == 0);
        --left;
        next += Unit<WIDTH>::BYTES;
        if constexpr (SPLITS > 1) {
            if (--row_left == 0) row_left = row_units, next += jump;
        }
    }
};
