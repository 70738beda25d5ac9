// SPDX-License-Identifier: Apache-2.0
// What the plan's kernels have in common, for few tokens and for many.
#ifndef MOE_ROUTER_PLAN_CUH
#define MOE_ROUTER_PLAN_CUH

#include "kernels/cuda/common/scan.cuh"
#include "router/place.cuh"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 1024; // of a block, at most: little work gets fewer, which meet sooner
constexpr int WARPS = THREADS / 32;

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

} // namespace

#endif
