// Runs a CUDA kernel on the CPU: a fiber for each thread of a block, block after block, or cluster after cluster with a CPU
// thread for each of its blocks. Barriers wait for the whole block and exchanges for the whole warp; a kernel whose threads
// don't all come stops with a message.
#pragma once
#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __syncthreads() emulator::barrier()
#define __shfl_xor_sync(lanes, value, lane_mask) emulator::shuffle(value, lane_mask)

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;
alignas(128) inline thread_local unsigned char dynamic_shared[228 << 10];

namespace emulator {

enum State { RUNNING, AT_BARRIER, AT_CLUSTER_BARRIER, AT_EXCHANGE, DONE };
constexpr size_t STACK_BYTES = 256 << 10;

struct Copy {
    unsigned offset;  // in shared memory
    const void* from;
    size_t bytes;
};
using CopyGroups = std::vector<std::vector<Copy>>;  // under way; the last one is still open

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    State state = DONE;
    unsigned sent[2][6];  // of the last two exchanges: a lane that runs ahead doesn't overwrite what others still read
    int exchanges = 0;
    bool arrived = false;  // at the cluster's barrier, and has not waited
    CopyGroups copies;
};

inline thread_local std::vector<Fiber> fibers;
inline thread_local ucontext_t scheduler;
inline thread_local unsigned current;
inline std::function<void()> body;

// Blocks of the cluster that runs. What is shared in a block is local to its CPU thread, as far from `anchor` in all of them.
inline thread_local char anchor;
inline std::vector<char*> anchors;
inline pthread_barrier_t cluster_barrier;

inline void yield(State state) {
    unsigned self = current;
    fibers[self].state = state;
    swapcontext(&fibers[self].context, &scheduler);
}

inline void barrier() { yield(AT_BARRIER); }

[[noreturn]] inline void stop(const char* why) {
    std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, why);
    std::abort();
}

inline void arrive_at_cluster() {
    if (fibers[current].arrived) stop("arrives twice at the cluster's barrier");
    fibers[current].arrived = true;
}

inline void wait_for_cluster() {
    if (!fibers[current].arrived) stop("waits at the cluster's barrier without having arrived");
    fibers[current].arrived = false;
    yield(AT_CLUSTER_BARRIER);
}

// Where block `rank` of the cluster has what is `place` in this one.
template <class Value>
Value* in_cluster(Value* place, unsigned rank) {
    return (Value*)(anchors[rank] + ((char*)place - &anchor));
}

inline CopyGroups& copies() { return fibers[current].copies; }

// All groups but the last `count` closed ones.
inline void receive_copies(size_t count) {
    CopyGroups& groups = copies();
    while (groups.size() - 1 > count) {
        for (const Copy& copy : groups.front()) std::memcpy(dynamic_shared + copy.offset, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

// Leaves words for the warp; afterwards `received(lane)` gives those of each lane.
inline int exchange(std::initializer_list<unsigned> words) {
    Fiber& self = fibers[current];
    int slot = self.exchanges++ % 2;
    std::copy(words.begin(), words.end(), self.sent[slot]);
    yield(AT_EXCHANGE);
    return slot;
}

inline const unsigned* received(int slot, unsigned lane) { return fibers[current / 32 * 32 + lane].sent[slot]; }

inline float shuffle(float value, int lane_mask) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    int slot = exchange({bits});
    std::memcpy(&value, received(slot, current % 32 ^ (unsigned)lane_mask), 4);
    return value;
}

inline void start() {
    body();
    if (fibers[current].arrived) stop("ends between the halves of the cluster's barrier");
    yield(DONE);
}

inline bool all_in(State state, unsigned first, unsigned last) {
    for (unsigned t = first; t < last; ++t)
        if (fibers[t].state != state) return false;
    return true;
}

inline void release(unsigned first, unsigned last) {
    for (unsigned t = first; t < last; ++t) fibers[t].state = RUNNING;
}

// Each lane up to its next barrier or exchange, and the exchange when all have come; false where none can go on. A warp
// runs ahead of the others as far as it may, so that what it reads too early is not there yet.
inline bool run_warp(unsigned warp) {
    bool moved = false;
    for (unsigned t = warp; t < warp + 32; ++t) {
        if (fibers[t].state != RUNNING) continue;
        current = t, threadIdx.x = t, moved = true;
        swapcontext(&scheduler, &fibers[t].context);
    }
    if (all_in(AT_EXCHANGE, warp, warp + 32)) release(warp, warp + 32), moved = true;
    return moved;
}

inline void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
        fiber.state = RUNNING, fiber.exchanges = 0, fiber.arrived = false, fiber.copies.assign(1, {});
    }
    while (!all_in(DONE, 0, threads)) {
        bool moved = false;
        for (unsigned warp = 0; warp < threads; warp += 32) {
            while (run_warp(warp)) moved = true;
        }
        if (all_in(AT_BARRIER, 0, threads)) release(0, threads), moved = true;
        if (all_in(AT_CLUSTER_BARRIER, 0, threads)) {
            pthread_barrier_wait(&cluster_barrier);
            release(0, threads), moved = true;
        }
        if (!moved) stop("the last to move, and not all threads reach the same barrier or exchange");
    }
}

inline void run_block_of(unsigned grid, unsigned threads, unsigned block) {
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    gridDim.x = grid, gridDim.y = 1, blockDim.x = threads, blockIdx.x = block;
    std::memset(dynamic_shared, 0xFF, sizeof dynamic_shared);  // NaN: nothing there is left of the block before
    run_block(threads);
}

inline void run_cluster(unsigned grid, unsigned threads, unsigned first, unsigned cluster) {
    anchors.assign(cluster, nullptr);
    pthread_barrier_init(&cluster_barrier, nullptr, cluster);
    std::vector<std::thread> blocks;
    for (unsigned rank = 0; rank < cluster; ++rank) {
        blocks.emplace_back([=] {
            anchors[rank] = &anchor;
            run_block_of(grid, threads, first + rank);
        });
    }
    for (std::thread& block : blocks) block.join();
    pthread_barrier_destroy(&cluster_barrier);
}

template <class... Args, size_t... N>
void run(void (*kernel)(Args...), unsigned grid, unsigned threads, unsigned cluster, void** args, std::index_sequence<N...>) {
    body = [&] { kernel(*(Args*)args[N]...); };
    for (unsigned block = 0; block < grid; block += cluster) {
        if (cluster > 1) {
            run_cluster(grid, threads, block, cluster);
        } else {
            run_block_of(grid, threads, block);
        }
    }
}

template <class... Args>
void run(void (*kernel)(Args...), unsigned grid, unsigned threads, unsigned cluster, void** args) {
    run(kernel, grid, threads, cluster, args, std::index_sequence_for<Args...>());
}

}  // namespace emulator
