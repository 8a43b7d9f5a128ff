// Rows of a packed weight, one for each token: what an embedding looks up.
//
// Of a unit (16 rows x 128 columns) lanes 4 g .. 4 g + 3 of a warp hold rows g and g + 8, in runs of their own. So only
// these four lanes' words are read, and the eight quarters of a warp take eight units of one row at once.
//
// Macros: those of decoders.cuh; WARPS; OUT, the format of rows.cuh that is written; WIDTH_LOW is the rate of the
// segment that a launch decodes.
#include "decoders.cuh"
#include "rows.cuh"

using Decoder = Choose<WIDTH_LOW>::Decoder;

constexpr int AT_ONCE = 8;  // units of a warp
constexpr int PIECE = 8;    // columns that are written together

// Columns of one of a lane's two rows (`upper`: row g + 8), from `column` of `out` on.
template <int BLOCK>
__device__ __forceinline__ void write_block(
    const Unit<WIDTH_LOW>& unit, const Decoder::Lane& decoding, bool upper, float scale, void* out, long long place) {
    float weights[2 * BLOCK_PAIRS];
    decode_values<Decoder, BLOCK>(unit, decoding, weights);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float value[PIECE];
#pragma unroll
        for (int n = 0; n < PIECE / 2; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* pair = weights + 2 * (4 * n + 2 * side);
                value[2 * n + i] = (upper ? pair[2 + i] : pair[i]) * scale;
            }
        }
        Raw<OUT, PIECE> result;
        result.set(value);
        result.store(out, place + side * PIECE);
    }
}

// tokens: `count` rows to look up, each below `rows`. packed: (row_tiles, units, 128 * WIDTH_LOW bytes). out: the
// segment's first column of the first token, `out_stride` numbers a token.
extern "C" __global__ void __launch_bounds__(32 * WARPS) look_up(
    const long long* tokens, const u8* packed, const u16* codebook, const u16* scales, void* out, int count, int rows,
    int units, int columns, int out_stride) {
    DYNAMIC_SHARED(shared);
    check_shared_base(shared);
    make_table<Decoder, 32 * WARPS>(codebook);
    Decoder::Lane decoding = Decoder::lane(Decoder::ask(codebook));
    int quarter = lane_index() / 4, tile = lane_index() % 4;
    int spans = (units + AT_ONCE - 1) / AT_ONCE;
    int warp = blockIdx.x * WARPS + threadIdx.x / 32, warps = gridDim.x * WARPS;
    for (int item = warp; item < count * spans; item += warps) {
        int row_number = item / spans, unit_number = item % spans * AT_ONCE + quarter;
        long long token = tokens[row_number];
        if (token < 0 || token >= rows) stop_kernel();
        int row = static_cast<int>(token % 16), lane = row % 8 * 4 + tile;
        bool active = unit_number < units;
        const u8* bytes = packed + (token / 16 * units + unit_number) * Unit<WIDTH_LOW>::BYTES;
        Unit<WIDTH_LOW> unit;
        unit.load(bytes + lane * unit.LANE_BYTES, active, lane);
#if FAMILY == TCQ || FAMILY == MAD
        int next_lane = (lane + 4) % 32;  // its run continues the lane's
        Unit<WIDTH_LOW> following;
        following.load(bytes + next_lane * unit.LANE_BYTES, active, next_lane);
        unit.next = Decoder::starts(following);
#endif
        float scale = half_to_float(scales[token]);
        int column = unit_number * UNIT_COLUMNS + tile * 16;
        long long place = static_cast<long long>(row_number) * out_stride + column;
        bool upper = row >= 8;
        if (active && column < columns) write_block<0>(unit, decoding, upper, scale, out, place);
        if (active && column + 64 < columns) write_block<1>(unit, decoding, upper, scale, out, place + 64);
    }
}
