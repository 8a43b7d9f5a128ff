// A tile of positions in the attention of few queries, on tensor cores (attention.cu).
//
// Nothing goes through shared memory on its way: a product doesn't change when the numbers that are summed over, or the
// rows of a result, change places, so lanes load 16 bytes of a row at once and take them as fragments.
//
// Macros: those of attention.cu.
#pragma once

#include "activation.cuh"
#include "rows.cuh"

constexpr float LOWEST = -1e30f;  // a maximum of nothing; finite, so that differences are numbers
constexpr int TILE = 16;          // positions
constexpr int PIECE_WORDS = 4;    // of 16 bytes: two numbers each
constexpr int KEY_PIECES = (HEAD_SIZE + 31) / 32;    // that a lane has of a key,
constexpr int VALUE_PIECES = (HEAD_SIZE + 63) / 64;  // or of a value
constexpr int QUERY_STRIDE = 32 * KEY_PIECES + 8;    // 8 numbers of filling keep loads free of bank conflicts

static_assert(HEAD_SIZE % 8 == 0, "a lane takes 8 numbers");
static_assert(GROUP <= 8, "a multiplication has 8 columns, the query heads");

constexpr int FORMAT = BFLOAT ? BF16 : FP16;
typedef Raw<FORMAT, 8> Piece;

__device__ __forceinline__ void multiply(
    float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    if constexpr (BFLOAT) {
        multiply_add_bfloat(sum, a, b, c, d, low, high);
    } else {
        multiply_add(sum, a, b, c, d, low, high);
    }
}

// Keys and values of TILE positions, as lane 4 g + t has them for PTX's mma.m16n8k16.
//
// Keys are its 16 rows: those of positions g and g + 8, of each 32 numbers the 8 from 8 t on, for two multiplications.
// Values are transposed, their numbers the rows: those of positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, of each 64
// numbers the 8 from 8 g on, for four multiplications of which each takes a word.
struct Tile {
    Piece keys[2][KEY_PIECES], values[4][VALUE_PIECES];

    // Of positions from `first` on, with keys `here` and values `there` in memory. Zeros for positions from `end` on
    // and for `missing`, which is being written.
    __device__ __forceinline__ void load(const u16* here, const u16* there, int first, int end, int missing) {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            int index = first + g + 8 * row;
            bool has = index < end && index != missing;
#pragma unroll
            for (int i = 0; i < KEY_PIECES; ++i) keys[row][i] = piece(here, index, 32 * i + 8 * t, has);
        }
#pragma unroll
        for (int row = 0; row < 4; ++row) {
            int index = first + value_row(row);
            bool has = index < end && index != missing;
#pragma unroll
            for (int i = 0; i < VALUE_PIECES; ++i) values[row][i] = piece(there, index, 64 * i + 8 * g, has);
        }
    }

    // Puts key and value of position `index`, in shared memory, in their places.
    __device__ __forceinline__ void insert(const u16* key, const u16* value, int first, int index) {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            if (first + g + 8 * row != index) continue;
#pragma unroll
            for (int i = 0; i < KEY_PIECES; ++i) keys[row][i] = piece(key, 0, 32 * i + 8 * t, true);
        }
#pragma unroll
        for (int row = 0; row < 4; ++row) {
            if (first + value_row(row) != index) continue;
#pragma unroll
            for (int i = 0; i < VALUE_PIECES; ++i) values[row][i] = piece(value, 0, 64 * i + 8 * g, true);
        }
    }

    static __device__ __forceinline__ int value_row(int row) { return lane_index() % 4 * 2 + row % 2 + row / 2 * 8; }

    // 8 numbers of a row, from `number` on; rows end with HEAD_SIZE.
    static __device__ __forceinline__ Piece piece(const u16* rows, int index, int number, bool has) {
        Piece loaded{};
        if (has && number < HEAD_SIZE) loaded.load(rows, static_cast<long long>(index) * HEAD_SIZE + number);
        return loaded;
    }
};

// The queries' fragments: column g is the g-th query head.
struct Queries {
    Piece pieces[KEY_PIECES];

    __device__ __forceinline__ void load(const u16* queries) {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < KEY_PIECES; ++i) {
            int number = 32 * i + 8 * t;
            pieces[i] = Piece{};
            if (g < GROUP && number < HEAD_SIZE) pieces[i].load(queries, g * QUERY_STRIDE + number);
        }
    }
};

// What a warp sums up over its positions, of query heads 2 t and 2 t + 1.
struct Sums {
    float maximum[2] = {LOWEST, LOWEST};  // of scores; the same in all lanes of a head
    float weights[2] = {};                // of this lane's positions
    // [4 p + j][n]: number 64 p + 8 g + 2 j + n / 2 of head 2 t + n % 2
    float values[VALUE_PIECES * PIECE_WORDS][4] = {};

    // scale: of scores, times log2(e); left: positions from the tile's first on that count.
    __device__ __forceinline__ void add(const Tile& tile, const Queries& queries, float scale, int left) {
        float scores[2][4] = {};  // two chains; rows g and g + 8
#pragma unroll
        for (int i = 0; i < KEY_PIECES; ++i) {
            const u32 *first = tile.keys[0][i].word, *second = tile.keys[1][i].word, *query = queries.pieces[i].word;
            multiply(scores[0], first[0], second[0], first[1], second[1], query[0], query[1]);
            multiply(scores[1], first[2], second[2], first[3], second[3], query[2], query[3]);
        }
        float weight[4];
#pragma unroll
        for (int head = 0; head < 2; ++head) {
            float score[2], highest = maximum[head];
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float sum = scores[0][2 * row + head] + scores[1][2 * row + head];
                score[row] = lane_index() / 4 + 8 * row < left ? sum * scale : 2 * LOWEST;
                highest = fmaxf(highest, score[row]);
            }
#pragma unroll
            for (int half = 4; half < LANES; half *= 2) highest = fmaxf(highest, exchange(highest, half));
            float factor = exp2_fast(maximum[head] - highest);
            maximum[head] = highest, weights[head] *= factor;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                weight[2 * row + head] = exp2_fast(score[row] - highest);
                weights[head] += weight[2 * row + head];
            }
#pragma unroll
            for (auto& sum : values) sum[head] *= factor, sum[2 + head] *= factor;
        }
        Raw<FORMAT, 2> first, second;  // positions g and g + 8
        first.set(weight), second.set(weight + 2);
        u32 low = transpose(first.word[0]), high = transpose(second.word[0]);
#pragma unroll
        for (int i = 0; i < VALUE_PIECES; ++i) {
#pragma unroll
            for (int j = 0; j < PIECE_WORDS; ++j) {
                u32 a = tile.values[0][i].word[j], b = tile.values[1][i].word[j];
                u32 c = tile.values[2][i].word[j], d = tile.values[3][i].word[j];
                multiply(
                    values[PIECE_WORDS * i + j], permute(a, b, 0x5410), permute(a, b, 0x7632), permute(c, d, 0x5410),
                    permute(c, d, 0x7632), low, high);
            }
        }
    }

    // To the warp's places: HEAD_SIZE values, a maximum and a sum of weights for each of GROUP heads.
    __device__ __forceinline__ void store(float* warp_values, float* warp_maxima, float* warp_weights) {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            int head = 2 * t + n;
            float total = weights[n];
#pragma unroll
            for (int half = 4; half < LANES; half *= 2) total += exchange(total, half);
            if (head >= GROUP) continue;
            if (g == 0) warp_maxima[head] = maximum[n], warp_weights[head] = total;
#pragma unroll
            for (int i = 0; i < 2 * VALUE_PIECES; ++i) {
                int number = 64 * (i / 2) + 8 * g + 4 * (i % 2);
                if (number >= HEAD_SIZE) continue;
                const float *even = values[2 * i], *odd = values[2 * i + 1];
                float piece[4] = {even[n], even[2 + n], odd[n], odd[2 + n]};
                Raw<FP32, 4> stored;
                stored.set(piece);
                stored.store(warp_values, head * HEAD_SIZE + number);
            }
        }
    }
};
