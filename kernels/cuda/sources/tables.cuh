// Tables, made of the codebook in global memory (TableFilling), lie at the start of shared memory with REPLICAS copies
// of every 4-byte entry side by side. With 32 of them each lane reads its own bank, so a lookup is one wavefront
// whatever the codes; with fewer, lanes that share a copy may collide.
#pragma once

#include "units.cuh"

// A table on its way to shared memory, by the first THREADS threads of a block: `ask` loads what it is made of, `store`
// writes every entry's copies. Decoder::entry gives the two words that repeat through an entry's ENTRY_BYTES; entries
// are STRIDE bytes apart.
template <typename Decoder, int THREADS>
struct TableFilling {
    static constexpr int STORE_BYTES = Decoder::ENTRY_BYTES < 16 ? 4 : 16;
    static constexpr int STORES = Decoder::ENTRY_BYTES / STORE_BYTES;  // of an entry
    static constexpr int ENTRIES = Decoder::ENTRIES > 0 ? Decoder::ENTRIES : 1;
    static constexpr int SPARE_THREADS = ENTRIES < THREADS ? 1 << LOG2<THREADS / ENTRIES> : 1;
    static constexpr int HELPERS = SPARE_THREADS < STORES ? SPARE_THREADS : STORES;  // threads of an entry
    static constexpr int AT_ONCE = THREADS / HELPERS;  // entries
    static constexpr int TURNS = (ENTRIES + AT_ONCE - 1) / AT_ONCE;

    Words2 values[TURNS];

    __device__ __forceinline__ void ask(const u16* codebook) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            int code = threadIdx.x % AT_ONCE + turn * AT_ONCE;
            if (code < Decoder::ENTRIES) values[turn] = Decoder::entry(codebook, code);
        }
    }

    __device__ __forceinline__ void store() const {
        constexpr int SHARE = STORES / HELPERS;
        int first = threadIdx.x / AT_ONCE * SHARE;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            int code = threadIdx.x % AT_ONCE + turn * AT_ONCE;
            if (code >= Decoder::ENTRIES || first >= STORES) continue;
            u32 one = values[turn].x, two = values[turn].y;
#pragma unroll
            for (int i = 0; i < SHARE; ++i) {
                // Neighbouring threads begin at different copies, in different banks.
                u32 to = code * Decoder::STRIDE + (first + (i + threadIdx.x) % SHARE) * STORE_BYTES;
                if constexpr (STORE_BYTES == 16) {
                    store_shared(to, Words4{one, two, one, two});
                } else {
                    store_shared(to, one);
                }
            }
        }
    }
};

// The table of a block of THREADS threads, for kernels that have nothing to do meanwhile.
template <typename Decoder, int THREADS>
__device__ __forceinline__ void make_table(const u16* codebook) {
    if constexpr (Decoder::ENTRIES > 0) {
        TableFilling<Decoder, THREADS> filling;
        filling.ask(codebook);
        filling.store();
    }
    block_sync();
}
