// A packed weight to fp16 or bf16 in row-major order: what cuBLAS multiplies with when there are many tokens.
//
// Warps take units (16 rows x 128 columns) in turn. In a block of a unit, lane 4 g + t holds columns 16 t .. 16 t + 15
// of rows g and g + 8, so four lanes write 128 contiguous bytes of a row.
//
// Macros: those of decoders.cuh; WARPS, BFLOAT; WIDTH_LOW is the rate of the segment that a launch decodes.
#include "decoders.cuh"

using Decoder = Choose<WIDTH_LOW>::Decoder;

// Two neighbouring weights times their row's scale, in fp32, rounded once.
__device__ __forceinline__ u32 scaled(const float* pair, float scale) {
    float first = pair[0] * scale, second = pair[1] * scale;
    if constexpr (BFLOAT) return float_to_bfloat(first) | static_cast<u32>(float_to_bfloat(second)) << 16;
    return float_to_half(first) | static_cast<u32>(float_to_half(second)) << 16;
}

template <int BLOCK>
__device__ __forceinline__ void write_block(
    const Unit<WIDTH_LOW>& unit, const Decoder::Lane& decoding, const float (&scale)[2], u16* to, int out_stride,
    int columns) {
    float values[2 * BLOCK_PAIRS];
    decode_values<Decoder, BLOCK>(unit, decoding, values);
    if (lane_index() % 4 * 16 >= columns) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Words4* row = reinterpret_cast<Words4*>(to + static_cast<u64>(8 * half) * out_stride);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const float* first = values + 2 * (2 * side + half);
            row[side] = Words4{
                scaled(first, scale[half]), scaled(first + 8, scale[half]), scaled(first + 16, scale[half]),
                scaled(first + 24, scale[half])};
        }
    }
}

// packed: (row_tiles, units, 128 * WIDTH_LOW bytes). out: row 0 of the segment's columns, `out_stride` elements a row.
extern "C" __global__ void __launch_bounds__(32 * WARPS) dequantize(
    const u8* packed, const u16* codebook, const u16* scales, u16* out, int row_tiles, int units, int columns,
    int out_stride) {
    DYNAMIC_SHARED(shared);
    check_shared_base(shared);
    make_table<Decoder, 32 * WARPS>(codebook);
    Decoder::Lane decoding = Decoder::lane(Decoder::ask(codebook));
    int row = lane_index() / 4, column = lane_index() % 4 * 16;
    int warp = blockIdx.x * WARPS + shuffle(threadIdx.x / 32, 0), warps = gridDim.x * WARPS;
    for (int item = warp; item < row_tiles * units; item += warps) {
        int row_tile = item / units, first_column = item % units * UNIT_COLUMNS;
        Unit<WIDTH_LOW> unit;
        unit.load(packed + static_cast<u64>(item) * unit.BYTES + lane_index() * unit.LANE_BYTES);
        Decoder::finish(unit);
        const u16* row_scales = scales + row_tile * 16 + row;
        float scale[2] = {half_to_float(row_scales[0]), half_to_float(row_scales[8])};
        u16* to = out + static_cast<u64>(row_tile * 16 + row) * out_stride + first_column + column;
        write_block<0>(unit, decoding, scale, to, out_stride, columns - first_column);
        write_block<1>(unit, decoding, scale, to + 64, out_stride, columns - first_column - 64);
    }
}
