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
    int32_t *finished;             // [tiles]: how many bands of GEMM 1 are done of each, or halves of a joint one's;
                                   // zero at the start
    int32_t *all_finished;         // the sum of those
    moe_items items;               // without the table
    int32_t *summed;               // [items cut][blocks][slices but the last][MULTIPLYING_WARPS]: 1: this warp has
                                   // left its sums, or has none; zero at the start
    char *sums;                    // [items cut][blocks][slices but the last] of Shape::SUM_BYTES: what these leave
    int32_t hidden, intermediate;
    int32_t guess; // tiles of weights to fetch before the routing is known
};

constexpr int WARPGROUP = 128;
constexpr int MULTIPLIERS = 2; // warpgroups
constexpr int FFN_THREADS = (1 + MULTIPLIERS) * WARPGROUP;
constexpr int MULTIPLYING_WARPS = MULTIPLIERS * WARPGROUP / 32;
constexpr int MOST_SLICES = 4; // of an item
static_assert((MOST_SLICES - 1) * MULTIPLYING_WARPS <= 32, "a warp waits for their flags, each lane for one");
constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES, COLS = MOE_PACKED_COLS, TILE_BYTES = MOE_PACKED_TILE_BYTES;
constexpr int WEIGHT_BYTES = MULTIPLIERS * TILE_BYTES; // in a stage
constexpr int M_BLOCKS = 2;                            // of 64 weight rows, to a warpgroup
constexpr int SLOTS = 2;                               // items known in advance
constexpr int NUMBERS = 8;                             // of items, that the second block of a pair may be behind

// The part of a finished tile that is written to a lent stage: two pieces of 64 columns, or of a joint one a single
// one.
struct lent_tile {
    int row, rows;
    int column, columns; // the first of the part's, and where the matrix or the part ends; 0: nothing is written
    int tile;            // whose results are complete with this; -1: none's, of GEMM 1
    bool gemm2;
};

// Of a warp's entries, when the table of items is made: their tiles, how many of them come first, and the tiles of
// those.
struct table_sums {
    int32_t tiles, first, first_tiles;
};

// Sums of 64 weight rows and a step of tokens.
constexpr int SUM_UNIT_BYTES = MOE_PACKED_ROWS / M_BLOCKS * MOE_ROW_STEP * 4;

// NMAX tokens to a tile, STAGES in the ring. ORDERED: GEMM 1's tokens lie in `down`, in plan order. PAIRED: by clusters
// of two blocks. CUTS: the last items may be cut. Only where tokens are in order: one thread fills a stage of sums, and
// where all gather uniform routing would pay 0.3 to 1.5 % for it.
template <int NMAX_, int STAGES_, bool ORDERED_, bool PAIRED_> struct ffn_shape {
    static constexpr int NMAX = NMAX_, STAGES = STAGES_;
    static constexpr bool ORDERED = ORDERED_, PAIRED = PAIRED_, CUTS = ORDERED;
    static constexpr int BLOCKS = PAIRED ? 2 : 1; // that take an item together

    // Arrivals that fill a stage: of the thread that starts copies and, where threads gather tokens, of all of these.
    static constexpr int FILLERS = ORDERED ? 1 : 1 + WARPGROUP;
    static_assert(!CUTS || FILLERS == 1);

    // The finished tile in shared memory: pieces of 64 features of all tokens, one to a warpgroup of GEMM 1, in one
    // stage, two of GEMM 2, of each warpgroup in a stage of its own.
    static constexpr int PIECE = NMAX * ROW_BYTES;
    static constexpr int STAGE = WEIGHT_BYTES + NMAX * ROW_BYTES;
    static_assert(2 * PIECE <= STAGE);

    // Of a tile that both blocks of a pair take as one, a stage has half as many weights, and a lent one a single
    // piece.
    static constexpr int JOINT = PAIRED ? 256 : 0; // as many as a product can have
    static_assert(TILE_BYTES + JOINT * ROW_BYTES <= STAGE && JOINT <= M_BLOCKS * NMAX && JOINT % 64 == 0);

    // What a slice of an item leaves comes through the ring, in so many stages, the sums of each warpgroup side by
    // side. A stage has some steps' sums: of a step M times SUM_UNIT_BYTES to a warpgroup.
    static constexpr int SUM_STAGES = 4;
    template <int M> static constexpr int STEPS = (M == M_BLOCKS ? NMAX : JOINT) / MOE_ROW_STEP;
    template <int M> static constexpr int SUM_STEPS = (STEPS<M> + SUM_STAGES - 1) / SUM_STAGES;
    static constexpr int HALF_SUM_BYTES = M_BLOCKS * SUM_STEPS<M_BLOCKS> * SUM_UNIT_BYTES;
    static constexpr int SUM_BYTES = SUM_STAGES * MULTIPLIERS * HALF_SUM_BYTES;
    static_assert(MULTIPLIERS * HALF_SUM_BYTES <= STAGE && SUM_STEPS<1> * SUM_UNIT_BYTES <= HALF_SUM_BYTES);

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

// The stages of an item: of operands, from block `first` of K on; of sums that other slices have left; and lent.
template <class Shape> struct item_stages {
    int first, blocks, sums, lent;

    // K has `all` blocks. In an item of GEMM 2 every loading warp has a stage, and so sees to what it has left of
    // GEMM 1. A slice that leaves its sums is long enough for that without those that are lent.
    __device__ __forceinline__ item_stages(const moe_item &item, int all)
        : first(0), blocks(all), sums(0), lent(item.gemm2 ? max(MULTIPLIERS, WARPGROUP / 32 - all) : 1)
    {
        if (!Shape::CUTS || item.cut < 0)
            return;
        const int each = (all + item.slices - 1) / item.slices;
        first = item.slice * each;
        blocks = min(each, all - first);
        if (item.slice < item.slices - 1)
            lent = 0;
        else
            sums = item.slice * Shape::SUM_STAGES;
    }

    __device__ __forceinline__ bool leaves_sums() const
    {
        return Shape::CUTS && lent == 0;
    }
};

template <class Shape> __device__ __forceinline__ int block_rank()
{
    return Shape::PAIRED ? (int)moe_cluster_rank() : 0;
}

// Whether multiplying warpgroup `half` of this block has a row of weights in an item.
template <class Shape> __device__ __forceinline__ bool has_weights(const ffn_args &args, const moe_item &item, int half)
{
    const int rows = item.gemm2 ? args.hidden : 2 * args.intermediate;
    const int first = Shape::PAIRED && item.joint
                          ? block_rank<Shape>() * MOE_PACKED_ROWS + half * (MOE_PACKED_ROWS / M_BLOCKS)
                          : half * MOE_PACKED_ROWS; // of the band's
    return !item.idle && item.band * MOE_BAND_ROWS + first < rows;
}

// Of an item that is cut: the place of what a slice leaves in this block.
template <class Shape> __device__ __forceinline__ int64_t slice_place(const moe_item &item, int slice)
{
    return ((int64_t)item.cut * Shape::BLOCKS + block_rank<Shape>()) * (item.slices - 1) + slice;
}

template <class Shape> __device__ __forceinline__ char *sums_of(const ffn_args &args, const moe_item &item, int slice)
{
    return args.sums + slice_place<Shape>(item, slice) * Shape::SUM_BYTES;
}

template <class Shape>
__device__ __forceinline__ int32_t *summed_of(const ffn_args &args, const moe_item &item, int slice)
{
    return args.summed + slice_place<Shape>(item, slice) * MULTIPLYING_WARPS;
}

// Where both kinds of warpgroups read what is next. A place and a parity would take one register more.
template <class Shape> struct item_reader {
    const uint32_t shared;
    uint32_t items_read = 0;

    __device__ __forceinline__ uint32_t slot() const
    {
        return items_read % SLOTS;
    }

    __device__ __forceinline__ uint32_t parity() const
    {
        return items_read / SLOTS % 2;
    }

    // The next one in shared memory; without rows there is nothing left.
    __device__ __forceinline__ const moe_item &item() const
    {
        moe_barrier_wait(shared + Shape::SLOT_FULL + slot() * 8, parity());
        return static_cast<const moe_item *>(__cvta_shared_to_generic(shared + Shape::ITEMS))[slot()];
    }

    // Each thread says for itself that it no longer reads the slot.
    __device__ __forceinline__ void done()
    {
        moe_barrier_arrive(shared + Shape::SLOT_EMPTY + slot() * 8);
        items_read++;
    }
};

} // namespace

#endif
