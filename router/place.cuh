// SPDX-License-Identifier: Apache-2.0
// What those who lead up to the FFN on the GPU leave in memory for it.
#ifndef MOE_ROUTER_PLACE_CUH
#define MOE_ROUTER_PLACE_CUH

#include "router/router.h"

// The memory of a step that comes later, of so many bytes, spread over the grid. The last threads of a block go first:
// it is the first that make the plan, or add up logits.
static __device__ inline void moe_set_zeroed(void *zeroed, size_t bytes)
{
    const uint4 *const end = (const uint4 *)((const char *)zeroed + bytes);
#pragma unroll 1
    for (uint4 *p = (uint4 *)zeroed + (blockIdx.x + 1) * blockDim.x - 1 - threadIdx.x; p < end;
         p += gridDim.x * blockDim.x)
        *p = uint4();
}

// Pair i of a token and a slot gets this row (-1: none). `token` is i / slots, which takes long enough to be worked out
// while there is something to wait for.
static __device__ inline void moe_place_pair(const moe_plan &plan, uint32_t slots, int64_t i, uint32_t token,
                                             int32_t row, float weight)
{
    plan.slot_row[i] = row;
    if (row >= 0) {
        plan.row_token[row] = (int32_t)token;
        plan.row_slot[row] = (int32_t)((uint32_t)i - token * slots);
        plan.row_weight[row] = weight;
    }
}

#endif
