// One step of attention: a new token of each sequence is turned to its position, joins the cache and looks back at it.
//
// A block takes GROUP query heads that share one key head, for one sequence and one of up to SPLITS runs of its positions,
// of about CHUNK positions while there are few: blocks without a run end at once. It
//
//   1. asks for the first keys and values of its run, which no kernel before it in the graph writes,
//   2. turns its queries by their position (and norms them first, where NORM is set), in float32; the block that owns the
//      new position does so with the new key, stores key and value in the cache and keeps them in shared memory,
//   3. goes through its run: each warp takes TILE positions at a time, TILES such tiles under way at once, and multiplies
//      them with tensor cores, keys by queries and values by weights. Nothing goes through shared memory for it: a product
//      doesn't change when the numbers that are summed over, or the rows of a result, change places, so lanes load 16 bytes
//      of a row at once and take them as the fragments they have to be (Tile),
//   4. joins the warps' sums, in a fixed order.
//
// With several runs the sums go to a workspace, and the block that comes last joins those of all runs, in a fixed order
// again: results repeat bit for bit. Counters are zero before and after.
//
// Macros: HEAD_SIZE (multiple of 8, at most 256), GROUP (at most 8), GROUPS (blocks for one key head), KEY_HEADS, SPLITS,
// CHUNK, WARPS, TILES, BFLOAT (1 for bf16, else fp16), NORM.
#include "activation.cuh"
#include "rows.cuh"

constexpr int THREADS = WARPS * LANES;
constexpr int HALF = HEAD_SIZE / 2;
constexpr int QUERY_HEADS = KEY_HEADS * GROUPS * GROUP;
constexpr int SUMS = GROUP * (HEAD_SIZE + 2);  // of a block: maximum, weights, weighted values of each head
constexpr float LOWEST = -1e30f;               // a maximum of nothing; finite, so that differences are numbers
constexpr int TILE = 16, STRIDE = WARPS * TILE;        // positions that a warp takes at a time, and a block
constexpr int KEY_PIECES = (HEAD_SIZE + 31) / 32;      // of 16 bytes, that a lane has of a key,
constexpr int VALUE_PIECES = (HEAD_SIZE + 63) / 64;    // or of a value
constexpr int QUERY_STRIDE = 32 * KEY_PIECES + 8;      // 8 numbers of filling keep loads free of bank conflicts
constexpr int PIECE_WORDS = 4;                         // two numbers each

static_assert(HEAD_SIZE % 8 == 0 && HEAD_SIZE <= 256 && GROUP <= 8, "8 columns of a multiplication are its query heads");

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int half = 1; half < LANES; half *= 2) value += exchange(value, half);
    return value;
}

__device__ __forceinline__ void multiply(
    float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
    if constexpr (BFLOAT) {
        multiply_add_bfloat(sum, a, b, c, d, low, high);
    } else {
        multiply_add(sum, a, b, c, d, low, high);
    }
}

// One number of each pair that a lane turns: pair i is numbers i and i + HALF of a head, and lane i % 32 has it.
constexpr int PAIRS = (HALF + LANES - 1) / LANES;
typedef float Pairs[PAIRS];

// Turns one head by its position, a warp at work.
__device__ __forceinline__ void turn(
    const u16* head, const u16* weight, float epsilon, const Pairs& cosines, const Pairs& sines, int lane,
    Pairs& low, Pairs& high) {
    float power = 0, scale = 1;
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        int i = n * LANES + lane;
        if (i < HALF) {
            low[n] = value_of(head[i]), high[n] = value_of(head[i + HALF]);
            power += low[n] * low[n] + high[n] * high[n];
        }
    }
    if constexpr (NORM) scale = rsqrtf(warp_sum(power) / HEAD_SIZE + epsilon);
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        int i = n * LANES + lane;
        if (i < HALF) {
            float first = low[n] * scale, second = high[n] * scale;
            if constexpr (NORM) first *= value_of(weight[i]), second *= value_of(weight[i + HALF]);
            low[n] = first * cosines[n] - second * sines[n];
            high[n] = second * cosines[n] + first * sines[n];
        }
    }
}

// Keys and values of TILE positions, as lane 4 g + t has them for PTX's mma.m16n8k16.
//
// Keys are its 16 rows: those of positions g and g + 8, of each 32 numbers the 8 from 8 t on, for two multiplications. Values
// are transposed, their numbers the rows: those of positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, of each 64 numbers the 8
// from 8 g on, for four multiplications of which each takes a word.
struct Tile {
    Words4 keys[2][KEY_PIECES], values[4][VALUE_PIECES];

    // Of positions from `first` on, which lie `here` and `there` in memory. Zeros where a position is not below `end`, or is
    // `missing`.
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
    static __device__ __forceinline__ Words4 piece(const u16* rows, int index, int number, bool has) {
        if (!has || number >= HEAD_SIZE) return Words4{};
        return *reinterpret_cast<const Words4*>(rows + static_cast<long long>(index) * HEAD_SIZE + number);
    }
};

// The queries' fragments: column g is the g-th query head.
struct Queries {
    Words4 pieces[KEY_PIECES];

    __device__ __forceinline__ void load(const u16* queries) {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < KEY_PIECES; ++i) {
            int number = 32 * i + 8 * t;
            bool has = g < GROUP && number < HEAD_SIZE;
            pieces[i] = has ? *reinterpret_cast<const Words4*>(queries + g * QUERY_STRIDE + number) : Words4{};
        }
    }
};

// What a warp sums up over its positions, of query heads 2 t and 2 t + 1.
struct Sums {
    float maximum[2] = {LOWEST, LOWEST}, weights[2] = {};  // of scores, the same in all lanes of a head; of this lane's positions
    // values[4 p + j][n]: of number 64 p + 8 g + 2 j + n / 2, of head 2 t + n % 2
    float values[VALUE_PIECES * PIECE_WORDS][4] = {};

    // scale: of scores, times log2(e); left: positions from the tile's first on that count.
    __device__ __forceinline__ void add(const Tile& tile, const Queries& queries, float scale, int left) {
        float scores[2][4] = {};  // two chains; rows g and g + 8
#pragma unroll
        for (int i = 0; i < KEY_PIECES; ++i) {
            const Words4 &first = tile.keys[0][i], &second = tile.keys[1][i], &query = queries.pieces[i];
            multiply(scores[0], first.x, second.x, first.y, second.y, query.x, query.y);
            multiply(scores[1], first.z, second.z, first.w, second.w, query.z, query.w);
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
        u32 low = transpose(pair_of(weight[0], weight[1])), high = transpose(pair_of(weight[2], weight[3]));
#pragma unroll
        for (int i = 0; i < VALUE_PIECES; ++i) {
            add_word(values[4 * i], tile.values[0][i].x, tile.values[1][i].x, tile.values[2][i].x, tile.values[3][i].x, low, high);
            add_word(values[4 * i + 1], tile.values[0][i].y, tile.values[1][i].y, tile.values[2][i].y, tile.values[3][i].y, low, high);
            add_word(values[4 * i + 2], tile.values[0][i].z, tile.values[1][i].z, tile.values[2][i].z, tile.values[3][i].z, low, high);
            add_word(values[4 * i + 3], tile.values[0][i].w, tile.values[1][i].w, tile.values[2][i].w, tile.values[3][i].w, low, high);
        }
    }

    static __device__ __forceinline__ u32 pair_of(float low, float high) {
        return bits_of(low) | static_cast<u32>(bits_of(high)) << 16;
    }

    // Two numbers of each of four values, times their weights.
    static __device__ __forceinline__ void add_word(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 low, u32 high) {
        multiply(
            sum, permute(a, b, 0x5410), permute(a, b, 0x7632), permute(c, d, 0x5410), permute(c, d, 0x7632), low, high);
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
                float piece[4] = {values[2 * i][n], values[2 * i][2 + n], values[2 * i + 1][n], values[2 * i + 1][2 + n]};
                Raw<FP32, 4> stored;
                stored.set(piece);
                stored.store(warp_values, head * HEAD_SIZE + number);
            }
        }
    }
};

// Args: q, k, v: rows of QUERY_HEADS, KEY_HEADS and KEY_HEADS heads, so many numbers apart; out: contiguous rows like q;
// cosines, sines: (capacity, HALF) float32; q_weight, k_weight: HEAD_SIZE numbers, where NORM is set; positions: of the
// new token in each sequence; keys, values: (batch, KEY_HEADS, capacity, HEAD_SIZE); scale: of the products, times
// log2(e); window: positions that a token sees, itself included, 0 for all; sums: (batch, KEY_HEADS, GROUPS, SPLITS,
// SUMS) float32 and counters: (batch, KEY_HEADS, GROUPS), for SPLITS > 1.
extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const u16* q, int q_stride, const u16* k, int k_stride, const u16* v, int v_stride, u16* out, const float* cosines,
    const float* sines, const u16* q_weight, const u16* k_weight, float epsilon, const int* positions, u16* keys,
    u16* values, int capacity, float scale, int window, float* sums, u32* counters) {
    alignas(16) __shared__ u16 queries[GROUP * QUERY_STRIDE], new_key[HEAD_SIZE], new_value[HEAD_SIZE];
    alignas(16) __shared__ float block_values[WARPS * GROUP * HEAD_SIZE];
    __shared__ float block_maxima[WARPS * GROUP], block_weights[WARPS * GROUP];
    __shared__ u32 is_last;

    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int split = blockIdx.x % SPLITS, place = blockIdx.x / SPLITS;  // place: sequence, key head, group of query heads
    int key_head = place / GROUPS % KEY_HEADS, sequence = place / GROUPS / KEY_HEADS;
    int first_head = place % (KEY_HEADS * GROUPS) * GROUP;

    allow_next_kernel();
    int position = positions[sequence];
    if (position < 0 || position >= capacity) stop_kernel();
    int start = window > 0 && position >= window ? position - window + 1 : 0, count = position + 1 - start;
    int runs = min(SPLITS, (count + CHUNK - 1) / CHUNK), run = (count + runs - 1) / runs;
    if (split >= runs) return;
    int begin = start + split * run, end = min(begin + run, position + 1);
    bool has_new = begin <= position && position < begin + run;

    long long cache = (long long)(sequence * KEY_HEADS + key_head) * capacity * HEAD_SIZE;
    int first = begin + warp * TILE;
    Tile tiles[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) tiles[n].load(keys + cache, values + cache, first + n * STRIDE, end, position);
    Pairs cosine, sine;
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        int i = n * LANES + lane;
        if (i < HALF) cosine[n] = cosines[(long long)position * HALF + i], sine[n] = sines[(long long)position * HALF + i];
    }
    wait_for_previous_kernels();

    for (int head = warp; head < GROUP + 2; head += WARPS) {
        Pairs low, high;
        if (head < GROUP) {
            const u16* row = q + (long long)sequence * q_stride + (first_head + head) * HEAD_SIZE;
            turn(row, q_weight, epsilon, cosine, sine, lane, low, high);
#pragma unroll
            for (int n = 0; n < PAIRS; ++n) {
                int i = n * LANES + lane;
                u16* query = queries + head * QUERY_STRIDE;
                if (i < HALF) query[i] = bits_of(low[n]), query[i + HALF] = bits_of(high[n]);
            }
        } else if (has_new) {
            bool stores = place % GROUPS == 0;
            long long at = cache + (long long)position * HEAD_SIZE;
            if (head == GROUP) {
                const u16* row = k + (long long)sequence * k_stride + key_head * HEAD_SIZE;
                turn(row, k_weight, epsilon, cosine, sine, lane, low, high);
#pragma unroll
                for (int n = 0; n < PAIRS; ++n) {
                    int i = n * LANES + lane;
                    if (i < HALF) {
                        new_key[i] = bits_of(low[n]), new_key[i + HALF] = bits_of(high[n]);
                        if (stores) keys[at + i] = new_key[i], keys[at + i + HALF] = new_key[i + HALF];
                    }
                }
            } else {
                const u16* row = v + (long long)sequence * v_stride + key_head * HEAD_SIZE;
                for (int i = lane; i < HEAD_SIZE; i += LANES) {
                    new_value[i] = row[i];
                    if (stores) values[at + i] = row[i];
                }
            }
        }
    }
    block_sync();

    Queries own;
    own.load(queries);
    Sums warp_sums;
    for (int from = first; from < end; from += TILES * STRIDE) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            int of_tile = from + n * STRIDE;
            if (of_tile >= end) continue;
            if (of_tile <= position && position < of_tile + TILE) tiles[n].insert(new_key, new_value, of_tile, position);
            warp_sums.add(tiles[n], own, scale, end - of_tile);
            tiles[n].load(keys + cache, values + cache, of_tile + TILES * STRIDE, end, position);
        }
    }
    warp_sums.store(block_values + warp * GROUP * HEAD_SIZE, block_maxima + warp * GROUP, block_weights + warp * GROUP);
    block_sync();

    u16* row = out + (long long)(sequence * QUERY_HEADS + first_head) * HEAD_SIZE;
    float* block_sums = sums + (long long)(place * SPLITS + split) * SUMS;
    for (int item = threadIdx.x; item < GROUP * HEAD_SIZE; item += THREADS) {
        int g = item / HEAD_SIZE;
        float top = LOWEST, total = 0, joined = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = block_maxima[w * GROUP + g] > top ? block_maxima[w * GROUP + g] : top;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            float factor = exp2_fast(block_maxima[w * GROUP + g] - top);
            total += block_weights[w * GROUP + g] * factor;
            joined += block_values[(w * GROUP) * HEAD_SIZE + item] * factor;
        }
        if (SPLITS == 1 || runs == 1) {
            row[item] = bits_of(joined / total);
        } else {
            store_global((u32*)block_sums + 2 * GROUP + item, float_to_bits(joined));
            if (item % HEAD_SIZE == 0) {
                store_global((u32*)block_sums + g, float_to_bits(top));
                store_global((u32*)block_sums + GROUP + g, float_to_bits(total));
            }
        }
    }
    if (SPLITS > 1 && runs > 1) {
        block_sync();
        if (threadIdx.x == 0) is_last = count_up(counters + place) == runs - 1;
        block_sync();
        if (!is_last) return;
        if (threadIdx.x == 0) store_global(counters + place, 0);
        const u32* all = (const u32*)sums + (long long)place * SPLITS * SUMS;
        for (int item = threadIdx.x; item < GROUP * HEAD_SIZE; item += THREADS) {
            int g = item / HEAD_SIZE;
            float top = LOWEST, total = 0, joined = 0, tops[SPLITS], parts[SPLITS], part_weights[SPLITS];
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
                tops[s] = LOWEST, part_weights[s] = parts[s] = 0;
                if (s >= runs) continue;
                tops[s] = bits_to_float(load_global(all + s * SUMS + g));
                part_weights[s] = bits_to_float(load_global(all + s * SUMS + GROUP + g));
                parts[s] = bits_to_float(load_global(all + s * SUMS + 2 * GROUP + item));
            }
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) top = tops[s] > top ? tops[s] : top;
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
                float factor = exp2_fast(tops[s] - top);
                total += part_weights[s] * factor;
                joined += parts[s] * factor;
            }
            row[item] = bits_of(joined / total);
        }
    }
}
