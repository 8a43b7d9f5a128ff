// Tail-biting Viterbi search over the bitshift trellis, TILES tiles a block: `quantizers/viterbi.py` on a GPU.
//
// With the overlap u of a state s = (j, u), j the high WIDTH bits and u the low STATE_BITS - WIDTH, a step is
//
//     M_t[u] = |x_t|^2 + min_j (|p_s|^2 - 2 x_t.p_s + M_{t+1}[s >> WIDTH]),
//
// so a block keeps M, OVERLAPS floats a tile, in shared memory and replaces it in every step. A thread has RUNS runs of
// RUN neighbouring u and as many mirror images OVERLAPS - 1 - u, and takes the minima over its share of the j (there
// are SPLITS shares) in registers, for all tiles at once: a point is read and converted once for TILES tiles. Where
// MIRRORED, states s and STATES - 1 - s stand for the same point (the hash s * (s + 1) is symmetric at 16 bits), so
// that a distance serves two states: 2 FFMA, 2 FADD and 2 FMNMX for both. M of every step goes to global memory, where
// a warp for each tile then traces the path and forms the few costs it needs again, in the same order of operations.
//
// Macros: STATE_BITS, WIDTH, STEPS, WINDOW (see viterbi.py), TILES, BLOCK_THREADS, RESIDENT, RUN, RUNS, MIRRORED.
#include "ptx.cuh"

constexpr int STATES = 1 << STATE_BITS;
constexpr int FAN = 1 << WIDTH;
constexpr int OVERLAPS = STATES / FAN;
constexpr int LANES = OVERLAPS / 2 / (RUN * RUNS);  // threads that share the u of one j
constexpr int SPLITS = BLOCK_THREADS / LANES;
constexpr int WARPS = BLOCK_THREADS / 32;
constexpr int ROW = TILES < 4 ? TILES : 4;  // tiles whose M[u] lie side by side
constexpr int PLANES = TILES / ROW;
constexpr int M_WORDS = OVERLAPS * TILES;
static_assert(LANES * RUN * RUNS * 2 == OVERLAPS, "lanes must divide the overlaps");
static_assert(LANES * SPLITS == BLOCK_THREADS && SPLITS <= FAN, "threads must divide the fan");
static_assert(RUN == 1 || RUN == 2 || RUN == 4, "a run is one load of points");
static_assert(RUN <= FAN, "a run shares its M");
static_assert(WINDOW <= STEPS, "the window has to fit into the scratch memory");

struct alignas(8) Pair { float x, y; };
struct Costs { float of[TILES]; };

constexpr float INFINITE = 3.4e38f;  // added to, it may become infinity proper; never NaN

// Shared memory, in this order.
struct Shared {
    float* costs;    // M: PLANES x OVERLAPS x ROW
    float* partial;  // SPLITS > 1: the minima of every share
    Pair* inputs;    // STEPS x TILES: -2 x
    u32* lows;       // TILES: the overlap where a path begins
};

__device__ __forceinline__ int place(int u, int tile) { return (tile / ROW * OVERLAPS + u) * ROW + tile % ROW; }

__device__ __forceinline__ Costs load_costs(const float* from, int u) {
    Costs costs;
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        const float* row = from + (plane * OVERLAPS + u) * ROW;
        if constexpr (ROW == 4) {
            Words4 four = *reinterpret_cast<const Words4*>(row);
            u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) costs.of[4 * plane + i] = bits_to_float(words[i]);
        } else if constexpr (ROW == 2) {
            Pair two = *reinterpret_cast<const Pair*>(row);
            costs.of[0] = two.x, costs.of[1] = two.y;
        } else {
            costs.of[0] = *row;
        }
    }
    return costs;
}

// The M of a run, which begins at u; `reverse` where the run is a mirror image.
__device__ __forceinline__ void store_run(float* to, int u, const Costs (&run)[RUN], bool reverse) {
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
        float values[RUN * ROW];
#pragma unroll
        for (int i = 0; i < RUN; ++i)
#pragma unroll
            for (int n = 0; n < ROW; ++n)
                values[i * ROW + n] = reverse ? run[RUN - 1 - i].of[plane * ROW + n] : run[i].of[plane * ROW + n];
        float* row = to + (plane * OVERLAPS + u) * ROW;
        if constexpr (RUN * ROW % 4 == 0) {
#pragma unroll
            for (int n = 0; n < RUN * ROW; n += 4)
                *reinterpret_cast<Words4*>(row + n) = Words4{
                    float_to_bits(values[n]), float_to_bits(values[n + 1]), float_to_bits(values[n + 2]),
                    float_to_bits(values[n + 3])};
        } else {
#pragma unroll
            for (int n = 0; n < RUN * ROW; ++n) row[n] = values[n];
        }
    }
}

// The points of RUN states from s on: fp16 pairs.
__device__ __forceinline__ void load_points(u32 (&run)[RUN], const u32* __restrict__ points, int s) {
    if constexpr (RUN == 4) {
        Words4 four = *reinterpret_cast<const Words4*>(points + s);
        run[0] = four.x, run[1] = four.y, run[2] = four.z, run[3] = four.w;
    } else if constexpr (RUN == 2) {
        Words2 two = *reinterpret_cast<const Words2*>(points + s);
        run[0] = two.x, run[1] = two.y;
    } else {
        run[0] = points[s];
    }
}

struct Point { float x, y, norm; };

__device__ __forceinline__ Point unpack(u32 word) {
    float x = half_to_float(static_cast<u16>(word)), y = half_to_float(static_cast<u16>(word >> 16));
    return {x, y, fmaf(y, y, x * x)};
}

// |x - p|^2 - |x|^2, given -2 x.
__device__ __forceinline__ float distance(Point point, Pair scaled) {
    return fmaf(point.y, scaled.y, fmaf(point.x, scaled.x, point.norm));
}

// One step: M_{t+1} in `shared.costs` becomes M_t, which is also written to `kept` unless that is null.
__device__ __forceinline__ void step(const Shared& shared, const u32* __restrict__ points, int t, float* kept) {
    int thread = threadIdx.x, lane = thread % LANES, split = thread / LANES;
    Pair scaled[TILES];
    Costs low[RUNS][RUN], high[RUNS][RUN];  // minima of u and of their mirror images
#pragma unroll
    for (int n = 0; n < TILES; ++n) scaled[n] = shared.inputs[t * TILES + n];
#pragma unroll
    for (int g = 0; g < RUNS; ++g)
#pragma unroll
        for (int i = 0; i < RUN; ++i)
#pragma unroll
            for (int n = 0; n < TILES; ++n) low[g][i].of[n] = high[g][i].of[n] = INFINITE;
#pragma unroll 1
    for (int j = split * (FAN / SPLITS); j < (split + 1) * (FAN / SPLITS); ++j) {
#pragma unroll
        for (int g = 0; g < RUNS; ++g) {
            int s = j * OVERLAPS + (g * LANES + lane) * RUN;
            u32 run[RUN], mirror[RUN];
            load_points(run, points, s);
            if (!MIRRORED) load_points(mirror, points, STATES - RUN - s);
            Costs next = load_costs(shared.costs, s >> WIDTH);
            Costs next_mirror = load_costs(shared.costs, OVERLAPS - 1 - (s >> WIDTH));
#pragma unroll
            for (int i = 0; i < RUN; ++i) {
                Point point = unpack(run[i]), other = MIRRORED ? point : unpack(mirror[RUN - 1 - i]);
#pragma unroll
                for (int n = 0; n < TILES; ++n) {
                    float d = distance(point, scaled[n]), e = MIRRORED ? d : distance(other, scaled[n]);
                    low[g][i].of[n] = fminf(low[g][i].of[n], d + next.of[n]);
                    high[g][i].of[n] = fminf(high[g][i].of[n], e + next_mirror.of[n]);
                }
            }
        }
    }
    float norms[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        Pair input = shared.inputs[t * TILES + n];
        norms[n] = 0.25f * fmaf(input.y, input.y, input.x * input.x);
    }
    float* target = SPLITS > 1 ? shared.partial + split * M_WORDS : shared.costs;
    if (SPLITS == 1) block_sync();  // all have read M
#pragma unroll
    for (int g = 0; g < RUNS; ++g) {
        int u = (g * LANES + lane) * RUN;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
#pragma unroll
            for (int n = 0; n < TILES; ++n) low[g][i].of[n] += norms[n], high[g][i].of[n] += norms[n];
        store_run(target, u, low[g], false);
        store_run(target, OVERLAPS - RUN - u, high[g], true);
        if (SPLITS == 1 && kept != nullptr) {
            store_run(kept, u, low[g], false);
            store_run(kept, OVERLAPS - RUN - u, high[g], true);
        }
    }
    block_sync();
    if constexpr (SPLITS > 1) {
        for (int word = thread; word < M_WORDS; word += BLOCK_THREADS) {
            float least = shared.partial[word];
#pragma unroll 4
            for (int other = 1; other < SPLITS; ++other)
                least = fminf(least, shared.partial[other * M_WORDS + word]);
            shared.costs[word] = least;
            if (kept != nullptr) kept[word] = least;
        }
        block_sync();
    }
}

// Of all lanes the least value, and the least index among those that have it.
__device__ __forceinline__ void warp_least(float& value, u32& index) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) {
        int lane = lane_index() ^ distance;
        float other = bits_to_float(shuffle(float_to_bits(value), lane));
        u32 other_index = shuffle(index, lane);
        if (other < value || (other == value && other_index < index)) value = other, index = other_index;
    }
}

// Follows the best path of a tile from the overlap `low` through `count` steps from step `first` on, given M_{t+1} of
// each in `kept`; writes the new bits of every step to `codes` unless that is null. One warp; returns the last overlap.
__device__ __forceinline__ u32 trace(
    const Shared& shared, const u32* __restrict__ points, const float* kept, int first, int count, int tile, u32 low,
    int* codes) {
    int lane = lane_index(), mine = 0;
    for (int n = 0; n < count; ++n, kept += M_WORDS) {
        Pair scaled = shared.inputs[(first + n) % STEPS * TILES + tile];
        float least = INFINITE;
        u32 best = FAN - 1;
#pragma unroll 4
        for (int j = lane; j < FAN; j += 32) {
            int s = j * OVERLAPS + static_cast<int>(low);
            float cost = distance(unpack(points[s]), scaled) + kept[place(s >> WIDTH, tile)];
            if (cost < least) least = cost, best = j;
        }
        warp_least(least, best);
        u32 state = best * OVERLAPS + low;
        if (lane == n % 32) mine = static_cast<int>(state & (FAN - 1));
        low = state >> WIDTH;
        if (codes != nullptr && (n % 32 == 31 || n + 1 == count) && lane <= n % 32) codes[n - n % 32 + lane] = mine;
    }
    return low;
}

// Args:
//   pairs: (tiles, STEPS) Pair.
//   points: (STATES,) fp16 pairs.
//   codes: (tiles, STEPS) out.
//   scratch: (gridDim.x, STEPS, M_WORDS).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT) encode(
    const Pair* __restrict__ pairs, const u32* __restrict__ points, int* __restrict__ codes, float* scratch,
    int tiles) {
    DYNAMIC_SHARED(bytes);
    Shared shared;
    shared.costs = reinterpret_cast<float*>(bytes);
    shared.partial = shared.costs + M_WORDS;
    shared.inputs = reinterpret_cast<Pair*>(shared.partial + (SPLITS > 1 ? SPLITS * M_WORDS : 0));
    shared.lows = reinterpret_cast<u32*>(shared.inputs + STEPS * TILES);
    float* kept = scratch + static_cast<u64>(blockIdx.x) * (STEPS * static_cast<u64>(M_WORDS));
    int thread = threadIdx.x, warp = thread / 32;

    for (int group = blockIdx.x; group * TILES < tiles; group += gridDim.x) {
        for (int i = thread; i < STEPS * TILES; i += BLOCK_THREADS) {
            int tile = min(group * TILES + i / STEPS, tiles - 1);  // the last group repeats the last tile
            Pair input = pairs[static_cast<u64>(tile) * STEPS + i % STEPS];
            shared.inputs[i % STEPS * TILES + i / STEPS] = Pair{-2 * input.x, -2 * input.y};
        }
        for (int i = thread; i < M_WORDS; i += BLOCK_THREADS) shared.costs[i] = 0;
        block_sync();
        for (int t = WINDOW - 1; t >= -WINDOW; --t) {
            bool needed = t <= 0 && t > -WINDOW;
            step(shared, points, (t + STEPS) % STEPS, needed ? kept + (t - 1 + WINDOW) * M_WORDS : nullptr);
        }
        for (int tile = warp; tile < TILES; tile += WARPS) {
            float least = INFINITE;
            u32 low = OVERLAPS - 1;
            for (int u = lane_index(); u < OVERLAPS; u += 32) {
                float cost = shared.costs[place(u, tile)];
                if (cost < least) least = cost, low = u;
            }
            warp_least(least, low);
            low = trace(shared, points, kept, STEPS - WINDOW, WINDOW, tile, low, nullptr);
            if (lane_index() == 0) shared.lows[tile] = low;
        }
        block_sync();
        for (int i = thread; i < M_WORDS; i += BLOCK_THREADS) {
            int tile = i / (OVERLAPS * ROW) * ROW + i % ROW, u = i / ROW % OVERLAPS;
            float cost = u == static_cast<int>(shared.lows[tile]) ? 0.0f : INFINITE;
            shared.costs[i] = kept[(STEPS - 1) * M_WORDS + i] = cost;
        }
        block_sync();
        for (int t = STEPS - 1; t > 0; --t) step(shared, points, t, kept + (t - 1) * M_WORDS);
        for (int tile = warp; tile < TILES; tile += WARPS) {
            int number = group * TILES + tile;
            if (number >= tiles) break;
            trace(shared, points, kept, 0, STEPS, tile, shared.lows[tile], codes + static_cast<u64>(number) * STEPS);
        }
        block_sync();
    }
}
