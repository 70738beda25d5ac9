// SPDX-License-Identifier: Apache-2.0
// What the plan's kernels have in common, for few tokens and for many.
#ifndef MOE_ROUTER_PLAN_CUH
#define MOE_ROUTER_PLAN_CUH

#include "kernels/cuda/common/scan.cuh"
#include "router/router.h"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 1024; // of a block, at most: little work gets fewer, which meet sooner
constexpr int WARPS = THREADS / 32;

// The memory of the step that comes next, spread over the grid. The last threads of a block go first: they have the
// least to do otherwise.
__device__ inline void set_zeroed(const moe_plan_args &args)
{
    const uint4 *const end = (const uint4 *)((const char *)args.zeroed + args.zeroed_bytes);
#pragma unroll 1
    for (uint4 *p = (uint4 *)args.zeroed + (blockIdx.x + 1) * blockDim.x - 1 - threadIdx.x; p < end;
         p += gridDim.x * blockDim.x)
        *p = uint4();
}

// Exclusive scan of one number a thread; `sum` becomes the sum of all. warp_sums is in use until the block's next
// barrier.
__device__ inline int32_t scan_block(int32_t own, int32_t (&warp_sums)[WARPS], int32_t &sum)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t inclusive = moe_scan_warp(own);
    if (lane == 31)
        warp_sums[warp] = inclusive;
    __syncthreads();
    const int32_t of_lane = lane < blockDim.x / 32 ? warp_sums[lane] : 0;
    sum = __reduce_add_sync(ALL_LANES, of_lane);
    return inclusive - own + __reduce_add_sync(ALL_LANES, lane < warp ? of_lane : 0);
}

// `token` is i / slots, which takes long enough to be worked out while there is something to wait for.
__device__ inline void place_pair(const moe_plan_args &args, int64_t i, uint32_t token, int32_t row, float weight)
{
    args.plan.slot_row[i] = row;
    if (row >= 0) {
        args.plan.row_token[row] = (int32_t)token;
        args.plan.row_slot[row] = (int32_t)((uint32_t)i - token * (uint32_t)args.slots);
        args.plan.row_weight[row] = weight;
    }
}

} // namespace

#endif
