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
// thread. The finished tile is turned to rows of tokens in stages of the ring, which it borrows, and leaves from there
// by itself while the next item begins.
//
// Tokens in plan order lie in `down`, where the results of GEMM 2 go, so that they need no memory of their own. A
// tile's results come only when no copy reads its tokens any more: a multiplying warpgroup adds to the tile's counter
// after it has waited for all the bytes of its item, the tokens' among them, and GEMM 2 of the tile begins with the
// counter at its full number. So the reads are complete before the counter says so, and the stores, in whichever proxy,
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

struct ffn_args {
    CUtensorMap act_64, act_16;    // act [R][I] in boxes of 64 and of 16 rows
    CUtensorMap down_64, down_16;  // down [R][H]
    CUtensorMap w13_rows, w2_rows; // row-major weights, in the order of the packed layout
    const void *x;                 // [T][H]
    const int32_t *row_token;      // [R]
    void *act, *down;              // [R][I], [R][H]
    const char *w13, *w2;          // packed; NULL: row-major
    uint32_t *taken;               // items so far; zero at the start. Blocks that find none left count on
    int32_t *finished;             // [tiles]: how much of GEMM 1 is done of each; zero at the start
    int32_t *all_finished;         // the sum of those
    moe_items items;               // without the table
    int32_t hidden, intermediate;
    bool once;     // weights are read by one tile, most of them
    int32_t guess; // tiles of weights to fetch before the routing is known
};

constexpr int WARPGROUP = 128;
constexpr int MULTIPLIERS = 2; // warpgroups
constexpr int FFN_THREADS = (1 + MULTIPLIERS) * WARPGROUP;
constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES, COLS = MOE_PACKED_COLS, TILE_BYTES = MOE_PACKED_TILE_BYTES;
constexpr int WEIGHT_BYTES = MULTIPLIERS * TILE_BYTES; // in a stage
constexpr int M_BLOCKS = 2;                            // of 64 weight rows, to a warpgroup
constexpr int SLOTS = 2;                               // items known in advance
constexpr int NUMBERS = 8;                             // of items, that the second block of a pair may be behind

// NMAX tokens to a tile, STAGES in the ring. ORDERED: GEMM 1's tokens lie in `down`, in plan order. PAIRED: by clusters
// of two blocks.
template <int NMAX_, int STAGES_, bool ORDERED_, bool PAIRED_> struct ffn_shape {
    static constexpr int NMAX = NMAX_, STAGES = STAGES_;
    static constexpr bool ORDERED = ORDERED_, PAIRED = PAIRED_;
    static constexpr int BLOCKS = PAIRED ? 2 : 1; // that take an item together

    // Arrivals that fill a stage: of the thread that starts copies and, where threads gather tokens, of all of these.
    static constexpr int FILLERS = ORDERED ? 1 : 1 + WARPGROUP;

    // The finished tile in shared memory: pieces of 64 features of all tokens, one to a warpgroup of GEMM 1, two of
    // GEMM 2.
    static constexpr int PIECE = NMAX * ROW_BYTES;
    static constexpr int STAGE = WEIGHT_BYTES + NMAX * ROW_BYTES;
    static constexpr int BORROWED1 = 1, BORROWED2 = 2 * MULTIPLIERS * PIECE <= STAGE ? 1 : 2; // stages
    static_assert(MULTIPLIERS * PIECE <= STAGE && BORROWED2 <= MULTIPLIERS);

    // Shared memory.
    static constexpr int FULL = STAGES * STAGE, EMPTY = FULL + STAGES * 8;
    static constexpr int SLOT_FULL = EMPTY + STAGES * 8, SLOT_EMPTY = SLOT_FULL + SLOTS * 8;
    static constexpr int NUMBER_FULL = SLOT_EMPTY + SLOTS * 8, NUMBER = NUMBER_FULL + NUMBERS * 8;
    static constexpr int ITEMS = NUMBER + NUMBERS * 4;
    static constexpr int TABLE = ITEMS + SLOTS * sizeof(moe_item);
    static constexpr int SUMS = TABLE + (MOE_ITEM_TABLE + 1) * sizeof(moe_item_entry);
    static constexpr int BYTES = SUMS + FFN_THREADS / 32 * 4;
    static_assert(STAGE % 1024 == 0 && NMAX % 64 == 0 && STAGES >= BORROWED2 + 2);
    static_assert(STAGES < NUMBERS, "the second block may be two rings behind, two stages an item");
    static_assert(BYTES <= 227 * 1024, "a block of compute capability 9.0 has no more shared memory");
};

// Where both kinds of warpgroups read what is next.
template <class Shape> struct item_reader {
    const uint32_t shared;
    moe_ring_place slot;

    // False: there is nothing left. Each thread says for itself that it has read the slot.
    __device__ __forceinline__ bool next(moe_item &item)
    {
        moe_barrier_wait(shared + Shape::SLOT_FULL + slot.at * 8, slot.parity);
        item = static_cast<const moe_item *>(__cvta_shared_to_generic(shared + Shape::ITEMS))[slot.at];
        moe_barrier_arrive(shared + Shape::SLOT_EMPTY + slot.at * 8);
        slot.next(SLOTS);
        return item.rows > 0;
    }
};

// ---- Loading ----

// Where an item's weights come from, for the threads that start their copies: two tiles of up to 128 rows.
struct weight_source {
    const char *packed; // the band's first tile; NULL: through `map`
    int64_t next_tile;  // bytes to the second one
    uint32_t bytes[2];  // of each tile in a stage; 0 past the last row
    const CUtensorMap *map;
    int group, row;
    bool gemm2, shared;

    __device__ weight_source(const ffn_args &args, const moe_item &item)
    {
        shared = item.shared;
        group = item.group;
        row = item.band * MOE_BAND_ROWS;
        gemm2 = item.gemm2;
        map = gemm2 ? &args.w2_rows : &args.w13_rows;
        const char *base = gemm2 ? args.w2 : args.w13;
        const int64_t rows = gemm2 ? args.hidden : 2 * (int64_t)args.intermediate;
        const int64_t cols = gemm2 ? args.intermediate : args.hidden;
        next_tile = TILE_BYTES * moe_packed_blocks(cols);
        packed = base == NULL ? NULL
                              : base + group * moe_packed_expert_bytes(rows, cols) + row / MOE_PACKED_ROWS * next_tile;
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const int64_t left = moe_packed_rows(rows) - row - m * MOE_PACKED_ROWS;
            const bool whole = left >= MOE_PACKED_ROWS || (left > 0 && base == NULL);
            bytes[m] = whole ? TILE_BYTES : left > 0 ? (uint32_t)left * ROW_BYTES : 0;
        }
    }

    // Of the tiles of a block of columns that of number m, for both blocks of a pair. Few groups have a third tile: so
    // as if they were read once.
    __device__ __forceinline__ void load_both(uint32_t to, int block, uint32_t barrier, int m) const
    {
        const int first = row + m * MOE_PACKED_ROWS;
        const uint32_t own = m == 0 ? bytes[0] : bytes[1];
        to += m * TILE_BYTES;
        if (own == 0)
            return;
        if (packed != NULL)
            moe_bulk_load_both(to, packed + m * next_tile + (int64_t)block * own, own, barrier, moe_policy_once());
        else if (gemm2)
            moe_tensor_load_3d_both(to, map, block * COLS, first, group, barrier);
        else
            moe_tensor_load_5d_both(to, map, block * COLS, 0, 0, first / 16, group, barrier);
    }

    // The tiles of a block of columns.
    __device__ __forceinline__ void load(uint32_t to, int block, uint32_t barrier, bool once) const
    {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const int first = row + m * MOE_PACKED_ROWS;
            if (bytes[m] == 0)
                continue;
            if (packed != NULL && once)
                moe_bulk_load(to + m * TILE_BYTES, packed + m * next_tile + (int64_t)block * bytes[m], bytes[m],
                              barrier, moe_policy_once());
            else if (packed != NULL)
                moe_bulk_load(to + m * TILE_BYTES, packed + m * next_tile + (int64_t)block * bytes[m], bytes[m],
                              barrier);
            else if (gemm2)
                moe_tensor_load_3d(to + m * TILE_BYTES, map, block * COLS, first, group, barrier);
            else // 8 rows, gate or up, eights of rows
                moe_tensor_load_5d(to + m * TILE_BYTES, map, block * COLS, 0, 0, first / 16, group, barrier);
        }
    }
};

template <typename T, class Shape> struct ffn_loader {
    const ffn_args &args;
    const uint32_t shared;
    const int rank; // of the block in its cluster
    moe_ring_place stage, number;
    bool results_there = false; // all of GEMM 1's, as this thread has seen

    __device__ uint32_t full() const
    {
        return shared + Shape::FULL + stage.at * 8;
    }

    __device__ const moe_item_entry *table() const
    {
        return static_cast<const moe_item_entry *>(__cvta_shared_to_generic(shared + Shape::TABLE));
    }

    __device__ uint32_t tokens() const
    {
        return shared + stage.at * Shape::STAGE + WEIGHT_BYTES;
    }

    // Starting a copy takes a while, so that warps take turns at it: each has its stages.
    __device__ bool is_own() const
    {
        return threadIdx.x / 32 == stage.at % (WARPGROUP / 32);
    }

    __device__ void wait_empty() const
    {
        moe_barrier_wait(shared + Shape::EMPTY + stage.at * 8, stage.parity ^ 1);
    }

    // By one thread: the stage's weights, and word of `token_bytes` to come.
    __device__ __forceinline__ void load_weights(const weight_source &source, int block, uint32_t token_bytes) const
    {
        moe_barrier_expect(full(), source.bytes[0] + source.bytes[1] + token_bytes);
        if (Shape::PAIRED && source.shared)
            source.load_both(shared + stage.at * Shape::STAGE, block, full(), rank);
        else
            source.load(shared + stage.at * Shape::STAGE, block, full(), args.once);
    }

    // Stages that the multiplying warpgroups may write to.
    __device__ __forceinline__ void lend(int stages)
    {
#pragma unroll 1
        for (int i = 0; i < stages; i++) {
            if (is_own() || !Shape::ORDERED)
                wait_empty();
            if (is_own() && moe_elect())
                moe_barrier_arrive(full());
            if (!Shape::ORDERED)
                moe_barrier_arrive(full());
            stage.next(Shape::STAGES);
        }
    }

    // GEMM 1. A thread brings the same chunk of every 16th token.
    __device__ __forceinline__ void gather(const moe_item &item)
    {
        constexpr int STRIDE = WARPGROUP / 8, MOST = Shape::NMAX / STRIDE;
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const weight_source source(args, item);
        const uint32_t row_chunks = args.hidden / 8;
        const int mine = (item.rows - first + STRIDE - 1) / STRIDE;
        uint32_t at[MOST]; // where each row begins in x, in chunks: the host has seen to it that this fits
#pragma unroll
        for (int i = 0; i < MOST; i++)
            at[i] = i < mine ? args.row_token[item.row + first + i * STRIDE] * row_chunks : 0;

        const uint32_t place = first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
        const char *from = (const char *)args.x + chunk * 16;
        int left = args.hidden - chunk * 8; // columns from this thread's chunk on
#pragma unroll 1
        for (int block = 0; block * COLS < args.hidden; block++) {
            wait_empty();
            if (is_own() && moe_elect())
                load_weights(source, block, 0);
            const uint32_t to = tokens() + place;
            const int bytes = left > 0 ? 16 : 0; // past the row's end zeros, as in the weights
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (i < mine)
                    moe_cp_async_to(to + i * STRIDE * ROW_BYTES, from + at[i] * (uint64_t)16, bytes);
            moe_barrier_arrive_cp_async(full());
            from += ROW_BYTES;
            left -= COLS;
            stage.next(Shape::STAGES);
        }
    }

    // Until GEMM 1's results of this tile are in memory. Once all are nobody has to look again.
    __device__ __forceinline__ void await_results(int32_t tile)
    {
        const int32_t of_tile = MULTIPLIERS * args.items.bands1;
        const uint32_t tiles = table()[args.items.entries].tile;
        results_there = (uint32_t)moe_load_acquire(args.all_finished) == tiles * of_tile;
        while (!results_there && moe_load_acquire(args.finished + tile) < of_tile)
            ;
        moe_fence_async(); // what other blocks stored comes before the tensor copies
    }

    // Rows in plan order: of act, or of tokens. Rows past the item's are those of its neighbour, or zeros past the end
    // of all; nobody keeps their products.
    __device__ __forceinline__ void stream(const moe_item &item)
    {
        const weight_source source(args, item);
        const int columns = item.gemm2 ? args.intermediate : args.hidden;
        const CUtensorMap *by_64 = item.gemm2 ? &args.act_64 : &args.down_64;
        const CUtensorMap *by_16 = item.gemm2 ? &args.act_16 : &args.down_16;
        const int steps = (item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP;
        if (item.gemm2 && !results_there)
            await_results(item.tile);
#pragma unroll 1
        for (int block = 0; block * COLS < columns; block++) {
            if (is_own() || !Shape::ORDERED)
                wait_empty();
            if (is_own() && moe_elect()) {
                load_weights(source, block, steps * MOE_ROW_STEP * ROW_BYTES);
                uint32_t to = tokens();
                int row = item.row;
#pragma unroll 1
                for (int i = 0; i < steps / 4; i++, row += 64, to += 64 * ROW_BYTES)
                    moe_tensor_load_2d(to, by_64, block * COLS, row, full());
#pragma unroll 1
                for (int i = 0; i < steps % 4; i++, row += 16, to += 16 * ROW_BYTES)
                    moe_tensor_load_2d(to, by_16, block * COLS, row, full());
            }
            if (!Shape::ORDERED)
                moe_barrier_arrive(full());
            stage.next(Shape::STAGES);
        }
    }

    // Of a pair the first block takes items' numbers and sends them to the second. It is never NUMBERS ahead: its
    // warp waits for one stage of each ring, so that the other block is less than two rings behind, and an item has two
    // stages at the least.
    __device__ uint32_t number_full() const
    {
        return shared + Shape::NUMBER_FULL + number.at * 8;
    }

    __device__ int32_t *number_at() const
    {
        return static_cast<int32_t *>(__cvta_shared_to_generic(shared + Shape::NUMBER)) + number.at;
    }

    __device__ __forceinline__ void send(uint32_t taken)
    {
        moe_cluster_store(number_at(), 1, (int32_t)taken,
                          static_cast<uint64_t *>(__cvta_shared_to_generic(number_full())));
        number.next(NUMBERS);
    }

    __device__ __forceinline__ uint32_t receive()
    {
        moe_barrier_expect(number_full(), sizeof(int32_t));
        moe_barrier_wait(number_full(), number.parity);
        const uint32_t taken = (uint32_t)*number_at();
        number.next(NUMBERS);
        return taken;
    }

    // The first thread, of a pair's first block, has taken item number `next`.
    __device__ __forceinline__ void run(uint32_t next)
    {
        item_reader<Shape> reader{shared};
        const bool first = threadIdx.x == 0;
        moe_items items = args.items;
        items.table = table();
        items.blocks = Shape::BLOCKS; // the same, known to the compiler
        if (Shape::ORDERED)
            moe_fence_async(); // what the kernel ahead stored comes before the tensor copies
        moe_item item;
        for (;;) {
            if (first) {
                item.rows = 0;
                if (Shape::PAIRED && rank > 0)
                    next = receive();
                const uint32_t count = moe_items_count(&items);
#pragma unroll 1
                for (; next < count; next = atomicAdd(args.taken, 1)) {
                    item = moe_items_at(&items, (int32_t)next, rank);
                    if (!Shape::PAIRED || item.rows > 0)
                        break;
                }
                if (Shape::PAIRED && rank == 0)
                    send(next);
                const uint32_t at = reader.slot.at;
                moe_barrier_wait(shared + Shape::SLOT_EMPTY + at * 8, reader.slot.parity ^ 1);
                static_cast<moe_item *>(__cvta_shared_to_generic(shared + Shape::ITEMS))[at] = item;
                moe_barrier_arrive(shared + Shape::SLOT_FULL + at * 8);
            }
            if (!reader.next(item))
                return;
            if (Shape::ORDERED || item.gemm2)
                stream(item);
            else
                gather(item);
            if (first && rank == 0) // not sooner: who takes an item early keeps it from those who are free
                next = atomicAdd(args.taken, 1);
            lend(item.gemm2 ? Shape::BORROWED2 : Shape::BORROWED1);
        }
    }
};

// ---- Multiplying ----

template <typename T, class Shape> struct ffn_multiplier {
    const ffn_args &args;
    const uint32_t shared;
    const int half, thread; // which warpgroup of the two, and which thread in it
    const bool sender;      // one thread, which starts the copies of the warpgroup's results and awaits them
    moe_ring_place stage;
    int borrowed = -1;  // the stage that the last tile is leaving from
    int unsettled = -1; // the tile of a GEMM 1 item whose results may not be in memory yet
    float d[M_BLOCKS][Shape::NMAX / 2];

    __device__ ffn_multiplier(const ffn_args &a, uint32_t s)
        : args(a), shared(s), half(__shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP - 1, 0)),
          thread(threadIdx.x % WARPGROUP), sender(thread < 32 && moe_elect())
    {
    }

    __device__ void wait_full() const
    {
        moe_barrier_wait(shared + Shape::FULL + stage.at * 8, stage.parity);
    }

    // A stage is empty when both blocks of a pair have read it, for each brings some of it to both.
    __device__ void release(uint32_t at) const
    {
        const uint32_t empty = shared + Shape::EMPTY + at * 8;
        if constexpr (Shape::PAIRED) {
            if (thread % 32 < Shape::BLOCKS)
                moe_cluster_barrier_arrive(empty, thread % 32);
        } else if (thread % 32 == 0) {
            moe_barrier_arrive(empty);
        }
    }

    // Gives the borrowed stage back when the tile has left it: one thread, who started the copies, for all warps.
    __device__ __forceinline__ void give_back()
    {
        if (sender) {
            const uint32_t empty = shared + Shape::EMPTY + borrowed * 8;
            moe_store_wait_read();
            if constexpr (Shape::PAIRED) {
                moe_cluster_barrier_arrive(empty, 0, WARPGROUP / 32);
                moe_cluster_barrier_arrive(empty, 1, WARPGROUP / 32);
            } else {
                moe_barrier_arrive_as(empty, WARPGROUP / 32);
            }
        }
        borrowed = -1;
    }

    // Lets GEMM 2 have a tile's results when they are in memory.
    __device__ __forceinline__ void settle()
    {
        if (sender) {
            moe_store_wait();
            moe_add_release_both(args.finished + unsettled, args.all_finished, 1);
        }
        unsettled = -1;
    }

    // d = weights . tokens^T over `blocks` stages. While this warpgroup waits for its products, to pass the stage on as
    // early as can be, the other one's keep the tensor cores busy. What is left of the last tile is seen to while the
    // first ones run.
    template <int N> __device__ __forceinline__ void multiply(int blocks, bool gathered)
    {
        int chore = borrowed >= 0 ? 0 : unsettled >= 0 ? 2 : -1; // the block when it is time
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
            if (block == chore) {
                if (block == 0)
                    give_back();
                else
                    settle();
                chore = unsettled >= 0 ? 2 : -1;
            }
            moe_wgmma_wait();
            release(stage.at);
            stage.next(Shape::STAGES);
        }
        if (unsettled >= 0)
            settle();
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

    __device__ void sync() const
    {
        moe_named_sync(1 + half, WARPGROUP);
    }

    // Borrows `stages` stages and returns where this warpgroup's pieces go: each has one of two stages or half of one.
    __device__ __forceinline__ uint32_t borrow(int stages, int bytes)
    {
        uint32_t place = 0;
        for (int i = 0; i < stages; i++) {
            wait_full();
            if (stages == 1 || i == half) {
                borrowed = stage.at;
                place = shared + stage.at * Shape::STAGE + (stages == 1 ? half * bytes : 0);
            } else {
                release(stage.at);
            }
            stage.next(Shape::STAGES);
        }
        return place;
    }

    // Rows go out in boxes of 64 and 16 by tensor copies; what is left by the threads, so that no neighbour's rows are
    // touched.
    template <int PIECES>
    __device__ __forceinline__ void send(uint32_t place, const CUtensorMap *by_64, const CUtensorMap *by_16, void *to,
                                         int64_t columns, int64_t column, int row, int rows)
    {
        moe_fence_async_shared();
        sync();
        if (thread < 32 && moe_elect()) {
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int c = (int)column + p * COLS;
                const uint32_t piece = place + p * Shape::PIECE;
                int r = 0;
#pragma unroll 1
                for (; r + 64 <= rows; r += 64)
                    moe_tensor_store_2d(by_64, piece + r * ROW_BYTES, c, row + r);
#pragma unroll 1
                for (; r + 16 <= rows; r += 16)
                    moe_tensor_store_2d(by_16, piece + r * ROW_BYTES, c, row + r);
            }
            moe_store_commit();
        }
        const int whole = rows / 16 * 16;
        if (whole == rows)
            return;
#pragma unroll 1
        for (int i = thread; i < (rows - whole) * PIECES * 8; i += WARPGROUP) {
            const int chunk = i % 8, p = i / 8 % PIECES, r = whole + i / 8 / PIECES;
            const int64_t c = column + p * COLS + chunk * 8;
            const void *from =
                __cvta_shared_to_generic(place + p * Shape::PIECE + r * ROW_BYTES + ((chunk ^ (r & 7)) << 4));
            if (c < columns)
                *reinterpret_cast<uint4 *>((T *)to + (row + r) * columns + c) = *reinterpret_cast<const uint4 *>(from);
        }
        sync(); // before the sender gives the stage back, and says that all is in memory
    }

    // For a warpgroup that has nothing to do in an item: passes on its stages and those to borrow.
    __device__ __forceinline__ void go_along(int stages)
    {
        if (borrowed >= 0)
            give_back();
        if (unsettled >= 0)
            settle();
#pragma unroll 1
        for (int i = 0; i < stages; i++) {
            wait_full();
            release(stage.at);
            stage.next(Shape::STAGES);
        }
    }

    // GEMM 1: of each pair of eights of rows one is gate, one up.
    __device__ __forceinline__ void finish_gated(const moe_item &item)
    {
        const int lane = thread % 32, warp = thread / 32;
        const uint32_t place = borrow(Shape::BORROWED1, Shape::PIECE);
#pragma unroll
        for (int q = 0; q < Shape::NMAX; q += 32) {
            if (q >= item.rows)
                break;
#pragma unroll
            for (int m = 0; m < M_BLOCKS; m++) {
                uint32_t v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *e = d[m] + (q / 8 + i) * 4;
                    v[i] = moe_pair(moe_silu_fast(e[0]) * e[2], moe_silu_fast(e[1]) * e[3], T());
                }
                moe_stmatrix_trans(place + (q + lane) * ROW_BYTES + (((m * 4 + warp) ^ (lane & 7)) << 4), v[0], v[1],
                                   v[2], v[3]);
            }
        }
        send<1>(place, &args.act_64, &args.act_16, args.act, args.intermediate,
                (int64_t)item.band * (MOE_BAND_ROWS / 2) + half * 64, item.row, item.rows);
        unsettled = item.tile;
    }

    __device__ __forceinline__ void finish_down(const moe_item &item)
    {
        const int lane = thread % 32, warp = thread / 32;
        const uint32_t place = borrow(Shape::BORROWED2, 2 * Shape::PIECE);
        const uint32_t to =
            place + (lane / 16 * 8 + lane % 8) * ROW_BYTES + (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
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
        send<2>(place, &args.down_64, &args.down_16, args.down, args.hidden,
                (int64_t)item.band * MOE_BAND_ROWS + half * 128, item.row, item.rows);
    }

    __device__ __forceinline__ void run()
    {
        item_reader<Shape> reader{shared};
        const int blocks1 = (args.hidden + COLS - 1) / COLS, blocks2 = (args.intermediate + COLS - 1) / COLS;
        moe_item item;
        for (;;) {
            const bool more = reader.next(item);
            // What this block waits for from here on may be its own results.
            if (unsettled >= 0 && (!more || item.gemm2))
                settle();
            if (!more)
                break;
            const int blocks = item.gemm2 ? blocks2 : blocks1;
            const int rows = item.gemm2 ? args.hidden : 2 * args.intermediate; // of weights
            if (item.idle || item.band * MOE_BAND_ROWS + half * MOE_PACKED_ROWS >= rows) {
                go_along(blocks + (item.gemm2 ? Shape::BORROWED2 : Shape::BORROWED1));
                if (!item.gemm2 && !item.idle)
                    unsettled = item.tile;
                continue;
            }
            multiply_any<1, Shape::NMAX / MOE_ROW_STEP>((item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP, blocks,
                                                        !Shape::ORDERED && !item.gemm2);
            if (item.gemm2)
                finish_down(item);
            else
                finish_gated(item);
        }
        if (sender)
            moe_store_wait(); // shared memory is the block's only as long as it runs
    }
};

// The table of items, by the whole block; sums [warps].
__device__ __forceinline__ void make_table(const moe_items &items, moe_item_entry *table, int32_t *sums)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t before = 0;
    for (int i = 0; i < items.entries; i += FFN_THREADS) {
        const int entry = i + threadIdx.x;
        const int32_t own = entry < items.entries ? moe_items_entry_tiles(&items, entry) : 0;
        int32_t sum = moe_scan_warp(own);
        if (lane == 31)
            sums[warp] = sum;
        __syncthreads();
        sum += before - own;
#pragma unroll
        for (int w = 0; w < FFN_THREADS / 32; w++) {
            if (w < warp)
                sum += sums[w];
            before += sums[w];
        }
        if (entry < items.entries)
            table[entry] = {sum, items.offsets[entry << items.shift]};
        if (threadIdx.x == 0)
            table[items.entries] = {before, items.offsets[items.groups]};
        __syncthreads();
    }
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
        }
        for (int i = 0; i < SLOTS; i++) {
            moe_barrier_init(shared + Shape::SLOT_FULL + i * 8, 1);
            moe_barrier_init(shared + Shape::SLOT_EMPTY + i * 8, FFN_THREADS);
        }
        for (int i = 0; i < NUMBERS; i++)
            moe_barrier_init(shared + Shape::NUMBER_FULL + i * 8, 1);
        moe_barrier_init_done();
    }
    // Items begin with the first bands of the first group in use, two tiles side by side.
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
    make_table(args.items, reinterpret_cast<moe_item_entry *>(ffn_memory + Shape::TABLE),
               reinterpret_cast<int32_t *>(ffn_memory + Shape::SUMS));

    if (Shape::PAIRED)
        moe_cluster_wait(); // the other block's barriers are there

    // 168 registers a thread at the start: what the loading warpgroup gives up the multiplying ones get.
    if (threadIdx.x < WARPGROUP) {
        moe_registers_less<56>();
        ffn_loader<T, Shape>{args, shared, rank}.run(next);
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
