// One pass of the input rotation (hadamard.py says what a pass is), with what may stand before it fused in.
//
// A row is seen as (OUTER, ORDER, INNER). For each outer index and column c the pass computes
//
//     out[j][c] = scale * sum_i sign(M[i][j]) * value(in[i][c])        i, j < ORDER
//
// and then, where FWHT is set, a Walsh-Hadamard transform along the COLUMNS = INNER columns. `value` applies the random
// signs (SIGNS), and before them x * weight (NORM; the row's 1 / rms joins the scale) or silu(gate) * up (GATE). With
// ADD, x is the sum of two rows, rounded to their format, and is written out as well. The inverse rotation has the
// transposed matrices and applies the signs to what the last pass writes (OUT_SIGNS).
//
// A block owns GROUP * WARPS_J outputs j for COLUMNS columns of one row and outer index. Each lane loads VECTOR
// neighbouring columns; COLUMNS / VECTOR lanes span the columns, and the WAYS = WARPS_K * 32 * VECTOR / COLUMNS groups
// of lanes that do so take every WAYS-th i. Their partial sums meet in shared memory in a fixed order; then one warp
// transforms one j. Only partial sums go through shared memory, at the price that every block reads the row.
//
// Macros: OUTER, ORDER, INNER, COLUMNS, FWHT, SIGNS, OUT_SIGNS, NORM, ADD, GATE; VECTOR, WARPS_K, WARPS_J, GROUP (how
// work is divided); IN and OUT: formats, 0 fp16, 1 bf16, 2 fp32.
#include "rows.cuh"

constexpr int WARPS = WARPS_K * WARPS_J;
constexpr int SPAN = COLUMNS / VECTOR;                // lanes across the columns
constexpr int LANE_WAYS = LANES / SPAN;               // ways a warp splits i
constexpr int WAYS = WARPS_K * LANE_WAYS;             // ways the block splits i
constexpr int STEPS = (ORDER + WAYS - 1) / WAYS;      // i's of a lane
constexpr int LIMIT = WAYS == 1 ? 4 : 8;              // they are taken in batches of at most so many,
constexpr int BATCHES = (STEPS + LIMIT - 1) / LIMIT;
constexpr int BATCH = (STEPS + BATCHES - 1) / BATCHES;  // each read before the first of it is used
constexpr int OWN = COLUMNS > LANES ? COLUMNS / LANES : 1;  // columns of a lane in the transform
constexpr int PIECE = VECTOR < 4 ? VECTOR : 4;        // partial sums are stored in pieces of this many
constexpr int PIECES = VECTOR / PIECE;
constexpr int TAKEN = OWN < PIECE ? OWN : PIECE;      // and read in pieces of this many
constexpr int TILES = INNER / COLUMNS;
constexpr int SLICES = ORDER / (GROUP * WARPS_J);
constexpr int ROW = OUTER * ORDER * INNER;

static_assert(VECTOR * SPAN == COLUMNS && SPAN <= LANES && LANE_WAYS * SPAN == LANES, "lanes don't span the columns");
static_assert(SLICES * GROUP * WARPS_J == ORDER && TILES * COLUMNS == INNER, "blocks don't cover the pass");
static_assert(!FWHT || TILES == 1, "a transform needs all its columns in one block");
static_assert(!NORM || (TILES == 1 && OUTER == 1), "a norm needs the whole row in one block");
static_assert(!ADD || NORM, "the sum is written by the first block of a row, which must see the whole row");
static_assert(GROUP <= 8 && (WAYS > 1 || OWN == VECTOR), "unsupported division of work");

// value[n] * sigmoid(value[n]) * factor[n] for COUNT numbers. Two numbers share a reciprocal: the unit that makes
// these, and exponentials, is what bounds a gated rotation, as every block sees the whole row. Numbers below -40, of
// which 2e-16 at most is left, are taken for -40, so that products of two denominators are finite.
template <int COUNT>
__device__ __forceinline__ void gate(float* value, const float* factor) {
    float denominator[COUNT];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        if (value[n] < -40.0f) value[n] = -40.0f;
        denominator[n] = 1.0f + __expf(-value[n]);
    }
#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {
        if constexpr (COUNT == 1) {
            value[n] *= factor[n] * __fdividef(1.0f, denominator[n]);
        } else {
            float inverse = __fdividef(1.0f, denominator[n] * denominator[n + 1]);
            value[n] *= factor[n] * (inverse * denominator[n + 1]);
            value[n + 1] *= factor[n + 1] * (inverse * denominator[n]);
        }
    }
}

// The sign of a float: bit `n` of `bits`.
__device__ __forceinline__ u32 sign_bit(u32 bits, int n) { return bits << (31 - n) & 0x80000000u; }

// Walsh-Hadamard transform of COLUMNS values, OWN neighbours in each lane.
__device__ __forceinline__ void transform(float* value, int lane) {
#pragma unroll
    for (int half = 1; half < OWN; half *= 2) {
#pragma unroll
        for (int n = 0; n < OWN; ++n) {
            if (!(n & half)) {
                float low = value[n], high = value[n + half];
                value[n] = low + high;
                value[n + half] = low - high;
            }
        }
    }
#pragma unroll
    for (int half = 1; half < COLUMNS / OWN; half *= 2) {
#pragma unroll
        for (int n = 0; n < OWN; ++n) {
            float other = exchange(value[n], half);
            value[n] = lane & half ? other - value[n] : value[n] + other;
        }
    }
}

// The random signs of neighbouring numbers of a row, from `place` on.
template <int COUNT>
__device__ __forceinline__ void flip(float* value, const u8* signs, int place) {
    u32 flips = signs[place / 8] >> place % 8;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) value[n] = bits_to_float(float_to_bits(value[n]) ^ sign_bit(flips, n));
}

// Args: `in`: rows of ROW numbers, `in_stride` apart (the gate, where GATE is set); `second`: the up rows,
// `second_stride` apart, or the norm's weight (ROW numbers); `out`: contiguous rows of ROW numbers; `signs`: one bit a
// number of a row, set for -1; `matrix`: bit g of byte [j / GROUP][i], j a multiple of GROUP, is set where
// M[i][j + g] < 0. With ADD: `residual`: rows to add, `residual_stride` apart; `total`: contiguous rows for the sums,
// which must be no row that is read, as other blocks may still read it.
extern "C" __global__ void __launch_bounds__(WARPS* LANES)
    rotate(const void* in, int in_stride, const void* second, int second_stride, void* out, const u8* signs,
           const u8* matrix, float scale, float epsilon, const void* residual, int residual_stride, void* total) {
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int warp_k = warp % WARPS_K, warp_j = warp / WARPS_K;
    int block = blockIdx.x;
    int slice = block % SLICES;
    block /= SLICES;
    int tile = block % TILES;
    block /= TILES;
    int outer = block % OUTER, row = block / OUTER;

    int way = warp_k * LANE_WAYS + lane / SPAN;
    int column = tile * COLUMNS + lane % SPAN * VECTOR;
    int base = outer * (ORDER * INNER) + column;  // of this lane's columns in the row, at i = 0
    const u8* group = matrix + (slice * WARPS_J + warp_j) * ORDER;
    const u8* in_row = (const u8*)in + (long long)row * in_stride * bytes_of(IN);
    const u8* up_row = (const u8*)second + (long long)row * second_stride * bytes_of(IN);
    const u8* residual_row = (const u8*)residual + (long long)row * residual_stride * bytes_of(IN);

    float sum[GROUP][VECTOR] = {};
    float power = 0.0f;
    Raw<IN, VECTOR> loaded[BATCH], other[BATCH], added[BATCH];
    u32 flips[BATCH], coefficients[BATCH];
    // What no kernel writes is read ahead: before the wait, and then a batch early.
    auto read_tables = [&](int first) {
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
            int i = (first + n) * WAYS + way;
            if (i < ORDER) {
                int place = base + i * INNER;
                coefficients[n] = group[i];
                if constexpr (SIGNS) flips[n] = signs[place / 8] >> place % 8;
                if constexpr (NORM) other[n].load(second, place);
            }
        }
    };
    allow_next_kernel();
    read_tables(0);
    wait_for_previous_kernels();
#pragma unroll 1
    for (int first = 0; first < STEPS; first += BATCH) {
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
            int i = (first + n) * WAYS + way;
            if (i < ORDER) {
                loaded[n].load(in_row, base + i * INNER);
                if constexpr (GATE) other[n].load(up_row, base + i * INNER);
                if constexpr (ADD) added[n].load(residual_row, base + i * INNER);
            }
        }
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
            if ((first + n) * WAYS + way < ORDER) {
                float value[VECTOR];
                if constexpr (ADD) {
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) value[v] = loaded[n].value(v) + added[n].value(v);
                    loaded[n].set(value);
                    int place = base + ((first + n) * WAYS + way) * INNER;
                    if (slice == 0 && warp_j == 0) loaded[n].store(total, (long long)row * ROW + place);
                }
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) value[v] = loaded[n].value(v);
                if constexpr (GATE) {
                    float factor[VECTOR];
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) factor[v] = other[n].value(v);
                    gate<VECTOR>(value, factor);
                }
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    if constexpr (NORM) {
                        power += value[v] * value[v];
                        value[v] *= other[n].value(v);
                    }
                    if constexpr (SIGNS) value[v] = bits_to_float(float_to_bits(value[v]) ^ sign_bit(flips[n], v));
                }
#pragma unroll
                for (int g = 0; g < GROUP; ++g) {
                    float coefficient = bits_to_float(0x3f800000u | sign_bit(coefficients[n], g));  // +1 or -1
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) sum[g][v] += coefficient * value[v];
                }
            }
        }
        if (BATCHES > 1) read_tables(first + BATCH);
    }

    if constexpr (NORM) {
#pragma unroll
        for (int half = 1; half < LANES; half *= 2) power += exchange(power, half);
    }
    if constexpr (WAYS == 1) {
        if constexpr (NORM) scale *= rsqrtf(power / ROW + epsilon);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            if constexpr (FWHT) transform(sum[g], lane);
#pragma unroll
            for (int n = 0; n < OWN; ++n) sum[g][n] *= scale;
            int place = outer * (ORDER * INNER) + ((slice * WARPS_J + warp_j) * GROUP + g) * INNER + column;
            if constexpr (OUT_SIGNS) flip<OWN>(sum[g], signs, place);
            Raw<OUT, OWN> result;
            result.set(sum[g]);
            result.store(out, (long long)row * ROW + place);
        }
    } else {
        // partial[warp][g][piece][lane][PIECE]: each lane writes whole pieces, neighbours side by side.
        alignas(16) __shared__ float partial[WAYS == 1 ? 1 : WARPS * GROUP * PIECES * LANES * PIECE];
        __shared__ float powers[WARPS];
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
                Raw<FP32, PIECE> stored;
                stored.set(sum[g] + piece * PIECE);
                stored.store(partial, (((warp * GROUP + g) * PIECES + piece) * LANES + lane) * PIECE);
            }
        }
        if (NORM && lane == 0) powers[warp] = power;
        __syncthreads();
        if constexpr (NORM) {
            power = 0.0f;
#pragma unroll
            for (int k = 0; k < WARPS_K; ++k) power += powers[k];
            scale *= rsqrtf(power / ROW + epsilon);
        }
        for (int local = warp; local < GROUP * WARPS_J; local += WARPS) {
            float value[OWN] = {};
            int own_column = lane * OWN % COLUMNS;  // lanes beyond the columns repeat them
#pragma unroll 4
            for (int part = 0; part < WAYS; ++part) {
                int owner = local / GROUP * WARPS_K + part / LANE_WAYS;
                int start = (owner * GROUP + local % GROUP) * PIECES;
#pragma unroll
                for (int n = 0; n < OWN; n += TAKEN) {
                    int c = own_column + n;
                    int source = part % LANE_WAYS * SPAN + c / VECTOR, piece = c % VECTOR / PIECE;
                    Raw<FP32, TAKEN> taken;
                    taken.load(partial, ((start + piece) * LANES + source) * PIECE + c % PIECE);
#pragma unroll
                    for (int m = 0; m < TAKEN; ++m) value[n + m] += taken.value(m);
                }
            }
            if constexpr (FWHT) transform(value, lane);
#pragma unroll
            for (int n = 0; n < OWN; ++n) value[n] *= scale;
            if (lane * OWN < COLUMNS) {
                int j = slice * WARPS_J * GROUP + local;
                int place = outer * (ORDER * INNER) + j * INNER + tile * COLUMNS + own_column;
                if constexpr (OUT_SIGNS) flip<OWN>(value, signs, place);
                Raw<OUT, OWN> result;
                result.set(value);
                result.store(out, (long long)row * ROW + place);
            }
        }
    }
}
