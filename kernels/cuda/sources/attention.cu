// One step of attention: a new token of each sequence is turned to its position, joins the cache and looks back at it.
//
// A cluster of CLUSTER blocks takes GROUP query heads that share one key head, for one sequence and one of up to SPLITS
// runs of its positions, of about CHUNK while there are few: clusters without a run end at once. A block takes a part
// of that run. It
//
//   1. asks for the first keys and values of its part, which no kernel before it in the graph writes,
//   2. turns its queries by their position (and norms them first, where NORM is set), in float32; the block that owns
//      the new position does so with the new key, stores key and value in the cache and keeps them in shared memory,
//   3. goes through its part: each warp multiplies TILE positions at a time with tensor cores, keys by queries and
//      values by weights, TILES such tiles under way at once (attention_tile.cuh),
//   4. joins the warps' sums, then, through shared memory, those of the cluster's blocks, each for some of the results.
//
// With several runs the sums go to a workspace, and the block that comes last joins those of all runs. All of it is in
// a fixed order: results repeat bit for bit. Counters are zero before and after.
//
// Macros: HEAD_SIZE (multiple of 8, at most 256), GROUP (at most 8), GROUPS (of query heads for one key head),
// KEY_HEADS, SPLITS, CHUNK, CLUSTER (1, 2, 4 or 8; 1 below sm_90), WARPS, TILES, BFLOAT (1 for bf16, else fp16), NORM.
#include "attention_tile.cuh"

constexpr int THREADS = WARPS * LANES;
constexpr int HALF = HEAD_SIZE / 2;
constexpr int QUERY_HEADS = KEY_HEADS * GROUPS * GROUP;
constexpr int ITEMS = GROUP * HEAD_SIZE;       // results of a cluster
constexpr int SUMS = 2 * GROUP + ITEMS;        // of a run: maxima and weights of the heads, weighted values
constexpr int OWN = ITEMS / CLUSTER;           // results that a block of the cluster joins
constexpr int STRIDE = WARPS * TILE;           // positions that a block takes at a time

static_assert(8 % CLUSTER == 0, "blocks of a cluster join as many results each");

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

// Sums over several runs of positions made one, in the runs' order.
struct Joined {
    float maximum, weights, value;
};

template <int COUNT>
__device__ __forceinline__ Joined join(
    const float* maxima, const float* weights, int stride, const float* values, int value_stride) {
    Joined joined{LOWEST, 0, 0};
#pragma unroll
    for (int n = 0; n < COUNT; ++n) joined.maximum = fmaxf(joined.maximum, maxima[n * stride]);
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        float factor = exp2_fast(maxima[n * stride] - joined.maximum);
        joined.weights += weights[n * stride] * factor;
        joined.value += values[n * value_stride] * factor;
    }
    return joined;
}

// Args: q, k, v: rows of QUERY_HEADS, KEY_HEADS and KEY_HEADS heads, so many numbers apart; out: contiguous rows like
// q; cosines, sines: (capacity, HALF) float32; q_weight, k_weight: HEAD_SIZE numbers, where NORM is set; positions: of
// the new token in each sequence; keys, values: (batch, KEY_HEADS, capacity, HEAD_SIZE); scale: of the products, times
// log2(e); window: positions that a token sees, itself included, 0 for all; sums: (batch, KEY_HEADS, GROUPS, SPLITS,
// SUMS) float32 and counters: (batch, KEY_HEADS, GROUPS), for SPLITS > 1.
extern "C" __global__ void __launch_bounds__(THREADS) attend(
    const u16* q, int q_stride, const u16* k, int k_stride, const u16* v, int v_stride, u16* out, const float* cosines,
    const float* sines, const u16* q_weight, const u16* k_weight, float epsilon, const int* positions, u16* keys,
    u16* values, int capacity, float scale, int window, float* sums, u32* counters) {
    alignas(16) __shared__ u16 queries[GROUP * QUERY_STRIDE], new_key[HEAD_SIZE], new_value[HEAD_SIZE];
    alignas(16) __shared__ float block_values[WARPS * ITEMS];
    __shared__ float block_maxima[WARPS * GROUP], block_weights[WARPS * GROUP];
    __shared__ float cluster_values[ITEMS], cluster_maxima[CLUSTER * GROUP], cluster_weights[CLUSTER * GROUP];
    __shared__ u32 is_last;

    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int rank = blockIdx.x % CLUSTER, split = blockIdx.x / CLUSTER % SPLITS;
    int place = blockIdx.x / (CLUSTER * SPLITS);  // sequence, key head, group of query heads
    int key_head = place / GROUPS % KEY_HEADS, sequence = place / GROUPS / KEY_HEADS;
    int first_head = place % (KEY_HEADS * GROUPS) * GROUP;

    allow_next_kernel();
    int position = positions[sequence];
    if (position < 0 || position >= capacity) stop_kernel();
    int start = window > 0 && position >= window ? position - window + 1 : 0, count = position + 1 - start;
    int runs = min(SPLITS, (count + CHUNK - 1) / CHUNK), parts = runs * CLUSTER, part = (count + parts - 1) / parts;
    if (split >= runs) return;
    if constexpr (CLUSTER > 1) cluster_arrive();
    int begin = start + (split * CLUSTER + rank) * part, end = min(begin + part, position + 1);
    bool has_new = begin <= position && position < begin + part;

    long long cache = (long long)(sequence * KEY_HEADS + key_head) * capacity * HEAD_SIZE;
    int first = begin + warp * TILE;
    Tile tiles[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) tiles[n].load(keys + cache, values + cache, first + n * STRIDE, end, position);
    Pairs cosine, sine;
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        int i = n * LANES + lane;
        long long at = (long long)position * HALF + i;
        if (i < HALF) cosine[n] = cosines[at], sine[n] = sines[at];
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
            bool has_position = of_tile <= position && position < of_tile + TILE;
            if (has_position) tiles[n].insert(new_key, new_value, of_tile, position);
            warp_sums.add(tiles[n], own, scale, end - of_tile);
            tiles[n].load(keys + cache, values + cache, of_tile + TILES * STRIDE, end, position);
        }
    }
    warp_sums.store(block_values + warp * ITEMS, block_maxima + warp * GROUP, block_weights + warp * GROUP);
    block_sync();

    u16* row = out + (long long)(sequence * QUERY_HEADS + first_head) * HEAD_SIZE;
    u32* runs_sums = (u32*)sums + (long long)place * SPLITS * SUMS;
    auto finish = [&](int item, const Joined& joined) {
        if (SPLITS == 1 || runs == 1) {
            row[item] = bits_of(joined.value / joined.weights);
            return;
        }
        u32* run_sums = runs_sums + split * SUMS;
        int head = item / HEAD_SIZE;
        store_global(run_sums + 2 * GROUP + item, float_to_bits(joined.value));
        if (item % HEAD_SIZE == 0) {
            store_global(run_sums + head, float_to_bits(joined.maximum));
            store_global(run_sums + GROUP + head, float_to_bits(joined.weights));
        }
    };
    if constexpr (CLUSTER > 1) cluster_wait();  // all blocks have started
    for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
        int head = item / HEAD_SIZE;
        Joined joined = join<WARPS>(block_maxima + head, block_weights + head, GROUP, block_values + item, ITEMS);
        if constexpr (CLUSTER == 1) {
            finish(item, joined);
        } else {
            int number = item % HEAD_SIZE;
            store_in_cluster(cluster_values + rank * OWN + item % OWN, item / OWN, joined.value);
            if (number < CLUSTER) {
                store_in_cluster(cluster_maxima + rank * GROUP + head, number, joined.maximum);
                store_in_cluster(cluster_weights + rank * GROUP + head, number, joined.weights);
            }
        }
    }
    if constexpr (CLUSTER > 1) {
        cluster_arrive();
        cluster_wait();
        for (int own_item = threadIdx.x; own_item < OWN; own_item += THREADS) {
            int item = rank * OWN + own_item, head = item / HEAD_SIZE;
            const float* values_of_item = cluster_values + own_item;
            finish(item, join<CLUSTER>(cluster_maxima + head, cluster_weights + head, GROUP, values_of_item, OWN));
        }
    }
    if (SPLITS > 1 && runs > 1) {
        block_sync();
        if (threadIdx.x == 0) is_last = count_up(counters + place) == runs * CLUSTER - 1;
        block_sync();
        if (!is_last) return;
        if (threadIdx.x == 0) store_global(counters + place, 0);
        for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
            int head = item / HEAD_SIZE;
            float maxima[SPLITS], weights[SPLITS], weighted[SPLITS];
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
                maxima[s] = LOWEST, weights[s] = weighted[s] = 0;
                if (s >= runs) continue;
                const u32* run_sums = runs_sums + s * SUMS;
                maxima[s] = bits_to_float(load_global(run_sums + head));
                weights[s] = bits_to_float(load_global(run_sums + GROUP + head));
                weighted[s] = bits_to_float(load_global(run_sums + 2 * GROUP + item));
            }
            Joined joined = join<SPLITS>(maxima, weights, 1, weighted, 1);
            row[item] = bits_of(joined.value / joined.weights);
        }
    }
}
