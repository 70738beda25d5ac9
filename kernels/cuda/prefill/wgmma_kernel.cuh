// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM of compute capability 9.0: one launch for both GEMMs of all groups.
//
// A block is three warpgroups. One loads: weights by bulk copies, or by tensor copies where they are row-major, rows of
// GEMM 2 by tensor copies, tokens of GEMM 1 row by row through row_token, or where they have been put into plan order
// by tensor copies too. Two multiply: each has 128 of an item's 256 weight rows, as the operand m, and all of its
// tokens, as n; so a tile of tokens wastes nothing however few they are, up to a step of 16. Between them is a ring of
// stages in shared memory, 64 columns of both operands each, which goes on from item to item without a pause.
//
// What L2 can deliver, and the power that it takes, are the limit more than the tensor cores: hence the broad band of
// weights, with as many sums as the registers hold.
//
// Weight rows alternate between gate and up in eights, which puts the gate and up of a feature into registers of one
// thread. The finished tile is turned to rows of tokens in stages of the ring, which are lent to the multiplying
// warpgroups for that. Each stage has a warp of its own that fills it, and this warp also sends the tile on its way
// before it fills the stage again: starting copies takes a while, in which those who multiply have begun the next item.
//
// Tokens in plan order lie in `down`, where the results of GEMM 2 go, so that they need no memory of their own. A
// tile's results come only when no copy reads its tokens any more: the tile's counter is added to when both
// multiplying warpgroups have waited for all the bytes of an item, the tokens' among them, and GEMM 2 of the tile
// begins with the counter at its full number. So the reads are complete before the counter says so, and the stores
// follow from it. A copy may also read up to 15 rows of the next tile, which may just be changing, and a block that
// only goes along (moe_item.idle) all of a tile whose counter it does not add to: nobody keeps their products.
//
// Where most groups have two tiles, their weights go through L2 twice, at a rate near all that it has. There clusters
// of two blocks take an item together: each brings half of the weights, for both. So they go through the ring side by
// side, and a stage is empty when both have read it.
//
// Items (items.h) are taken from one counter, in order. Those of GEMM 2 come after all those of GEMM 1 whose results
// they read, so that what an item waits for is always done or being done, on however few blocks the grid runs. What an
// item is each block finds for itself, from the plan's offsets and a table in shared memory: no kernel ahead makes a
// list.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_KERNEL_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_KERNEL_CUH

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/guess.cuh"
#include "kernels/cuda/common/hopper.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/scan.cuh"
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

// ---- Loading ----

// An item's weights: two tiles of up to 128 rows in each of `blocks` stages. All that is the same for each stage is
// worked out once: between a stage that is empty and the first copy into it there should be few instructions.
struct weight_source {
    const char *packed; // the band's first tile; NULL: row-major
    int blocks;
    uint32_t bytes[2]; // of each tile in a stage; 0 past the last row. A box through a tensor map is whole always

    __device__ weight_source(const ffn_args &args, const moe_item &item)
    {
        const char *base = item.gemm2 ? args.w2 : args.w13;
        const int64_t rows = item.gemm2 ? args.hidden : 2 * (int64_t)args.intermediate;
        const int64_t cols = item.gemm2 ? args.intermediate : args.hidden;
        blocks = (int)moe_packed_blocks(cols);
        packed = base == NULL ? NULL
                              : base + item.group * moe_packed_expert_bytes(rows, cols) +
                                    item.band * (MOE_BAND_ROWS / MOE_PACKED_ROWS) * ((int64_t)TILE_BYTES * blocks);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const int64_t left = moe_packed_rows(rows) - item.band * MOE_BAND_ROWS - m * MOE_PACKED_ROWS;
            const bool whole = left >= MOE_PACKED_ROWS || (left > 0 && base == NULL);
            bytes[m] = whole ? TILE_BYTES : left > 0 ? (uint32_t)left * ROW_BYTES : 0;
        }
    }
};

// Where a thread gets tokens of GEMM 1 from where they are not in plan order: the same chunk of every 16th.
template <class Shape> struct token_source {
    static constexpr int STRIDE = WARPGROUP / 8, MOST = Shape::ORDERED ? 1 : Shape::NMAX / STRIDE;
    uint32_t at[MOST]; // of each row its token, from the first stage on where that begins in x, in chunks

    // How many rows of `rows` are this thread's.
    __device__ static int own(int rows)
    {
        return (rows - (int)threadIdx.x / 8 + STRIDE - 1) / STRIDE;
    }

    // The numbers are on their way together, and are waited for where the first stage's tokens are: after its weights.
    __device__ __forceinline__ void read(const ffn_args &args, int row, int rows)
    {
        const int32_t *from = args.row_token + row + (int)threadIdx.x / 8;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            at[i] = i < own(rows) ? from[i * STRIDE] : 0;
    }

    __device__ __forceinline__ void load(const ffn_args &args, int rows, uint32_t to, int block, uint32_t barrier)
    {
        if (block == 0)
#pragma unroll
            for (int i = 0; i < MOST; i++)
                at[i] *= args.hidden / 8; // the host has seen to it that this fits
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8, column = block * COLS + chunk * 8;
        const bool there = column < args.hidden; // past the row's end zeros, as in the weights
        const char *from = (const char *)args.x + (there ? column * 2 : 0);
        asm volatile("" : "+l"(from)); // or its base is read anew for each row
        to += first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < own(rows))
                moe_cp_async_to(to + i * STRIDE * ROW_BYTES, from + at[i] * (uint64_t)16, there ? 16 : 0);
        moe_barrier_arrive_cp_async(barrier);
    }
};

template <class Shape> struct ffn_loader {
    const ffn_args &args;
    const uint32_t shared;
    const int rank; // of the block in its cluster
    const int warp; // and the number of its own stage

    moe_ring_place stage, number;
    bool results_there = false; // all of GEMM 1's, as this thread has seen

    // Of this warp's stage: lent, then maybe not settled: GEMM 1's results may not be in memory yet.
    enum { OWN, LENT, UNSETTLED } state = OWN;
    uint32_t lent_parity = 0;

    item_reader<Shape> reader;
    uint32_t next; // of the first thread: the next item's number

    // The first thread of a pair's first block, or of a block alone, has taken item number `first`.
    __device__ ffn_loader(const ffn_args &a, uint32_t memory, int block, uint32_t first)
        : args(a), shared(memory), rank(block), warp(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)), reader{memory},
          next(first)
    {
    }

    // Made anew where it is used, so that it takes no registers elsewhere.
    __device__ __forceinline__ moe_items items() const
    {
        moe_items i = args.items;
        i.table = static_cast<const moe_item_table *>(__cvta_shared_to_generic(shared + Shape::TABLE));
        i.blocks = Shape::BLOCKS; // the same, known to the compiler
        return i;
    }

    __device__ uint32_t full() const
    {
        return shared + Shape::FULL + stage.at * 8;
    }

    __device__ uint32_t tokens() const
    {
        return shared + stage.at * Shape::STAGE + WEIGHT_BYTES;
    }

    __device__ void wait_empty() const
    {
        moe_barrier_wait(shared + Shape::EMPTY + stage.at * 8, stage.parity ^ 1);
    }

    // ---- The finished tile ----

    // Rows in boxes, of which the last one takes some again, so that no neighbour's rows are touched.
    __device__ __forceinline__ static void store_rows(const row_maps &to, uint32_t from, int column, int row, int rows)
    {
        int r = 0;
#pragma unroll 1
        for (; r + 64 <= rows; r += 64)
            moe_tensor_store_2d(&to.by_64, from + r * ROW_BYTES, column, row + r);
        const int box = rows >= 16 ? 16 : rows >= 4 ? 4 : 1;
        const CUtensorMap *by_box = rows >= 16 ? &to.by_16 : rows >= 4 ? &to.by_4 : &to.by_1;
#pragma unroll 1
        for (; r < rows; r += box) {
            const int first = min(r, rows - box);
            moe_tensor_store_2d(by_box, from + first * ROW_BYTES, column, row + first);
        }
    }

    // What is in this warp's stage when it is lent.
    __device__ lent_tile *tile() const
    {
        return static_cast<lent_tile *>(__cvta_shared_to_generic(shared + Shape::TILES)) + warp;
    }

    // By the stage's warp, before it is filled: when the tile has been written, starts the copies of it, and waits
    // until they have read it.
    __device__ __forceinline__ void send_tile()
    {
        if (state != LENT)
            return;
        moe_barrier_wait(shared + Shape::WRITTEN + warp * 8, lent_parity);
        lent_parity ^= 1;
        const lent_tile t = *tile();
        if (moe_elect()) {
            const uint32_t piece = shared + warp * Shape::STAGE, empty = shared + Shape::EMPTY + warp * 8;
#pragma unroll 1
            for (int p = 0; p < 2 && t.column + p * COLS < t.columns; p++)
                store_rows(t.gemm2 ? args.down : args.act, piece + p * Shape::PIECE, t.column + p * COLS, t.row,
                           t.rows);
            moe_store_commit();
            moe_store_wait_read();
            constexpr int ARRIVALS = MULTIPLIERS * WARPGROUP / 32; // for all who would have read the stage
            if constexpr (Shape::PAIRED) {
                moe_cluster_barrier_arrive(empty, 0, ARRIVALS);
                moe_cluster_barrier_arrive(empty, 1, ARRIVALS);
            } else {
                moe_barrier_arrive_as(empty, ARRIVALS);
            }
        }
        __syncwarp();
        state = t.tile >= 0 ? UNSETTLED : OWN;
    }

    // Lets GEMM 2 have a tile's results when they are in memory.
    __device__ __forceinline__ void settle()
    {
        if (state != UNSETTLED)
            return;
        if (moe_elect()) {
            moe_store_wait();
            moe_add_release_both(args.finished + tile()->tile, args.all_finished, 1);
        }
        __syncwarp();
        state = OWN;
    }

    // Lends this warp's stage: the part of the item's tile that is written to it.
    __device__ __forceinline__ void lend(const moe_item &item, int part)
    {
        if (moe_elect()) {
            const int band = item.gemm2 ? MOE_BAND_ROWS : MOE_BAND_ROWS / 2; // columns
            const int columns = item.gemm2 ? args.hidden : args.intermediate;
            const bool nothing = item.idle || part >= (item.gemm2 ? MULTIPLIERS : 1);
            *tile() = {item.row,
                       item.rows,
                       item.band * band + part * 2 * COLS,
                       nothing ? 0 : columns,
                       item.gemm2 || item.idle ? -1 : item.tile,
                       item.gemm2};
            moe_barrier_arrive(full());
        }
        state = LENT;
    }

    // ---- Operands ----

    // By one thread: tile m of the stage's weights, for both blocks of a pair or for this one alone.
    __device__ __forceinline__ void load_tile(const moe_item &item, const weight_source &source, int block, int m,
                                              bool both, bool once) const
    {
        const uint32_t to = shared + stage.at * Shape::STAGE + m * TILE_BYTES;
        const uint32_t bytes = m == 0 ? source.bytes[0] : source.bytes[1];
        if (bytes == 0)
            return;
        if (source.packed != NULL) {
            const char *from = source.packed + m * (int64_t)TILE_BYTES * source.blocks + block * (int64_t)bytes;
            if (both) // few groups have a third tile: so as if they were read once
                moe_bulk_load_both(to, from, bytes, full(), moe_policy_once());
            else if (once)
                moe_bulk_load(to, from, bytes, full(), moe_policy_once());
            else
                moe_bulk_load(to, from, bytes, full());
            return;
        }
        const int row = item.band * MOE_BAND_ROWS + m * MOE_PACKED_ROWS;
        if (both && item.gemm2)
            moe_tensor_load_3d_both(to, &args.w2_rows, block * COLS, row, item.group, full());
        else if (both)
            moe_tensor_load_5d_both(to, &args.w13_rows, block * COLS, 0, 0, row / 16, item.group, full());
        else if (item.gemm2)
            moe_tensor_load_3d(to, &args.w2_rows, block * COLS, row, item.group, full());
        else // 8 rows, gate or up, eights of rows
            moe_tensor_load_5d(to, &args.w13_rows, block * COLS, 0, 0, row / 16, item.group, full());
    }

    // The stage's weights, and word of `token_bytes` to come.
    __device__ __forceinline__ void load_weights(const moe_item &item, const weight_source &source, int block,
                                                 uint32_t token_bytes, bool once) const
    {
        moe_barrier_expect(full(), source.bytes[0] + source.bytes[1] + token_bytes);
        if (Shape::PAIRED && item.shared) {
            load_tile(item, source, block, rank, true, true);
        } else {
#pragma unroll
            for (int m = 0; m < 2; m++)
                load_tile(item, source, block, m, false, once);
        }
    }

    // Until GEMM 1's results of this tile are in memory. Once all are nobody has to look again.
    __device__ __forceinline__ void await_results(int32_t tile)
    {
        const uint32_t tiles = items().table->tile[args.items.entries];
        results_there = (uint32_t)moe_load_acquire(args.all_finished) == tiles * args.items.bands1;
        while (!results_there && moe_load_acquire(args.finished + tile) < args.items.bands1)
            ;
        moe_fence_async(); // what other blocks stored comes before the tensor copies
    }

    // By one thread: rows in plan order, of act, or of tokens. Rows past the item's are those of its neighbour, or
    // zeros past the end of all; nobody keeps their products.
    __device__ __forceinline__ void load_rows(const row_maps &from, int block, int row, int steps) const
    {
        uint32_t to = tokens();
#pragma unroll 1
        for (int i = 0; i < steps / 4; i++, row += 64, to += 64 * ROW_BYTES)
            moe_tensor_load_2d(to, &from.by_64, block * COLS, row, full());
#pragma unroll 1
        for (int i = 0; i < steps % 4; i++, row += 16, to += 16 * ROW_BYTES)
            moe_tensor_load_2d(to, &from.by_16, block * COLS, row, full());
    }

    // All stages of an item: those of its operands, then those lent. Without an item (rows is 0) only what is left to
    // do with the last tiles.
    __device__ __forceinline__ void load(const moe_item &item)
    {
        const bool gathered = !Shape::ORDERED && !item.gemm2 && item.rows > 0;
        const weight_source source(args, item);
        const int blocks = item.rows > 0 ? source.blocks : 0;
        const int stages = item.rows > 0 ? blocks + lent_stages(item.gemm2, blocks) : Shape::STAGES;
        token_source<Shape> gather;
        const int steps = gathered ? 0 : (item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP; // of rows, by tensor copies
        bool ready = !item.gemm2 || results_there;
        const int take_at = item.early ? max(blocks - 2 * Shape::STAGES, 0) : blocks;
#pragma unroll 1
        for (int block = 0; block < stages; block++) {
            const bool own = warp == stage.at; // starting a copy takes a while, so that warps take turns at it
            if (own) {
                settle();
                send_tile();
                if (!ready || block >= blocks)
                    settle(); // what this waits for may be the block's own results; and the stage may be lent again
                if (!ready && item.rows > 0)
                    await_results(item.tile);
                ready = true;
            }
            if (item.rows > 0) {
                if (gathered && block == 0)
                    gather.read(args, item.row, item.rows);
                if (warp == 0 && block == take_at)
                    take();
                const bool once = own && item.once; // known when the stage is empty
                if (own || !Shape::ORDERED)
                    wait_empty();
                if (!own && Shape::ORDERED)
                    settle(); // soon, since others may wait for it; who gathers has no time for that
                if (own && block >= blocks)
                    lend(item, block - blocks);
                else if (own && moe_elect()) {
                    load_weights(item, source, block, steps * MOE_ROW_STEP * ROW_BYTES, once);
                    if (!gathered)
                        load_rows(item.gemm2 ? args.act : args.down, block, item.row, steps);
                }
                if (gathered && block < blocks)
                    gather.load(args, item.rows, tokens(), block, full());
                else if (!Shape::ORDERED)
                    moe_barrier_arrive(full());
            }
            stage.next(Shape::STAGES);
        }
    }

    // ---- Items ----

    // Of a pair the first block takes items' numbers and sends them to the second. It is never NUMBERS ahead: its
    // warp waits for one stage of each ring, so that the other block is less than two rings behind, an item has two
    // stages at the least, and it knows one item in advance.
    __device__ uint32_t number_full() const
    {
        return shared + Shape::NUMBER_FULL + number.at * 8;
    }

    __device__ int32_t *number_at() const
    {
        return static_cast<int32_t *>(__cvta_shared_to_generic(shared + Shape::NUMBER)) + number.at;
    }

    __device__ __forceinline__ void send(uint32_t item)
    {
        if (threadIdx.x == 0)
            moe_cluster_store(number_at(), 1, (int32_t)item,
                              static_cast<uint64_t *>(__cvta_shared_to_generic(number_full())));
        number.next(NUMBERS);
    }

    __device__ __forceinline__ uint32_t receive()
    {
        if (threadIdx.x == 0)
            moe_barrier_expect(number_full(), sizeof(int32_t));
        __syncwarp();
        moe_barrier_wait(number_full(), number.parity);
        const uint32_t item = (uint32_t)*number_at();
        number.next(NUMBERS);
        return item;
    }

    __device__ __forceinline__ void take()
    {
        if (rank == 0)
            moe_fetch_add_first(args.taken, 1, &next);
    }

    // By the first warp: finds the next item and tells all of the block.
    __device__ __forceinline__ void tell()
    {
        const moe_items all = items();
        const uint32_t count = moe_items_count(&all);
        uint32_t current;
        moe_item item = {};
        for (;; take()) {
            current = Shape::PAIRED && rank > 0 ? receive() : __shfl_sync(0xffffffffu, next, 0);
            if (current >= count)
                break;
            item = moe_items_at(&all, (int32_t)current, rank);
            if (!Shape::PAIRED || item.rows > 0)
                break;
        }
        // The item after it is taken while there are so many blocks of it left that the number is there in time. But
        // only when none is left, before the wait for the stages that are lent, when few items are left, or where
        // memory is the limit and some blocks are faster than others: who takes an item early keeps it from those who
        // are free.
        uint32_t grid;
        asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(grid)); // here, so that it takes no register elsewhere
        item.early = !args.memory_bound && current + 2 * grid / Shape::BLOCKS < count;
        if (Shape::PAIRED && rank == 0)
            send(current);
        if (threadIdx.x == 0) {
            const uint32_t at = reader.slot.at;
            moe_barrier_wait(shared + Shape::SLOT_EMPTY + at * 8, reader.slot.parity ^ 1);
            static_cast<moe_item *>(__cvta_shared_to_generic(shared + Shape::ITEMS))[at] = item;
            moe_barrier_arrive(shared + Shape::SLOT_FULL + at * 8);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void run()
    {
        if (Shape::ORDERED)
            moe_fence_async(); // what the kernel ahead stored comes before the tensor copies
        bool more;
        do {
            if (warp == 0)
                tell();
            const moe_item &item = reader.item(); // read there, not kept in registers
            more = item.rows > 0;
            load(item);
            reader.done();
        } while (more);
        if (moe_elect())
            moe_store_wait(); // shared memory is the block's only as long as it runs
    }
};

// ---- Multiplying ----

template <typename T, class Shape> struct ffn_multiplier {
    const ffn_args &args;
    const uint32_t shared;
    const int half, thread; // which warpgroup of the two, and which thread in it
    moe_ring_place stage;
    float d[M_BLOCKS][Shape::NMAX / 2];

    __device__ ffn_multiplier(const ffn_args &a, uint32_t s)
        : args(a), shared(s), half(__shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP - 1, 0)),
          thread(threadIdx.x % WARPGROUP)
    {
    }

    __device__ void wait_full() const
    {
        moe_barrier_wait(shared + Shape::FULL + stage.at * 8, stage.parity);
    }

    // A stage is empty when both blocks of a pair have read it, for each brings some of it to both.
    __device__ void release() const
    {
        const uint32_t empty = shared + Shape::EMPTY + stage.at * 8;
        if constexpr (Shape::PAIRED) {
            if (thread % 32 < Shape::BLOCKS)
                moe_cluster_barrier_arrive(empty, thread % 32);
        } else if (thread % 32 == 0) {
            moe_barrier_arrive(empty);
        }
    }

    // d = weights . tokens^T over `blocks` stages. While this warpgroup waits for its products, to pass the stage on as
    // early as can be, the other one's keep the tensor cores busy.
    template <int N> __device__ __forceinline__ void multiply(int blocks, bool gathered)
    {
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            const uint32_t base = shared + stage.at * Shape::STAGE;
            const uint32_t a = moe_wgmma_matrix(base + half * TILE_BYTES), b = moe_wgmma_matrix(base + WEIGHT_BYTES);
            wait_full();
            if (gathered)
                moe_fence_async_shared(); // the loading threads' own copies, which the tensor cores might not see yet
            moe_wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLS / 16; k++)
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++)
                    moe_wgmma<T, N>::run(d[m], a + m * (TILE_BYTES / M_BLOCKS / 16) + k * 2, b + k * 2,
                                         (block | k) != 0);
            moe_wgmma_commit();
            moe_wgmma_wait();
            release();
            stage.next(Shape::STAGES);
        }
    }

    // With the number of tokens, in steps from FIRST to LAST, known to the compiler. Halves: each jump to code that did
    // not run yet is a wait for memory.
    template <int FIRST, int LAST> __device__ __forceinline__ void multiply_any(int steps, int blocks, bool gathered)
    {
        constexpr int MIDDLE = (FIRST + LAST) / 2;
        if constexpr (FIRST == LAST)
            multiply<FIRST * MOE_ROW_STEP>(blocks, gathered);
        else if (steps <= MIDDLE)
            multiply_any<FIRST, MIDDLE>(steps, blocks, gathered);
        else
            multiply_any<MIDDLE + 1, LAST>(steps, blocks, gathered);
    }

    // Of the lent stages: each warp says that it has written what it had to.
    __device__ __forceinline__ void pass_back(uint32_t at) const
    {
        moe_fence_async_shared();
        __syncwarp();
        if (thread % 32 == 0)
            moe_barrier_arrive(shared + Shape::WRITTEN + at * 8);
    }

    // For a warpgroup that has nothing to do in an item, or in some of its stages: passes them on, then those lent.
    __device__ __forceinline__ void go_along(int blocks, int lent)
    {
#pragma unroll 1
        for (int i = 0; i < blocks + lent; i++) {
            wait_full();
            if (i < blocks)
                release();
            else
                pass_back(stage.at);
            stage.next(Shape::STAGES);
        }
    }

    // GEMM 1: of each pair of eights of rows one is gate, one up.
    __device__ __forceinline__ void finish_gated(const moe_item &item)
    {
        const int lane = thread % 32, warp = thread / 32;
        const uint32_t place = shared + stage.at * Shape::STAGE + half * Shape::PIECE;
        // The second 64 weight rows have not been loaded where there are none. What was multiplied instead must not
        // come together with results.
        if (2 * args.intermediate - item.band * MOE_BAND_ROWS - half * MOE_PACKED_ROWS <= MOE_PACKED_ROWS / M_BLOCKS)
#pragma unroll
            for (int i = 0; i < Shape::NMAX / 2; i++)
                d[1][i] = 0.0f;
        wait_full();
#pragma unroll
        for (int q = 0; q < Shape::NMAX; q += 32) {
            if (q >= item.rows)
                break;
            uint32_t v[M_BLOCKS][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                static_assert(M_BLOCKS == 2, "two features of a token have their activation together");
                float *e = d[0] + (q / 8 + i) * 4, *f = d[1] + (q / 8 + i) * 4;
                moe_silu_fast_both(e[0], f[0]);
                moe_silu_fast_both(e[1], f[1]);
                v[0][i] = moe_pair(e[0] * e[2], e[1] * e[3], T());
                v[1][i] = moe_pair(f[0] * f[2], f[1] * f[3], T());
            }
#pragma unroll
            for (int m = 0; m < M_BLOCKS; m++)
                moe_stmatrix_trans(place + (q + lane) * ROW_BYTES + (((m * 4 + warp) ^ (lane & 7)) << 4), v[m][0],
                                   v[m][1], v[m][2], v[m][3]);
        }
        pass_back(stage.at);
        stage.next(Shape::STAGES);
    }

    // Each warpgroup has a stage of its own.
    __device__ __forceinline__ void finish_down(const moe_item &item, int lent)
    {
        const int lane = thread % 32, warp = thread / 32;
        go_along(0, half);
        const uint32_t to = shared + stage.at * Shape::STAGE + (lane / 16 * 8 + lane % 8) * ROW_BYTES +
                            (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
        wait_full();
#pragma unroll
        for (int q = 0; q < Shape::NMAX; q += MOE_ROW_STEP) {
            if (q >= item.rows)
                break;
#pragma unroll
            for (int m = 0; m < M_BLOCKS; m++) {
                const float *e = d[m] + q / 8 * 4;
                moe_stmatrix_trans(to + m * Shape::PIECE + q * ROW_BYTES, moe_pair(e[0], e[1], T()),
                                   moe_pair(e[2], e[3], T()), moe_pair(e[4], e[5], T()), moe_pair(e[6], e[7], T()));
            }
        }
        pass_back(stage.at);
        stage.next(Shape::STAGES);
        go_along(0, lent - 1 - half);
    }

    __device__ __forceinline__ void run()
    {
        item_reader<Shape> reader{shared};
        const int blocks1 = (args.hidden + COLS - 1) / COLS, blocks2 = (args.intermediate + COLS - 1) / COLS;
        for (;;) {
            const moe_item item = reader.item();
            reader.done();
            if (item.rows == 0)
                break;
            const int blocks = item.gemm2 ? blocks2 : blocks1;
            const int lent = lent_stages(item.gemm2, blocks);
            const int rows = item.gemm2 ? args.hidden : 2 * args.intermediate; // of weights
            if (item.idle || item.band * MOE_BAND_ROWS + half * MOE_PACKED_ROWS >= rows) {
                go_along(blocks, lent);
                continue;
            }
            multiply_any<1, Shape::NMAX / MOE_ROW_STEP>((item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP, blocks,
                                                        !Shape::ORDERED && !item.gemm2);
            if (item.gemm2)
                finish_down(item, lent);
            else
                finish_gated(item);
        }
    }
};

// The table of items, by the whole block, a thread for each entry; sums [warps]. Within the kernel it would cost the
// loading warps registers, so that addresses of rows waited for each other: hence a function.
__device__ __noinline__ void make_table(const moe_items &items, moe_item_table *table, table_sums *sums)
{
    static_assert(MOE_ITEM_TABLE <= FFN_THREADS, "a thread for each entry");
    const int entry = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool there = entry < items.entries;
    const int32_t own = there ? moe_items_entry_tiles(&items, entry) : 0;
    const bool is_first = there && moe_items_is_first(&items, entry, own);
    const int32_t own_first = is_first ? own : 0, sum = moe_scan_warp(own), sum_first = moe_scan_warp(own_first);
    const unsigned firsts = __ballot_sync(0xffffffffu, is_first);
    if (lane == 31)
        sums[warp] = {sum, __popc(firsts), sum_first};
    __syncthreads();
    table_sums before = {sum - own, __popc(firsts & ((1u << lane) - 1)), sum_first - own_first}, all = {};
#pragma unroll
    for (int w = 0; w < FFN_THREADS / 32; w++) {
        const table_sums of = sums[w];
        if (w < warp)
            before = {before.tiles + of.tiles, before.first + of.first, before.first_tiles + of.first_tiles};
        all = {all.tiles + of.tiles, all.first + of.first, all.first_tiles + of.first_tiles};
    }
    if (there) {
        const int at = is_first ? before.first : all.first + entry - before.first;
        table->tile[at] = is_first ? before.first_tiles : all.first_tiles + before.tiles - before.first_tiles;
        table->order[at] = (uint8_t)entry;
        table->row[entry] = items.offsets[entry << items.shift];
    }
    if (threadIdx.x == 0) {
        table->tile[items.entries] = all.tiles;
        table->row[items.entries] = items.offsets[items.groups];
        moe_items_finish(table, (uint32_t)all.tiles, (uint32_t)all.first_tiles);
    }
    __syncthreads();
}

template <typename T, class Shape>
__global__ void __launch_bounds__(FFN_THREADS, 1) ffn_kernel(const __grid_constant__ ffn_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char ffn_memory[];
    const uint32_t shared = moe_shared(ffn_memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::STAGES; i++) {
            moe_barrier_init(shared + Shape::FULL + i * 8, Shape::FILLERS);
            moe_barrier_init(shared + Shape::EMPTY + i * 8, Shape::BLOCKS * MULTIPLIERS * WARPGROUP / 32);
            moe_barrier_init(shared + Shape::WRITTEN + i * 8, MULTIPLIERS * WARPGROUP / 32);
        }
        for (int i = 0; i < SLOTS; i++) {
            moe_barrier_init(shared + Shape::SLOT_FULL + i * 8, 1);
            moe_barrier_init(shared + Shape::SLOT_EMPTY + i * 8, FFN_THREADS);
        }
        for (int i = 0; i < NUMBERS; i++)
            moe_barrier_init(shared + Shape::NUMBER_FULL + i * 8, 1);
        moe_barrier_init_done();
    }
    // Items begin with the first bands of the first group in use, two tiles side by side, if all groups have one tile.
    if (threadIdx.x % 32 == 0 && threadIdx.x / 32 < 2 && args.guess > 0)
        moe_fetch_guess(args.w13, args.hidden, args.intermediate, args.items.groups, blockIdx.x * 2 + threadIdx.x / 32,
                        args.guess);
    __syncthreads();
    if (Shape::PAIRED)
        moe_cluster_arrive_relaxed();
    moe_grid_launch_dependents();
    moe_grid_wait();
    const int rank = Shape::PAIRED ? (int)moe_cluster_rank() : 0;
    // Arrives while the table is made.
    const uint32_t next = threadIdx.x == 0 && rank == 0 ? atomicAdd(args.taken, 1) : 0;
    make_table(args.items, reinterpret_cast<moe_item_table *>(ffn_memory + Shape::TABLE),
               reinterpret_cast<table_sums *>(ffn_memory + Shape::SUMS));

    if (Shape::PAIRED)
        moe_cluster_wait(); // the other block's barriers are there

    // 168 registers a thread at the start: what the loading warpgroup gives up the multiplying ones get.
    if (threadIdx.x < WARPGROUP) {
        moe_registers_less<56>();
        ffn_loader<Shape>(args, shared, rank, next).run();
    } else {
        moe_registers_more<224>();
        ffn_multiplier<T, Shape>(args, shared).run();
    }
    if (Shape::PAIRED) { // the other block's arrivals and copies come here as long as it runs
        moe_cluster_arrive();
        moe_cluster_wait();
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "built for 9.0 without its own instructions this kernel would do nothing: build for 90a"
#endif
}

} // namespace

#endif
