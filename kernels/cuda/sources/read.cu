// Reading and nothing else: the floor under the decode kernels' times.
//
// `read_direct` is the plainest fast read, 16 bytes a thread and load; `read_ring` reads units as decode.cu does, through
// the same rings, and decodes nothing. Macros: UNROLL and READ_THREADS for the first; those of decoders.cuh, stream.cuh
// and WARPS for the second.
#include "ptx.cuh"

#ifdef UNROLL
extern "C" __global__ void __launch_bounds__(READ_THREADS) read_direct(const Words4* from, u32* out, int count) {
    allow_next_kernel();
    u32 all = 0;
    int stride = gridDim.x * READ_THREADS;
    for (int start = blockIdx.x * READ_THREADS + threadIdx.x; start < count; start += UNROLL * stride) {
        Words4 words[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            int at = start + i * stride;
            words[i] = at < count ? from[at] : Words4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) all += words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    }
    wait_for_previous_kernels();
    if (all == 0x12345678) out[0] = all;  // so that the reads are not left out
}
#else
#include "decoders.cuh"
#include "stream.cuh"

using Ring = Stream<Unit<WIDTH_LOW>::BYTES>;

extern "C" __global__ void __launch_bounds__(32 * WARPS) read_ring(const u8* packed, u32* out, int row_tiles, int units) {
    extern __shared__ __align__(128) u8 shared[];
    allow_next_kernel();
    int warp = shuffle(threadIdx.x / 32, 0), first_tile = row_tiles * blockIdx.x / gridDim.x;
    Ring stream;
    stream.unit_bytes = Unit<WIDTH_LOW>::BYTES;
    stream.row_bytes = units * stream.unit_bytes;
    stream.ring = shared + warp * STAGES * Ring::STAGE_BYTES;
    stream.barriers = reinterpret_cast<u64*>(shared + WARPS * STAGES * Ring::STAGE_BYTES) + warp * STAGES;
    int tiles = row_tiles * (blockIdx.x + 1) / gridDim.x - first_tile;
    const u8* first = packed + static_cast<u64>(first_tile) * stream.row_bytes;
    stream.begin(first, units * warp / WARPS, units * (warp + 1) / WARPS, tiles);
    u32 all = 0;
    for (int tile = 0; tile < tiles; tile += ROW_TILES) {
        for (int left = stream.units; left > 0; left -= STAGE_UNITS) {
            stream.wait();
            for (int i = 0; i < min(STAGE_UNITS, left); ++i) {
                for (int row = 0; row < min(ROW_TILES, tiles - tile); ++row) {
                    Unit<WIDTH_LOW> unit;
                    unit.load(stream.at(row, i));
#pragma unroll
                    for (int word = 0; word < WIDTH_LOW; ++word) all += unit.words[word];
                }
            }
            stream.release();
        }
    }
    wait_for_previous_kernels();
    if (all == 0x12345678) out[0] = all;
}
#endif
