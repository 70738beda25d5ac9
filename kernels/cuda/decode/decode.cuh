// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN as its kernels share it: what they are given, how their blocks find their work (work.h), and
// how they wait for each other.
//
// Rows of a group are cut into tiles of up to 1 << most_log2 tokens. A GEMM is a row of bands, MOE_PACKED_ROWS weight
// rows times one tile each: groups one after another, in a group bands, in a band tiles, so that tiles which share
// weights read them at the same time. Items of GEMM 1 come first, those of GEMM 2 follow; blocks take them in order
// from one counter.
#ifndef MOE_KERNELS_CUDA_DECODE_DECODE_CUH
#define MOE_KERNELS_CUDA_DECODE_DECODE_CUH

#include "kernels/cuda/common/scan.cuh"
#include "kernels/cuda/decode/work.h"
#include "kernels/kernels.h"

struct moe_decode_args {
    const void *x;            // [T][H]
    const int32_t *row_token; // [R]
    void *act, *down;         // [R][I], [R][H], in the layer's dtype
    const char *w13, *w2;     // packed or row-major
    const int32_t *offsets;   // [groups + 1]
    int32_t groups;
    int32_t hidden, intermediate;
    int32_t most_log2; // tokens of a tile at most: a power of two, from 8 to MOE_DECODE_TOKENS
    int32_t workers;   // blocks of the grid
    // Scratch memory; all but the sums are zero at first, `passed` for one token only.
    int32_t *taken;      // items so far
    int32_t *finished;   // [tiles]: how much of GEMM 1 is done of each tile
    int32_t *slot_state; // [workers][MOE_SLOT_PARTS]: of the slots' sums, how far they are
    void *passed;        // [R][I], of one token's rows; NULL: of more tokens. Beside act, for who looks for results
                         // where zeros were
    float *sums;         // [workers][MOE_PACKED_ROWS << most_log2]: the slots
};

constexpr int MOE_DECODE_TOKENS = 128; // of a tile at most

// A slot's sums are written and read by parts of a block, each for itself. GEMM 2 uses the slots again.
constexpr int MOE_SLOT_PARTS = 2;
enum { MOE_SLOT_FREE, MOE_SLOT_SUM1, MOE_SLOT_READ1, MOE_SLOT_SUM2 };

// Fills args for this call. *bytes: what it takes of scratch memory; *zeroed: how much of that, from the beginning,
// must be zero. With scratch NULL only counts.
void moe_decode_prepare(const struct moe_call *call, moe_decode_args *args, size_t *bytes, size_t *zeroed);

#ifdef __CUDACC__

// One task, as a block's parts tell it to each other.
struct alignas(16) moe_decode_task {
    int32_t rows; // of tokens; 0: there are no more tasks
    int32_t row;  // the first of them in the plan
    int32_t tile; // number of their tile
    int32_t group;
    int32_t band;       // of the group's weights
    int32_t begin, end; // blocks of K
    int32_t gemm2;
    int32_t first_slot, slots, own_slot; // work.h
    int32_t slot_free;                   // the state in which own_slot can be written to
};

// Where a group begins: how many tiles and rows there are before it.
struct alignas(8) moe_decode_group {
    int32_t tile, row;
};

// Fills list[0] to list[groups], in shared memory; by one warp, which alone needs to know. Returns the tokens of the
// largest tile. Everything waits for this and what comes after it, in a kernel whose instructions are not in any cache
// yet: so it is few instructions.
static __device__ inline int32_t moe_decode_groups(const moe_decode_args &args, moe_decode_group *list)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    constexpr int EACH = 4; // groups of a lane, which follow each other
    const int lane = threadIdx.x % 32, most = 1 << args.most_log2;
    int32_t before = 0, largest = 0;
#pragma unroll 1
    for (int g0 = 0; g0 < args.groups; g0 += 32 * EACH) {
        const int g = g0 + lane * EACH;
        int32_t offset[EACH + 1], own[EACH + 1], sum = 0;
#pragma unroll
        for (int i = 0; i <= EACH; i++)
            offset[i] = args.offsets[min(g + i, args.groups)];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int32_t rows = offset[i + 1] - offset[i];
            largest = max(largest, min(rows, most));
            own[i] = sum;
            sum += (rows + most - 1) >> args.most_log2;
        }
        own[EACH] = sum;
        const int32_t inclusive = moe_scan_warp(sum);
        const int32_t first = before + inclusive - sum;
        // The last lane also writes where the next one would begin, which may be the list's end.
#pragma unroll
        for (int i = 0; i <= EACH; i++)
            if (g + i <= args.groups && (i < EACH || lane == 31))
                list[g + i] = {first + own[i], offset[i]};
        before += __shfl_sync(ALL_LANES, inclusive, 31);
    }
    __syncwarp();
    return __reduce_max_sync(ALL_LANES, largest);
}

// A block's way through its tasks, which one warp goes. Its first thread's number is a constant: of an addition by a
// lane of this number or that the compiler would make one for all lanes, with a shuffle that waits for the result at
// once.
template <int FIRST_THREAD> struct moe_decode_walk {
    const moe_decode_args &args;
    const moe_decode_group *list;
    int32_t bands1, bands2; // of a tile
    moe_work work1, work2;
    int32_t items1, items = INT32_MAX; // work2 is only made when it is come to
    int32_t item, at = 0;

    static __device__ __forceinline__ int32_t take(const moe_decode_args &args)
    {
        return threadIdx.x == FIRST_THREAD ? atomicAdd(args.taken, 1) : 0;
    }

    // `taken`: the first item, from take().
    __device__ moe_decode_walk(const moe_decode_args &a, const moe_decode_group *groups, int32_t taken)
        : args(a), list(groups)
    {
        bands1 = (2 * args.intermediate + MOE_PACKED_ROWS - 1) / MOE_PACKED_ROWS;
        bands2 = (args.hidden + MOE_PACKED_ROWS - 1) / MOE_PACKED_ROWS;
        work1 =
            moe_work_make(list[args.groups].tile * bands1, (int32_t)moe_packed_blocks(args.hidden), args.workers, 0);
        items1 = moe_work_items(&work1);
        item = __shfl_sync(0xffffffffu, taken, 0);
    }

    // The last group whose first band is not past this one.
    __device__ int group_of(int32_t band, int32_t bands) const
    {
        const int lane = threadIdx.x % 32;
        static_assert(MOE_MAX_EXPERTS <= 32 * 1024, "three steps find any group");
        int g = 0;
        for (int step = args.groups > 1024 ? 1024 : args.groups > 32 ? 32 : 1; step > 0; step /= 32) {
            const int at = g + lane * step;
            const bool before = at < args.groups && list[at].tile * bands <= band;
            g += (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
        }
        return g;
    }

    // task.rows is 0 at the end. Before it takes another item it calls wait(), which comes back when that is needed:
    // who has taken an item early does it late.
    template <typename Wait> __device__ void next(moe_decode_task &task, Wait wait)
    {
        moe_task t;
        for (;;) {
            task.rows = 0;
            task.gemm2 = item >= items1;
            if (task.gemm2 && items == INT32_MAX) { // GEMM 1 reads twice as much
                work2 = moe_work_make(list[args.groups].tile * bands2, (int32_t)moe_packed_blocks(args.intermediate),
                                      args.workers, 2);
                items = items1 + moe_work_items(&work2);
            }
            if (item >= items)
                return;
            const moe_work work = task.gemm2 ? work2 : work1;
            if (moe_work_task(&work, task.gemm2 ? item - items1 : item, at, &t))
                break;
            at = 0;
            wait();
            item = __shfl_sync(0xffffffffu, take(args), 0);
        }
        at++;
        const int32_t bands = task.gemm2 ? bands2 : bands1;
        const int g = group_of(t.band, bands);
        const moe_decode_group group = list[g], after = list[g + 1];
        const int32_t rows = after.row - group.row, tiles = after.tile - group.tile;
        const int32_t in_group = t.band - group.tile * bands;
        int32_t band = in_group, mine = 0, size = rows, longer = 0; // the first `longer` tiles have one row more
        if (tiles > 1) {
            band = in_group / tiles;
            mine = in_group - band * tiles;
            size = rows / tiles;
            longer = rows - size * tiles;
        }
        task.row = group.row + mine * size + (mine < longer ? mine : longer);
        task.rows = size + (mine < longer);
        task.tile = group.tile + mine;
        task.group = g;
        task.band = band;
        task.begin = t.begin;
        task.end = t.end;
        task.first_slot = t.first_slot;
        task.slots = t.slots;
        task.own_slot = t.own_slot;
        // Before GEMM 2 leaves sums where GEMM 1 did those must have been read.
        task.slot_free = task.gemm2 && moe_work_leaves(&work1, t.own_slot) ? MOE_SLOT_READ1 : MOE_SLOT_FREE;
    }
};

#endif

#endif
