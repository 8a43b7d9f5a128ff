// One step of attention: a new token of each sequence is turned to its position, joins the cache and looks back at it.
//
// A block takes GROUP query heads that share one key head, for one sequence and one of SPLITS runs of its positions. It
//
//   1. asks for the first keys and values of its run, which no kernel before it in the graph writes,
//   2. turns its queries by their position (and norms them first, where NORM is set), in float32; the block that owns the
//      new position does so with the new key, stores key and value in the cache and keeps them in shared memory,
//   3. goes through its run: SPAN lanes hold the HEAD_SIZE numbers of one key, 8 each, so a warp takes KEYS keys at once;
//      each such group of lanes keeps a maximum, a sum of weights and a weighted sum of values of its own,
//   4. joins these within the block, in a fixed order.
//
// With SPLITS > 1 the sums go to a workspace, and the block that comes last joins those of all runs, in a fixed order
// again: results repeat bit for bit. Counters are zero before and after.
//
// Macros: HEAD_SIZE (multiple of 8, at most 256), GROUP, GROUPS (blocks for one key head), KEY_HEADS, SPLITS, WARPS,
// UNROLL (steps whose loads are under way at once), BFLOAT (1 for bf16, else fp16), NORM.
#include "activation.cuh"
#include "rows.cuh"

constexpr int PIECES = HEAD_SIZE / 8;  // of 16 bytes, one a lane
constexpr int SPAN = PIECES <= 1 ? 1 : PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32;
constexpr int KEYS = LANES / SPAN;     // keys of a warp at a time
constexpr int THREADS = WARPS * LANES;
constexpr int HALF = HEAD_SIZE / 2;
constexpr int QUERY_HEADS = KEY_HEADS * GROUPS * GROUP;
constexpr int SUMS = GROUP * (HEAD_SIZE + 2);  // of a block: maximum, weights, weighted values of each head
constexpr float LOWEST = -1e30f;               // a maximum of nothing; finite, so that differences are numbers

static_assert(HEAD_SIZE % 8 == 0 && HEAD_SIZE <= 256, "a key is held by a warp, 8 numbers a lane");

typedef Raw<BFLOAT ? BF16 : FP16, 8> Piece;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int half = 1; half < LANES; half *= 2) value += exchange(value, half);
    return value;
}

// One number of each pair that a lane turns: pair i is numbers i and i + HALF of a head, and lane i % 32 has it.
constexpr int PAIRS = (HALF + LANES - 1) / LANES;
typedef float Pairs[PAIRS];

// Turns one head by its position, a warp at work.
__device__ __forceinline__ void turn(
    const u16* head, const u16* weight, float epsilon, const Pairs& cosines, const Pairs& sines, int lane, float scale,
    Pairs& low, Pairs& high) {
    float power = 0;
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        int i = n * LANES + lane;
        if (i < HALF) {
            low[n] = value_of(head[i]), high[n] = value_of(head[i + HALF]);
            power += low[n] * low[n] + high[n] * high[n];
        }
    }
    if constexpr (NORM) scale *= rsqrtf(warp_sum(power) / HEAD_SIZE + epsilon);
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

// Joins sums of the same head made over two runs of keys: the factor of each side.
__device__ __forceinline__ float join(float& maximum, float other, float& other_factor) {
    float joined = other > maximum ? other : maximum, factor = exp2_fast(maximum - joined);
    other_factor = exp2_fast(other - joined);
    maximum = joined;
    return factor;
}

// Args: q, k, v: rows of QUERY_HEADS, KEY_HEADS and KEY_HEADS heads, so many numbers apart; out: contiguous rows like q;
// cosines, sines: (capacity, HALF) float32; q_weight, k_weight: HEAD_SIZE numbers, where NORM is set; positions: of the
// new token in each sequence; keys, values: (batch, KEY_HEADS, capacity, HEAD_SIZE); scale: of the products, times
// log2(e); window: positions that a token sees, itself included, 0 for all; sums: (batch, KEY_HEADS, GROUPS, SPLITS,
// SUMS) float32 and counters: (batch, KEY_HEADS, GROUPS), for SPLITS > 1.
extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const u16* q, int q_stride, const u16* k, int k_stride, const u16* v, int v_stride, u16* out, const float* cosines,
    const float* sines, const u16* q_weight, const u16* k_weight, float epsilon, const int* positions, u16* keys,
    u16* values, int capacity, float scale, int window, float* sums, u32* counters) {
    alignas(16) __shared__ float queries[GROUP * HEAD_SIZE];
    alignas(16) __shared__ u16 new_key[HEAD_SIZE], new_value[HEAD_SIZE];
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
    int start = window > 0 && position >= window ? position - window + 1 : 0;
    int run = (position + 1 - start + SPLITS - 1) / SPLITS;
    int begin = start + split * run, end = begin + run <= position + 1 ? begin + run : position + 1;
    bool has_new = begin <= position && position < begin + run;

    long long cache = (long long)(sequence * KEY_HEADS + key_head) * capacity * HEAD_SIZE;
    int own = lane % SPAN, first_key = begin + warp * KEYS + lane / SPAN;
    constexpr int STRIDE = WARPS * KEYS;
    Piece key[UNROLL], value[UNROLL];
    auto load = [&](int from) {
#pragma unroll
        for (int n = 0; n < UNROLL; ++n) {
            int index = from + n * STRIDE;
            if (index < end && index != position && own < PIECES) {
                long long at = cache + (long long)index * HEAD_SIZE + own * 8;
                key[n].load(keys, at);
                value[n].load(values, at);
            }
        }
    };
    load(first_key);
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
            turn(row, q_weight, epsilon, cosine, sine, lane, scale, low, high);
#pragma unroll
            for (int n = 0; n < PAIRS; ++n) {
                int i = n * LANES + lane;
                if (i < HALF) queries[head * HEAD_SIZE + i] = low[n], queries[head * HEAD_SIZE + i + HALF] = high[n];
            }
        } else if (has_new) {
            bool stores = place % GROUPS == 0;
            long long at = cache + (long long)position * HEAD_SIZE;
            if (head == GROUP) {
                const u16* row = k + (long long)sequence * k_stride + key_head * HEAD_SIZE;
                turn(row, k_weight, epsilon, cosine, sine, lane, 1.0f, low, high);
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

    float query[GROUP][8], sum[GROUP][8] = {}, weights[GROUP] = {}, maximum[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        maximum[g] = LOWEST;
#pragma unroll
        for (int j = 0; j < 8; ++j) query[g][j] = own < PIECES ? queries[g * HEAD_SIZE + own * 8 + j] : 0.0f;
    }
    for (int from = first_key, turn_number = 0; from - lane / SPAN < end; from += UNROLL * STRIDE, ++turn_number) {
        if (turn_number > 0) load(from);
        float score[UNROLL][GROUP];
#pragma unroll
        for (int n = 0; n < UNROLL; ++n) {
            int index = from + n * STRIDE;
            if (index == position && own < PIECES) key[n].load(new_key, own * 8), value[n].load(new_value, own * 8);
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                score[n][g] = 0;
                if (index < end && own < PIECES) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) score[n][g] += query[g][j] * key[n].value(j);
                }
#pragma unroll
                for (int half = 1; half < SPAN; half *= 2) score[n][g] += exchange(score[n][g], half);
                if (index >= end) score[n][g] = 2 * LOWEST;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float highest = maximum[g];
#pragma unroll
            for (int n = 0; n < UNROLL; ++n) highest = score[n][g] > highest ? score[n][g] : highest;
            float factor = exp2_fast(maximum[g] - highest);
            maximum[g] = highest, weights[g] *= factor;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[g][j] *= factor;
#pragma unroll
            for (int n = 0; n < UNROLL; ++n) {
                float weight = exp2_fast(score[n][g] - highest);
                weights[g] += weight;
                if (from + n * STRIDE < end && own < PIECES) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) sum[g][j] += weight * value[n].value(j);
                }
            }
        }
    }

    // The groups of lanes of a warp, then the warps.
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int half = SPAN; half < LANES; half *= 2) {
            float other_factor, factor = join(maximum[g], exchange(maximum[g], half), other_factor);
            weights[g] = weights[g] * factor + exchange(weights[g], half) * other_factor;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[g][j] = sum[g][j] * factor + exchange(sum[g][j], half) * other_factor;
        }
        if (lane < PIECES) {
#pragma unroll
            for (int j = 0; j < 8; ++j) block_values[(warp * GROUP + g) * HEAD_SIZE + lane * 8 + j] = sum[g][j];
        }
        if (lane == 0) block_maxima[warp * GROUP + g] = maximum[g], block_weights[warp * GROUP + g] = weights[g];
    }
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
        if constexpr (SPLITS == 1) {
            row[item] = bits_of(joined / total);
        } else {
            store_global((u32*)block_sums + 2 * GROUP + item, float_to_bits(joined));
            if (item % HEAD_SIZE == 0) {
                store_global((u32*)block_sums + g, float_to_bits(top));
                store_global((u32*)block_sums + GROUP + g, float_to_bits(total));
            }
        }
    }
    if constexpr (SPLITS > 1) {
        block_sync();
        if (threadIdx.x == 0) is_last = count_up(counters + place) == SPLITS - 1;
        block_sync();
        if (!is_last) return;
        if (threadIdx.x == 0) store_global(counters + place, 0);
        const u32* all = (const u32*)sums + (long long)place * SPLITS * SUMS;
        for (int item = threadIdx.x; item < GROUP * HEAD_SIZE; item += THREADS) {
            int g = item / HEAD_SIZE;
            float top = LOWEST, total = 0, joined = 0, tops[SPLITS], parts[SPLITS], part_weights[SPLITS];
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
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
