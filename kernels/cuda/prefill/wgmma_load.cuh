// SPDX-License-Identifier: Apache-2.0
// What fills the stages of a block of prefill's grouped GEMM (wgmma_kernel.cuh), finds its items, and sends finished
// tiles on their way: a warpgroup.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_LOAD_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_LOAD_CUH

#include "kernels/cuda/prefill/wgmma_block.cuh"

namespace
{

// An item's weights: two tiles of up to 128 rows, or of a joint item one of them, in each of `blocks` blocks of K. All
// that is the same for each stage is worked out once: between a stage that is empty and the first copy into it there
// should be few instructions.
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
        if (!Shape::CUTS)
            i.most_slices = 1; // and so is this
        return i;
    }

    __device__ uint32_t full() const
    {
        return shared + Shape::FULL + stage.at * 8;
    }

    __device__ uint32_t tokens(uint32_t weights = WEIGHT_BYTES) const
    {
        return shared + stage.at * Shape::STAGE + weights;
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

    // By one thread of the stage's warp, for all who would have read the stage. In a pair to its own block first, where
    // only this warp waits, and goes on when it has told the other block, too. Were that told first, it could use the
    // stage and come back to it before this block has heard.
    __device__ __forceinline__ void give_back() const
    {
        const uint32_t empty = shared + Shape::EMPTY + warp * 8;
        if constexpr (Shape::PAIRED) {
            moe_cluster_barrier_arrive(empty, rank, MULTIPLYING_WARPS);
            moe_cluster_barrier_arrive(empty, rank ^ 1, MULTIPLYING_WARPS);
        } else {
            moe_barrier_arrive_as(empty, MULTIPLYING_WARPS);
        }
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
            const uint32_t piece = shared + warp * Shape::STAGE;
#pragma unroll 1
            for (int p = 0; p < 2 && t.column + p * COLS < t.columns; p++)
                store_rows(t.gemm2 ? args.down : args.act, piece + p * Shape::PIECE, t.column + p * COLS, t.row,
                           t.rows);
            moe_store_commit();
            moe_store_wait_read();
            give_back();
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
            const bool joint = Shape::PAIRED && item.joint; // one piece then
            const int first = item.band * band + (joint ? rank * (band / 2) + part * COLS : part * 2 * COLS);
            *tile() = {item.row,
                       item.rows,
                       first,
                       nothing ? 0
                       : joint ? min(columns, first + COLS)
                               : columns,
                       item.gemm2 || item.idle ? -1 : item.tile,
                       item.gemm2};
            moe_barrier_arrive(full());
        }
        state = LENT;
    }

    // ---- Operands ----

    // By one thread: tile m of the item's weights to a place in the stage, for both blocks of a pair or for this one
    // alone.
    __device__ __forceinline__ void load_tile(const moe_item &item, const weight_source &source, int block, int m,
                                              int place, bool both, bool once) const
    {
        const uint32_t to = shared + stage.at * Shape::STAGE + place * TILE_BYTES;
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
        // Weights that one tile reads make way in L2 first, but not with many tokens: with 64 that saves time, with 128
        // it costs some. A guess why: L2 brings the columns of two stages at once, and if these take long the second
        // ones have made way. Where tokens are in order few groups have so few.
        const bool hint = once && !Shape::ORDERED && item.rows <= 96;
        if (both && item.gemm2)
            moe_tensor_load_3d_both(to, &args.w2_rows, block * COLS, row, item.group, full());
        else if (both)
            moe_tensor_load_5d_both(to, &args.w13_rows, block * COLS, 0, 0, row / 16, item.group, full());
        else if (item.gemm2 && hint)
            moe_tensor_load_3d(to, &args.w2_rows, block * COLS, row, item.group, full(), moe_policy_once());
        else if (item.gemm2)
            moe_tensor_load_3d(to, &args.w2_rows, block * COLS, row, item.group, full());
        else if (hint) // 8 rows, gate or up, eights of rows
            moe_tensor_load_5d(to, &args.w13_rows, block * COLS, 0, 0, row / 16, item.group, full(), moe_policy_once());
        else
            moe_tensor_load_5d(to, &args.w13_rows, block * COLS, 0, 0, row / 16, item.group, full());
    }

    // The stage's weights, and word of `token_bytes` to come.
    __device__ __forceinline__ void load_weights(const moe_item &item, const weight_source &source, int block,
                                                 uint32_t token_bytes, bool once) const
    {
        if (Shape::PAIRED && item.joint) {
            moe_barrier_expect(full(), (rank == 0 ? source.bytes[0] : source.bytes[1]) + token_bytes);
            load_tile(item, source, block, rank, 0, false, true);
            return;
        }
        moe_barrier_expect(full(), source.bytes[0] + source.bytes[1] + token_bytes);
        if (Shape::PAIRED && item.shared) {
            load_tile(item, source, block, rank, rank, true, true);
        } else {
#pragma unroll
            for (int m = 0; m < 2; m++)
                load_tile(item, source, block, m, m, false, once);
        }
    }

    // Until GEMM 1's results of the item's tile are in memory. Once all are nobody has to look again.
    __device__ __forceinline__ void await_results(const moe_item &item)
    {
        const uint32_t tiles = items().table->tile[args.items.entries];
        const int32_t parts = Shape::PAIRED && item.joint ? 2 : 1; // of a band
        results_there = (uint32_t)moe_load_acquire(args.all_finished) == tiles * args.items.bands1;
        while (!results_there && moe_load_acquire(args.finished + item.tile) < args.items.bands1 * parts)
            ;
        moe_fence_async(); // what other blocks stored comes before the tensor copies
    }

    // By one thread: `steps` of rows in plan order, of act, or of tokens. Rows past the item's are those of its
    // neighbour, or zeros past the end of all; nobody keeps their products. Where both blocks of a pair have the same
    // rows each brings some of them for both.
    __device__ __forceinline__ void load_rows(const row_maps &from, const moe_item &item, int block, int steps) const
    {
        int first = 0, count = steps;
        const bool both = Shape::PAIRED && !item.shared;
        if (both) {
            const int split = min(steps, (steps + 7) / 8 * 4); // a multiple of 64 rows, or all
            first = rank == 0 ? 0 : split;
            count = rank == 0 ? split : steps - split;
        }
        int row = item.row + first * MOE_ROW_STEP;
        uint32_t to =
            tokens(Shape::PAIRED && item.joint ? TILE_BYTES : WEIGHT_BYTES) + first * (MOE_ROW_STEP * ROW_BYTES);
        const auto load = [&](const CUtensorMap *map) {
            if (both)
                moe_tensor_load_2d_both(to, map, block * COLS, row, full());
            else
                moe_tensor_load_2d(to, map, block * COLS, row, full());
        };
#pragma unroll 1
        for (int i = 0; i < count / 4; i++, row += 64, to += 64 * ROW_BYTES)
            load(&from.by_64);
#pragma unroll 1
        for (int i = 0; i < count % 4; i++, row += 16, to += 16 * ROW_BYTES)
            load(&from.by_16);
    }

    // ---- Sums of an item that is cut ----

    // Until all slices but the last have left theirs.
    __device__ __forceinline__ void await_sums(const moe_item &item) const
    {
        const int lane = threadIdx.x % 32; // the flags of all slices lie one after another
        if (lane < (item.slices - 1) * MULTIPLYING_WARPS)
            while (moe_load_acquire(summed_of<Shape>(args, item, 0) + lane) == 0)
                ;
        __syncwarp();
        moe_fence_async(); // what other blocks stored comes before the copies
    }

    // Stage `at` of those that bring them, for warpgroups that have weights. It is lent like the others: nothing is
    // written to it, but threads read it, and each of them says when it has.
    __device__ __forceinline__ void load_sums(const moe_item &item, int at)
    {
        const bool joint = Shape::PAIRED && item.joint;
        const int slice = at / Shape::SUM_STAGES, part = at % Shape::SUM_STAGES;
        const char *from = sums_of<Shape>(args, item, slice) + part * (MULTIPLIERS * Shape::HALF_SUM_BYTES);
        const int most = joint ? Shape::template SUM_STEPS<1> : Shape::template SUM_STEPS<M_BLOCKS>;
        const int steps = (item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP - part * most;
        const uint32_t bytes = max(min(steps, most), 0) * (joint ? 1 : M_BLOCKS) * SUM_UNIT_BYTES;
        const bool first = bytes > 0 && has_weights<Shape>(args, item, 0);
        const bool second = bytes > 0 && has_weights<Shape>(args, item, 1);
        if (first)
            await_sums(item);
        if (moe_elect()) {
            const uint32_t to = shared + stage.at * Shape::STAGE;
            *tile() = {0, 0, 0, 0, -1, true};
            moe_barrier_expect(full(), bytes * (first + second));
            if (first)
                moe_bulk_load(to, from, bytes, full(), moe_policy_once());
            if (second)
                moe_bulk_load(to + Shape::HALF_SUM_BYTES, from + Shape::HALF_SUM_BYTES, bytes, full(),
                              moe_policy_once());
        }
        __syncwarp();
        state = LENT;
    }

    // All stages that bring them, then those lent. A loop of its own, as that of the operands has no register left.
    // What a warp had to send and to settle of other items is done: the last slice, too, had a stage of operands for
    // it.
    __device__ __forceinline__ void load_sums_and_lend(const moe_item &item)
    {
        const item_stages<Shape> of(item, (int)moe_packed_blocks(args.intermediate));
#pragma unroll 1
        for (int i = 0; i < of.sums + of.lent; i++) {
            if (warp == stage.at) {
                send_tile(); // nothing but the word that sums have been read, if the stage brought some
                wait_empty();
                if (i < of.sums)
                    load_sums(item, i);
                else
                    lend(item, i - of.sums);
            }
            stage.next(Shape::STAGES);
        }
    }

    // ---- All stages of an item ----

    // Those of its operands, of others' sums, then those lent. Without an item (rows is 0) only what is left to do with
    // the last tiles.
    __device__ __forceinline__ void load(const moe_item &item)
    {
        const bool gathered = !Shape::ORDERED && !item.gemm2 && item.rows > 0;
        const weight_source source(args, item);
        const item_stages<Shape> of(item, source.blocks);
        const int first = item.rows > 0 ? of.first : 0, end = item.rows > 0 ? first + of.blocks : 0; // of K
        const int stop = item.rows > 0 ? end + (of.sums == 0 ? of.lent : 0) : Shape::STAGES;         // stages
        token_source<Shape> gather;
        const int steps = gathered ? 0 : (item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP; // of rows, by tensor copies
        bool ready = !item.gemm2 || results_there;
        const int take_at = item.early ? max(end - 2 * Shape::STAGES, first) : min(end, stop - 1);
#pragma unroll 1
        for (int block = first; block < stop; block++) {
            const bool own = warp == stage.at; // starting a copy takes a while, so that warps take turns at it
            if (own) {
                settle();
                send_tile();
                if (!ready || block >= end)
                    settle(); // what this waits for may be the block's own results; and the stage may be lent again
                if (!ready && item.rows > 0)
                    await_results(item);
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
                if (own && block >= end)
                    lend(item, block - end);
                else if (own && moe_elect()) {
                    load_weights(item, source, block, steps * MOE_ROW_STEP * ROW_BYTES, once);
                    if (!gathered)
                        load_rows(item.gemm2 ? args.act : args.down, item, block, steps);
                }
                if (gathered && block < end)
                    gather.load(args, item.rows, tokens(), block, full());
                else if (!Shape::ORDERED)
                    moe_barrier_arrive(full());
            }
            stage.next(Shape::STAGES);
        }
        if (Shape::CUTS && item.rows > 0 && item.cut >= 0 && item.slice == item.slices - 1)
            load_sums_and_lend(item);
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
        item.cut = -1;
        for (;; take()) {
            current = Shape::PAIRED && rank > 0 ? receive() : __shfl_sync(0xffffffffu, next, 0);
            if (current >= count)
                break;
            item = moe_items_at(&all, (int32_t)current, rank);
            if (!Shape::PAIRED || item.rows > 0)
                break;
        }
        // The item after it is taken while there are so many blocks of it left that the number is there in time. But
        // only when none is left, or the last one of a slice, before the wait for the stages behind them, when few
        // items are left, or where memory is the limit and some blocks are faster than others: who takes an item early
        // keeps it from those who are free.
        uint32_t grid;
        asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(grid)); // here, so that it takes no register elsewhere
        item.early = !args.items.memory_bound && current + 2 * grid / Shape::BLOCKS < count;
        if (Shape::PAIRED && rank == 0)
            send(current);
        if (threadIdx.x == 0) {
            const uint32_t at = reader.slot();
            moe_barrier_wait(shared + Shape::SLOT_EMPTY + at * 8, reader.parity() ^ 1);
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

} // namespace

#endif
