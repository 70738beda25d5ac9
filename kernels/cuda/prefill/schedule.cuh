// SPDX-License-Identifier: Apache-2.0
// The prefill path's FFN as its parts see it: a plan of the rows, cut into items of work (schedule.cu), which
// persistent blocks take in order (wgmma_kernel.cuh). An item is one band of 256 weight rows times one tile of up to
// NMAX tokens of the same group, over the whole of K, in GEMM 1 or in GEMM 2.
#ifndef MOE_KERNELS_CUDA_PREFILL_SCHEDULE_CUH
#define MOE_KERNELS_CUDA_PREFILL_SCHEDULE_CUH

#include <cuda.h>

#include "kernels/kernels.h"
#include "kernels/packed.h"

// Read as one int4.
struct alignas(16) moe_item {
    int32_t row;      // the first of its rows in the plan
    int32_t rows;     // 1 to NMAX; 0: there are no more items
    int32_t tile;     // number of its tile of tokens
    uint32_t weights; // band, GEMM 1 or 2, group
};

constexpr uint32_t MOE_ITEM_GROUPS = 1 << 13, MOE_ITEM_GEMM2 = MOE_ITEM_GROUPS;
constexpr int MOE_ITEM_BAND_SHIFT = 14;
constexpr int64_t MOE_ITEM_BANDS = (int64_t)1 << (32 - MOE_ITEM_BAND_SHIFT); // as many can be numbered
static_assert(MOE_ITEM_GROUPS >= MOE_MAX_EXPERTS, "a group must fit");

constexpr int MOE_BAND_ROWS = 256; // of weights: two tiles of the packed layout
constexpr int MOE_ROW_STEP = 16;   // rows of tokens are multiplied in multiples of this

// At the beginning of the scratch memory, then the tiles' counters of finished bands, then the items.
struct moe_schedule {
    int32_t items; // in all
    int32_t taken; // so far
};

struct moe_schedule_args {
    const int32_t *offsets; // [groups + 1]
    int32_t groups;
    int32_t bands1, bands2; // of w13 and w2
    int32_t nmax;           // tokens of a tile at most
    moe_schedule *schedule;
    int32_t *finished; // [tiles]: how much of GEMM 1 is done of each tile of tokens
    int64_t max_tiles;
    moe_item *items;
};

// offsets -> schedule, items, finished = 0. max_sms as in moe_call.
moe_status moe_schedule_cuda(const moe_schedule_args &args, int32_t max_sms, bool dependent, cudaStream_t stream,
                             struct moe_error *err);

// The most pieces of up to `tile` rows that `rows` rows in `groups` groups can make.
static inline int64_t moe_max_tiles(int64_t rows, int32_t groups, int32_t tile)
{
    return rows / tile + (groups < rows ? groups : rows);
}

#endif
