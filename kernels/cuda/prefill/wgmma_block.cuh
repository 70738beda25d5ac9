// SPDX-License-Identifier: Apache-2.0
// A block of prefill's grouped GEMM for compute capability 9.0 (wgmma_kernel.cuh): what it is given, what lies in its
// shared memory, and how its parts come to know of the next item.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_BLOCK_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_BLOCK_CUH

#include "kernels/cuda/common/hopper.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/prefill/items.h"

namespace
{

// A matrix of rows of tokens, in boxes of 64 columns and so many rows.
struct row_maps {
    CUtensorMap by_64, by_16, by_4, by_1;
};

struct ffn_args {
    row_maps act;                  // [R][I]
    row_maps down;                 // [R][H]
    CUtensorMap w13_rows, w2_rows; // row-major weights, in the order of the packed layout
    const void *x;                 // [T][H]
    const int32_t *row_token;      // [R]
    const char *w13, *w2;          // packed; NULL: row-major
    uint32_t *taken;               // items so far; zero at the start. Blocks that find none left count on
    int32_t *finished;             // [tiles]: how many bands of GEMM 1 are done of each; zero at the start
    int32_t *all_finished;         // the sum of those
    moe_items items;               // without the table
    int32_t hidden, intermediate;
    bool memory_bound; // most groups have one tile
    int32_t guess;     // tiles of weights to fetch before the routing is known
};

constexpr int WARPGROUP = 128;
constexpr int MULTIPLIERS = 2; // warpgroups
constexpr int FFN_THREADS = (1 + MULTIPLIERS) * WARPGROUP;
constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES, COLS = MOE_PACKED_COLS, TILE_BYTES = MOE_PACKED_TILE_BYTES;
constexpr int WEIGHT_BYTES = MULTIPLIERS * TILE_BYTES; // in a stage
constexpr int M_BLOCKS = 2;                            // of 64 weight rows, to a warpgroup
constexpr int SLOTS = 2;                               // items known in advance
constexpr int NUMBERS = 8;                             // of items, that the second block of a pair may be behind

// The part of a finished tile that is written to a lent stage: two pieces of 64 columns.
struct lent_tile {
    int row, rows;
    int column, columns; // the first of the part's, and how many the matrix has; 0: nothing is written
    int tile;            // whose results are complete with this; -1: none's, of GEMM 1
    bool gemm2;
};

// Of a warp's entries, when the table of items is made: their tiles, how many of them come first, and the tiles of
// those.
struct table_sums {
    int32_t tiles, first, first_tiles;
};

// NMAX tokens to a tile, STAGES in the ring. ORDERED: GEMM 1's tokens lie in `down`, in plan order. PAIRED: by clusters
// of two blocks.
template <int NMAX_, int STAGES_, bool ORDERED_, bool PAIRED_> struct ffn_shape {
    static constexpr int NMAX = NMAX_, STAGES = STAGES_;
    static constexpr bool ORDERED = ORDERED_, PAIRED = PAIRED_;
    static constexpr int BLOCKS = PAIRED ? 2 : 1; // that take an item together

    // Arrivals that fill a stage: of the thread that starts copies and, where threads gather tokens, of all of these.
    static constexpr int FILLERS = ORDERED ? 1 : 1 + WARPGROUP;

    // The finished tile in shared memory: pieces of 64 features of all tokens, one to a warpgroup of GEMM 1, in one
    // stage, two of GEMM 2, of each warpgroup in a stage of its own.
    static constexpr int PIECE = NMAX * ROW_BYTES;
    static constexpr int STAGE = WEIGHT_BYTES + NMAX * ROW_BYTES;
    static_assert(2 * PIECE <= STAGE);

    // Shared memory.
    static constexpr int FULL = STAGES * STAGE, EMPTY = FULL + STAGES * 8, WRITTEN = EMPTY + STAGES * 8;
    static constexpr int SLOT_FULL = WRITTEN + STAGES * 8, SLOT_EMPTY = SLOT_FULL + SLOTS * 8;
    static constexpr int NUMBER_FULL = SLOT_EMPTY + SLOTS * 8, NUMBER = NUMBER_FULL + NUMBERS * 8;
    static constexpr int ITEMS = NUMBER + NUMBERS * 4, TILES = ITEMS + SLOTS * sizeof(moe_item);
    static constexpr int TABLE = TILES + STAGES * sizeof(lent_tile);
    static constexpr int SUMS = TABLE + sizeof(moe_item_table);
    static constexpr int BYTES = SUMS + FFN_THREADS / 32 * sizeof(table_sums);
    static_assert(STAGE % 1024 == 0 && NMAX % 64 == 0);
    static_assert(STAGES == WARPGROUP / 32, "each stage has a warp of its own");
    static_assert(STAGES < NUMBERS, "the second block may be two rings behind, two stages an item");
    static_assert(BYTES <= 227 * 1024, "a block of compute capability 9.0 has no more shared memory");
};

// Stages that are lent at the end of an item of so many blocks. In an item of GEMM 2 every loading warp has a stage,
// and so sees to what it has left of GEMM 1.
__device__ __forceinline__ int lent_stages(bool gemm2, int blocks)
{
    return gemm2 ? max(MULTIPLIERS, WARPGROUP / 32 - blocks) : 1;
}

// Where both kinds of warpgroups read what is next.
template <class Shape> struct item_reader {
    const uint32_t shared;
    moe_ring_place slot;

    // The next one in shared memory; without rows there is nothing left.
    __device__ __forceinline__ const moe_item &item() const
    {
        moe_barrier_wait(shared + Shape::SLOT_FULL + slot.at * 8, slot.parity);
        return static_cast<const moe_item *>(__cvta_shared_to_generic(shared + Shape::ITEMS))[slot.at];
    }

    // Each thread says for itself that it no longer reads the slot.
    __device__ __forceinline__ void done()
    {
        moe_barrier_arrive(shared + Shape::SLOT_EMPTY + slot.at * 8);
        slot.next(SLOTS);
    }
};

} // namespace

#endif
