// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM of compute capability 9.0: one launch for both GEMMs of all groups.
//
// A block is three warpgroups. One loads (wgmma_load.cuh): weights by bulk copies, or by tensor copies where they are
// row-major, rows of GEMM 2 by tensor copies, tokens of GEMM 1 row by row through row_token, or where they have been
// put into plan order by tensor copies too. Two multiply (wgmma_multiply.cuh): each has 128 of an item's 256 weight
// rows, as the operand m, and all of its tokens, as n; so a tile of tokens wastes nothing however few they are, up to a
// step of 8, or of 16 where threads gather. Between them is a ring of stages in shared memory, 64 columns of both
// operands each, which goes on from item to item without a pause.
//
// What moving data takes, of L2's speed and of the card's power, is the limit more than the tensor cores: hence the
// broad band of weights, with as many sums as the registers hold.
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
// follow from it; whichever block of a pair has asked for bytes, they are waited for where they come. A copy may also
// read up to 15 rows of the next tile, which may just be changing, and a block that only goes along (moe_item.idle)
// gets rows of a tile whose counter it does not add to: nobody keeps their products.
//
// Where most groups have two tiles, their weights go through L2 twice, at a rate near all that it has. There clusters
// of two blocks take an item together: each brings half of the weights, for both. So they go through the ring side by
// side, and a stage is empty when both have read it. Where both have the same tokens instead each brings part of those
// for both. A group that is just too large for one tile is one joint tile (moe_item.joint), of which a multiplying
// warpgroup has 64 weight rows, and up to 256 tokens to a product.
//
// A slice of an item that is cut leaves its sums in memory, and each of its warps sets a flag when it has. The loading
// warps of the last slice wait for all flags of the others and bring those sums through the ring, behind its operands,
// in stages that are lent as well: threads read them.
//
// Items (items.h) are taken from one counter, in order. Those of GEMM 2 come after all those of GEMM 1 whose results
// they read, so that what an item waits for is always done or being done, on however few blocks the grid runs. What an
// item is each block finds for itself, from the plan's offsets and a table in shared memory: no kernel ahead makes a
// list.
//
// Who waits for what in a block is also written down in tests/model/prefill_ring.py, which runs it in random orders.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_KERNEL_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_KERNEL_CUH

#include "kernels/cuda/common/guess.cuh"
#include "kernels/cuda/common/scan.cuh"
#include "kernels/cuda/prefill/wgmma_load.cuh"
#include "kernels/cuda/prefill/wgmma_multiply.cuh"

namespace
{

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
        moe_items_finish(&items, table, (uint32_t)all.tiles, (uint32_t)all.first_tiles);
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
            moe_barrier_init(shared + Shape::EMPTY + i * 8, Shape::BLOCKS * MULTIPLYING_WARPS);
            moe_barrier_init(shared + Shape::WRITTEN + i * 8, MULTIPLIERS * WARPGROUP);
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
    moe_grid_wait();
    moe_grid_launch_dependents(); // the plan is complete when the next kernel starts
    const int rank = block_rank<Shape>();
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
